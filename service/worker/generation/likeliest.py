"""The likeliest tokens of some rows of logits, by a graph without weights: half of the time that numpy takes.

`likeliest.onnx` is written by model.likeliest_graph. Knows no beam and no text.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import EngineFailed
from service.worker.generation.sampling import NOT_FINITE, Logits
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
        TensorSpec(name="log_greatest", dtype="float32", axes=("B",)),
    ),
)


class Likeliest:
    """Thread-safe. A row's result is the same bits whatever the other rows are."""

    def __init__(self) -> None:
        self._session = Session(GRAPH, _SPEC, arena=True)

    def of(self, logits: Logits, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(rows, vocabulary) -> log-probabilities and tokens (rows, count), the likeliest first, of equals the lowest.

        There are fewer if the vocabulary is smaller. Told apart is what differs in a bit of its logits. Raises
        EngineFailed if a row's greatest logit is not finite, or one of its logits is not a number.
        """
        most = np.array([min(count, logits.shape[1])], np.int64)
        values, ids, log_greatest = self._session.run({"logits": logits, "count": most})
        if not np.isfinite(log_greatest).all():
            raise EngineFailed(NOT_FINITE)
        return values - (values[:, :1] - log_greatest[:, None].astype(np.float64)), ids
