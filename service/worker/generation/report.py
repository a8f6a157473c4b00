"""What a lane tells of its steps, as plain values: what to pass on, what outputs cost, what to count.

A lane's thread or process makes reports of steps; whoever serves the model takes them on the event loop. Nobody is
woken for nothing: what only counts waits for something to tell, though not for long.
"""

import time
from dataclasses import dataclass, field
from itertools import chain

from service.worker.generation.loop import Done, Events
from service.worker.generation.sequence import Job, Sequence
from service.worker.generation.step import Chunk

LATEST_S = 0.05  # that counts and marks may wait


@dataclass(frozen=True, slots=True)
class Ended:
    """One output, or one search, that came to its end. `index` is that of the output, or of the search's first.

    `num_written` and `num_cached` are tokens, `at` a `time.monotonic()` instant, `slot_seconds` how long it had a slot.
    """

    index: int
    num_written: int
    num_cached: int
    at: float
    slot_seconds: float


@dataclass(frozen=True, slots=True)
class StepFacts:
    """How much a step did, and how long it took."""

    rows: int
    prefill_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(slots=True)
class Report:
    """`failed` are indices of outputs; `prefixes` the tokens (queried, found) of each prompt that was begun;
    `released` how many seconds each slot was still taken after its client had left; `marked` the jobs whose progress
    has new marks.
    """

    events: Events = field(default_factory=list)
    ended: list[tuple[Job, Ended]] = field(default_factory=list)
    failed: list[tuple[Job, int]] = field(default_factory=list)
    steps: list[StepFacts] = field(default_factory=list)
    prefixes: list[tuple[int, int]] = field(default_factory=list)
    released: list[float] = field(default_factory=list)
    marked: set[Job] = field(default_factory=set)


class Reports:
    """Makes reports of one lane's steps, in its thread. `has_prefixes`: the beginnings of prompts may be cached."""

    def __init__(self, *, has_prefixes: bool) -> None:
        self._has_prefixes = has_prefixes
        self._pending = Report()
        self._last = 0.0

    def tell(self, done: Done) -> Report:
        """Of events that cannot wait for the end of their step."""
        self._add_told(done)
        return self._take()

    def add(self, done: Done) -> Report | None:
        """None: nothing in it is worth a waking."""
        pending = self._pending
        self._add_told(done)
        pending.failed += [(one.job, one.index) for one in done.failed]
        pending.marked.update([one.job for one in done.step.started])
        pending.steps.append(_facts(done))
        pending.released += [done.begun - job.closed_at for job in done.step.released if job.closed_at is not None]
        if self._has_prefixes:
            pending.prefixes += [_prefix(chunk) for chunk in done.step.chunks if _is_first(chunk)]
        if pending.events or pending.failed or done.step.released:
            return self._take()
        if time.monotonic() - self._last < LATEST_S:
            return None
        pending.marked.update([row.job for row in done.step.rows])
        return self._take()

    def _add_told(self, done: Done) -> None:
        self._pending.events += done.events
        self._pending.ended += [(one.job, _ended(one)) for one in done.ended]
        self._pending.marked.update([job for job, _ in done.events])

    def _take(self) -> Report:
        taken, self._pending = self._pending, Report()
        self._last = time.monotonic()
        return taken


def _ended(sequence: Sequence) -> Ended:
    return Ended(
        sequence.index,
        sequence.output.num_tokens,
        sequence.num_cached,
        sequence.written,
        sequence.written - sequence.started,
    )


def _facts(done: Done) -> StepFacts:
    chunks = chain(chain.from_iterable(done.step.sources), done.step.chunks)
    num_tokens = sum([chunk.end - chunk.start for chunk in chunks])
    return StepFacts(len(done.step.rows), num_tokens, done.prefill_seconds, done.decode_seconds)


def _is_first(chunk: Chunk) -> bool:
    return chunk.start == chunk.sequence.num_cached and not chunk.sequence.is_echoed


def _prefix(chunk: Chunk) -> tuple[int, int]:
    return len(chunk.sequence.prompt.ids), chunk.sequence.num_cached
