"""The jobs of one model from admission to their end: places, deadlines, the engine loop, and rows on their way back.

Everything here runs on the asyncio thread, except the function that runs a batch. Knows neither texts nor labels.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Inputs
from contextlib import contextmanager

from service.domain import Call
from service.errors import DeadlineExceeded, EngineFailed, Overloaded, TooLarge, Unavailable
from service.metrics import Metrics
from service.worker.classification.loop import EngineLoop, Finished, Runs
from service.worker.classification.scheduler import Scheduler
from service.worker.classification.sequence import Job, Sequence


class OpenJobs:
    """`run` is called in engine threads. `max_inputs` bounds one job, `max_waiting` all that wait for the engine."""

    def __init__(
        self,
        run: Runs,
        metrics: Metrics,
        *,
        name: str,
        num_threads: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_inputs: int,
    ) -> None:
        self._name = name
        self._metrics = metrics
        self._max_inputs = max_inputs
        self._num_threads = num_threads
        self._rate = 0.0  # padded tokens a second lately, of one thread, for Retry-After
        self._open: dict[Job, asyncio.Future[None]] = {}
        self._failure: BaseException | None = None
        self._loop = EngineLoop(
            run,
            Scheduler(max_batch_tokens=max_batch_tokens, max_waiting=max_waiting, num_threads=num_threads),
            publish=self._publish_from_thread,
            died=self._died_in_thread,
            num_threads=num_threads,
            name=name,
        )

    def start(self) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._metrics.queue_depth.labels(self._name).set_function(lambda: self._loop.num_waiting)
        self._loop.start()

    @property
    def is_alive(self) -> bool:
        return self._failure is None

    @contextmanager
    def admitted(self, job: Job, call: Call) -> Iterator[asyncio.Future[None]]:
        """Holds places for the job's inputs; what of it has not run at the block's end never will.

        The future is done when all rows are in the job, and raises EngineFailed, DeadlineExceeded and Unavailable.
        Raises TooLarge, Overloaded, DeadlineExceeded and Unavailable, before any work is done.
        """
        self._admit(job, call)
        done = self._open[job] = self._asyncio.create_future()
        alarm = self._asyncio.call_later(call.deadline - time.monotonic(), self._expire, job)
        try:
            yield done
        finally:
            alarm.cancel()
            self._open.pop(job, None)
            self._loop.close(job)
            if done.done() and not done.cancelled():
                done.exception()  # seen, even when the block failed first

    def widen(self, job: Job, num_more: int) -> None:
        """Take places for `num_more` inputs of an admitted job. Raises TooLarge and Overloaded."""
        self._check_num_inputs(job.num_inputs + num_more)
        self._take_places(lambda: self._loop.widen(job, num_more))

    def add(self, job: Job, sequences: Inputs[Sequence]) -> None:
        """All inputs of an admitted job, for the engine to run."""
        job.progress.tokenized = time.monotonic()
        self._loop.add(sequences)

    def _admit(self, job: Job, call: Call) -> None:
        if call.deadline <= time.monotonic():
            raise self._expired(job)
        if self._failure is not None:
            raise Unavailable(f"the engine of {self._name} has failed", code="engine_dead")
        self._check_num_inputs(job.num_inputs)
        self._take_places(lambda: self._loop.admit(job))
        job.progress.admitted = time.monotonic()

    def _check_num_inputs(self, num_inputs: int) -> None:
        if num_inputs > self._max_inputs:
            message = f"{num_inputs} inputs in one request, the limit is {self._max_inputs}"
            raise TooLarge(message, param="input", code="too_many_inputs")

    def _take_places(self, take: Callable[[], None]) -> None:
        try:
            take()
        except Overloaded as error:
            error.retry_after_s = self._seconds_of_work()
            raise

    def _seconds_of_work(self) -> float:
        """How long what waits now will keep all threads busy, between 0.1 and 30 seconds."""
        if not self._rate:
            return 1.0
        return min(30.0, max(0.1, self._loop.num_tokens / (self._num_threads * self._rate)))

    def _expired(self, job: Job) -> DeadlineExceeded:
        return DeadlineExceeded(f"the deadline passed after {time.monotonic() - job.progress.begun:.3f} s")

    def _expire(self, job: Job) -> None:
        self._fail(job, self._expired(job))

    def _fail(self, job: Job, error: Exception) -> None:
        done = self._open.pop(job, None)
        if done is not None and not done.done():
            done.set_exception(error)
        self._loop.close(job)

    # --- engine threads

    def _publish_from_thread(self, finished: Finished) -> None:
        self._asyncio.call_soon_threadsafe(self._publish, finished)

    def _died_in_thread(self, error: BaseException) -> None:
        self._asyncio.call_soon_threadsafe(self._die, error)

    # --- asyncio thread again

    def _publish(self, finished: Finished) -> None:
        for sequence, row in zip(finished.batch, finished.rows, strict=True):
            job = sequence.job
            if row is None:
                self._fail(job, EngineFailed(f"the engine failed on input {sequence.index}"))
                continue
            job.rows[sequence.index] = row
            job.num_missing -= 1
            if job.num_missing == 0 and (done := self._open.get(job)) is not None and not done.done():
                done.set_result(None)
        self._count(finished)

    def _count(self, finished: Finished) -> None:
        num_inputs = len(finished.batch)
        padded = num_inputs * finished.batch[0].padded_length
        metrics, name = self._metrics, self._name
        metrics.batch_size.labels(name).observe(num_inputs)
        metrics.batch_tokens.labels(name).observe(padded)
        metrics.batch_seconds.labels(name).observe(finished.seconds)
        metrics.padded_tokens.labels(name).inc(padded)
        metrics.real_tokens.labels(name).inc(sum(len(sequence.ids) for sequence in finished.batch))
        rate = padded / max(finished.seconds, 1e-6)
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate

    def _die(self, error: BaseException) -> None:
        self._failure = error
        for job in list(self._open):
            self._fail(job, EngineFailed(f"the engine of {self._name} has failed"))

    # --- the end

    async def aclose(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for open jobs, fail those that remain, end the engine threads."""
        if self._open:
            await asyncio.wait(list(self._open.values()), timeout=timeout_s)
        for job in list(self._open):
            self._fail(job, Unavailable("the server is stopping", code="draining"))
        await asyncio.to_thread(self._loop.stop)
