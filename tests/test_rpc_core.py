"""The core's calls and port by themselves, asked by gRPC's own client."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fakes import until
from grpc import StatusCode

from service.rpc.core import MAX_UNSENT_BYTES, Call, Port

Answer = Callable[[Call], Awaitable[None]]


@asynccontextmanager
async def answering(answer: Answer, *, grace_s: float = 0.0) -> AsyncIterator[Any]:
    """A method of a channel to a port that answers every call so; closed as the server does it."""
    open_: set[asyncio.Future[Any]] = set()

    def accept(call: Call) -> None:
        answered, left = asyncio.ensure_future(answer(call)), call.left()
        left.add_done_callback(lambda left: left.result() and answered.cancel())
        open_.update((answered, left))

    port = Port(accept, ())
    address = f"127.0.0.1:{port.bind('127.0.0.1:0')}"
    port.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel.stream_stream("/a.B/C")
    finally:
        await port.drain(grace_s)
        await port.stop(0.0)
        await asyncio.gather(*open_, return_exceptions=True)
        port.close()


async def test_messages_come_in_the_order_they_were_written_and_before_the_status() -> None:
    async def answer(call: Call) -> None:
        for number in range(500):
            await call.write(b"%d" % number)
        await call.finish(StatusCode.OK, "", (("seen", "all"),), message=b"last")

    async with answering(answer) as method:
        stream = method(timeout=10)
        assert [message async for message in stream] == [*(b"%d" % number for number in range(500)), b"last"]
        assert dict(await stream.trailing_metadata())["seen"] == "all"


async def test_every_message_is_read_and_then_none() -> None:
    async def answer(call: Call) -> None:
        while (message := await call.read()) is not None:
            await call.write(message)
        await call.finish(StatusCode.OK, "", ())

    sent = [b"%d" % number for number in range(500)]
    async with answering(answer) as method:
        assert [message async for message in method(iter(sent), timeout=10)] == sent


async def test_a_writer_waits_while_the_caller_takes_none() -> None:
    written: list[bytes] = []
    piece = bytes(MAX_UNSENT_BYTES // 4)

    async def answer(call: Call) -> None:
        for _ in range(4000):
            written.append(piece)
            await call.write(piece)
        await call.finish(StatusCode.OK, "", ())

    async with answering(answer) as method:
        stream = method(timeout=10)
        await stream.read()
        before = -1
        while len(written) > before:  # the network's own buffers fill first
            before = len(written)
            await asyncio.sleep(0.1)
        assert len(written) < 4000
        stream.cancel()


async def test_a_call_that_is_left_drops_what_was_not_sent() -> None:
    has_left: list[bool] = []

    async def answer(call: Call) -> None:
        try:
            while True:
                await call.write(bytes(MAX_UNSENT_BYTES))
        except asyncio.CancelledError:
            has_left.append(True)
            raise

    async with answering(answer) as method:
        stream = method(timeout=10)
        await stream.read()
        stream.cancel()
        await until(lambda: has_left == [True])


async def test_a_port_that_stops_cancels_the_calls_that_remain() -> None:
    held = asyncio.Event()

    async def answer(call: Call) -> None:
        await call.write(b"begun")
        for _ in range(8):
            await call.write(bytes(MAX_UNSENT_BYTES // 8))  # more than the caller takes unasked
        await held.wait()

    async with answering(answer) as method:
        stream = method(timeout=10)
        assert await stream.read() == b"begun"
    assert await stream.code() == StatusCode.CANCELLED


@pytest.mark.parametrize("name", ["127.0.0.1:{}", "no..name:{}"])
async def test_a_port_that_cannot_be_bound_is_an_error_that_names_it(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = name.format(listener.getsockname()[1])
        with pytest.raises(OSError, match=address):
            Port(lambda call: None, ()).bind(address)
