"""Tokens -> logits of the tokens after them, over slots that remember what was read. Owns the step and its bindings.

Knows no request, no queue, no text. A slot holds one sequence; to decode, the sequences stand in slots 0 to B-1. Keys
and values live in memory that the graph reads and writes in place, so that a step costs no copy of them. No operator of
the graph mixes rows: a row's logits are the same bits alone and among others, in whatever slot.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleError, ConfigError
from service.worker.bundle import Bundle, GraphSpec
from service.worker.generation.kv_memory import BLOCK, CROSS, KvMemory, read_shape
from service.worker.session import Binding, Session

GRAPH = "decode"
INPUTS = ("ids", "lengths", "longest", "keep")

Keep = Literal["none", "last", "all"]
Logits = NDArray[np.float32]


def kv_bytes_per_token(bundle: Bundle) -> int:
    """What one token of context takes in memory, whether it is in a slot or in a block. Raises BundleError.

    For a translation: one token of the source and one of its own.
    """
    kinds = ("", CROSS) if bundle.manifest.task == "translation" else ("",)
    return sum(read_shape(bundle.graph(GRAPH), kind).bytes_per_token for kind in kinds)


def check_provider(provider: str, *, fallback: bool) -> None:
    """Raises ConfigError."""
    if provider != "cpu" and not fallback:
        raise ConfigError(f"provider is {provider!r}, generation runs on the cpu only", param="provider")


def vocabulary_of(graph: GraphSpec) -> int:
    """The last axis of the logits. Raises BundleError."""
    axes = {tensor.name: tensor.axes for tensor in graph.outputs}.get("logits", ())
    if len(axes) != 3 or not isinstance(axes[2], int):
        raise BundleError(f"{graph.file} must have an output logits of axes (B, K, vocabulary), not {list(axes)}")
    return axes[2]


class Step:
    """The graph bound to the keys and values of some slots, for a step of (rows, T) tokens."""

    def __init__(self, session: Session, kv: NDArray[np.float32], names: Sequence[str]) -> None:
        """kv: (2 * layers, rows, heads, max_tokens, width)."""
        self.bound: Binding = session.bind()
        for name, memory in zip(names, kv, strict=True):
            self.bound.bind_input(f"past_{name}", memory)
            self.bound.bind_output(f"present_{name}", memory)

    def feed(self, inputs: Sequence[NDArray[Any]], logits: Logits) -> None:
        """ids (rows, T), lengths (rows), longest (), keep (K), and where the logits (rows, K, vocabulary) go."""
        for name, array in zip(INPUTS, inputs, strict=True):
            self.bound.bind_input(name, array)
        self.bound.bind_output("logits", logits)


class DecodeStep:
    """A decode of so many rows; its inputs and outputs stay where they are from step to step."""

    def __init__(self, step: Step, logits: Logits) -> None:
        """logits: (num_rows, 1, vocabulary)."""
        self._step, self._logits = step, logits
        self._ids = np.zeros((len(logits), 1), np.int64)
        self._lengths = np.zeros(len(logits), np.int32)
        self._longest = np.zeros((), np.int32)
        step.feed((self._ids, self._lengths, self._longest, np.zeros(1, np.int64)), logits)

    def run(self, ids: Sequence[int], lengths: Sequence[int]) -> Logits:
        self._ids[:, 0] = ids
        self._lengths[:] = lengths
        self._longest[...] = max(lengths) + 1
        self._step.bound.run()
        logits: Logits = self._logits[:, 0]
        return logits


class DecoderEngine:
    """A generation bundle's graph and its memory. One thread at a time; a run releases the GIL."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        num_slots: int,
        num_blocks: int,
        threads: int,
        provider: str = "cpu",
        fallback: bool = False,
        spin: bool = False,
    ) -> None:
        """`num_blocks` may be 0. Raises BundleError and ConfigError, for instance for a `provider` other than "cpu"."""
        check_provider(provider, fallback=fallback)
        spec = bundle.graph(GRAPH)
        shape = read_shape(spec)
        self.num_slots, self.num_blocks = num_slots, num_blocks
        self.max_tokens = bundle.manifest.limits.max_tokens
        self.vocab_size = vocabulary_of(spec)
        self._names = shape.names
        self._session = Session(bundle.graph_path(GRAPH), spec, threads=threads, spin=spin)
        self._memory = KvMemory(shape, num_slots=num_slots, max_tokens=self.max_tokens, num_blocks=num_blocks)
        self._logits = np.empty((num_slots, 1, self.vocab_size), np.float32)  # of a decode
        self._decodes: dict[int, DecodeStep] = {}  # by number of rows
        self._prefills: dict[int, Step] = {}  # by slot

    def prefill(self, slot: int, ids: Sequence[int], start: int, *, keep: Keep) -> Logits:
        """Reads `ids` into `slot`, behind the `start` tokens that it holds: (0, 1 or len(ids), vocabulary).

        The logits are the caller's own. A prompt gives the same bits wherever it is cut, as long as no other piece
        is of a single token, which takes another path through the kernels.
        """
        num_ids = len(ids)
        self._check(slot, start, num_ids)
        kept = {"none": range(0), "last": range(num_ids - 1, num_ids), "all": range(num_ids)}[keep]
        logits = np.empty((1, len(kept), self.vocab_size), np.float32)
        end = start + num_ids
        inputs = (
            np.array([ids], np.int64),
            np.array([end - 1], np.int32),
            np.array(end, np.int32),
            np.array(kept, np.int64),
        )
        step = self._prefill_step(slot)
        step.feed(inputs, logits)
        step.bound.run()
        rows: Logits = logits[0]
        return rows

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> Logits:
        """One token for each of slots 0 to B-1, behind the `lengths` tokens that they hold: (B, vocabulary).

        The array is written again by the next decode: whoever needs it longer copies it.
        """
        for slot, length in enumerate(lengths):
            self._check(slot, length, 1)
        return self._decode_step(len(ids)).run(ids, lengths)

    def encode(self, slots: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        raise NotImplementedError("a prompt is read a piece at a time: there is no encoder")

    def move(self, source: int, target: int, start: int, end: int) -> None:
        """`target` then holds the tokens `start` to `end` of `source`; with those before, it goes on with its bits."""
        if source != target:
            self._memory.move(source, target, start, end)

    def save(self, slot: int, start: int, block: int) -> None:
        """Keeps the BLOCK tokens of `slot` from `start` on in the pool's `block`."""
        self._check(slot, start, BLOCK)
        self._memory.save(slot, start, block)

    def restore(self, block: int, slot: int, start: int) -> None:
        """Puts the pool's `block` back, to the place in the sequence where it was saved."""
        self._check(slot, start, BLOCK)
        self._memory.restore(block, slot, start)

    def warm_up(self) -> None:
        """Runs a piece of prefill and decodes of several sizes, so that no request pays for what happens only once."""
        self.prefill(0, [0] * min(BLOCK, self.max_tokens), 0, keep="last")
        for num_rows in {1, self.num_slots}:
            self.decode([0] * num_rows, [0] * num_rows)

    def _check(self, slot: int, start: int, num_tokens: int) -> None:
        """The graph writes where it is told to: a place that does not exist would be somebody else's memory."""
        if not (0 <= slot < self.num_slots and 0 <= start < start + num_tokens <= self.max_tokens):
            raise ValueError(
                f"{num_tokens} tokens from {start} on in slot {slot}: there are {self.num_slots} slots "
                f"of {self.max_tokens} tokens"
            )

    def _decode_step(self, num_rows: int) -> DecodeStep:
        if num_rows not in self._decodes:
            step = Step(self._session, self._memory.slots[:, :num_rows], self._names)
            self._decodes[num_rows] = DecodeStep(step, self._logits[:num_rows])
        return self._decodes[num_rows]

    def _prefill_step(self, slot: int) -> Step:
        if slot not in self._prefills:
            self._prefills[slot] = Step(self._session, self._memory.slots[:, slot : slot + 1], self._names)
        return self._prefills[slot]
