"""Just enough HTTP/2 (RFC 9113) and gRPC framing to load a gRPC server cheaply.

Requests are prepared bytes and replies are only framed, never decoded, so that the generator takes a small part of
the cores that it shares with the server. Header blocks use no HPACK dynamic table (RFC 7541, 6.2.2), so one constant
block serves every call. Knows nothing of schedules, latencies or protobuf beyond one tag byte.
"""

import asyncio
import re
from collections import deque
from collections.abc import Callable

from .faults import LONGEST_TEXT, lost_fault
from .http1 import OnReply

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0x0, 0x1, 0x3, 0x4, 0x6, 0x7, 0x8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEAD = 9  # bytes
_MESSAGE_HEAD = 5  # bytes: compressed flag, length
_MAX_FRAME = 16_384  # bytes; what every server takes
_DEFAULT_WINDOW = 65_535
_WIDE_WINDOW = 2**31 - 1
_INITIAL_WINDOW_SIZE = 4  # settings identifier
# ClassifyStreamResponse: field 1 is a response, field 2 an error.
_RESPONSE_TAG = b"\x0a"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def grpc_message(body: bytes) -> bytes:
    """A message with gRPC's prefix: not compressed, length."""
    return b"\0" + len(body).to_bytes(4, "big") + body


def header_block(authority: str, path: str) -> bytes:
    """The request headers of a gRPC call as HPACK literals (every string is under 127 bytes)."""

    def literal(name: bytes, value: str) -> bytes:
        return name + bytes((len(value),)) + value.encode()

    method_post, scheme_http = b"\x83", b"\x86"
    by_name = b"\0" + bytes((len("te"),)) + b"te"
    return (
        method_post
        + scheme_http
        + literal(b"\x04", path)
        + literal(b"\x01", authority)
        + literal(b"\x0f\x10", "application/grpc")
        + literal(by_name, "trailers")
    )


def unanswered(kind: int, payload: bytes) -> str:
    """Why a call ended without a message: what its last frame has for a reader, who knows no HPACK."""
    if kind == RST_STREAM:
        return f"the call was reset: error code {int.from_bytes(payload, 'big')}"
    return f"no message: {_readable(payload)}"


def _readable(data: bytes | bytearray) -> str:
    return re.sub(rb"[^ -~]+", b" ", data)[:LONGEST_TEXT].decode().strip()


