"""Health and metrics of a worker over plain HTTP, for probes and scrapers: /healthz, /readyz, /metrics.

On the standard library's server in a thread of its own: a worker carries no web framework, and a probe is answered
even while the event loop is busy.
"""

import asyncio
import json
import logging
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from service.address import listening
from service.backend import Backend
from service.errors import AttndError
from service.metrics import Metrics

READY_TIMEOUT_S = 5.0

_Reply = tuple[HTTPStatus, str, bytes]

_log = logging.getLogger("attnd.status")


class _Server(ThreadingHTTPServer):
    """The library's own knows IPv4 alone, and prints tracebacks, also of clients that leave."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        found, *_ = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0]
        super().__init__((str(found[4][0]), address[1]), handler)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            _log.exception("a request for health or metrics failed")


class StatusServer:
    """`start` gives the bound port; port 0 takes any free one."""

    def __init__(self, backend: Backend, metrics: Metrics, *, host: str, port: int) -> None:
        self._backend = backend
        self._metrics = metrics
        self._address = (host, port)
        self._is_draining = False

    def start(self) -> int:
        """Listen; called on the event loop that the backend belongs to. Raises ConfigError when that fails."""
        self._loop = asyncio.get_running_loop()
        with listening("health and metrics", *self._address):
            self._server = _Server(self._address, self._handler())
        threading.Thread(target=self._server.serve_forever, name="status", daemon=True).start()
        return self._server.server_port

    async def drain(self) -> None:
        """From now on not ready, and otherwise as before: alive, and with metrics for the last scrape."""
        self._is_draining = True

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()

    def _reply(self, path: str) -> _Reply:
        if path == "/healthz":
            return _told("alive", self._backend.failure)
        if path == "/readyz":
            return _told("ready", "the server is draining" if self._is_draining else self._hindrance())
        if path == "/metrics":
            body, content_type = self._metrics.render()
            return HTTPStatus.OK, content_type, body
        return HTTPStatus.NOT_FOUND, "text/plain", b"there are /healthz, /readyz and /metrics\n"

    def _hindrance(self) -> str | None:
        """Why the backend cannot serve, asked on its own loop; None if it can."""
        asked = asyncio.run_coroutine_threadsafe(self._backend.models(), self._loop)
        try:
            asked.result(READY_TIMEOUT_S)
        except AttndError as error:
            return error.message
        except TimeoutError:
            asked.cancel()
            return "the event loop does not answer"
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        reply_to = self._reply

        class Handler(BaseHTTPRequestHandler):
            timeout = 10.0  # seconds for a client to send its request
            server_version = "attnd"
            sys_version = ""

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self.wfile.write(self._answer())

            def _answer(self) -> bytes:
                """Writes a reply's head; gives its body."""
                status, content_type, body = reply_to(self.path.partition("?")[0])
                self.send_response(status)
                self.send_header("content-type", content_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                return body

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every few seconds; they are not worth a line."""

        return Handler


def _told(status: str, hindrance: str | None) -> _Reply:
    if hindrance is None:
        return HTTPStatus.OK, "application/json", json.dumps({"status": status}).encode()
    body = json.dumps({"status": "unavailable", "reason": hindrance}).encode()
    return HTTPStatus.SERVICE_UNAVAILABLE, "application/json", body
