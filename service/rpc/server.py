"""The gRPC port: carries the methods over grpc.aio, and drains.

What a method does is not its business, nor how messages look.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from service.config import Settings
from service.errors import AttndError, ConfigError, EngineFailed, TooLarge, Unavailable
from service.observed import Observed
from service.rpc import health, inference, reflection
from service.rpc.errors import DETAILS_KEY, rich_status, status_of
from service.rpc.methods import (
    REQUEST_ID,
    Context,
    Methods,
    Received,
    ServerStreaming,
    Streaming,
    Unary,
    request_id_of,
)

# A message over `max_body_bytes` gets our error and is counted up to this size; beyond, gRPC itself refuses it.
_MIN_READ_BYTES = 1_048_576
_OVERSIZE_FACTOR = 4

_END: Any = vars(grpc.aio)["EOF"]  # missing from its type stubs
_DRAINING = "draining"

_log = logging.getLogger("attnd.rpc")


class RpcServer:
    """attnd.v1.Inference, health and reflection on one port."""

    def __init__(self, backend: Observed, settings: Settings) -> None:
        self._settings = settings
        self._reading: set[asyncio.Task[Any]] = set()
        self._health = health.Health(backend, frozenset({inference.SERVICE}))
        services = (inference.SERVICE, health.SERVICE, *reflection.SERVICES)
        self._methods: Methods = {
            **inference.Inference(backend, settings).methods(),
            **self._health.methods(),
            **reflection.Reflection(services).methods(),
        }
        self._server: Any = None

    async def start(self) -> int:
        """Listen; the bound port. Raises ConfigError."""
        address = f"{self._settings.host}:{self._settings.grpc_port}"
        limit = self._settings.max_body_bytes
        options = (
            ("grpc.max_receive_message_length", max(limit * _OVERSIZE_FACTOR, _MIN_READ_BYTES)),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        )
        self._server = grpc.aio.server(options=options)
        self._server.add_generic_rpc_handlers((_Routes(self._methods, limit, self._reading),))
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(f"cannot listen on {address}", param="grpc_port") from None
        await self._server.start()
        return int(port)

    async def stop(self) -> None:
        """Say NOT_SERVING, refuse new calls, finish the accepted ones in `drain_timeout` seconds, then close."""
        self._health.drain()
        for task in list(self._reading):
            task.cancel(_DRAINING)
        if self._server is not None:
            await self._server.stop(self._settings.drain_timeout)


class _Routes(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    def __init__(self, methods: Methods, limit: int, reading: set[asyncio.Task[Any]]) -> None:
        self._handlers: dict[str, Any] = {}
        for path, method in methods.items():
            if isinstance(method, Unary):
                self._handlers[path] = grpc.unary_unary_rpc_method_handler(_unary(path, method, limit))
            elif isinstance(method, ServerStreaming):
                self._handlers[path] = grpc.unary_stream_rpc_method_handler(_server_streaming(path, method, limit))
            else:
                self._handlers[path] = grpc.stream_stream_rpc_method_handler(_streaming(path, method, limit, reading))

    def service(self, details: Any) -> Any:
        return self._handlers.get(details.method)


def _within(data: bytes, limit: int) -> Received:
    return data if len(data) <= limit else TooLarge(f"a message has at most {limit} bytes, got {len(data)}")


def _context(path: str, call: Any) -> Context:
    metadata = dict(call.invocation_metadata())
    left = call.time_remaining()
    now = time.monotonic()
    return Context(path, metadata, request_id_of(metadata), now, None if left is None else now + left)


async def _abort(call: Any, context: Context, error: Exception) -> None:
    if not isinstance(error, AttndError):
        _log.error("a call failed", exc_info=error)
        error = EngineFailed("internal error")
    await call.abort(status_of(error), error.message, (*_trailing(context), (DETAILS_KEY, rich_status(error))))


def _trailing(context: Context) -> tuple[tuple[str, str], ...]:
    """What goes out with the status; initial metadata would be one more operation a call."""
    return ((REQUEST_ID, context.request_id),)


def _unary(path: str, method: Unary, limit: int) -> Any:
    async def handle(data: bytes, call: Any) -> bytes:
        context = _context(path, call)
        call.set_trailing_metadata(_trailing(context))
        try:
            return await method.answer(_within(data, limit), context)
        except Exception as error:
            await _abort(call, context, error)
            raise

    return handle


async def _read(call: Any, reading: set[asyncio.Task[Any]]) -> Any:
    """The next message of a stream. Raises Unavailable when the server drains meanwhile."""
    task = asyncio.current_task()
    assert task is not None
    reading.add(task)
    try:
        return await call.read()
    except asyncio.CancelledError as cancelled:
        if cancelled.args != (_DRAINING,):
            raise
        raise Unavailable("the server is draining", code="draining") from None
    finally:
        reading.discard(task)


def _streaming(path: str, method: Streaming, limit: int, reading: set[asyncio.Task[Any]]) -> Any:
    async def handle(_: AsyncIterator[bytes], call: Any) -> None:
        async def received() -> AsyncIterator[Received]:
            while (data := await _read(call, reading)) is not _END:
                yield _within(data, limit)

        context = _context(path, call)
        await _send_all(method.answers(received(), context), call, context)

    return handle


def _server_streaming(path: str, method: ServerStreaming, limit: int) -> Any:
    async def handle(data: bytes, call: Any) -> None:
        context = _context(path, call)
        await _send_all(method.answers(_within(data, limit), context), call, context)

    return handle


async def _send_all(replies: AsyncGenerator[bytes, None], call: Any, context: Context) -> None:
    """Send every reply, then the status. The replies are closed here, at once, also when the caller leaves meanwhile.

    A handler that yielded them would stay open, until it is collected, when its call ends while a reply is being sent.
    """
    call.set_trailing_metadata(_trailing(context))
    try:
        async with aclosing(replies):
            async for reply in replies:
                await call.write(reply)
    except Exception as error:
        await _abort(call, context, error)
