"""One HTTP/1.1 connection: bytes from a socket into ASGI calls, and their replies back.

A request reaches the app once it is complete, in memory and within the limits, so that a slow sender costs no task.
A client that leaves cancels its request's task; nothing polls for it. Pipelined requests are answered in order, one at
a time. Knows neither routes nor errors' shapes, except for the few replies to what is not a request at all.

Why not uvicorn: the same small app costs half the processor time here, and uvicorn bounds neither a head nor the time
that a client takes to send one.
"""

import asyncio
import time
from collections import deque
from typing import cast
from urllib.parse import unquote

import httptools

from service.errors import AttndError, Cancelled, InvalidRequest, TooLarge
from service.gateway.errors import Failure
from service.gateway.exchange import BEGUN, Exchange, Scope, Shared, refusal, request_id_of
from service.gateway.limits import Limits

_ASGI = {"version": "3.0", "spec_version": "2.4"}
_UPGRADE_HEADERS = {b"upgrade", b"connection", b"http2-settings"}
_MAX_WAITING = 64  # pipelined requests
_MAX_WAITING_BYTES = 65_536
_MAX_UNSENT_BYTES = 65_536
_AROUND_HEADER = len(b": \r\n")
_MALFORMED = Failure(400, "this is not an HTTP/1.1 request", "malformed_http")


