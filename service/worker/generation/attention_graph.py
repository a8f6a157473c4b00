"""The graph of a bundle that tells attention weights: what it has, and a run of it.

Opened on the first run, since it takes memory of its own for weights that nobody else needs in it. Computes on one
thread, so that the steps of those who only want text keep the others. Knows no text and no request.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from service.domain import AttentionMap, Kind
from service.worker.attention.maps import maps_of
from service.worker.attention.views import Shape, View
from service.worker.bundle import Bundle
from service.worker.session import Session

GRAPH = "attention"

_KINDS: tuple[Kind, ...] = ("encoder", "decoder", "cross")


class AttentionGraph:
    """One thread at a time. A translator's `written` begins with the token that it starts from."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError if the bundle has no such graph."""
        self._spec = bundle.graph(GRAPH)
        self._path = bundle.graph_path(GRAPH)
        self._is_translator = any(tensor.name == "target_ids" for tensor in self._spec.inputs)
        heads = {one.name: one.axes[1] for one in self._spec.outputs if one.name != "logits"}
        kinds = [name.partition("_")[0] for name in heads]
        self.sizes = {kind: (kinds.count(kind), int(heads[f"{kind}_attention.0"])) for kind in _KINDS if kind in kinds}

    def shapes(self, num_read: int, num_written: int) -> dict[Kind, Shape]:
        """Queries and keys of each kind."""
        if not self._is_translator:
            return {"decoder": (num_read + num_written,) * 2}
        return {
            "encoder": (num_read, num_read),
            "decoder": (num_written, num_written),
            "cross": (num_written, num_read),
        }

    def run(self, read: Sequence[int], written: Sequence[int], views: Sequence[View]) -> tuple[AttentionMap, ...]:
        """The maps of all views, as they are asked for. Raises BundleError on the first run, as Session does."""
        fetch = [name for view in views for name in _outputs(view)]
        weights = dict(zip(fetch, self._session.run(self._feeds(read, written, views), fetch), strict=True))
        return tuple(
            one
            for view in views
            for one in maps_of(
                view, {layer: weights[name][0] for layer, name in zip(view.layers, _outputs(view), strict=True)}
            )
        )

    @cached_property
    def _session(self) -> Session:
        return Session(self._path, self._spec)

    def _feeds(
        self, read: Sequence[int], written: Sequence[int], views: Sequence[View]
    ) -> dict[str, NDArray[np.int64]]:
        keep = np.array([], np.int64)  # nobody wants to know logits
        if self._is_translator:
            return {"ids": np.array([read]), "target_ids": np.array([written]), "keep": keep}
        told = np.zeros(self.sizes["decoder"][0], np.int64)
        told[[layer for view in views for layer in view.layers]] = 1
        return {"ids": np.array([[*read, *written]]), "keep": keep, "told": told}


def _outputs(view: View) -> list[str]:
    return [f"{view.kind}_attention.{layer}" for layer in view.layers]
