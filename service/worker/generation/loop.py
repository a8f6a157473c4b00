"""The engine loop of a generation model, or one of its lanes: in a thread, steps from the scheduler are executed.

Another thread adds work; a step's events go back through `tell` for prompts, as soon as they are read, for a first
token need not wait until the rows are done, and through `publish` for all others. The lock around the scheduler is all
that both threads share. A job's progress is marked by all lanes that its outputs are in, without a lock: where two find
nothing there, the later mark stays, and both are of about that time.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from service.domain import Event
from service.worker.engine_threads import EngineThreads
from service.worker.generation.beam_search import BeamOutput, Rated
from service.worker.generation.likeliest import Likeliest
from service.worker.generation.prefix_cache import CHUNK
from service.worker.generation.scheduler import Scheduler
from service.worker.generation.sequence import Job, Sequence
from service.worker.generation.step import Chunk, Step

_log = logging.getLogger("attnd.engine")

Logits = NDArray[np.float32]
Given = Logits | Rated | None  # what a row gets to choose its token by; None: it failed
Events = list[tuple[Job, Event]]


class Engine(Protocol):
    """What DecoderEngine and TranslatorEngine do; `encode` is asked for prompts that are whole, and for no others."""

    def prefill(self, slot: int, ids: Several[int], start: int, *, keep: Literal["none", "last", "all"]) -> Logits: ...

    def decode(self, ids: Several[int], lengths: Several[int]) -> Logits: ...

    def encode(self, slots: Several[int], sources: Several[Several[int]]) -> None: ...

    def move(self, source: int, target: int, start: int, end: int) -> None: ...

    def save(self, slot: int, start: int, block: int) -> None: ...

    def restore(self, block: int, slot: int, start: int) -> None: ...


@dataclass(slots=True)
class Done:
    """What a step gave: the `events` not told before, in order, and the outputs that `ended` or `failed`.

    `begun` is a `time.monotonic()` instant.
    """

    step: Step
    begun: float
    events: Events = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class GenerationLoop:
    """All three are called in the engine thread: `publish` after every step, `tell` amid one with what it gave so far,
    `died` once, if the thread ends other than by `stop`.
    """

    def __init__(
        self,
        engine: Engine,
        scheduler: Scheduler,
        likeliest: Likeliest,
        *,
        tell: Callable[[Done], None],
        publish: Callable[[Done], None],
        died: Callable[[BaseException], None],
        name: str,
    ) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._likeliest = likeliest
        self._tell = tell
        self._publish = publish
        self._threads = EngineThreads(
            self._next_step, lambda step: publish(self._execute(step)), died=died, num_threads=1, name=name
        )

    # --- from another thread

    def start(self) -> None:
        self._threads.start()

    def stop(self) -> None:
        """See EngineThreads.stop."""
        self._threads.stop()

    def add(self, sequences: Several[Sequence]) -> None:
        with self._threads.has_work:
            self._scheduler.add(sequences)
            self._threads.has_work.notify()

    def close(self, job: Job) -> None:
        """See Scheduler.close."""
        with self._threads.has_work:
            self._scheduler.close(job)

    def step(self) -> bool:
        """One step in this thread, where none is started. False: there is nothing to do."""
        step = self._next_step()
        if step is not None:
            self._publish(self._execute(step))
        return step is not None

    @property
    def num_kept_tokens(self) -> int:
        with self._threads.has_work:
            return self._scheduler.num_kept_tokens

    # --- the engine thread

    def _next_step(self) -> Step | None:
        step = self._scheduler.next_step()
        return None if step.is_empty else step

    def _execute(self, step: Step) -> Done:
        begun = time.monotonic()
        done = Done(step, begun)
        for sequence in step.started:
            sequence.started = begun
            if sequence.job.progress.started is None:
                sequence.job.progress.started = begun
        for move in step.moves:
            self._engine.move(move.source, move.target, move.start, move.end)
        for restore in step.restores:
            self._engine.restore(restore.block, restore.slot, restore.start)
        for sources in step.sources:
            self._encode(sources, done)
        for chunk in step.chunks:
            self._prefill(chunk, done)
        if done.events and step.rows:
            self._tell(done)
            done.events, done.ended = [], []
        prefilled = time.monotonic()
        if step.rows:
            self._decode(step, done)
        done.prefill_seconds, done.decode_seconds = prefilled - begun, time.monotonic() - prefilled
        return done

    def _encode(self, sources: Several[Chunk], done: Done) -> None:
        prompts = [chunk.sequence.prompt.ids for chunk in sources]
        try:
            self._engine.encode([chunk.sequence.slot for chunk in sources], prompts)
        except Exception as error:
            for chunk in sources:
                if len(sources) > 1:
                    self._encode((chunk,), done)  # the others may be right
                else:
                    self._fail((chunk.sequence, *chunk.forks), error, done)
            return
        for chunk in sources:
            for fork in chunk.forks:
                self._engine.move(chunk.sequence.slot, fork.slot, 0, chunk.end - 1)
            for row in (chunk.sequence, *chunk.forks):
                row.last_id = row.prompt.ids[-1]

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
        with self._threads.has_work:
            block = self._scheduler.computed(chunk)
        if block is not None:
            self._engine.save(sequence.slot, chunk.end - CHUNK, block)
        if chunk.is_last:
            for fork in chunk.forks:
                self._engine.move(sequence.slot, fork.slot, 0, chunk.end)
            rows = (sequence, *chunk.forks)
            (last,) = self._rated((sequence,), [logits[-1]])
            for complete in rows:
                if not complete.is_follower:
                    self._write(complete, [last] * len(complete.rows), time.monotonic(), done)

    def _echo(self, chunk: Chunk, logits: Logits, done: Done) -> None:
        sequence = chunk.sequence
        sequence.output.read(sequence.prompt.ids, chunk.start, logits)
        if chunk.is_last:
            done.events.append((sequence.job, sequence.output.echoed(sequence.prompt.index)))

    def _decode(self, step: Step, done: Done) -> None:
        ids = [row.last_id for row in step.rows]
        try:
            logits: Several[Logits | None] | Logits = self._engine.decode(ids, step.lengths)
        except Exception as error:
            _log.error("the engine failed on a step of %d rows; each is tried alone", len(ids), exc_info=error)
            logits = [self._alone(row, length) for row, length in zip(step.rows, step.lengths, strict=True)]
        given = self._rated(step.rows, logits)
        now = time.monotonic()
        for row in step.rows:
            if not (row.is_follower or row.is_finished):  # already: its source could not be read
                self._write(row, [given[one.slot] for one in row.rows], now, done)

    def _rated(self, rows: Several[Sequence], logits: Several[Logits | None] | Logits) -> Several[Given] | Logits:
        """The logits of `rows`; with those of beams their likeliest tokens, sought for all searches at once."""
        wanted = [row.output.num_likely for row in rows]
        count = max(wanted)
        if not count:
            return logits
        each: list[Logits | None] = list(logits)
        beams = {at: one for at, one in enumerate(each) if wanted[at] and one is not None}
        if not beams:
            return each
        stays = isinstance(logits, np.ndarray) and len(beams) == len(rows)  # the engine's own memory
        try:
            found = self._likeliest.of(np.asarray(logits if stays else [*beams.values()]), count, stays=stays)
        except Exception as error:
            _log.error("the likeliest tokens of %d rows could not be found", len(beams), exc_info=error)
            return [None if at in beams else one for at, one in enumerate(each)]
        given: list[Given] = [*each]
        for (at, one), likely in zip(beams.items(), found, strict=True):
            given[at] = Rated(one, likely)
        return given

    def _alone(self, row: Sequence, length: int) -> Logits | None:
        """The same step for one row: it stays in its slot, and one token is prefilled there."""
        try:
            logits: Logits = self._engine.prefill(row.slot, [row.last_id], length, keep="last")[-1]
            return logits
        except Exception as error:
            _log.error("the engine failed on one row, too", exc_info=error)
            return None

    def _write(self, sequence: Sequence, given: Several[Given] | Logits, now: float, done: Done) -> None:
        """One more token of an output or of all beams of a search, and what follows from it."""
        output = sequence.output
        num_shown = output.num_shown
        rows: list[Any] = [row for row in given if row is not None]  # of the kind that the output takes
        if len(rows) < len(given):
            self._fail((sequence,), None, done)
            return
        try:
            for event in output.write(rows):
                done.events.append((sequence.job, event))
        except Exception as error:
            self._fail((sequence,), error, done)
            return
        self._mark(sequence, num_shown, now)
        if isinstance(output, BeamOutput):
            for row, (parent, token) in zip(sequence.rows, output.continuations, strict=True):
                row.last_id = token
                row.parent = None if sequence.rows[parent] is row else sequence.rows[parent]
        else:
            sequence.last_id = output.last_id
        if output.is_finished:
            self._scheduler.finish(sequence)
            done.ended.append(sequence)

    def _mark(self, sequence: Sequence, num_shown: int, now: float) -> None:
        """One more token was written, of an output that had `num_shown` in its text before."""
        output, progress = sequence.output, sequence.job.progress
        if progress.prefilled is None:
            progress.prefilled = now
        if progress.first_token is None and output.num_tokens:
            progress.first_token = now
        if output.num_shown > num_shown and (progress.is_told_late or not output.is_told):
            progress.leave_untold(now - sequence.written if num_shown else None)
        sequence.written = now

    def _fail(self, sequences: Several[Sequence], error: Exception | None, done: Done) -> None:
        if error is not None:
            _log.error("the engine failed on output %d", sequences[0].index, exc_info=error)
        for sequence in sequences:
            self._scheduler.finish(sequence)
        done.failed += [one for one in sequences if not one.is_follower]
