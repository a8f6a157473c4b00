"""The likeliest tokens of some rows of logits, by a graph without weights: half of the time that numpy takes.

`likeliest.onnx` is written by model.likeliest_graph. Knows no beam and no text.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from service.worker.generation.sampling import Logits
from service.worker.manifest import GraphSpec, TensorSpec
from service.worker.session import Session

GRAPH = Path(__file__).with_suffix(".onnx")

_SPEC = GraphSpec(
    file=GRAPH.name,
    inputs=(
        TensorSpec(name="logits", dtype="float32", axes=("B", "V")),
        TensorSpec(name="count", dtype="int64", axes=(1,)),
    ),
    outputs=(
        TensorSpec(name="values", dtype="float32", axes=("B", "K")),
        TensorSpec(name="ids", dtype="int64", axes=("B", "K")),
        TensorSpec(name="log_probabilities", dtype="float32", axes=("B", "K")),
    ),
)


class Likely(NamedTuple):
    """The likeliest tokens of a row, the likeliest first, of equals the lowest; and their log-probabilities.

    These are not finite if the row's greatest logit is not, or one of its logits is not a number.
    """

    ids: list[int]
    log_p: list[float]


class Likeliest:
    """Thread-safe. A row's result is the same bits whatever the other rows are."""

    def __init__(self) -> None:
        self._session = Session(GRAPH, _SPEC, arena=True)

    def of(self, logits: Logits, count: int) -> list[Likely]:
        """The `count` likeliest of each row of (rows, vocabulary); fewer if the vocabulary is smaller.

        Told apart is what differs in a bit of its logits.
        """
        most = np.array([min(count, logits.shape[1])], np.int64)
        found = self._session.run({"logits": logits, "count": most})
        return [_likely(*row) for row in zip(*[each.tolist() for each in found], strict=True)]


def _likely(values: list[float], ids: list[int], log_p: list[float]) -> Likely:
    """Log-probabilities in float64 from the first one in float32, in which neighbours may be equal."""
    log_sum = values[0] - log_p[0]
    return Likely(ids, [value - log_sum for value in values])
