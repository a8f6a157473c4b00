"""A source's ids -> logits of its translation's tokens, over slots that remember both: what `decoder` is to a chat.

To whoever drives it, a sequence is its source with the translation behind it; that the graphs keep the two apart, and
that a translation begins with a start token, is known here only. A slot holds the keys and values that cross-attention
reads, computed once from the source, and those of the translation's own tokens. Knows no request, no queue, no text.
No operator mixes rows: a row's logits are the same bits alone and among others, in whatever slot.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleError
from service.worker.bundle import Bundle
from service.worker.generation.decoder import GRAPH as DECODE
from service.worker.generation.decoder import Keep, Logits, check_provider, vocabulary_of
from service.worker.generation.kv_memory import CROSS, KvMemory, read_shape
from service.worker.session import Session

ENCODE = "encode"


class Step:
    """The decoder's graph bound to some slots, to read a token in each of them."""

    def __init__(self, session: Session, source_ends: NDArray[np.int32], logits: Logits) -> None:
        """source_ends (rows): the place of each source's last token; logits (rows, 1, vocabulary)."""
        self.source_ends = source_ends
        self._rows = logits[:, 0]
        self._ids = np.zeros((len(logits), 1), np.int64)
        self._lengths = np.zeros(len(logits), np.int32)
        self._longest, self._longest_source = np.zeros((), np.int32), np.zeros((), np.int32)
        self.bound = session.bind()
        self.bound.bind_input("ids", self._ids)
        self.bound.bind_input("lengths", self._lengths)
        self.bound.bind_input("longest", self._longest)
        self.bound.bind_input("source_lengths", source_ends)
        self.bound.bind_input("longest_source", self._longest_source)
        self.bound.bind_output("logits", logits)

    def run(self, ids: Sequence[int], lengths: Sequence[int], last_source_end: int) -> Logits:
        """`lengths`: tokens of each translation before this one, the start token included."""
        self._ids[:, 0] = ids
        self._lengths[:] = lengths
        self._longest[()] = max(lengths) + 1
        self._longest_source[()] = last_source_end + 1
        self.bound.run()
        return self._rows


