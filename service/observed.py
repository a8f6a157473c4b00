"""Counts, times and logs every request where it crosses the seam, whatever its end; and nowhere else.

A request that never became one (bad JSON, wrong key, too many bytes) is reported by the edge with `rejected`, one that
came to no route (not HTTP, no such path, a client that left before it was complete) with `turned_away`.

Since it knows what is open, it also ends what still is when the server's time is up.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from service.backend import Backend
from service.domain import (
    AttentionMaps,
    AttentionRequest,
    Call,
    Classification,
    ClassifyRequest,
    End,
    Event,
    ExplainRequest,
    Explanation,
    GenerateRequest,
    GenerateTiming,
    ModelInfo,
    Progress,
    Timing,
    attention_tasks,
    generation_tasks,
)
from service.errors import (
    AttndError,
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from service.metrics import Metrics
from service.tally import Clock, Tally

Log = Callable[[dict[str, object]], None]

Result = TypeVar("Result")

NO_ROUTE = "none"  # a label

_CLASSIFIES = ("classification",)

# A caller leaves when its own time is up, which may be before the deadline that it sent: gRPC's clients round what they
# send up by a hundredth, or repeat what they sent before where that is up to three hundredths more.
_OF_TIMEOUT = 0.95
_EARLY_S = 0.002  # and of timers

_LAST_WORDS_S = 1.0  # for the edges to tell the callers of what is ended here

_OUTCOMES: dict[type[BaseException], str] = {
    InvalidRequest: "invalid",
    TooLarge: "invalid",
    NotFound: "invalid",
    Unauthenticated: "invalid",
    Unsupported: "invalid",
    Overloaded: "overloaded",
    DeadlineExceeded: "deadline",
    Cancelled: "cancelled",
    asyncio.CancelledError: "cancelled",
    GeneratorExit: "cancelled",
}

_log = logging.getLogger("attnd.requests")


def outcome_of(error: BaseException) -> str:
    """The `outcome` label of a request that ended with `error`."""
    return _OUTCOMES.get(type(error), "error")


def _is_late(call: Call, now: float) -> bool:
    """Whether a caller that left at `now` did so because its time was up."""
    begun = call.progress.begun
    return now - begun + _EARLY_S >= _OF_TIMEOUT * (call.deadline - begun)


class Observed:
    """A Backend that passes everything on and misses nothing."""

    def __init__(
        self, backend: Backend, metrics: Metrics, *, log: Log | None = None, clock: Clock = time.monotonic
    ) -> None:
        """`log` gets the fields of one line a request. `clock` gives seconds, as the calls' own instants are."""
        self._backend = backend
        self._metrics = metrics
        self._write_line = log
        self._clock = clock
        self._models: list[ModelInfo] = []
        self._open: set[asyncio.Task[Any] | None] = set()  # each awaits the backend
        self._is_closing = False

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        result = await self._counted(self._backend.classify(request, call), call, request.model, _CLASSIFIES)
        usage = result.usage
        fields = {"inputs": len(result.results), "prompt_tokens": usage.prompt_tokens, "truncated": usage.truncated}
        self._succeeded(call, result, fields)
        return result

    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps:
        work = self._backend.attention(request, call)
        result = await self._counted(work, call, request.model, attention_tasks(request))
        seconds = self._clock() - call.progress.begun
        self._metrics.observe_maps(result.model, request.reduce, len(result.maps), result.num_bytes, seconds)
        fields = {"prompt_tokens": result.usage.prompt_tokens, "maps": len(result.maps), "bytes": result.num_bytes}
        self._succeeded(call, result, fields)
        return result

    async def explain(self, request: ExplainRequest, call: Call) -> Explanation:
        result = await self._counted(self._backend.explain(request, call), call, request.model, _CLASSIFIES)
        self._succeeded(call, result, {"prompt_tokens": result.usage.prompt_tokens, "method": result.method})
        return result

    async def _counted(self, work: Awaitable[Result], call: Call, wanted: str | None, tasks: Sequence[str]) -> Result:
        """What `work` results in; counted here when it fails."""
        in_flight, task = self._metrics.in_flight_of(call.route), asyncio.current_task()
        in_flight.inc()
        self._open.add(task)
        try:
            return await work
        except BaseException as caught:
            error = self._end_of(caught)
            self._failed(call, error, self._known(wanted, tasks))
            if error is not caught:
                raise error from None
            raise
        finally:
            in_flight.dec()
            self._open.discard(task)

    def _succeeded(
        self, call: Call, result: Classification | AttentionMaps | Explanation, fields: Mapping[str, object]
    ) -> None:
        """The total is what passed here: the worker's own knows neither the network nor those asked before it."""
        timing = replace(result.timing, total_seconds=self._clock() - call.progress.begun)
        self._metrics.observe_request(call.route, result.model, "ok", timing)
        self._metrics.observe_prompt(call.route, result.model, result.usage.prompt_tokens)
        self._log(call, result.model, "ok", timing, fields)

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        call.progress.is_told_late = request.num_beams > 1  # all at the end
        tally = Tally(call, self._metrics, self._clock)
        in_flight, task = self._metrics.in_flight_of(call.route), asyncio.current_task()
        in_flight.inc()
        self._open.add(task)
        try:
            async with aclosing(self._backend.generate(request, call)) as events:
                async for event in events:
                    tally.take(event)
                    if isinstance(event, End):
                        self._generated(call, tally, "ok")
                    yield event
            if tally.end is None:
                raise EngineFailed("the generation broke off")
        except BaseException as caught:
            error = self._end_of(caught)
            if tally.end is None:  # what comes after a complete reply is not its outcome
                tally.model = tally.model or self._known(request.model, generation_tasks(request))
                self._generated(call, tally, self._outcome(call, error), self._reason(call, error))
            if error is not caught:
                raise error from None
            raise
        finally:
            in_flight.dec()
            self._open.discard(task)

    async def models(self) -> list[ModelInfo]:
        self._models = await self._backend.models()
        return self._models

    @property
    def known_models(self) -> list[ModelInfo]:
        """As `models` last told; none if it was never asked."""
        return self._models

    @property
    def failure(self) -> str | None:
        return self._backend.failure

    async def aclose(self) -> None:
        """End what is still open with an error that its caller gets, as long as the edges are there; see roles.py."""
        self._is_closing = True
        if still_open := [task for task in self._open if task is not None]:
            for task in still_open:
                task.cancel()
            await asyncio.wait(still_open, timeout=_LAST_WORDS_S)
        await self._backend.aclose()

    def _end_of(self, error: BaseException) -> BaseException:
        """What ended a request: where it is cancelled by `aclose`, its caller has not left."""
        if self._is_closing and isinstance(error, asyncio.CancelledError):
            return Unavailable("the server is stopping", code="draining")
        return error

    def rejected(self, call: Call, error: AttndError) -> None:
        """Count a request that failed before it could be understood."""
        self._failed(call, error, "")

    def turned_away(self, request_id: str, begun: float, error: AttndError) -> None:
        """Count what came to no route; `begun` as in `Progress`."""
        self.rejected(Call(request_id, NO_ROUTE, math.inf, Progress(begun)), error)

    def _known(self, wanted: str | None, tasks: Sequence[str]) -> str:
        """A label that only takes names of served models, whatever callers send."""
        for task in tasks:
            for model in self._models:
                if model.id == wanted or (wanted is None and model.task == task):
                    return model.id
        return ""

    def _failed(self, call: Call, error: BaseException, model: str) -> None:
        outcome = self._outcome(call, error)
        timing = call.progress.timing(self._clock())
        self._metrics.observe_request(call.route, model, outcome, timing)
        self._log(call, model, outcome, timing, {}, self._reason(call, error))

    def _outcome(self, call: Call, error: BaseException) -> str:
        """Whether its deadline or its caller ends a call, gRPC tells by the same cancellation."""
        outcome = outcome_of(error)
        return "deadline" if outcome == "cancelled" and _is_late(call, self._clock()) else outcome

    def _generated(self, call: Call, tally: Tally, outcome: str, reason: str = "") -> None:
        tally.take_untold()
        timing = tally.timing()
        self._metrics.observe_request(call.route, tally.model, outcome, timing)
        self._metrics.observe_generation(call.route, tally.model, outcome, timing, tally.num_tokens)
        self._log(call, tally.model, outcome, timing, tally.fields(timing), reason)

    def _reason(self, call: Call, error: BaseException) -> str:
        """What to say of `error` in the request's line; what was our own fault is logged with its traceback."""
        if outcome_of(error) == "error" and not isinstance(error, Unavailable):
            _log.error("request %s failed", call.request_id, exc_info=error)
        return error.message if isinstance(error, AttndError) else type(error).__name__

    def _log(
        self,
        call: Call,
        model: str,
        outcome: str,
        timing: Timing | GenerateTiming,
        fields: Mapping[str, object],
        reason: str = "",
    ) -> None:
        if self._write_line is None:
            return
        line: dict[str, object] = {
            "request_id": call.request_id,
            "route": call.route,
            "model": model,
            "outcome": outcome,
            "total_seconds": round(timing.total_seconds, 6),
            "queue_seconds": round(timing.queue_seconds, 6),
            "compute_seconds": round(timing.compute_seconds, 6),
        }
        line |= fields
        if reason:
            line["error"] = reason
        self._write_line(line)
