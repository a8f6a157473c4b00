"""attnd.v1.Inference over a Backend: its methods, who may call them, and the order of a stream's replies.

Knows no transport (methods.py) and no field of a message (codec/).
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from service.config import Settings
from service.domain import Call, Progress
from service.errors import AttndError, EngineFailed, Unauthenticated
from service.observed import Observed
from service.rpc.codec import attend, classify, generate, models
from service.rpc.methods import Context, Methods, Received, ServerStreaming, Streaming, Unary
from service.rpc.together import together

SERVICE = "attnd.v1.Inference"
CLASSIFY = f"/{SERVICE}/Classify"
CLASSIFY_STREAM = f"/{SERVICE}/ClassifyStream"
ATTENTION = f"/{SERVICE}/Attention"
EXPLAIN = f"/{SERVICE}/Explain"
GENERATE = f"/{SERVICE}/Generate"
LIST_MODELS = f"/{SERVICE}/ListModels"

# Requests of one stream that may be open at once: enough to fill the engine's next batches, and no more than that, so
# that a fast sender is slowed down by flow control and never refused.
WINDOW = 256

# Replies to come, in order; None after the last.
_Replies = asyncio.Queue[asyncio.Task[bytes] | None]

AnyRequest = TypeVar("AnyRequest")

_log = logging.getLogger("attnd.rpc")


class Inference:
    def __init__(self, backend: Observed, settings: Settings) -> None:
        self._backend = backend
        self._timeout_s = settings.request_timeout
        self._authorization = f"Bearer {settings.api_key}".encode() if settings.api_key else b""

    def methods(self) -> Methods:
        return {
            CLASSIFY: Unary(self.classify),
            CLASSIFY_STREAM: Streaming(self.classify_stream),
            ATTENTION: ServerStreaming(self.attention),
            EXPLAIN: Unary(self.explain),
            GENERATE: ServerStreaming(self.generate),
            LIST_MODELS: Unary(self.list_models),
        }

    async def classify(self, received: Received, context: Context) -> bytes:
        call = self._call(context, context.request_id, context.begun)
        request = self._understood(received, context, call, classify.parse_request)
        return classify.classification_bytes(await self._backend.classify(request, call))

    async def explain(self, received: Received, context: Context) -> bytes:
        call = self._call(context, context.request_id, context.begun)
        request = self._understood(received, context, call, attend.parse_explain_request)
        return attend.explanation_bytes(await self._backend.explain(request, call))

    async def attention(self, received: Received, context: Context) -> AsyncGenerator[bytes, None]:
        """The summary, then each map in a message of its own, sent as fast as the caller takes them."""
        call = self._call(context, context.request_id, context.begun)
        request = self._understood(received, context, call, attend.parse_request)
        for message in attend.maps_bytes(await self._backend.attention(request, call)):
            yield message

    async def list_models(self, received: Received, context: Context) -> bytes:
        self._authenticate(context)
        return models.models_bytes(await self._backend.models())

    async def classify_stream(self, received: AsyncIterator[Received], context: Context) -> AsyncGenerator[bytes, None]:
        """Replies in the order of the requests, of which up to WINDOW are open at once."""
        try:
            self._authenticate(context)
        except AttndError as error:
            self._backend.rejected(self._call(context, context.request_id, context.begun), error)
            raise
        replies: _Replies = asyncio.Queue()
        window = asyncio.Semaphore(WINDOW)
        reader = asyncio.create_task(self._open_all(received, context, replies, window))
        task = None
        try:
            while (task := await replies.get()) is not None:
                yield await task
                window.release()
            await reader
        finally:
            await _abandon(reader, task, replies)

    async def generate(self, received: Received, context: Context) -> AsyncGenerator[bytes, None]:
        """The events of a generation, in one message those that came together."""
        call = self._call(context, context.request_id, context.begun)
        request, wants_tokens = self._understood(received, context, call, generate.parse_request)
        call = replace(call, wants_tokens=wants_tokens)
        async with aclosing(together(self._backend.generate(request, call))) as steps:
            async for events in steps:
                yield generate.events_bytes(events)

    async def _open_all(
        self, received: AsyncIterator[Received], context: Context, replies: _Replies, window: asyncio.Semaphore
    ) -> None:
        """Start on every message as it comes; what ends the messages is raised after the last reply's turn."""
        number = 0
        try:
            async for message in received:
                await window.acquire()
                replies.put_nowait(asyncio.create_task(self._reply(message, context, number)))
                number += 1
        finally:
            replies.put_nowait(None)

    async def _reply(self, received: Received, context: Context, number: int) -> bytes:
        """The reply to one message of a stream, whatever becomes of it."""
        call = self._call(context, f"{context.request_id}.{number}", time.monotonic())
        try:
            request = self._understood(received, context, call, classify.parse_stream_request)
            return classify.stream_result(await self._backend.classify(request, call))
        except AttndError as error:
            return classify.stream_error(error)
        except Exception:
            _log.exception("request %s failed", call.request_id)
            return classify.stream_error(EngineFailed("internal error"))

    def _call(self, context: Context, request_id: str, begun: float) -> Call:
        deadline = begun + self._timeout_s
        if context.deadline is not None:
            deadline = min(deadline, context.deadline)
        return Call(request_id, context.path, deadline, Progress(begun))

    def _understood(
        self, received: Received, context: Context, call: Call, parse: Callable[[bytes], AnyRequest]
    ) -> AnyRequest:
        """The request in a message, or the error that it has none, counted."""
        try:
            self._authenticate(context)
            if isinstance(received, AttndError):
                raise received
            return parse(received)
        except AttndError as error:
            self._backend.rejected(call, error)
            raise

    def _authenticate(self, context: Context) -> None:
        if not self._authorization:
            return
        given = context.metadata.get("authorization", "")
        if not hmac.compare_digest(given.encode(), self._authorization):
            reason = "is not valid" if given else "is missing"
            raise Unauthenticated(f"the API key {reason}: send metadata authorization: Bearer KEY")


async def _abandon(reader: asyncio.Task[None], task: asyncio.Task[bytes] | None, replies: _Replies) -> None:
    """Cancel what a stream still has open, and wait until it has ended. Nothing is open after a regular end."""
    still_open: list[asyncio.Task[Any]] = [reader]
    while task is not None or not replies.empty():
        if task is not None:
            still_open.append(task)
        task = None if replies.empty() else replies.get_nowait()
    for each in still_open:
        each.cancel()
    await asyncio.gather(*still_open, return_exceptions=True)
