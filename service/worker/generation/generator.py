"""One served generation model: admission, prompts, the engine loops, events.

Everything here runs on the asyncio thread, except what the engine threads call and the reading of long prompts (a
worker thread). A request that is left, in whatever way, is closed in `generate`'s finally, and nowhere else.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from itertools import chain

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
from service.worker.generation.lanes import Lanes
from service.worker.generation.loop import Done, Engine, Events, GenerationLoop
from service.worker.generation.outputs import Outputs, num_places
from service.worker.generation.prefix_cache import CHUNK
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.prompts import PromptReader, num_characters
from service.worker.generation.scheduler import Scheduler, slots_for
from service.worker.generation.sequence import Job, Prompt, Sequence

LONG_TEXT = 4096  # characters from which on tokenizing would hold up the event loop (about 1 ms)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """Whoever reads a request's events: where they wait for it, and whether it has left."""

    events: "asyncio.Queue[Event | AttndError]" = field(default_factory=asyncio.Queue)
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Generator:
    """A bundle, ready to generate once `start` has been called on the event loop that will use it."""

    def __init__(
        self,
        bundle: Bundle,
        engines: Several[Engine],
        metrics: Metrics,
        *,
        vocab_size: int,
        max_rows: int,
        max_waiting: int,
        num_blocks: int,
        attending: Attending | None = None,
    ) -> None:
        """Each engine takes steps of up to `max_rows` rows, beside the others and of outputs of its own.

        `attending` None: the model's attention cannot be told.
        """
        manifest = bundle.manifest
        assert manifest.generation is not None
        self.info = ModelInfo(manifest.id, manifest.task, manifest.created, manifest.facts())
        self.attending = attending
        tokenizer = PromptTokenizer(bundle.tokenizer_path)
        self._prompts = PromptReader(bundle, tokenizer, vocab_size=vocab_size)
        self._outputs = Outputs(
            tokenizer,
            self._prompts,
            end_ids=manifest.generation.end_ids,
            temperature=manifest.generation.temperature,
            vocab_size=vocab_size,
        )
        self._metrics = metrics
        self._max_rows = max_rows
        self._num_rows = len(engines) * max_rows
        self._max_waiting = max_waiting
        self._num_blocks = num_blocks
        self._kv_capacity = len(engines) * (slots_for(max_rows) * self._prompts.max_length + num_blocks * CHUNK)
        self._output_seconds = 0.0  # from slot to end lately, for Retry-After
        self._open: dict[Job, Reader] = {}
        self._failure: BaseException | None = None
        loops = [
            GenerationLoop(
                engine,
                Scheduler(max_rows=max_rows, num_blocks=num_blocks),
                tell=self._tell_from_thread,
                publish=self._publish,
                died=self._died_in_thread,
                name=f"{manifest.id}-{lane}",
            )
            for lane, engine in enumerate(engines)
        ]
        self._lanes = Lanes(loops, max_waiting=max_waiting)

    def start(self) -> None:
        self._asyncio = asyncio.get_running_loop()
        lanes, name = self._lanes, self.info.id
        self._metrics.set_load(name, waiting=lambda: lanes.num_waiting, running=lambda: lanes.num_running)
        self._metrics.set_kv(name, lambda: (lanes.num_kept_tokens, self._kv_capacity), block_tokens=CHUNK)
        lanes.start()

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
            prompts = await self._read(request)
            sequences = self._outputs.sequences(request, job, prompts)
            call.progress.tokenized = time.monotonic()
            self._lanes.add(job, sequences)
            event = await self._next(reader)
            yield Start(self.info.id, sum(len(prompt.ids) for prompt in prompts))
            while True:
                yield event
                num_missing -= isinstance(event, Finish)
                if not num_missing:
                    break
                event = await self._next(reader)
            call.progress.finished = max(sequence.written for sequence in sequences)
            yield End(_usage(prompts, sequences), call.progress.generate_timing(time.monotonic()))
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

    async def _read(self, request: GenerateRequest) -> list[Prompt]:
        if num_characters(request) < LONG_TEXT:
            return self._prompts.read(request)
        return await asyncio.to_thread(self._prompts.read, request)

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

    # --- engine threads

    def _tell_from_thread(self, events: Events) -> None:
        self._asyncio.call_soon_threadsafe(self._tell, events)

    def _publish(self, done: Done) -> None:
        """The event loop is not woken for nothing: that would cost as much as a step of a small model."""
        if done.events:
            self._tell_from_thread(done.events)
        for sequence in done.failed:
            error = EngineFailed(f"the engine failed on output {sequence.index}")
            self._asyncio.call_soon_threadsafe(self._fail, sequence.job, error)
        for seconds in done.slot_seconds:  # an estimate: lanes may overwrite what the other has just learned
            self._output_seconds = 0.9 * self._output_seconds + 0.1 * seconds if self._output_seconds else seconds
        self._count(done)

    def _count(self, done: Done) -> None:
        metrics, name, step = self._metrics, self.info.id, done.step
        chunks = [*chain.from_iterable(step.sources), *step.chunks]
        metrics.observe_step(
            name,
            rows=len(step.rows),
            prefill_tokens=sum(chunk.end - chunk.start for chunk in chunks),
            prefill_seconds=done.prefill_seconds,
            decode_seconds=done.decode_seconds,
        )
        for chunk in step.chunks:
            sequence = chunk.sequence
            if self._num_blocks and chunk.start == sequence.num_cached and not sequence.is_echoed:  # its first
                metrics.observe_prefix(name, queried=len(sequence.prompt.ids), hit=sequence.num_cached)
        for job in step.released:
            if job.closed_at is not None:
                metrics.observe_released(name, done.begun - job.closed_at)

    def _died_in_thread(self, error: BaseException) -> None:
        self._asyncio.call_soon_threadsafe(self._die, error)

    # --- asyncio thread again

    def _tell(self, events: Events) -> None:
        for job, event in events:
            if (reader := self._open.get(job)) is not None:
                reader.events.put_nowait(event)

    def _die(self, error: BaseException) -> None:
        self._failure = error
        for job in list(self._open):
            self._fail(job, EngineFailed(f"the engine of {self.info.id} has failed"))

    # --- the end

    async def aclose(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for open requests, fail those that remain, end the engine threads."""
        leaving = [asyncio.ensure_future(reader.left.wait()) for reader in self._open.values()]
        if leaving:
            _, staying = await asyncio.wait(leaving, timeout=timeout_s)
            for one in staying:
                one.cancel()
        for job in list(self._open):
            self._fail(job, Unavailable("the server is stopping", code="draining"))
        if self.attending is not None:
            await self.attending.aclose(timeout_s)
        await asyncio.to_thread(self._lanes.stop)


def _usage(prompts: Several[Prompt], sequences: Several[Sequence]) -> GenerateUsage:
    """A prompt counts once, however many outputs it has: those of its first."""
    return GenerateUsage(
        prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
        completion_tokens=sum(one.output.num_tokens for one in sequences),
        cached_tokens=sum(one.num_cached for one in sequences[:: len(sequences) // len(prompts)]),
    )
