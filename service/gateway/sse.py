"""A reply of server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html

Knows no dialect. The head goes out with the first event, so that whatever fails before that is a plain status.
"""

import asyncio
from collections.abc import Iterable

from service.gateway.exchange import Send

DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"  # a comment, which clients skip

_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back otherwise
)


def event(data: bytes) -> bytes:
    """`data` is JSON, and so without line ends."""
    return b"data: %b\n\n" % data


class EventStream:
    """`open`, `write`s, then `close`, or `abandon` without. Comments keep a quiet connection from being cut."""

    def __init__(self, send: Send, *, ping_seconds: float) -> None:
        """At least every `2 * ping_seconds` something is sent, and no comment sooner than `ping_seconds` after it."""
        self._send = send
        self._ping_seconds = ping_seconds
        self._pinging: asyncio.Task[None] | None = None
        self._is_quiet = True

    async def open(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})
        self._pinging = asyncio.get_running_loop().create_task(self._ping())

    async def write(self, data: bytes) -> None:
        """Whole events, if any. Waits while the client does not read."""
        if data:
            self._is_quiet = False
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self, data: bytes) -> None:
        """The last events, and the end of the reply."""
        self.abandon()
        await self._send({"type": "http.response.body", "body": data})

    def abandon(self) -> None:
        if self._pinging is not None:
            self._pinging.cancel()

    async def _ping(self) -> None:
        while True:
            self._is_quiet = True
            await asyncio.sleep(self._ping_seconds)
            if self._is_quiet:
                await self._send({"type": "http.response.body", "body": _PING, "more_body": True})
