"""Listens for HTTP, and drains. What a connection does is connection.py's."""

import asyncio
import contextlib
from email.utils import formatdate

from service.address import listening
from service.config import Settings
from service.gateway.app import Gateway
from service.gateway.connection import Connection
from service.gateway.exchange import Shared
from service.gateway.limits import Limits

_BACKLOG = 1024


class HttpServer:
    """Serves `gateway` on the settings' host and port; 0 takes any free one. Installs no signal handlers."""

    def __init__(self, gateway: Gateway, settings: Settings, *, limits: Limits | None = None) -> None:
        self._gateway = gateway
        self._host = settings.host
        self._port = settings.http_port
        self._grace_s = settings.drain_timeout
        self._limits = limits or Limits(max_body_bytes=settings.max_body_bytes)

    @property
    def num_connections(self) -> int:
        return len(self._shared.connections)

    async def start(self) -> int:
        """Listen; gives the port. Raises ConfigError when that fails."""
        loop = asyncio.get_running_loop()
        self._shared = Shared(self._gateway.entry, _date_line(), self._gateway.turned_away)
        with listening("HTTP", self._host, self._port):
            self._listener = await loop.create_server(
                lambda: Connection(self._shared, self._limits), self._host, self._port, backlog=_BACKLOG
            )
        self._sweeper = loop.create_task(self._sweep())
        port: int = self._listener.sockets[0].getsockname()[1]
        return port

    async def drain(self) -> None:
        """Refuse what comes from now on; returns once what was accepted is answered, or the grace is over.

        It keeps listening, so that probes read 503 and new requests get an answer that says to retry.
        """
        if not self._shared.is_draining:
            self._gateway.door.close()
            self._shared.is_draining = True
            self._drained_by = asyncio.get_running_loop().time() + self._grace_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._drained_by):
                await self._quiet()

    async def stop(self) -> None:
        """Drain, unless that is done, and close everything."""
        await self.drain()
        self._sweeper.cancel()
        self._listener.close()
        tasks = [connection.task for connection in self._shared.connections if connection.task is not None]
        for connection in list(self._shared.connections):
            connection.close()
        await asyncio.gather(*tasks, return_exceptions=True)  # cancelled with their connections
        await self._listener.wait_closed()

    async def _quiet(self) -> None:
        while any(connection.is_busy for connection in self._shared.connections):
            self._shared.changed.clear()
            await self._shared.changed.wait()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._limits.sweep_seconds)
            self._shared.date = _date_line()
            now = asyncio.get_running_loop().time()
            for connection in list(self._shared.connections):
                connection.sweep(now)


def _date_line() -> bytes:
    return f"date: {formatdate(usegmt=True)}\r\n".encode()
