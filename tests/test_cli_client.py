"""The command line's client of a server: errors, connections, whole texts."""

import asyncio
import time
from contextlib import aclosing

import pytest
import wire
from fakes import CHAT, FakeBackend, until

from service.cli.client import HttpClient
from service.domain import AttentionRequest, Call, Finish, GenerateRequest
from service.errors import AttndError, BundleError, Cancelled, ConfigError, EngineFailed, Overloaded
from service.gateway.errors import STATUS

PROMPT = GenerateRequest(prompt=("one two three",))
OURS = {AttndError, EngineFailed, BundleError, ConfigError, Cancelled}  # nothing that a caller can mend or wait for


def call(*, wants_tokens: bool = True) -> Call:
    return Call("id", "command line", time.monotonic() + 60, wants_tokens=wants_tokens)


def client_of(port: int) -> HttpClient:
    return HttpClient(f"http://127.0.0.1:{port}")


def port_of(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


async def text_of(client: HttpClient, call: Call) -> str:
    async with aclosing(client.generate(PROMPT, call)) as events:
        return "".join([event.text async for event in events])


@pytest.mark.parametrize("wants_tokens", [False, True])
@pytest.mark.parametrize("error_class", sorted(STATUS, key=str))
async def test_an_error_of_a_server_is_of_the_class_that_it_was_there(
    backend: FakeBackend, served: wire.Served, error_class: type[AttndError], wants_tokens: bool
) -> None:
    backend.served, backend.error = [CHAT], error_class("why not")
    async with aclosing(client_of(served.port)) as client:
        with pytest.raises(AttndError, match="why not") as caught:
            await text_of(client, call(wants_tokens=wants_tokens))
        assert caught.type is (AttndError if error_class in OURS else error_class)
        with pytest.raises(caught.type, match="why not"):
            await client.attention(AttentionRequest(text="a"), call())


async def test_a_full_queue_says_when_to_come_back(backend: FakeBackend, served: wire.Served) -> None:
    backend.served, backend.error = [CHAT], Overloaded("full", retry_after_s=0.25)
    async with aclosing(client_of(served.port)) as client:
        with pytest.raises(Overloaded) as caught:
            await text_of(client, call())
    assert caught.value.retry_after_s == 0.25


@pytest.mark.parametrize(
    ("header", "seconds"), [("retry-after: 7", 7), ("Retry-After: Fri, 31 Dec 1999 23:59:59 GMT", 1), ("x: y", 1)]
)
async def test_others_servers_say_when_to_come_back_too(header: str, seconds: float) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 429 Slow\r\n{header}\r\ncontent-length: 2\r\n\r\nno".encode())
        writer.close()

    async with (
        await asyncio.start_server(answer, "127.0.0.1", 0) as server,
        aclosing(client_of(port_of(server))) as client,
    ):
        with pytest.raises(Overloaded, match="status 429") as caught:
            await client.models()
    assert caught.value.retry_after_s == seconds


async def test_a_connection_is_used_again_while_it_is_open() -> None:
    """The server closes the first after its second reply without a word, and the second as its first reply says."""
    num_replies: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(num_replies)
        num_replies.append(0)
        for _ in range((2, 1, 1)[number]):
            await reader.readuntil(b"\r\n\r\n")
            says = b"connection: close\r\n" if number == 1 else b""
            writer.write(b'HTTP/1.1 200 OK\r\n%bcontent-length: 11\r\n\r\n{"data":[]}' % says)
            num_replies[number] += 1
        writer.close()

    async with (
        await asyncio.start_server(answer, "127.0.0.1", 0) as server,
        aclosing(client_of(port_of(server))) as client,
    ):
        for place in range(4):
            assert await client.models() == []
            if place == 1:
                await until(lambda: client._idle[0][0].at_eof())
    assert num_replies == [2, 1, 1]


async def test_a_generation_that_is_left_takes_its_connection_along(backend: FakeBackend, served: wire.Served) -> None:
    """Or its rest would be read as the next reply."""
    backend.served = [CHAT]
    async with aclosing(client_of(served.port)) as client:
        async with aclosing(client.generate(PROMPT, call())) as events:
            await anext(events)
        assert [model.id for model in await client.models()] == ["chat"]


async def test_whole_texts_are_not_asked_for_as_a_stream(backend: FakeBackend, served: wire.Served) -> None:
    backend.served = [CHAT]
    async with aclosing(client_of(served.port)) as client:
        streamed = await text_of(client, call())
        events = [event async for event in client.generate(PROMPT, call(wants_tokens=False))]
    assert events == [Finish(0, "stop", streamed)]
    assert [one.wants_tokens for one in backend.calls] == [True, False]
