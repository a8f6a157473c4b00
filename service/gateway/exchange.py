"""One HTTP request and the reply to it, as ASGI: what an app receives and sends, and the bytes that makes.

Knows no socket: a `Link` takes the bytes.
"""

import asyncio
import logging
import random
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

from service.errors import AttndError, TooLarge
from service.gateway.errors import Failure, headers_of, native_body

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
TurnedAway = Callable[[str, float, AttndError], None]  # a request's id, when it began, and why no app saw it

BEGUN = "attnd.begun"  # key of an ASGI scope: when the request's first byte came, as `time.monotonic` says

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
STATUS_LINES[499] = b"HTTP/1.1 499 Client Closed Request\r\n"

_VALID_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}").fullmatch

_log = logging.getLogger("attnd.http")


def request_id_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The client's own where it is a fit one, else a new one."""
    given = headers.get(b"x-request-id")
    return given if given and _VALID_ID(given) else b"%032x" % random.getrandbits(128)


def refusal(failure: Failure, request_id: bytes, date: bytes) -> bytes:
    """The reply to what is not a request, after which the connection ends."""
    body = native_body(failure)
    headers = [*headers_of(failure, body), (b"x-request-id", request_id), (b"connection", b"close")]
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    return b"%b%b%b\r\n%b" % (STATUS_LINES[failure.status], date, lines, body)


class Link(Protocol):
    """What a connection is to its exchanges and to its server."""

    task: asyncio.Task[None] | None

    @property
    def is_busy(self) -> bool: ...

    async def write(self, data: bytes, *, is_last: bool) -> None:
        """Pass `data` on, soon; at once when it is the `is_last` of a reply. Waits while the client does not read."""
        ...

    def exchange_ended(self, exchange: "Exchange") -> None: ...

    def sweep(self, now: float) -> None: ...

    def close(self) -> None: ...


@dataclass
class Shared:
    """What a server's connections share. `date` is the Date header's line, renewed by the server.

    `turned_away` counts the requests that never come to `app`.
    """

    app: App
    date: bytes
    turned_away: TurnedAway
    is_draining: bool = False
    connections: set[Link] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Exchange:
    """One request and the reply to it. `refusal` is why the request was not read to its end."""

    __slots__ = (
        "_chunked",
        "_head",
        "_is_head",
        "_is_read",
        "_link",
        "_shared",
        "body",
        "is_complete",
        "keep_alive",
        "refusal",
        "scope",
    )

    def __init__(
        self, link: Link, shared: Shared, scope: Scope, body: bytes, keep_alive: bool, refusal: TooLarge | None
    ):
        self._link = link
        self._shared = shared
        self.scope = scope
        self.body = body
        self.keep_alive = keep_alive
        self.refusal = refusal
        self.is_complete = False
        self._is_read = False
        self._is_head = scope["method"] == "HEAD"  # the app may see another method
        self._head: bytes | None = None
        self._chunked = False

    async def run(self) -> None:
        """Have the app answer; an app that fails to, loses its client."""
        try:
            await self._shared.app(self.scope, self.receive, self.send)
        except Exception:
            _log.exception("the app failed on %s %s", self.scope["method"], self.scope["path"])
        finally:
            self._link.exchange_ended(self)

    async def receive(self) -> Message:
        """The whole body as one message, once. Raises the refusal, if there is one."""
        if self.refusal is not None:
            raise self.refusal
        if self._is_read:
            await asyncio.get_running_loop().create_future()  # for ever: a client that leaves cancels this task
        self._is_read = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Write the head together with the first part of the body; wait while the client does not read."""
        if message["type"] == "http.response.start":
            self._head = self._encode_head(message["status"], message.get("headers", ()))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self._is_head:
            body = b""
        elif self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"" if more else b"0\r\n\r\n")
        if self._head is not None:
            body, self._head = self._head + body, None
        self.is_complete = not more
        await self._link.write(body, is_last=not more)

    def _encode_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> bytes:
        head = [STATUS_LINES[status], self._shared.date]
        is_sized = self._is_head or status in (204, 304)
        for name, value in headers:
            if name == b"content-length":
                is_sized = True
            head += (name, b": ", value, b"\r\n")
        is_old = self.scope["http_version"] == "1.0"
        self._chunked = not is_sized and not is_old
        self.keep_alive &= (is_sized or not is_old) and not self._shared.is_draining
        if self._chunked:
            head.append(b"transfer-encoding: chunked\r\n")
        if not self.keep_alive:
            head.append(b"connection: close\r\n")
        elif is_old:
            head.append(b"connection: keep-alive\r\n")
        head.append(b"\r\n")
        return b"".join(head)
