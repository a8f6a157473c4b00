"""Streams on real sockets and both event loops: clients that leave, do not read, speak HTTP/1.0 or send garbage."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from unittest.mock import Mock

import orjson
import pytest
import wire
from fakes import CHAT, MODEL, FakeBackend, until
from wire import connect, request

from service.domain import (
    Call,
    End,
    Event,
    Finish,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    Start,
    Token,
)
from service.gateway import sse
from service.gateway.connection import Connection
from service.gateway.exchange import Message, Shared
from service.gateway.limits import Limits

PATHS = ["/v1/generate", "/v1/completions", "/v1/chat/completions"]


def body(path: str, text: str = "a b", *, stream: bool = True) -> bytes:
    prompt = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    return orjson.dumps(prompt | {"stream": stream})


class EndlessBackend(FakeBackend):
    """Streams of `step` tokens at a time that end when their client is gone; `num_tokens` bounds them, if set."""

    def __init__(self, text: str, *, step: int = 1, num_tokens: int | None = None) -> None:
        super().__init__()
        self.served = [MODEL, CHAT]
        self.text = text
        self.step = step
        self.num_tokens = num_tokens
        self.num_sent = 0

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        try:
            yield Start("chat", 1)
            while self.num_sent != self.num_tokens:
                self.num_sent += 1
                yield Token(0, 1, self.text)
                if self.num_sent % self.step == 0:
                    await asyncio.sleep(0.001)
            yield Finish(0, "stop")
            yield End(GenerateUsage(1, self.num_sent, 0), GenerateTiming(0, 0, 0, 0, 0, 0))
        except (GeneratorExit, asyncio.CancelledError):
            self.num_cancelled += 1
            raise


@pytest.fixture
async def served(backend: FakeBackend) -> AsyncIterator[wire.Served]:
    """A gateway with small limits, which must still generate and classify when the test is over."""
    backend.served = [MODEL, CHAT]
    async with wire.serve(backend, limits=Limits(max_body_bytes=10_000)) as served:
        yield served
        backend.release()
        for path in PATHS:
            assert (await wire.ask(served.port, "POST", path, body(path, stream=False))).status == 200
        assert (await wire.classify(served.port)).status == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_before_the_first_token(served: wire.Served, path: str, stream: bool) -> None:
    served.backend.hold()
    async with connect(served.port) as client:
        await client.send(request("POST", path, body(path, stream=stream)))
        await until(lambda: served.backend.num_waiting == 1)
    await until(lambda: served.backend.num_cancelled == 1)
    assert served.backend.num_waiting == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_in_the_middle_closes_the_generator(path: str, stream: bool) -> None:
    backend = EndlessBackend("x")
    async with wire.serve(backend) as served:
        async with connect(served.port) as client:
            await client.send(request("POST", path, body(path, stream=stream)))
            if stream:
                await client.reader.readuntil(b"x")
            await until(lambda: backend.num_sent > 3)
        await until(lambda: backend.num_cancelled == 1)
        num_sent = backend.num_sent
        assert (await wire.classify(served.port)).status == 200
        assert backend.num_sent == num_sent
        assert served.count("cancelled", path, "chat") == 1


async def test_a_client_that_does_not_read_is_dropped_and_its_generator_closed() -> None:
    backend = EndlessBackend("x" * 50_000)
    limits = Limits(max_body_bytes=10_000, stalled_seconds=0.2, sweep_seconds=0.05)
    async with wire.serve(backend, limits=limits) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
        writer.write(request("POST", "/v1/generate", body("/v1/generate")))
        await until(lambda: backend.num_cancelled == 1)
        assert served.server.num_connections == 0
        await wire.Wire(reader, writer).close()


async def test_a_client_that_reads_late_gets_all() -> None:
    backend = EndlessBackend("y" * 50_000, step=50, num_tokens=100)  # 5 MB: more than sockets and buffers hold
    async with wire.serve(backend) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
        writer.write(request("POST", "/v1/completions", body("/v1/completions")))
        await until(lambda: backend.num_sent > 1)
        reply = await wire.Wire(reader, writer).read()
        assert reply.body.count(b"y") == 100 * 50_000
        assert reply.body.endswith(b"data: [DONE]\n\n")
        await wire.Wire(reader, writer).close()


async def test_tokens_that_are_ready_together_leave_together() -> None:
    """Seen from outside: nothing of a step of tokens arrives alone."""
    backend = EndlessBackend("x", step=4, num_tokens=8)
    async with wire.serve(backend) as served, connect(served.port) as client:
        writes: list[bytes] = []

        def spy() -> None:
            (connection,) = served.server._shared.connections
            transport = connection._transport  # type: ignore[attr-defined]

            class Spied:
                def write(self, data: bytes) -> None:
                    writes.append(data)
                    transport.write(data)

                def __getattr__(self, name: str) -> object:
                    return getattr(transport, name)

            connection._transport = Spied()  # type: ignore[attr-defined]

        await client.ask("GET", "/healthz")
        spy()
        await client.ask("POST", "/v1/generate", body("/v1/generate"))
    assert [data.count(b'"token"') for data in writes] == [4, 4, 0]
    assert writes[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert writes[-1].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("path", PATHS)
async def test_requests_after_a_stream_on_its_connection(served: wire.Served, path: str) -> None:
    async with connect(served.port) as client:
        await client.send(request("POST", path, body(path)) * 2 + request("POST", "/v1/classify", wire.GOOD))
        for _ in range(2):
            reply = await client.read()
            assert "connection" not in reply.headers
            assert reply.headers["transfer-encoding"] == "chunked"
            assert reply.body.endswith(b"\n\ndata: [DONE]\n\n")
        assert (await client.read()).json["model"] == "sentiment"
        assert (await client.ask("POST", path, body(path))).status == 200


@pytest.mark.parametrize("path", PATHS)
async def test_a_connection_lasts_after_a_stream_that_failed(served: wire.Served, path: str) -> None:
    served.backend.error, served.backend.error_after = RuntimeError("broken"), 1
    async with connect(served.port) as client:
        reply = await client.ask("POST", path, body(path))
        assert b'data: {"error":{' in reply.body
        assert b"[DONE]" not in reply.body
        served.backend.error = None
        assert (await client.ask("POST", path, body(path))).body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("header", ["", "connection: keep-alive\r\n"])
async def test_http_1_0_ends_a_stream_by_closing(served: wire.Served, path: str, header: str) -> None:
    async with connect(served.port) as client:
        await client.send(request("POST", path, body(path), header).replace(b"HTTP/1.1", b"HTTP/1.0"))
        reply = await client.read()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert "transfer-encoding" not in reply.headers
        assert reply.body.startswith(b"data: ")
        assert reply.body.endswith(b"data: [DONE]\n\n")


async def test_a_client_may_ask_to_close_after_a_stream(served: wire.Served) -> None:
    async with connect(served.port) as client:
        reply = await client.ask("POST", PATHS[0], body(PATHS[0]), "connection: close\r\n")
        assert reply.headers["connection"] == "close"
        assert await client.is_closed()


GARBAGE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"a"',
    b"\x00\xff\xfe",
    b'{"prompt": NaN}',
    b'{"prompt": "\\ud800"}',
    b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b"[" * 5000,
    b'{"messages":' * 500,
    b'{"n": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("path", PATHS)
async def test_garbage_bodies(served: wire.Served, path: str) -> None:
    for garbage in GARBAGE:
        reply = await wire.ask(served.port, "POST", path, garbage)
        assert reply.status == (422 if path == "/v1/generate" else 400), garbage
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}
        assert len(reply.body) < 1000
    assert served.backend.generations == []
    assert served.count("invalid", path) == len(GARBAGE)


@pytest.mark.parametrize("path", PATHS)
async def test_a_huge_body(served: wire.Served, path: str) -> None:
    reply = await wire.ask(served.port, "POST", path, body(path, "x" * 10_000))
    assert (reply.status, reply.json["error"]["code"]) == (413, "body_too_large")


async def test_many_bad_items_cost_one_record(backend: FakeBackend) -> None:
    async with wire.serve(backend) as served:
        for path, field in (("/v1/completions", "prompt"), ("/v1/chat/completions", "messages")):
            reply = await wire.ask(served.port, "POST", path, b'{"%b": [%b{}]}' % (field.encode(), b"{}," * 500_000))
            assert reply.status in (400, 413)
            assert len(reply.body) < 1000


async def test_many_streams_at_once_keep_apart(served: wire.Served) -> None:
    async def one(number: int) -> bool:
        reply = await wire.ask(served.port, "POST", PATHS[0], body(PATHS[0], f"w{number} " * 5))
        return reply.body.count(b'"text":"w%d "' % number) == 5 and reply.body.count(b'"text":"w') == 5

    assert all(await asyncio.gather(*(one(number) for number in range(50))))


async def test_a_writer_that_gives_up_does_not_take_another_with_it() -> None:
    """A stream's keep-alive comments may wait for the same slow reader as its tokens do."""
    connection = Connection(Shared(app=None, date=b"", turned_away=None), Limits(max_body_bytes=1))  # type: ignore[arg-type]
    connection.connection_made(Mock(**{"get_extra_info.return_value": ("127.0.0.1", 1)}))
    connection.pause_writing()
    first, second = (asyncio.ensure_future(connection.write(b"x", is_last=False)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    connection.resume_writing()
    await second
    assert first.cancelled()


async def test_a_quiet_stream_is_kept_alive_with_comments() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    stream = sse.EventStream(send, ping_seconds=0.005)
    await stream.open()
    await stream.write(sse.event(b"1"))
    await until(lambda: len(sent) >= 4)
    await stream.write(b"")
    await stream.close(sse.DONE)
    num_sent = len(sent)
    await asyncio.sleep(0.02)
    bodies = [message["body"] for message in sent[1:]]
    assert bodies[0] == b"data: 1\n\n"
    assert set(bodies[1:-1]) == {b": ping\n\n"}
    assert (bodies[-1], len(sent)) == (b"data: [DONE]\n\n", num_sent)
    assert [message.get("more_body", False) for message in sent[1:]] == [True] * len(bodies[:-1]) + [False]