class TranslatorEngine:
    """A translation bundle's graphs and its memory. One thread at a time; a run releases the GIL.

    A source has at most `max_tokens`, and as many can be written behind it.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        num_slots: int,
        threads: int,
        provider: str = "cpu",
        fallback: bool = False,
    ) -> None:
        """Raises BundleError and ConfigError, for instance for a `provider` other than "cpu"."""
        check_provider(provider, fallback=fallback)
        generation, decode = bundle.manifest.generation, bundle.graph(DECODE)
        if generation is None or generation.bos_id is None:
            raise BundleError(f"{bundle.directory} names no generation.bos_id, which begins every translation")
        self._start_id = generation.bos_id
        self.num_slots = num_slots
        self.max_tokens = bundle.manifest.limits.max_tokens
        self.vocab_size = vocabulary_of(decode)
        own, cross = read_shape(decode), read_shape(decode, CROSS)
        if own.names != cross.names:
            message = f"{own.num_layers} layers have keys and values of their own, {cross.num_layers} of the source"
            raise BundleError(f"{bundle.directory}: {message}")
        found = [tensor.axes[-1] for tensor in bundle.graph(ENCODE).outputs]
        if found != [len(cross.names) * cross.num_heads * cross.width]:
            raise BundleError(f"{bundle.directory}: {ENCODE} gives {found} numbers a token, decode reads {cross}")
        self._names = own.names
        opened = partial(Session, threads=threads, seven_bits=True)  # as model.quantize makes them
        self._encoder = opened(bundle.graph_path(ENCODE), bundle.graph(ENCODE), arena=True)
        self._decoder = opened(bundle.graph_path(DECODE), decode)
        self._own, self._cross = (
            KvMemory(shape, num_slots=num_slots, max_tokens=self.max_tokens, num_blocks=0) for shape in (own, cross)
        )
        self._source_ends = np.zeros(num_slots, np.int32)  # the place of each source's last token
        self._logits = np.empty((num_slots, 1, self.vocab_size), np.float32)
        self._steps: dict[tuple[int, int], Step] = {}  # by the slots they are bound to: (first, end)

    def encode(self, slots: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        """Reads sources of one length in one run, each into its slot; their last tokens are still to be read.

        Each leaves the bits that it would leave alone.
        """
        rows, lengths = list(slots), [len(source) for source in sources]
        num_tokens = lengths[0]
        fits = 0 <= min(rows) <= max(rows) < self.num_slots and 0 < num_tokens <= self.max_tokens
        if not fits or lengths != [num_tokens] * len(rows):
            raise ValueError(f"sources of {lengths} tokens, to be one length, for slots {rows}: {self._room}")
        (memory,) = self._encoder.run({"ids": np.array(sources, np.int64)})
        by_token = self._cross.slots.transpose(1, 3, 0, 2, 4)  # (slots, tokens, parts, heads, width)
        by_token[rows, :num_tokens] = memory.reshape(len(rows), num_tokens, *by_token.shape[2:])
        self._source_ends[rows] = num_tokens - 1

    def prefill(self, slot: int, ids: Sequence[int], start: int, *, keep: Keep) -> Logits:
        """Reads a whole source into `slot`, or a single token behind the `start` that it holds: (1, vocabulary).

        The logits are the caller's own and always those after the last token: the others have none.
        """
        if keep != "last" or (start and len(ids) != 1):
            raise ValueError(f"{len(ids)} tokens from {start} on, to keep {keep}: a source is read whole, for its end")
        if not start:
            self.encode([slot], [ids])
            ids, start = ids[-1:], len(ids) - 1
        return self._read(slot, ids, [start]).copy()

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> Logits:
        """One token for each of slots 0 to B-1, behind the `lengths` tokens that they hold: (B, vocabulary).

        The last token of a source that `encode` has read is one of them. The array is written again by the next run:
        whoever needs it longer copies it.
        """
        return self._read(0, ids, lengths)

    def move(self, source: int, target: int, start: int, end: int) -> None:
        """`target`, which holds what comes before, then holds the tokens from `start` to `end` of `source`, too.

        Both slots then go on with the same bits. The start token goes with the source.
        """
        if source == target:
            return
        num_source = int(self._source_ends[source]) + 1
        has_source = start >= num_source
        if not has_source:
            self._cross.move(source, target, start, num_source)
            self._source_ends[target] = num_source - 1
        shift = 1 - num_source  # from places in the sequence to those of the translation, the start token's being 0
        self._own.move(source, target, start + shift if has_source else 0, end + shift)

    def save(self, slot: int, start: int, block: int) -> None:
        raise NotImplementedError("no piece of a source can be used again: all of it is in each of its tokens")

    def restore(self, block: int, slot: int, start: int) -> None:
        raise NotImplementedError("nothing is ever saved")

    def warm_up(self) -> None:
        """Reads sources and decodes, so that no request pays for what happens only once."""
        for slot in {0, self.num_slots - 1}:
            self.prefill(slot, [0], 0, keep="last")
        for num_rows in {1, self.num_slots}:
            self.decode([0] * num_rows, [1] * num_rows)

    def _read(self, first: int, ids: Sequence[int], lengths: Sequence[int]) -> Logits:
        """One token for each of the slots from `first` on; see `decode`.

        The graph writes where it is told to: a place that does not exist would be somebody else's memory.
        """
        end = first + len(ids)
        if not 0 <= first < end <= self.num_slots:
            raise ValueError(f"tokens for slots {first} to {end}: {self._room}")
        step = self._step(first, end)
        source_ends = step.source_ends.tolist()
        own_lengths = [length - source_end for length, source_end in zip(lengths, source_ends, strict=True)]
        if min(own_lengths) < 0 or max(own_lengths) >= self.max_tokens:
            raise ValueError(f"{lengths} tokens in slots {first} to {end}, sources end at {source_ends}: {self._room}")
        if 0 in own_lengths:  # what follows the source is no token of it
            ids = [token if length else self._start_id for token, length in zip(ids, own_lengths, strict=True)]
        return step.run(ids, own_lengths, max(source_ends))

    @property
    def _room(self) -> str:
        return f"there are {self.num_slots} slots of {self.max_tokens} tokens of source, and as many behind them"

    def _step(self, first: int, end: int) -> Step:
        if (first, end) not in self._steps:
            self._steps[first, end] = self._bound(slice(first, end))
        return self._steps[first, end]

    def _bound(self, slots: slice) -> Step:
        step = Step(self._decoder, self._source_ends[slots], self._logits[slots])
        for name, own, cross in zip(self._names, self._own.slots, self._cross.slots, strict=True):
            step.bound.bind_input(f"past_{name}", own[slots])
            step.bound.bind_output(f"present_{name}", own[slots])
            step.bound.bind_input(f"past_{CROSS}{name}", cross[slots])
        return step
