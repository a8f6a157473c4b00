"""The likeliest tokens of some rows of logits, by a graph without weights, in less than half of numpy's time.

`likeliest.onnx` is written by model.likeliest_graph. Knows no beam and no text.
"""

import math
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
        TensorSpec(name="blocks", dtype="float32", axes=("B", "N", "M")),
        TensorSpec(name="tokens", dtype="int64", axes=("N", "M")),
        TensorSpec(name="count", dtype="int64", axes=(1,)),
        TensorSpec(name="num_blocks", dtype="int64", axes=(1,)),
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
    """One thread at a time. A row's result is the same bits whatever the other rows are.

    The graph stays bound to the last logits: in a search they are in the same memory at every step.
    """

    def __init__(self) -> None:
        self._session = Session(GRAPH, _SPEC, arena=True)
        self._shape = (0, 0, 0)  # rows, vocabulary, count
        self._address = 0

    def of(self, logits: Logits, count: int) -> list[Likely]:
        """The `count` likeliest of each row of (rows, vocabulary); fewer if the vocabulary is smaller.

        Told apart is what differs in a bit of its logits.
        """
        shape = (*logits.shape, min(count, logits.shape[1]))
        if shape != self._shape:
            self._bind(*shape)
        if logits.ctypes.data != self._address:
            self._bound.bind_input("logits", logits)
            self._bound.bind_input("blocks", logits.reshape(len(logits), *self._blocks))
            self._address = logits.ctypes.data
        self._bound.run()
        return [_likely(*row) for row in zip(*[each.tolist() for each in self._found], strict=True)]

    def _bind(self, num_rows: int, vocab_size: int, count: int) -> None:
        self._shape, self._address = (0, 0, 0), 0
        self._bound = self._session.bind()
        self._blocks = blocks_of(vocab_size)
        self._found = [np.empty((num_rows, count), dtype) for dtype in (np.float32, np.int64, np.float32)]
        self._bound.bind_input("tokens", np.arange(vocab_size).reshape(self._blocks))
        self._bound.bind_input("count", np.array([count]))
        self._bound.bind_input("num_blocks", np.array([min(count, self._blocks[0])]))
        for tensor, place in zip(_SPEC.outputs, self._found, strict=True):
            self._bound.bind_output(tensor.name, place)
        self._shape = (num_rows, vocab_size, count)


def blocks_of(vocab_size: int) -> tuple[int, int]:
    """Into how many blocks of one size a vocabulary is cut, and their size. A prime number is one block."""
    num_blocks = next(number for number in range(math.isqrt(vocab_size), 0, -1) if vocab_size % number == 0)
    return num_blocks, vocab_size // num_blocks


def _likely(values: list[float], ids: list[int], log_p: list[float]) -> Likely:
    """Log-probabilities in float64 from the first one in float32, in which neighbours may be equal."""
    log_sum = values[0] - log_p[0]
    return Likely(ids, [value - log_sum for value in values])