class Http2Connection:
    """Frames, settings and flow control of one connection. An asyncio protocol; the calls are laid over it."""

    def __init__(self, on_frame: Callable[[int, int, int, bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._window = _DEFAULT_WINDOW
        self._stream_window = _DEFAULT_WINDOW
        self._stream_used: dict[int, int] = {}
        self._waiting: deque[tuple[int, bytes, int]] = deque()

    def open_call(self, stream: int, block: bytes) -> None:
        self._stream_used[stream] = 0
        self._write(frame(HEADERS, END_HEADERS, stream, block))

    def forget(self, stream: int) -> None:
        self._stream_used.pop(stream, None)

    def send_data(self, stream: int, payload: bytes, flags: int) -> None:
        """Write DATA frames now, or when the server opens its window again; `flags` are the last frame's."""
        while len(payload) > _MAX_FRAME:
            self._waiting.append((stream, payload[:_MAX_FRAME], 0))
            payload = payload[_MAX_FRAME:]
        self._waiting.append((stream, payload, flags))
        self._flush()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        setting = _INITIAL_WINDOW_SIZE.to_bytes(2, "big") + _WIDE_WINDOW.to_bytes(4, "big")
        widen = (_WIDE_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big")
        self._write(_PREFACE + frame(SETTINGS, 0, 0, setting) + frame(WINDOW_UPDATE, 0, 0, widen))

    def data_received(self, data: bytes) -> None:
        self._received += data
        received, at, size = self._received, 0, len(self._received)
        while size - at >= _FRAME_HEAD:
            end = at + _FRAME_HEAD + int.from_bytes(received[at : at + 3], "big")
            if end > size:
                break
            stream = int.from_bytes(received[at + 5 : at + _FRAME_HEAD], "big")
            self._dispatch(received[at + 3], received[at + 4], stream, bytes(received[at + _FRAME_HEAD : end]))
            at = end
        del received[:at]

    def eof_received(self) -> None:
        return None

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost(lost_fault(error))

    def pause_writing(self) -> None:
        """The number of requests in flight bounds what is buffered."""

    def resume_writing(self) -> None:
        """See pause_writing."""

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def _dispatch(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._adopt(payload)
        elif kind == PING and not flags & ACK:
            self._write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            self._open_window(stream, int.from_bytes(payload, "big"))
        elif kind == GOAWAY:
            self.close()
        elif kind in (DATA, HEADERS, RST_STREAM):
            self._on_frame(kind, flags, stream, payload)

    def _adopt(self, settings: bytes) -> None:
        for at in range(0, len(settings), 6):
            if int.from_bytes(settings[at : at + 2], "big") == _INITIAL_WINDOW_SIZE:
                self._stream_window = int.from_bytes(settings[at + 2 : at + 6], "big")
        self._write(frame(SETTINGS, ACK, 0))
        self._flush()

    def _open_window(self, stream: int, size: int) -> None:
        if stream == 0:
            self._window += size
        elif stream in self._stream_used:
            self._stream_used[stream] -= size
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            stream, payload, flags = self._waiting[0]
            used = self._stream_used.get(stream, 0)
            if len(payload) > self._window or used + len(payload) > self._stream_window:
                return
            self._waiting.popleft()
            self._window -= len(payload)
            self._stream_used[stream] = used + len(payload)
            self._write(frame(DATA, flags, stream, payload))


class UnaryCalls:
    """Unary gRPC calls, many at once, over one connection."""

    def __init__(self, authority: str, path: str, *, capacity: int) -> None:
        self.capacity = capacity
        self.connection = Http2Connection(self._on_frame, self._on_lost)
        self._block = header_block(authority, path)
        self._next_stream = 1
        self._open: dict[int, OnReply] = {}
        self._answered: set[int] = set()

    def send(self, message: bytes, on_reply: OnReply) -> None:
        """Start one call; `on_reply(fault)` is called once. `message` is a prepared `grpc_message`."""
        stream = self._next_stream
        self._next_stream += 2
        self._open[stream] = on_reply
        self.connection.open_call(stream, self._block)
        self.connection.send_data(stream, message, END_STREAM)

    def close(self) -> None:
        self.connection.close()

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA and len(payload) > _MESSAGE_HEAD:
            self._answered.add(stream)
        if kind == RST_STREAM or flags & END_STREAM:
            # A unary call that fails carries no message, only trailers: so a message is success.
            self._finish(stream, "" if stream in self._answered else unanswered(kind, payload))

    def _finish(self, stream: int, fault: str) -> None:
        self._answered.discard(stream)
        self.connection.forget(stream)
        on_reply = self._open.pop(stream, None)
        if on_reply is not None:
            on_reply(fault)

    def _on_lost(self, fault: str) -> None:
        for stream in list(self._open):
            self._finish(stream, fault)


class StreamCall:
    """One bidirectional gRPC call with many messages in flight, answered in order."""

    def __init__(self, authority: str, path: str, *, capacity: int) -> None:
        self.capacity = capacity
        self.connection = Http2Connection(self._on_frame, self._on_lost)
        self._block = header_block(authority, path)
        self._is_open = False
        self._fault = ""  # why it is over
        self._received = bytearray()
        self._waiting: deque[OnReply] = deque()

    def send(self, message: bytes, on_reply: OnReply) -> None:
        """Send one message; `on_reply(fault)` is called once, with the reply that has its place in the order."""
        self._waiting.append(on_reply)
        if self._fault:
            self._on_lost(self._fault)
            return
        if not self._is_open:
            self._is_open = True
            self.connection.open_call(1, self._block)
        self.connection.send_data(1, message, 0)

    def close(self) -> None:
        self.connection.close()

    def _on_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            self._received += payload
            self._take_messages()
        if kind == RST_STREAM or flags & END_STREAM:
            self._on_lost(unanswered(kind, payload))

    def _take_messages(self) -> None:
        received, at = self._received, 0
        while len(received) - at >= _MESSAGE_HEAD:
            end = at + _MESSAGE_HEAD + int.from_bytes(received[at + 1 : at + _MESSAGE_HEAD], "big")
            if end > len(received):
                break
            begin = at + _MESSAGE_HEAD
            is_response = received.startswith(_RESPONSE_TAG, begin, end)
            self._waiting.popleft()("" if is_response else f"an error as the reply: {_readable(received[begin:end])}")
            at = end
        del received[:at]

    def _on_lost(self, fault: str) -> None:
        self._fault = self._fault or fault
        while self._waiting:
            self._waiting.popleft()(self._fault)
