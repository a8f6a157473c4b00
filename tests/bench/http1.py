"""HTTP/1.1 as a load generator needs it: prepared request bytes out, status and length of the reply in.

Parses no more than it must (the generator shares its cores with the server) and takes only replies that state a
Content-Length. Knows nothing of schedules or latencies.
"""

import asyncio
from collections.abc import Callable

from .faults import lost_fault, status_fault

OnReply = Callable[[str], None]  # gets what is wrong with the reply; empty when nothing is

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


def request_bytes(host: str, path: str, body: bytes) -> bytes:
    """A whole POST request, ready to be written as it is."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def reply_length(head: bytes) -> int:
    """Bytes of body that a reply's head announces. Raises ValueError when it does not say."""
    lowered = head.lower()
    at = lowered.find(_LENGTH)
    if at < 0:
        raise ValueError("the reply has no Content-Length")
    return int(lowered[at + len(_LENGTH) :].split(b"\r\n", 1)[0])


def reply_status(head: bytes) -> int:
    """Raises ValueError for what is no HTTP/1.1."""
    version, _, rest = head.partition(b" ")
    if version != b"HTTP/1.1":
        raise ValueError(f"it begins with {head[:20]!r}")
    return int(rest[:3])


class Http1Connection:
    """A keep-alive connection with one request in flight at a time. An asyncio protocol."""

    capacity = 1

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._on_reply: OnReply | None = None

    def send(self, message: bytes, on_reply: OnReply) -> None:
        """Write one prepared request; `on_reply(fault)` is called once, also when the connection is lost."""
        self._on_reply = on_reply
        if self._transport is None or self._transport.is_closing():
            self._finish(lost_fault(None))
        else:
            self._transport.write(message)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(_HEAD_END)
        if end < 0:
            return
        head, begin = bytes(self._received[:end]), end + len(_HEAD_END)
        if len(self._received) >= begin + reply_length(head):
            status = reply_status(head)
            fault = "" if status == 200 else status_fault(status, bytes(self._received[begin:]))
            self._received.clear()
            self._finish(fault)

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(lost_fault(error))

    def pause_writing(self) -> None:
        """Requests are small and one at a time: nothing to hold back."""

    def resume_writing(self) -> None:
        """See pause_writing."""

    def _finish(self, fault: str) -> None:
        on_reply, self._on_reply = self._on_reply, None
        if on_reply is not None:
            on_reply(fault)
