"""One served generation model: admission, prompts, the lanes that write, events.

Everything here runs on the asyncio thread, except what the lanes call and the reading of long prompts (a worker
thread). A request that is left, in whatever way, is closed in `generate`'s finally, and nowhere else.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from functools import partial

from service.domain import (
    Call,
    End,
    Event,
    Finish,
    GenerateRequest,
    GenerateUsage,
    ModelInfo,
    Start,
)
from service.errors import AttndError, DeadlineExceeded, EngineFailed, Overloaded, TooLarge, Unavailable
from service.metrics import Metrics
from service.worker.bundle import Bundle
from service.worker.generation.attend import Attending
from service.worker.generation.beam_search import check_beams
from service.worker.generation.lanes import Lane, Lanes
from service.worker.generation.outputs import num_places, plans
from service.worker.generation.prefix_cache import CHUNK
from service.worker.generation.prompts import PromptReader, num_characters
from service.worker.generation.report import Ended, Report
from service.worker.generation.scheduler import slots_for
from service.worker.generation.sequence import Job, Prompt
from service.worker.long_texts import LongTexts
from service.worker.tokenizer import LONG_TEXT


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Whoever reads a request's events: where they wait for it, what has ended of it, and whether it has left."""

    events: "asyncio.Queue[Event | AttndError]" = field(default_factory=asyncio.Queue)
    ended: list[Ended] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Generator:
    """A bundle, ready to generate once `start` has been called on the event loop that will use it."""

    def __init__(
        self,
        bundle: Bundle,
        lanes: Several[Lane],
        metrics: Metrics,
        *,
        prompts: PromptReader,
        max_rows: int,
        max_waiting: int,
        num_blocks: int,
        attending: Attending | None = None,
    ) -> None:
        """Each lane takes steps of up to `max_rows` rows, and has `num_blocks` for the beginnings of prompts.

        `attending` None: the model's attention cannot be told.
        """
        manifest = bundle.manifest
        self.info = ModelInfo(manifest.id, manifest.task, manifest.created, manifest.facts())
        self.attending = attending
        self._prompts = prompts
        self._long_texts = LongTexts(manifest.id)
        self._metrics = metrics
        self._max_rows = max_rows
        self._num_rows = len(lanes) * max_rows
        self._max_waiting = max_waiting
        self._kv_capacity = len(lanes) * (slots_for(max_rows) * prompts.max_length + num_blocks * CHUNK)
        self._output_seconds = 0.0  # from slot to end lately, for Retry-After
        self._open: dict[Job, Reader] = {}
        self._failure: BaseException | None = None
        self._lanes = Lanes(lanes, max_rows=max_rows, max_waiting=max_waiting)

    async def start(self) -> None:
        self._asyncio = asyncio.get_running_loop()
        lanes, name = self._lanes, self.info.id
        self._metrics.set_load(name, waiting=lambda: lanes.num_waiting, running=lambda: lanes.num_running)
        self._metrics.set_kv(name, lambda: (lanes.num_kept_tokens, self._kv_capacity), block_tokens=CHUNK)
        await lanes.start(self._tell, self._died)

    @property
    def is_alive(self) -> bool:
        return self._failure is None

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        job = Job(num_places(request), call.progress, call.wants_tokens)
        self._admit(request, job, call)
        reader = self._open[job] = Reader()
        alarm = self._asyncio.call_later(call.deadline - time.monotonic(), self._expire, job)
        num_missing = request.num_outputs
        try:
            prompts = await self._read(request, reader)
            planned = plans(request, prompts, self._prompts)
            call.progress.tokenized = time.monotonic()
            self._lanes.add(job, request, planned)
            event = await self._next(reader)
            yield Start(self.info.id, sum(len(prompt.ids) for prompt in prompts))
            while True:
                yield event
                num_missing -= isinstance(event, Finish)
                if not num_missing:
                    break
                event = await self._next(reader)
            call.progress.finished = max([one.at for one in reader.ended])
            yield End(_usage(request, prompts, reader.ended), call.progress.generate_timing(time.monotonic()))
        finally:
            alarm.cancel()
            self._close(job, is_abandoned=num_missing > 0)
            reader.left.set()

    def _admit(self, request: GenerateRequest, job: Job, call: Call) -> None:
        """Refuse what cannot be served, then take a place in the queue, before any work is done."""
        if call.deadline <= time.monotonic():
            raise self._expired(job)
        if self._failure is not None:
            raise Unavailable(f"the engine of {self.info.id} has failed", code="engine_dead")
        self._prompts.check(request)
        check_beams(request, self._max_rows)
        if job.num_places > self._max_waiting:
            raise self._too_many(request, job)
        try:
            self._lanes.admit(job)
        except Overloaded as error:
            error.retry_after_s = self._seconds_of_work()
            raise
        job.progress.admitted = time.monotonic()

    def _too_many(self, request: GenerateRequest, job: Job) -> TooLarge:
        param = "num_beams" if request.num_beams > 1 else "n" if request.n > 1 else "prompt"
        times = "" if param == "prompt" else f", {param}: {getattr(request, param)}"
        message = (
            f"{job.num_places} outputs or beams in one request (prompts or sentences: "
            f"{request.num_outputs // request.n}{times}), the limit is {self._max_waiting}"
        )
        return TooLarge(message, param=param, code="too_many_outputs")

    def _seconds_of_work(self) -> float:
        """How long what waits now will wait for a slot, between 0.1 and 30 seconds."""
        seconds = self._output_seconds * self._lanes.num_waiting / self._num_rows
        return min(30.0, max(0.1, seconds)) if seconds else 1.0

    async def _read(self, request: GenerateRequest, reader: Reader) -> list[Prompt]:
        """Raises what fails the request meanwhile, too: before it has prompts, no event but its end can come."""
        length = num_characters(request)
        if length < LONG_TEXT:
            return self._prompts.read(request)
        failed = asyncio.ensure_future(self._next(reader))
        try:
            return await self._long_texts.read(partial(self._prompts.read, request), length, unless=failed)
        finally:
            failed.cancel()

    async def _next(self, reader: Reader) -> Event:
        event = await reader.events.get()
        if isinstance(event, AttndError):
            raise event
        return event

    def _close(self, job: Job, *, is_abandoned: bool = False) -> None:
        if self._open.pop(job, None) is not None and is_abandoned:
            job.closed_at = time.monotonic()
        self._lanes.close(job)

    def _expired(self, job: Job) -> DeadlineExceeded:
        return DeadlineExceeded(f"the deadline passed after {time.monotonic() - job.progress.begun:.3f} s")

    def _expire(self, job: Job) -> None:
        self._fail(job, self._expired(job))

    def _fail(self, job: Job, error: AttndError) -> None:
        if (reader := self._open.get(job)) is not None:
            reader.events.put_nowait(error)
            self._close(job)

    # --- from the lanes, in whatever thread

    def _tell(self, report: Report) -> None:
        self._asyncio.call_soon_threadsafe(self._take, report)

    def _died(self, error: BaseException) -> None:
        self._asyncio.call_soon_threadsafe(self._die, error)

    # --- asyncio thread again

    def _take(self, report: Report) -> None:
        """What ended comes first: with its last event a request is over."""
        for job, ended in report.ended:
            self._learn(ended.slot_seconds)
            if (reader := self._open.get(job)) is not None:
                reader.ended.append(ended)
        for job, event in report.events:
            if (reader := self._open.get(job)) is not None:
                reader.events.put_nowait(event)
        for job, index in report.failed:
            self._fail(job, EngineFailed(f"the engine failed on output {index}"))
        self._count(report)

    def _learn(self, slot_seconds: float) -> None:
        before = self._output_seconds
        self._output_seconds = 0.9 * before + 0.1 * slot_seconds if before else slot_seconds

    def _count(self, report: Report) -> None:
        metrics, name = self._metrics, self.info.id
        for step in report.steps:
            metrics.observe_step(
                name,
                rows=step.rows,
                prefill_tokens=step.prefill_tokens,
                prefill_seconds=step.prefill_seconds,
                decode_seconds=step.decode_seconds,
            )
        for queried, found in report.prefixes:
            metrics.observe_prefix(name, queried=queried, hit=found)
        for seconds in report.released:
            metrics.observe_released(name, seconds)

    def _die(self, error: BaseException) -> None:
        self._failure = error
        for job in list(self._open):
            self._fail(job, EngineFailed(f"the engine of {self.info.id} has failed"))

    # --- the end

    async def aclose(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for open requests, fail those that remain, end the lanes."""
        leaving = [asyncio.ensure_future(reader.left.wait()) for reader in self._open.values()]
        if leaving:
            _, staying = await asyncio.wait(leaving, timeout=timeout_s)
            for one in staying:
                one.cancel()
        for job in list(self._open):
            self._fail(job, Unavailable("the server is stopping", code="draining"))
        if self.attending is not None:
            await self.attending.aclose(timeout_s)
        self._long_texts.close()
        await self._lanes.stop()


def _usage(request: GenerateRequest, prompts: Several[Prompt], ended: Several[Ended]) -> GenerateUsage:
    """A prompt counts once, however many outputs it has: what the first of them found in the cache."""
    return GenerateUsage(
        prompt_tokens=sum([len(prompt.ids) for prompt in prompts]),
        completion_tokens=sum([one.num_written for one in ended]),
        cached_tokens=sum([one.num_cached for one in ended if one.index % request.n == 0]),
    )
