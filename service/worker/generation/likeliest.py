"""The likeliest tokens of some rows of logits, by a graph without weights, in less than half of numpy's time.

`likeliest.onnx` is written by model.likeliest_graph. Knows no beam and no text.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.worker.generation.sampling import Logits
from service.worker.manifest import GraphSpec, TensorSpec
from service.worker.session import Session

Ids = NDArray[np.int64]

GRAPH = Path(__file__).with_suffix(".onnx")
MOST_BOUND = 64  # shapes; whoever asks chooses how many beams there are

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
    """One thread at a time. A row's result is the same bits whatever the other rows are."""

    def __init__(self) -> None:
        self._session = Session(GRAPH, _SPEC, arena=True)
        self._tokens = np.empty((1, 0), np.int64)  # of the vocabulary met last: its blocks
        self._bound: dict[tuple[int, int, int], _Bound] = {}  # by rows, vocabulary and count

    def of(self, logits: Logits, count: int, *, stays: bool = False) -> list[Likely]:
        """The `count` likeliest of each row of (rows, vocabulary); fewer if the vocabulary is smaller.

        Told apart is what differs in a bit of its logits, which are contiguous. `stays`: they are in memory that holds
        those of the next step, too. Then the graph stays bound to it.
        """
        num_rows, vocab_size = logits.shape
        count = min(count, vocab_size)
        if self._tokens.size != vocab_size:
            self._tokens = np.arange(vocab_size).reshape(blocks_of(vocab_size))
        if stays:
            found = self._bound_to(num_rows, count).run(logits)
        else:
            blocks = logits.reshape(num_rows, *self._tokens.shape)
            found = self._session.run({"logits": logits, "blocks": blocks, **_sought(self._tokens, count)})
        return [_likely(*row) for row in zip(*[each.tolist() for each in found], strict=True)]

    def _bound_to(self, num_rows: int, count: int) -> "_Bound":
        key = num_rows, self._tokens.size, count
        if key not in self._bound:
            if len(self._bound) == MOST_BOUND:
                self._bound.clear()
            self._bound[key] = _Bound(self._session, num_rows, self._tokens, count)
        return self._bound[key]


class _Bound:
    """The graph bound to so many rows of logits, wherever they were last, and to memory for what it finds."""

    def __init__(self, session: Session, num_rows: int, tokens: Ids, count: int) -> None:
        self._blocks = num_rows, *tokens.shape
        self._found = [np.empty((num_rows, count), tensor.dtype) for tensor in _SPEC.outputs]
        self._address = 0
        self._binding = session.bind()
        for name, value in _sought(tokens, count).items():
            self._binding.bind_input(name, value)
        for tensor, place in zip(_SPEC.outputs, self._found, strict=True):
            self._binding.bind_output(tensor.name, place)

    def run(self, logits: Logits) -> Sequence[NDArray[Any]]:
        """Written again by the next run. Raises ValueError for logits that are not contiguous."""
        if logits.ctypes.data != self._address or not logits.flags.c_contiguous:
            self._binding.bind_input("logits", logits)
            self._binding.bind_input("blocks", logits.reshape(self._blocks))
            self._address = logits.ctypes.data
        self._binding.run()
        return self._found


def blocks_of(vocab_size: int) -> tuple[int, int]:
    """Into how many blocks of one size a vocabulary is cut, and their size.

    A prime number is one block, which takes up to one and a half times as long as a TopK of the whole row.
    """
    num_blocks = next(number for number in range(math.isqrt(vocab_size), 0, -1) if vocab_size % number == 0)
    return num_blocks, vocab_size // num_blocks


def _sought(tokens: Ids, count: int) -> dict[str, Ids]:
    """The graph's inputs but for the logits."""
    return {"tokens": tokens, "count": np.array([count]), "num_blocks": np.array([min(count, len(tokens))])}


def _likely(values: list[float], ids: list[int], log_p: list[float]) -> Likely:
    """Log-probabilities in float64 from the first one in float32, in which neighbours may be equal."""
    log_sum = values[0] - log_p[0]
    return Likely(ids, [value - log_sum for value in values])
