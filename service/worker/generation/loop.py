"""The engine thread of one generation model: takes steps from the scheduler and executes them.

The asyncio thread adds work and gets a step's events back: those of prompts through `tell` as soon as they are read,
for a first token need not wait until the rows are done, all others through `publish`. The lock around the scheduler is
all they share. The thread never waits for the event loop: after a step it takes the next one at once.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from service.domain import Event
from service.worker.generation.prefix_cache import CHUNK
from service.worker.generation.scheduler import Scheduler
from service.worker.generation.sequence import Job, Sequence
from service.worker.generation.step import Chunk, Step

_log = logging.getLogger("attnd.engine")

Logits = NDArray[np.float32]
Events = list[tuple[Job, Event]]


class Engine(Protocol):
    """What DecoderEngine does."""

    def prefill(self, slot: int, ids: Several[int], start: int, *, keep: Literal["none", "last", "all"]) -> Logits: ...

    def decode(self, ids: Several[int], lengths: Several[int]) -> Logits: ...

    def move(self, source: int, target: int, num_tokens: int) -> None: ...

    def save(self, slot: int, start: int, block: int) -> None: ...

    def restore(self, block: int, slot: int, start: int) -> None: ...


@dataclass(slots=True)
class Done:
    """What a step gave: the `events` not told before, in order, and the outputs that `failed`.

    `begun` is a `time.monotonic()` instant.
    """

    step: Step
    begun: float
    events: Events = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class GenerationLoop:
    """`tell` and `publish` are called in the engine thread, `publish` after every step; `died` once, if it ends other
    than by `stop`."""

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        *,
        tell: Callable[[Events], None],
        publish: Callable[[Done], None],
        died: Callable[[BaseException], None],
        name: str,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._tell = tell
        self._publish = publish
        self._died = died
        self._is_stopped = False
        self._has_work = threading.Condition()
        self._thread = threading.Thread(target=self._serve, name=f"engine-{name}", daemon=True)

    # --- from the asyncio thread

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Let the running step end and join the thread; what is still open is left to the caller."""
        with self._has_work:
            self._is_stopped = True
            self._has_work.notify()
        self._thread.join()

    def admit(self, job: Job) -> None:
        """See Scheduler.admit."""
        with self._has_work:
            self._scheduler.admit(job)

    def add(self, sequences: Several[Sequence]) -> None:
        with self._has_work:
            self._scheduler.add(sequences)
            self._has_work.notify()

    def close(self, job: Job) -> None:
        """See Scheduler.close."""
        with self._has_work:
            self._scheduler.close(job)

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_kept_tokens(self) -> int:
        with self._has_work:
            return self._scheduler.num_kept_tokens

    # --- the engine thread

    def _serve(self) -> None:
        try:
            while step := self._next_step():
                self._publish(self._execute(step))
        except BaseException as error:  # whatever it is, nobody may wait for a dead thread
            _log.critical("the engine thread died", exc_info=error)
            self._died(error)

    def _next_step(self) -> Step | None:
        """The next step, waiting for one; None when the loop is to end."""
        with self._has_work:
            while not self._is_stopped:
                if not (step := self._scheduler.next_step()).is_empty:
                    return step
                self._has_work.wait()
        return None

    def _execute(self, step: Step) -> Done:
        begun = time.monotonic()
        done = Done(step, begun)
        for sequence in step.started:
            if sequence.job.progress.started is None:
                sequence.job.progress.started = begun
        for move in step.moves:
            self._engine.move(move.source, move.target, move.num_tokens)
        for restore in step.restores:
            self._engine.restore(restore.block, restore.slot, restore.start)
        for chunk in step.chunks:
            self._prefill(chunk, done)
        if done.events and step.rows:
            self._tell(done.events)
            done.events = []
        prefilled = time.monotonic()
        if step.rows:
            self._decode(step, done)
        done.prefill_seconds, done.decode_seconds = prefilled - begun, time.monotonic() - prefilled
        return done

    def _prefill(self, chunk: Chunk, done: Done) -> None:
        sequence, ids = chunk.sequence, chunk.sequence.prompt.ids
        if sequence.has_left:  # since the step was planned, or it failed in it
            return
        keep: Literal["none", "last", "all"] = "all" if sequence.is_echoed else "last" if chunk.is_last else "none"
        try:
            logits = self._engine.prefill(sequence.slot, ids[chunk.start : chunk.end], chunk.start, keep=keep)
            if sequence.is_echoed:
                self._echo(chunk, logits, done)
        except Exception as error:
            self._fail((sequence, *chunk.forks), error, done)
            return
        with self._has_work:
            block = self._scheduler.computed(chunk)
        if block is not None:
            self._engine.save(sequence.slot, chunk.end - CHUNK, block)
        if chunk.is_last:
            for fork in chunk.forks:
                self._engine.move(sequence.slot, fork.slot, chunk.end)
            for complete in (sequence, *chunk.forks):
                self._write(complete, logits[-1], done)

    def _echo(self, chunk: Chunk, logits: Logits, done: Done) -> None:
        sequence = chunk.sequence
        sequence.output.read(sequence.prompt.ids, chunk.start, logits)
        if chunk.is_last:
            done.events.append((sequence.job, sequence.output.echoed(sequence.prompt.index)))

    def _decode(self, step: Step, done: Done) -> None:
        ids = [row.last_id for row in step.rows]
        try:
            rows: Iterable[Logits | None] = self._engine.decode(ids, step.lengths)
        except Exception as error:
            _log.error("the engine failed on a step of %d rows; each is tried alone", len(ids), exc_info=error)
            rows = [self._alone(row, length) for row, length in zip(step.rows, step.lengths, strict=True)]
        for row, logits in zip(step.rows, rows, strict=True):
            if logits is None:
                self._fail((row,), None, done)
            else:
                self._write(row, logits, done)

    def _alone(self, row: Sequence, length: int) -> Logits | None:
        """The same step for one row: it stays in its slot, and one token is prefilled there."""
        try:
            logits: Logits = self._engine.prefill(row.slot, [row.last_id], length, keep="last")[-1]
            return logits
        except Exception as error:
            _log.error("the engine failed on one row, too", exc_info=error)
            return None

    def _write(self, sequence: Sequence, logits: Logits, done: Done) -> None:
        """One more token of an output, and what follows from it."""
        try:
            done.events += [(sequence.job, event) for event in sequence.output.write(logits)]
        except Exception as error:
            self._fail((sequence,), error, done)
            return
        progress, now = sequence.job.progress, time.monotonic()
        if progress.first_token is None:
            progress.first_token = now
        sequence.last_id = sequence.output.last_id
        if sequence.output.is_finished:
            self._scheduler.finish(sequence)
            sequence.job.num_unfinished -= 1
            if sequence.job.num_unfinished == 0:
                progress.finished = now

    def _fail(self, sequences: Several[Sequence], error: Exception | None, done: Done) -> None:
        if error is not None:
            _log.error("the engine failed on output %d", sequences[0].index, exc_info=error)
        for sequence in sequences:
            self._scheduler.finish(sequence)
        done.failed += sequences
