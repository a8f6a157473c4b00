"""One served classification model: admission, tokens, the engine loop, scores.

Everything here runs on the asyncio thread, except `_run` (engine threads) and long tokenizations (a worker thread).
"""

import asyncio
import time
from collections.abc import Sequence as Inputs

from service.domain import Call, Classification, ClassifyRequest, FunctionToApply, ModelInfo, Score, TextInput, Usage
from service.errors import DeadlineExceeded, EngineFailed, Overloaded, TooLarge, Unavailable
from service.metrics import Metrics
from service.worker.bundle import Bundle
from service.worker.engine import ClassificationEngine, Tokens, padded_length
from service.worker.loop import EngineLoop, Finished, Row
from service.worker.scheduler import Scheduler
from service.worker.scores import apply, function_for, ranked
from service.worker.sequence import Job, Sequence
from service.worker.tokenizer import Encoded, Tokenizer

LONG_TEXT = 4096  # characters from which on tokenizing would hold up the event loop (about 1 ms)


class Classifier:
    """A bundle, ready to classify once `start` has been called on the event loop that will use it."""

    def __init__(
        self,
        bundle: Bundle,
        engine: ClassificationEngine,
        metrics: Metrics,
        *,
        num_threads: int,
        max_batch_tokens: int,
        max_waiting: int,
        max_inputs: int,
    ) -> None:
        manifest = bundle.manifest
        self.info = ModelInfo(manifest.id, manifest.task, manifest.created, manifest.facts())
        self._labels = manifest.labels
        self._function = function_for(manifest.problem_type, len(manifest.labels))
        self._tokenizer = Tokenizer(bundle.tokenizer_path, manifest.limits.max_tokens)
        self._engine = engine
        self._metrics = metrics
        self._max_inputs = max_inputs
        self._rate = 0.0  # inputs a second lately, for Retry-After
        self._open: dict[Job, asyncio.Future[None]] = {}
        self._failure: BaseException | None = None
        self._loop = EngineLoop(
            self._run,
            Scheduler(max_batch_tokens=max_batch_tokens, max_waiting=max_waiting),
            publish=self._publish_from_thread,
            died=self._died_in_thread,
            num_threads=num_threads,
            name=manifest.id,
        )

    def start(self) -> None:
        self._asyncio = asyncio.get_running_loop()
        self._metrics.queue_depth.labels(self.info.id).set_function(lambda: self._loop.num_waiting)
        self._loop.start()

    @property
    def is_alive(self) -> bool:
        return self._failure is None

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        job = Job(len(request.input), call.progress)
        self._admit(job, call)
        done = self._open[job] = self._asyncio.create_future()
        alarm = self._asyncio.call_later(call.deadline - time.monotonic(), self._expire, job)
        try:
            encoded = await self._encode(request)
            call.progress.tokenized = time.monotonic()
            self._loop.add([_sequence(job, index, one) for index, one in enumerate(encoded)])
            await done
            return self._result(request, call, job, encoded)
        finally:
            alarm.cancel()
            self._open.pop(job, None)
            self._loop.close(job)
            if done.done() and not done.cancelled():
                done.exception()  # seen, even when tokenizing failed first

    def _admit(self, job: Job, call: Call) -> None:
        if call.deadline <= time.monotonic():
            raise self._expired(job)
        if self._failure is not None:
            raise Unavailable(f"the engine of {self.info.id} has failed", code="engine_dead")
        if job.num_inputs > self._max_inputs:
            message = f"{job.num_inputs} inputs in one request, the limit is {self._max_inputs}"
            raise TooLarge(message, param="input", code="too_many_inputs")
        try:
            self._loop.admit(job)
        except Overloaded as error:
            error.retry_after_s = self._seconds_of_work()
            raise
        job.progress.admitted = time.monotonic()

    def _seconds_of_work(self) -> float:
        """How long what waits now will keep the engine busy, between 0.1 and 30 seconds."""
        return min(30.0, max(0.1, self._loop.num_waiting / self._rate)) if self._rate else 1.0

    async def _encode(self, request: ClassifyRequest) -> list[Encoded]:
        inputs: Inputs[TextInput] = request.input
        if sum(len(item.text) + len(item.text_pair or "") for item in inputs) < LONG_TEXT:
            return self._tokenizer.encode(inputs, truncate=request.truncate)
        return await asyncio.to_thread(self._tokenizer.encode, inputs, truncate=request.truncate)

    def _result(self, request: ClassifyRequest, call: Call, job: Job, encoded: Inputs[Encoded]) -> Classification:
        function = request.function_to_apply or self._function
        results = tuple(self._scores(row, function, request.top_k) for row in job.rows)
        usage = Usage(sum(len(one.ids) for one in encoded), sum(one.is_truncated for one in encoded))
        return Classification(self.info.id, results, usage, call.progress.timing(time.monotonic()))

    def _scores(self, row: Row, function: FunctionToApply, top_k: int | None) -> tuple[Score, ...]:
        return ranked(self._labels, apply(function, row), top_k)

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

    def _run(self, batch: Inputs[Sequence]) -> Inputs[Row]:
        rows: list[list[float]] = self._engine.logits([Tokens(one.ids, one.type_ids) for one in batch]).tolist()
        return rows

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
        metrics, name = self._metrics, self.info.id
        metrics.batch_size.labels(name).observe(num_inputs)
        metrics.batch_tokens.labels(name).observe(padded)
        metrics.batch_seconds.labels(name).observe(finished.seconds)
        metrics.padded_tokens.labels(name).inc(padded)
        metrics.real_tokens.labels(name).inc(sum(len(sequence.ids) for sequence in finished.batch))
        rate = num_inputs / max(finished.seconds, 1e-6)
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate

    def _die(self, error: BaseException) -> None:
        self._failure = error
        for job in list(self._open):
            self._fail(job, EngineFailed(f"the engine of {self.info.id} has failed"))

    # --- the end

    async def aclose(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for open requests, fail those that remain, end the engine threads."""
        if self._open:
            await asyncio.wait(list(self._open.values()), timeout=timeout_s)
        for job in list(self._open):
            self._fail(job, Unavailable("the server is stopping", code="draining"))
        await asyncio.to_thread(self._loop.stop)


def _sequence(job: Job, index: int, encoded: Encoded) -> Sequence:
    return Sequence(job, index, encoded.ids, encoded.type_ids, padded_length(len(encoded.ids)))
