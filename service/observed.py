"""Counts, times and logs every request where it crosses the seam, whatever its end; and nowhere else.

A request that never became one (bad JSON, wrong key, too many bytes) is reported by the edge with `rejected`.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from service.backend import Backend
from service.domain import Call, Classification, ClassifyRequest, ModelInfo, Timing, Usage
from service.errors import (
    AttndError,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from service.metrics import Metrics

Log = Callable[[dict[str, object]], None]

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
}

_log = logging.getLogger("attnd.requests")


def outcome_of(error: BaseException) -> str:
    """The `outcome` label of a request that ended with `error`."""
    return _OUTCOMES.get(type(error), "error")


class Observed:
    """A Backend that passes everything on and misses nothing."""

    def __init__(self, backend: Backend, metrics: Metrics, *, log: Log | None = None) -> None:
        """`log` gets the fields of one line a request."""
        self._backend = backend
        self._metrics = metrics
        self._write_line = log
        self._models: list[ModelInfo] = []

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        in_flight = self._metrics.in_flight_of(call.route)
        in_flight.inc()
        try:
            result = await self._backend.classify(request, call)
        except BaseException as error:
            self._failed(call, error, self._known(request.model, "classification"))
            raise
        finally:
            in_flight.dec()
        self._metrics.observe_request(call.route, result.model, "ok", result.timing)
        self._metrics.observe_prompt(call.route, result.model, result.usage.prompt_tokens)
        self._log(call, result.model, "ok", result.timing, inputs=len(result.results), usage=result.usage)
        return result

    async def models(self) -> list[ModelInfo]:
        self._models = await self._backend.models()
        return self._models

    async def aclose(self) -> None:
        await self._backend.aclose()

    def rejected(self, call: Call, error: AttndError) -> None:
        """Count a request that failed before it could be understood."""
        self._failed(call, error, "")

    def _known(self, wanted: str | None, task: str) -> str:
        """A label that only takes names of served models, whatever callers send."""
        for model in self._models:
            if model.id == wanted or (wanted is None and model.task == task):
                return model.id
        return ""

    def _failed(self, call: Call, error: BaseException, model: str) -> None:
        outcome = outcome_of(error)
        timing = call.progress.timing(time.monotonic())
        self._metrics.observe_request(call.route, model, outcome, timing)
        if outcome == "error" and not isinstance(error, Unavailable):
            _log.error("request %s failed", call.request_id, exc_info=error)
        reason = error.message if isinstance(error, AttndError) else type(error).__name__
        self._log(call, model, outcome, timing, error=reason)

    def _log(
        self,
        call: Call,
        model: str,
        outcome: str,
        timing: Timing,
        *,
        inputs: int = 0,
        usage: Usage | None = None,
        error: str = "",
    ) -> None:
        if self._write_line is None:
            return
        fields: dict[str, object] = {
            "request_id": call.request_id,
            "route": call.route,
            "model": model,
            "outcome": outcome,
            "total_seconds": round(timing.total_seconds, 6),
            "queue_seconds": round(timing.queue_seconds, 6),
            "compute_seconds": round(timing.compute_seconds, 6),
        }
        if usage is not None:
            fields |= {"inputs": inputs, "prompt_tokens": usage.prompt_tokens, "truncated": usage.truncated}
        if error:
            fields["error"] = error
        self._write_line(fields)
