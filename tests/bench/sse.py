"""HTTP/1.1 replies that are streams of server-sent events: the events, and the instants at which they came.

Parses no more than it must (the generator shares its cores with the server): the head, the chunked transfer coding and
the blank lines between events. What an event says is read later, when nothing is being measured.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .faults import lost_fault
from .http1 import reply_length, reply_status

_HEAD_END = b"\r\n\r\n"
_DATA = b"data: "


@dataclass(slots=True)
class Reply:
    """One request's reply as it grows. Instants are `time.perf_counter` seconds.

    `events` are the payloads of `data:` lines, each with its instant; `body` is the reply of a server that does not
    stream. `fault` says why the reply is not whole.
    """

    sent: float = 0.0
    ended: float = 0.0
    status: int = 0
    events: list[tuple[float, bytes]] = field(default_factory=list)
    body: bytes = b""
    fault: str = ""


class Chunks:
    """The chunked transfer coding (RFC 9112, section 7.1), taken off whole chunks; trailers are not expected."""

    def __init__(self) -> None:
        self.is_over = False
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """The content of the chunks that `data` completes. Raises ValueError for what is not a chunk's size."""
        held, at = self._held + data, 0
        content: list[bytes] = []
        while not self.is_over and (line_end := held.find(b"\r\n", at)) >= 0:
            begin = line_end + 2
            end = begin + int(held[at:line_end].split(b";", 1)[0], 16)
            if len(held) < end + 2:
                break
            content.append(held[begin:end])
            self.is_over = end == begin
            at = end + 2
        self._held = held[at:]
        return b"".join(content)


class Sized:
    """A body of a stated length."""

    def __init__(self, length: int) -> None:
        self.is_over = length == 0
        self._left = length

    def feed(self, data: bytes) -> bytes:
        self._left -= len(data)
        self.is_over = self._left <= 0
        return data


class Events:
    """Server-sent events of one `data:` line each, as OpenAI's dialect has them; comments are passed over."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, text: bytes) -> list[bytes]:
        """The payloads of the events that `text` completes."""
        *whole, self._held = (self._held + text).split(b"\n\n")
        return [event[len(_DATA) :] for event in whole if event.startswith(_DATA)]


class ReplyReader:
    """An asyncio protocol that sends one prepared request when connected, and reads its reply.

    `on_first` is called once, when the first event or the end has come; `ended` is done when the reply is whole, or
    cannot be any more.
    """

    def __init__(self, message: bytes, on_first: Callable[[], None]) -> None:
        self.reply = Reply()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._message = message
        self._on_first: Callable[[], None] | None = on_first
        self._head = b""
        self._body: Chunks | Sized | None = None
        self._events: Events | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.reply.sent = time.perf_counter()
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.ended.done():
            return
        try:
            self._take(data, now)
        except ValueError as error:
            self.finish(f"the reply is not HTTP as expected: {error}")

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        self.finish(lost_fault(error))

    def pause_writing(self) -> None:
        """Requests are small: nothing to hold back."""

    def resume_writing(self) -> None:
        """See pause_writing."""

    def finish(self, fault: str = "") -> None:
        """The reply is over; the first call counts."""
        if not self.ended.done():
            self.reply.ended, self.reply.fault = time.perf_counter(), fault
            self.ended.set_result(None)
            self._tell_first()

    def _take(self, data: bytes, now: float) -> None:
        if self._body is None:
            self._head += data
            head, separator, data = self._head.partition(_HEAD_END)
            if not separator:
                return
            self._body = self._open(head)
        content = self._body.feed(data)
        if self._events is None:
            self.reply.body += content
        elif events := self._events.feed(content):
            self.reply.events += [(now, event) for event in events]
            self._tell_first()
        if self._body.is_over:
            self.finish()

    def _open(self, head: bytes) -> Chunks | Sized:
        lowered = head.lower()
        self.reply.status = reply_status(head)
        if b"text/event-stream" in lowered:
            self._events = Events()
        return Chunks() if b"transfer-encoding: chunked" in lowered else Sized(reply_length(head))

    def _tell_first(self) -> None:
        on_first, self._on_first = self._on_first, None
        if on_first is not None:
            on_first()


async def fetch(
    host: str, port: int, message: bytes, *, on_first: Callable[[], None] = lambda: None, patience_s: float = 120.0
) -> Reply:
    """Send one request on a connection of its own and read the reply to its end; what goes wrong is in `fault`."""
    reader = ReplyReader(message, on_first)
    loop = asyncio.get_running_loop()
    try:
        transport, _ = await loop.create_connection(lambda: reader, host, port)  # type: ignore[type-var]
    except OSError as error:
        reader.reply.sent = time.perf_counter()
        reader.finish(str(error))
        return reader.reply
    patience = loop.call_later(patience_s, reader.finish, f"no end of the reply within {patience_s:g} s")
    try:
        await reader.ended
    finally:
        patience.cancel()
        transport.close()
    return reader.reply
