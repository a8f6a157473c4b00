"""The gRPC port: carries the methods over the core's calls, and drains.

What a method does is not its business, nor how messages look.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from grpc import StatusCode

from service.address import address_text, addresses_of, listening
from service.config import Settings
from service.errors import (
    AttndError,
    Cancelled,
    EngineFailed,
    InvalidRequest,
    TooLarge,
    Unavailable,
    Unsupported,
)
from service.observed import Observed
from service.rpc import health, inference, reflection
from service.rpc.core import Call, MessageRefused, Metadata, Port
from service.rpc.errors import DETAILS_KEY, rich_status, status_of, told
from service.rpc.methods import (
    REQUEST_ID,
    Context,
    Methods,
    Received,
    ServerStreaming,
    Unary,
    request_id_of,
)

# A message over `max_body_bytes` gets our error and is counted up to this size; beyond, gRPC itself refuses it.
_MIN_READ_BYTES = 1_048_576
_OVERSIZE_FACTOR = 4

_SHOWN = 128  # characters of a path that an error repeats
_DRAINING = "draining"
_LEAVING_S = 0.01  # that a caller has left, the core may tell a moment after it told that there is no message
_LAST_WORDS_S = 0.5  # to send what calls have ended with in the meantime

_log = logging.getLogger("attnd.rpc")


class RpcServer:
    """attnd.v1.Inference, health and reflection on one port."""

    def __init__(self, backend: Observed, settings: Settings) -> None:
        self._backend = backend
        self._settings = settings
        self._reading: set[asyncio.Task[Any]] = set()
        self._tasks: set[asyncio.Future[Any]] = set()
        self._health = health.Health(backend, frozenset({inference.SERVICE}))
        services = (inference.SERVICE, health.SERVICE, *reflection.SERVICES)
        self._methods: Methods = {
            **inference.Inference(backend, settings).methods(),
            **self._health.methods(),
            **reflection.Reflection(services).methods(),
        }
        self._port: Port | None = None

    async def start(self) -> int:
        """Listen on every address of the host; the bound port. Raises ConfigError."""
        options = (
            ("grpc.max_receive_message_length", max(self._settings.max_body_bytes * _OVERSIZE_FACTOR, _MIN_READ_BYTES)),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # else another server could have the same port, and a part of the calls
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        )
        port, bound = Port(self._accept, options), self._settings.grpc_port
        with listening("gRPC", self._settings.host, bound):
            for host in await addresses_of(self._settings.host):
                bound = port.bind(address_text(host, bound))
        port.start()
        self._port = port
        return bound

    async def drain(self) -> None:
        """Say NOT_SERVING, refuse new calls; returns once the accepted ones are answered, or the grace is over."""
        self._health.drain()
        for task in list(self._reading):
            task.cancel(_DRAINING)
        if self._port is not None:
            await self._port.drain(self._settings.drain_timeout)

    async def stop(self) -> None:
        """Drain, unless that is done, and close everything."""
        if not self._health.is_draining:
            await self.drain()
        port, self._port = self._port, None
        if port is not None:
            await port.stop(_LAST_WORDS_S)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            port.close()

    def _accept(self, call: Call) -> None:
        """Answer in a task, which a caller that leaves cancels."""
        answering, left = asyncio.create_task(self._answer(call)), call.left()
        left.add_done_callback(lambda left: left.result() and answering.cancel())
        for each in (answering, left):
            self._tasks.add(each)
            each.add_done_callback(self._tasks.discard)

    async def _answer(self, call: Call) -> None:
        context = Context(call.path, call.metadata, request_id_of(call.metadata), call.begun, call.deadline)
        method = self._methods.get(call.path)
        try:
            if method is None:
                raise self._no_method(context)
            if isinstance(method, Unary):
                reply = await method.answer(await self._received(call), context)
                await call.finish(StatusCode.OK, "", _trailing(context), message=reply)
            elif isinstance(method, ServerStreaming):
                await _send_all(method.answers(await self._received(call), context), call, context)
            else:
                await _send_all(method.answers(self._all_received(call), context), call, context)
        except Exception as error:
            await _fail(call, context, error)

    def _no_method(self, context: Context) -> Unsupported:
        """What to tell who calls a method that there is not; counted."""
        error = Unsupported(f"there is no method {context.path[:_SHOWN]}", code="method_not_found")
        self._backend.turned_away(context.request_id, context.begun, error)
        return error

    async def _received(self, call: Call) -> Received:
        """The one message of a call, or why there is none, for the method to count."""
        try:
            if (data := await call.read()) is None:
                await asyncio.sleep(_LEAVING_S)
        except MessageRefused:
            return self._refused()
        except asyncio.CancelledError:  # as `_accept` says that the caller has left
            return Cancelled("the caller left before its message was here")
        return InvalidRequest("the call has no message") if data is None else self._within(data)

    async def _all_received(self, call: Call) -> AsyncIterator[Received]:
        try:
            while (data := await self._read(call)) is not None:
                yield self._within(data)
        except MessageRefused:
            yield self._refused()

    def _refused(self) -> TooLarge:
        """For the method to count; the caller has been told already, by gRPC."""
        limit = self._settings.max_body_bytes
        return TooLarge(f"gRPC itself refused the message as too large, one has at most {limit} bytes")

    def _within(self, data: bytes) -> Received:
        limit = self._settings.max_body_bytes
        return data if len(data) <= limit else TooLarge(f"a message has at most {limit} bytes, got {len(data)}")

    async def _read(self, call: Call) -> bytes | None:
        """The next message of a stream. Raises Unavailable when the server drains meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        self._reading.add(task)
        try:
            return await call.read()
        except asyncio.CancelledError as cancelled:
            if cancelled.args != (_DRAINING,):
                raise
            raise Unavailable("the server is draining", code="draining") from None
        finally:
            self._reading.discard(task)


async def _fail(call: Call, context: Context, error: Exception) -> None:
    if not isinstance(error, AttndError):
        _log.error("a call failed", exc_info=error)
        error = EngineFailed("internal error")
    message, _ = told(error)
    await call.finish(status_of(error), message, (*_trailing(context), (DETAILS_KEY, rich_status(error))))


def _trailing(context: Context) -> Metadata:
    """What goes out with the status; initial metadata would be one more operation a call."""
    return ((REQUEST_ID, context.request_id),)


async def _send_all(replies: AsyncGenerator[bytes, None], call: Call, context: Context) -> None:
    """Send every reply, then the status. They are closed here, at once, also when the caller leaves meanwhile."""
    async with aclosing(replies):
        async for reply in replies:
            await call.write(reply)
    await call.finish(StatusCode.OK, "", _trailing(context))
