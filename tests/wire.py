"""HTTP as bytes on a socket, for the tests that send what no client library would."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fakes import FakeBackend

from service.config import Settings
from service.gateway.app import Gateway, create_app
from service.gateway.limits import Limits
from service.gateway.server import HttpServer
from service.metrics import Metrics
from service.observed import Observed

GOOD = b'{"input": "a fine film"}'


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection. `read` takes the next reply off it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read(self, *, has_body: bool = True) -> Reply:
        async with asyncio.timeout(60):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await self._body(headers) if has_body else b""
            return Reply(int(first.split()[1]), headers, body)

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") != "chunked":
            return await self.reader.read()
        body = b""
        while size := int(await self.reader.readline(), 16):
            body += await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return body

    async def ask(self, method: str, path: str, body: bytes = b"", headers: str = "") -> Reply:
        await self.send(request(method, path, body, headers))
        return await self.read(has_body=method != "HEAD")

    async def is_closed(self) -> bool:
        """Whether the server hangs up. Waits for it, but not for long."""
        async with asyncio.timeout(60):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True

    async def close(self) -> None:
        self.writer.close()
        await asyncio.gather(self.writer.wait_closed(), return_exceptions=True)


def request(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """A request's bytes; `headers` are lines, each with its line end."""
    length = f"content-length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nhost: test\r\n{length}{headers}\r\n".encode() + body


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[Wire]:
    wire = Wire(*await asyncio.open_connection("127.0.0.1", port))
    try:
        yield wire
    finally:
        await wire.close()


async def ask(port: int, method: str, path: str, body: bytes = b"", headers: str = "") -> Reply:
    """One request on a connection of its own."""
    async with connect(port) as wire:
        return await wire.ask(method, path, body, headers)


async def classify(port: int, body: bytes = GOOD, headers: str = "") -> Reply:
    return await ask(port, "POST", "/v1/classify", body, headers)


@dataclass(frozen=True)
class Served:
    """A running gateway over a FakeBackend."""

    port: int
    backend: FakeBackend
    metrics: Metrics
    gateway: Gateway
    server: HttpServer

    def count(self, outcome: str, route: str = "/v1/classify", model: str = "") -> float:
        """How many requests the metrics have with this end."""
        labels = {"route": route, "model": model, "outcome": outcome}
        return self.metrics.registry.get_sample_value("attnd_request_seconds_count", labels) or 0.0


@asynccontextmanager
async def serve(backend: FakeBackend, *, limits: Limits | None = None, **settings: Any) -> AsyncIterator[Served]:
    """The gateway on a free port, with these settings over the defaults."""
    chosen = Settings(**{"http_port": 0, "drain_timeout": 5.0, **settings})
    metrics = Metrics(chosen.latency_buckets, {})
    gateway = create_app(Observed(backend, metrics), metrics, chosen)
    server = HttpServer(gateway, chosen, limits=limits)
    port = await server.start()
    try:
        yield Served(port, backend, metrics, gateway, server)
    finally:
        if isinstance(backend, FakeBackend):
            backend.release()
        await server.stop()
