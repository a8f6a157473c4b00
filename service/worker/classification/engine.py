"""A batch of sequences -> logits. Owns the packed form of a batch; knows no queue, no text, no clock.

Matrices see real tokens only: the ids of all sequences stand in one row after the other, without padding. Attention
needs a rectangle, (batch, length), and `pack` says where each token stands in it. A sequence always runs at the
length that its own number of tokens gives, and no operator mixes rows, so that its logits are the same bits whatever
its neighbours are.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleError
from service.worker.bundle import Bundle
from service.worker.session import Session

GRAPH = "classify"
LOGITS = "logits"  # (batch, labels)
LENGTH_STEP = 16  # measured: with packing, finer steps only make batches smaller
WARM_UP = ((1, 16), (8, 24), (4, 64))  # batch, length

Feeds = dict[str, NDArray[np.int64]]
Weights = dict[int, NDArray[np.float32]]  # layer -> (heads, tokens, tokens), of one sequence


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sequence, special tokens included. `type_ids` None: all zero."""

    ids: Sequence[int]
    type_ids: Sequence[int] | None = None


def attention_output(layer: int) -> str:
    """The graph's output with a layer's softmax weights, (watched, heads, length, length)."""
    return f"attention.{layer}"


def padded_length(num_tokens: int) -> int:
    """The length at which attention runs for a sequence of `num_tokens`; batches are made of equal ones."""
    return max(1, -(-num_tokens // LENGTH_STEP)) * LENGTH_STEP


class ClassificationEngine:
    """Thread-safe: with `threads=1` several engine threads may each run a batch of their own at the same time."""

    def __init__(
        self, bundle: Bundle, *, threads: int = 1, provider: str = "cpu", fallback: bool = False, spin: bool = False
    ) -> None:
        """Raises BundleError for labels that are not the graph's, else it and ConfigError as Session does."""
        spec = bundle.graph(GRAPH)
        self._directory = bundle.directory
        self.labels = bundle.manifest.labels or ()
        self.max_tokens = bundle.manifest.limits.max_tokens
        self._inputs = frozenset(tensor.name for tensor in spec.inputs)
        axes = {tensor.name: tensor.axes for tensor in spec.outputs}
        num_labels = axes.get(LOGITS, (len(self.labels),))[-1]
        if num_labels != len(self.labels):
            raise BundleError(f"{bundle.directory}: labels are {list(self.labels)}, the graph's logits {num_labels}")
        self.num_layers = sum(name.startswith(attention_output(0)[:-1]) for name in axes)  # 0: the bundle tells none
        self.num_heads = int(axes[attention_output(0)][1]) if self.num_layers else 0
        self._session = Session(
            bundle.graph_path(GRAPH),
            spec,
            threads=threads,
            provider=provider,
            fallback=fallback,
            spin=spin,
            seven_bits=True,  # as model.quantize makes them
            arena=True,  # batches are bounded, so what the largest one takes is too
        )

    def logits(self, batch: Sequence[Tokens]) -> NDArray[np.float32]:
        """(batch, labels), in the order of `batch`. Sequences of several lengths run as one batch a length."""
        rows = np.empty((len(batch), len(self.labels)), np.float32)
        for members in by_length(batch):
            (rows[members],) = self._run([batch[index] for index in members], [LOGITS])
        return rows

    def attend(
        self, batch: Sequence[Tokens], layers: Sequence[int], watched: Collection[int]
    ) -> tuple[NDArray[np.float32], dict[int, Weights]]:
        """What `logits` gives, to the bit, and from the same run the softmax weights of `layers` of some sequences.

        `watched` are their places in `batch`. The weights are views without padding: rows are queries, columns keys.
        """
        rows = np.empty((len(batch), len(self.labels)), np.float32)
        weights: dict[int, Weights] = {}
        fetch = [LOGITS, *map(attention_output, layers)]
        for members in by_length(batch):
            seen = [at for at, member in enumerate(members) if member in watched]
            rows[members], *maps = self._run([batch[index] for index in members], fetch, seen)
            for row, at in enumerate(seen):
                num_tokens = len(batch[members[at]].ids)
                weights[members[at]] = {
                    layer: padded[row, :, :num_tokens, :num_tokens] for layer, padded in zip(layers, maps, strict=True)
                }
        return rows, weights

    def warm_up(self) -> None:
        """Runs a few shapes, so that no request pays for the first touch of the weights. Raises BundleError."""
        for num_sequences, length in WARM_UP:
            num_tokens = min(length, self.max_tokens)
            try:
                self.logits([Tokens([0] * num_tokens)] * num_sequences)
            except Exception as error:  # the binding has no common base class
                said = f"limits.max_tokens is {self.max_tokens}, but {num_tokens} cannot be computed"
                raise BundleError(f"{self._directory}: {said}: {error}") from error

    def _run(
        self, batch: Sequence[Tokens], fetch: Sequence[str], watched: Sequence[int] = ()
    ) -> list[NDArray[np.float32]]:
        feeds = pack(batch, padded_length(len(batch[0].ids)), watched=watched)
        return self._session.run({name: feeds[name] for name in self._inputs}, fetch)


def by_length(batch: Sequence[Tokens]) -> Iterable[list[int]]:
    """Indices of the sequences, grouped by padded length."""
    groups: dict[int, list[int]] = {}
    for index, tokens in enumerate(batch):
        groups.setdefault(padded_length(len(tokens.ids)), []).append(index)
    return groups.values()


def pack(batch: Sequence[Tokens], length: int, *, watched: Sequence[int] = ()) -> Feeds:
    """A batch as the graph takes it; every sequence has between 1 and `length` tokens.

    The first four are (tokens,), the sequences one after the other: input_ids, token_type_ids, position_ids (the place
    of a token in its sequence), sequence_ids (the place of its sequence in the batch). slots: (batch, length), the row
    in the packed form of each position, -1 for padding. watched: (watched,), the places of the sequences whose
    attention is told.
    """
    lengths = np.array([len(tokens.ids) for tokens in batch])
    is_real = np.arange(length) < lengths[:, None]  # (batch, length)
    num_tokens = int(lengths.sum())
    sequence_ids, position_ids = np.nonzero(is_real)
    slots = np.full(is_real.shape, -1, np.int64)
    slots[is_real] = np.arange(num_tokens)
    types = [[0] * len(tokens.ids) if tokens.type_ids is None else tokens.type_ids for tokens in batch]
    return {
        "input_ids": _flat([tokens.ids for tokens in batch], num_tokens),
        "token_type_ids": _flat(types, num_tokens),
        "position_ids": position_ids,
        "sequence_ids": sequence_ids,
        "slots": slots,
        "watched": np.array(watched, np.int64),
    }


def _flat(rows: Sequence[Sequence[int]], num_tokens: int) -> NDArray[np.int64]:
    return np.fromiter(chain.from_iterable(rows), np.int64, num_tokens)