class Connection(asyncio.Protocol):
    """One client's connection; the parser calls the `on_` methods."""

    def __init__(self, shared: Shared, limits: Limits) -> None:
        self._shared = shared
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._active: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self.task: asyncio.Task[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._is_receiving = False  # part of a request is here
        self._is_in_head = False
        self._is_ending = False  # nothing more is taken
        self._is_paused = False  # nothing more is read, for now
        self._since = self._loop.time()  # of the present state, for `sweep`
        self._num_raw = 0  # bytes of the request that is being received
        self._unsent: list[bytes] = []  # of the reply
        self._num_unsent = 0

    @property
    def is_busy(self) -> bool:
        return self._active is not None

    # The transport's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server = transport.get_extra_info("sockname")[:2]
        peer = transport.get_extra_info("peername")
        self._client = peer and peer[:2]  # None: it has reset the connection already
        self._shared.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.connections.discard(self)
        self._shared.changed.set()
        if self._is_receiving:
            self._turn_away(self._headers, self._begun, Cancelled("the connection ended within the request"))
        self._is_receiving, self._is_ending = False, True
        self._drop_waiting()
        self._unsent.clear()
        if self.task is not None:
            self.task.cancel()

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()
        self._since = self._loop.time()

    def resume_writing(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def data_received(self, data: bytes) -> None:
        while data and not self._is_ending:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._decline_upgrade() + data[upgrade.args[0] :]
                continue
            except httptools.HttpParserError:
                self._refuse(_MALFORMED)
            break
        if self._is_receiving and not self._is_ending:
            self._num_raw += len(data)
            self._check_size()

    def _check_size(self) -> None:
        """Bound what the parser keeps of an unfinished head, and what chunking may add to a body."""
        limit = self._limits.max_head_bytes + (0 if self._is_in_head else 8 * self._limits.max_body_bytes)
        if self._num_raw > limit:
            self._refuse_head()

    def _refuse_head(self) -> None:
        message = f"the request's head has over {self._limits.max_head_bytes} bytes"
        self._refuse(Failure(431, message, "head_too_large"))

    def _decline_upgrade(self) -> bytes:
        """The request's head again, without the wish for a protocol that is not spoken here, for a new parser.

        Some clients offer HTTP/2 with their first request; the parser would take its body for that protocol.
        """
        method = self._parser.get_method()
        self._parser = httptools.HttpRequestParser(self)
        if method == b"CONNECT":
            self._refuse(Failure(405, "this is no proxy: CONNECT is not taken", "method_not_allowed"))
            return b""
        lines = [b"%b: %b\r\n" % header for header in self._headers if header[0] not in _UPGRADE_HEADERS]
        return b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self._url, b"".join(lines))

    # The parser's side.

    def on_message_begin(self) -> None:
        self._is_receiving = self._is_in_head = True
        self._since = self._loop.time()
        self._begun = time.monotonic()  # the loop's time may be of milliseconds only
        self._num_raw = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._num_body = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # and not a trailer
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._is_ending or self._parser.should_upgrade():
            return
        num_head, num_body, is_asking = len(self._url), 0, False
        for name, value in self._headers:
            num_head += len(name) + len(value) + _AROUND_HEADER
            if name == b"content-length":
                num_body = int(value)
            elif name == b"expect":
                is_asking = value.lower() == b"100-continue"
        if num_head > self._limits.max_head_bytes:
            self._refuse_head()
        elif num_body > self._limits.max_body_bytes:
            self._dispatch_too_large()
        elif is_asking and self._active is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        if self._num_body > self._limits.max_body_bytes:
            self._dispatch_too_large()
        elif not self._is_ending:
            self._body.append(body)

    def on_message_complete(self) -> None:
        self._is_receiving = False
        if not self._is_ending and not self._parser.should_upgrade():
            self._dispatch(None)

    def _dispatch_too_large(self) -> None:
        if not self._is_ending:
            limit = self._limits.max_body_bytes
            self._is_receiving, self._is_ending = False, True
            self._body = []
            self._dispatch(TooLarge(f"the body has more than {limit} bytes, which is the limit", code="body_too_large"))

    def _dispatch(self, refusal: TooLarge | None) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        keep_alive = refusal is None and self._parser.should_keep_alive()
        exchange = Exchange(self, self._shared, self._scope(), body, keep_alive, refusal)
        if self._active is None:
            self._start(exchange)
        else:
            self._waiting.append(exchange)
            self._bound_waiting()

    def _bound_waiting(self) -> None:
        """Stop reading when too much waits; not before, since a client's leaving is only seen by reading."""
        num_bytes = sum(len(exchange.body) for exchange in self._waiting)
        if len(self._waiting) > _MAX_WAITING or num_bytes > _MAX_WAITING_BYTES:
            self._is_paused = True
            self._transport.pause_reading()

    def _scope(self) -> Scope:
        path, _, query = self._url.partition(b"?")
        if not path.startswith(b"/"):  # absolute form, as proxies use it
            path = httptools.parse_url(self._url).path or b"/" if b"://" in path else path
        text = path.decode("latin-1")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": self._parser.get_http_version(),
            "method": self._parser.get_method().decode("latin-1"),
            "scheme": "http",
            "path": unquote(text) if "%" in text else text,
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "server": self._server,
            "client": self._client,
            BEGUN: self._begun,
        }

    # The app's side.

    def _start(self, exchange: Exchange) -> None:
        self._active = exchange
        self.task = self._loop.create_task(exchange.run())

    async def write(self, data: bytes, *, is_last: bool) -> None:
        """What a reply consists of so far leaves together, when its task has nothing more to write for now.

        So the tokens that one step of a model gives to one client cost one system call.
        """
        self._unsent.append(data)
        self._num_unsent += len(data)
        if is_last or self._num_unsent > _MAX_UNSENT_BYTES:
            self._flush()
        elif len(self._unsent) == 1:
            self._loop.call_soon(self._flush)
        if self._writable is not None:
            await asyncio.shield(self._writable)  # others may wait for it too: it outlives who gives up

    def _flush(self) -> None:
        if self._unsent:
            self._transport.write(b"".join(self._unsent))
            self._unsent.clear()
            self._num_unsent = 0

    def exchange_ended(self, exchange: Exchange) -> None:
        """Go on to the next request, or to the end."""
        self._active = self.task = None
        self._since = self._loop.time()
        if not exchange.is_complete:
            self._transport.abort()
        elif not exchange.keep_alive:
            self._end()
        elif self._waiting:
            self._start(self._waiting.popleft())
        elif self._is_ending:
            self._end()
        else:
            self._resume_reading()
        if self._shared.is_draining:
            self._shared.changed.set()

    def _refuse(self, failure: Failure) -> None:
        """Answer what is not a request, unless a request before it is still being answered, and hang up."""
        self._is_receiving, self._is_ending = False, True
        error = InvalidRequest(failure.message, code=failure.code)
        request_id = self._turn_away(self._headers, self._begun, error)
        if self._active is None:
            self._transport.write(refusal(failure, request_id, self._shared.date))
            self._end()

    def _turn_away(self, headers: list[tuple[bytes, bytes]], begun: float, error: AttndError) -> bytes:
        """Have a request counted that no app gets to see; its id."""
        request_id = request_id_of(dict(headers))
        self._shared.turned_away(request_id.decode(), begun, error)
        return request_id

    def _drop_waiting(self) -> None:
        for exchange in self._waiting:
            error = exchange.refusal or Cancelled("the connection ended before the request's turn came")
            self._turn_away(exchange.scope["headers"], exchange.scope[BEGUN], error)
        self._waiting.clear()

    def _end(self) -> None:
        """Close after what was written; read on for a while, since unread input would reset the connection."""
        self._is_ending = True
        self._drop_waiting()
        if not self._transport.is_closing():
            self._transport.write_eof()
            self._resume_reading()

    def _resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        """Close now; a request being answered is cancelled."""
        self._transport.abort()

    def sweep(self, now: float) -> None:
        """Close the connection if its client takes longer than it may in the present state."""
        limits, passed = self._limits, now - self._since
        if self._writable is not None:
            is_over = passed > limits.stalled_seconds
        elif self.is_busy:
            is_over = False
        elif self._is_ending:
            is_over = passed > limits.linger_seconds
        else:
            is_over = passed > (limits.receive_seconds if self._is_receiving else limits.idle_seconds)
        if is_over:
            self._transport.abort()
