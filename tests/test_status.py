"""The status server over a real socket, asked by an HTTP client."""

import asyncio
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import httpx
import pytest
from fakes import FakeBackend, until
from processes import needs_ipv6

from service import status
from service.domain import ModelInfo
from service.errors import ConfigError, Unavailable
from service.metrics import Metrics
from service.status import StatusServer

Ask = Callable[..., Awaitable[httpx.Response]]
Start = Callable[..., Awaitable[tuple[StatusServer, Ask]]]


@pytest.fixture
async def start(backend: FakeBackend) -> AsyncIterator[Start]:
    """Starts a server, and gives what asks it."""
    async with AsyncExitStack() as stack:

        async def start(*, host: str = "127.0.0.1", port: int = 0) -> tuple[StatusServer, Ask]:
            server = StatusServer(backend, Metrics((1.0,), {"version": "1.2.3"}), host=host, port=port)
            bound = server.start()
            stack.push_async_callback(server.stop)
            address = f"[{host}]" if ":" in host else host
            client = httpx.AsyncClient(base_url=f"http://{address}:{bound}")
            asking = await stack.enter_async_context(client)
            return server, lambda path, method="GET": asking.request(method, path)

        yield start


async def test_it_is_alive_and_ready(start: Start) -> None:
    _, get = await start()
    assert ((await get("/healthz")).status_code, (await get("/healthz")).json()) == (200, {"status": "alive"})
    assert ((await get("/readyz")).status_code, (await get("/readyz")).json()) == (200, {"status": "ready"})
    assert (await get("/readyz?verbose")).status_code == 200


async def test_while_the_backend_cannot_serve_it_is_alive_and_not_ready(start: Start, backend: FakeBackend) -> None:
    _, get = await start()
    backend.unready = Unavailable("the models are being loaded", code="loading")
    reply = await get("/readyz")
    assert reply.status_code == 503
    assert reply.json() == {"status": "unavailable", "reason": "the models are being loaded"}
    assert (await get("/healthz")).status_code == 200


async def test_with_a_dead_engine_it_is_not_alive(start: Start, backend: FakeBackend) -> None:
    _, get = await start()
    backend.failure = "the engine of tiny has failed"
    reply = await get("/healthz")
    assert (reply.status_code, reply.json()) == (503, {"status": "unavailable", "reason": backend.failure})


async def test_while_it_drains_it_is_alive_and_not_ready(start: Start) -> None:
    server, get = await start()
    await server.drain()
    reply = await get("/readyz")
    assert (reply.status_code, reply.json()["reason"]) == (503, "the server is draining")
    assert (await get("/healthz")).status_code == 200
    assert (await get("/metrics")).status_code == 200


async def test_a_backend_that_does_not_answer_is_not_ready_and_is_not_asked_on(
    start: Start, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = asyncio.Event()

    async def models() -> list[ModelInfo]:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()
        return []

    monkeypatch.setattr(status, "READY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(backend, "models", models)
    _, get = await start()
    reply = await get("/readyz")
    assert (reply.status_code, reply.json()["reason"]) == (503, "the event loop does not answer")
    await asyncio.wait_for(given_up.wait(), 5)


async def test_a_head_is_that_of_a_get_alone(start: Start) -> None:
    _, get = await start()
    reply, whole = await get("/healthz", method="HEAD"), await get("/healthz")
    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["content-length"] == whole.headers["content-length"]
    assert (await get("/nothing", method="HEAD")).status_code == 404


async def test_a_client_that_resets_is_let_go_without_a_word(
    start: Start, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    _, get = await start()
    port = (await get("/healthz")).url.port
    for request in (b"", b"GET /metrics HTTP/1.1\r\n\r\n"):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.sendall(request)
    assert (await get("/healthz")).status_code == 200
    await until(lambda: not [one for one in threading.enumerate() if "process_request_thread" in one.name])
    assert (capfd.readouterr().err, caplog.records) == ("", [])


async def test_a_failure_of_our_own_is_logged(
    start: Start, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "models", None)
    _, get = await start()
    with pytest.raises(httpx.RemoteProtocolError):
        await get("/readyz")
    await until(lambda: "a request for health or metrics failed" in caplog.text)
    assert "TypeError" in caplog.text


async def test_metrics_are_told(start: Start) -> None:
    _, get = await start()
    reply = await get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    assert 'version="1.2.3"' in reply.text


async def test_there_is_nothing_else(start: Start) -> None:
    _, get = await start()
    reply = await get("/v1/models")
    assert reply.status_code == 404
    assert "/readyz" in reply.text


@needs_ipv6
async def test_it_listens_on_ipv6(start: Start) -> None:
    _, get = await start(host="::1")
    assert (await get("/healthz")).status_code == 200


async def test_a_taken_port_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen for health and metrics on 127.0.0.1:{taken}: "):
            await start(port=taken)
