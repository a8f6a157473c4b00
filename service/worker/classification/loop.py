"""The threads that take batches from the scheduler and run them on the engine. One loop a model.

The asyncio thread adds work and gets results back through `publish`; the lock around the scheduler is all they share.
An engine thread never waits for the event loop: after a batch it takes the next one at once.
"""

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Inputs
from dataclasses import dataclass
from typing import Protocol

from service.worker.classification.scheduler import Scheduler
from service.worker.classification.sequence import Job, Sequence

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
        self._publish = publish
        self._died = died
        self._is_stopped = False
        self._has_work = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"engine-{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let running batches end and join the threads; what still waits is left to the caller."""
        with self._has_work:
            self._is_stopped = True
            self._has_work.notify_all()
        for thread in self._threads:
            thread.join()

    def admit(self, job: Job) -> None:
        """See Scheduler.admit."""
        with self._has_work:
            self._scheduler.admit(job)

    def widen(self, job: Job, num_more: int) -> None:
        """See Scheduler.widen."""
        with self._has_work:
            self._scheduler.widen(job, num_more)

    def add(self, sequences: Inputs[Sequence]) -> None:
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

    def _serve(self) -> None:
        try:
            while batch := self._next_batch():
                self._publish(self._finish(batch))
        except BaseException as error:  # whatever it is, nobody may wait for a dead thread
            _log.critical("an engine thread died", exc_info=error)
            self._died(error)

    def _next_batch(self) -> list[Sequence]:
        """The next batch, waiting for one; empty when the loop is to end."""
        with self._has_work:
            while not self._is_stopped:
                if batch := self._scheduler.next_batch():
                    return batch
                self._has_work.wait()
        return []

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
