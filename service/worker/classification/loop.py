"""The engine loop of a classifier: batches from the scheduler are run on the engine, in threads. One loop a model.

The asyncio thread adds work and gets results back through `publish`; the lock around the scheduler is all they share.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Inputs
from dataclasses import dataclass
from typing import Protocol

from service.worker.classification.scheduler import Scheduler
from service.worker.classification.sequence import Job, Sequence
from service.worker.engine_threads import EngineThreads

_log = logging.getLogger("attnd.engine")

Row = Inputs[float]


class Runs(Protocol):
    def __call__(self, batch: Inputs[Sequence]) -> Inputs[Row]:
        """One row of logits for each input of the batch, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """One batch that left the engine. `rows` are its results; an input whose row is None could not be computed."""

    batch: Inputs[Sequence]
    rows: Inputs[Row | None]
    seconds: float


class EngineLoop:
    """`publish` is called in an engine thread after every batch, `died` once if a thread ends other than by `stop`."""

    def __init__(
        self,
        run: Runs,
        scheduler: Scheduler,
        *,
        publish: Callable[[Finished], None],
        died: Callable[[BaseException], None],
        num_threads: int,
        name: str,
    ) -> None:
        self._run = run
        self._scheduler = scheduler
        self._threads = EngineThreads(
            lambda: scheduler.next_batch() or None,
            lambda batch: publish(self._finish(batch)),
            died=died,
            num_threads=num_threads,
            name=name,
        )

    def start(self) -> None:
        self._threads.start()

    def stop(self) -> None:
        """See EngineThreads.stop."""
        self._threads.stop()

    def admit(self, job: Job) -> None:
        """See Scheduler.admit."""
        with self._threads.has_work:
            self._scheduler.admit(job)

    def widen(self, job: Job, num_more: int) -> None:
        """See Scheduler.widen."""
        with self._threads.has_work:
            self._scheduler.widen(job, num_more)

    def add(self, sequences: Inputs[Sequence]) -> None:
        with self._threads.has_work:
            self._scheduler.add(sequences)
            self._threads.has_work.notify()

    def close(self, job: Job) -> None:
        """See Scheduler.close."""
        with self._threads.has_work:
            self._scheduler.close(job)

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_tokens(self) -> int:
        """See Scheduler.num_tokens."""
        with self._threads.has_work:
            return self._scheduler.num_tokens

    def _finish(self, batch: list[Sequence]) -> Finished:
        started = time.monotonic()
        for sequence in batch:
            if sequence.job.progress.started is None:
                sequence.job.progress.started = started
        rows = self._rows(batch)
        ended = time.monotonic()
        for sequence in batch:
            sequence.job.progress.finished = ended
        return Finished(batch, rows, ended - started)

    def _rows(self, batch: list[Sequence]) -> Inputs[Row | None]:
        """The engine's rows; if it fails on a batch, each input is tried alone, so that one fails alone."""
        try:
            return self._run(batch)
        except Exception as error:
            _log.error("the engine failed on a batch of %d", len(batch), exc_info=error)
            if len(batch) == 1:
                return [None]
        return [row for sequence in batch for row in self._rows([sequence])]
