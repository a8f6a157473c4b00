"""Attention weights of a run -> the maps that a caller is told. Arithmetic only.

Shapes: H heads, T queries, S keys, of one run without padding; rows are queries, columns keys.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from service.domain import AttentionMap, Kind
from service.worker.attention.views import View

Floats = NDArray[np.float32]


def maps_of(view: View, weights: Mapping[int, Floats]) -> tuple[AttentionMap, ...]:
    """`weights` are (H, T, S) for each layer of the view, at least; for a rollout T is S."""
    if view.reduce == "rollout":
        flow = rollout([_heads(weights[layer], view) for layer in sorted(view.layers)])
        return (_told(view.kind, None, None, flow[None]),)
    return tuple(_told(view.kind, layer, *_reduced(_heads(weights[layer], view), view)) for layer in view.layers)


def rollout(layers: Sequence[Floats]) -> Floats:
    """(T, T) of the layers' (H, T, T), from the lowest up (Abnar and Zuidema 2020, equation 1).

    Row i says how much of each input token may have reached position i. The residual path counts as half of a layer.
    """
    flow = np.eye(layers[0].shape[-1], dtype=np.float32)
    for weights in layers:
        mixed = 0.5 * weights.mean(0) + 0.5 * np.eye(len(flow), dtype=np.float32)
        flow = (mixed / mixed.sum(-1, keepdims=True)) @ flow
    return flow


def shares(rolled: AttentionMap, pooling: str) -> list[float]:
    """Of each token, in the position that the prediction is read from: the first, the last, or the mean of all."""
    flow = np.frombuffer(rolled.weights, "<f4").reshape(rolled.shape)[0]
    row: Floats = flow.mean(0) if pooling == "mean" else flow[-1 if pooling == "last" else 0]
    found: list[float] = row.tolist()
    return found


def _heads(weights: Floats, view: View) -> Floats:
    """(chosen heads, T, S); all of them, in order, are not copied."""
    return weights if view.heads == tuple(range(len(weights))) else weights[list(view.heads)]


def _reduced(weights: Floats, view: View) -> tuple[tuple[int, ...] | None, Floats]:
    if view.reduce == "none":
        return view.heads, weights
    return None, weights.mean(0, keepdims=True) if view.reduce == "mean" else weights.max(0, keepdims=True)


def _told(kind: Kind, layer: int | None, heads: tuple[int, ...] | None, weights: Floats) -> AttentionMap:
    num_heads, num_queries, num_keys = weights.shape
    content = weights.astype("<f4", copy=False).tobytes()
    return AttentionMap(kind, layer, heads, (num_heads, num_queries, num_keys), content)
