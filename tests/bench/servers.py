"""Server processes: started, asked whether they are ready, stopped for the time that another is measured, ended.

A server that is not being measured is suspended (SIGSTOP for it and all its descendants), so it takes none of the
cores that it shares with the one that is. Linux only: descendants are read from /proc. Knows no API: a `Server` says
how it is started and how it is spoken to.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_START_PATIENCE_S = 300.0
_END_PATIENCE_S = 15.0


class ServerFailed(Exception):
    """A server did not come up, or answered wrongly."""


@dataclass(frozen=True)
class Server:
    """One contender: its command, the HTTP route that classifies, and how to read that route's replies.

    `body_of` makes the request for one text, `label_of` finds the label in a decoded reply. `grpc_port` is 0 for a
    server without gRPC.
    """

    name: str
    command: Sequence[str]
    port: int
    path: str
    body_of: Callable[[str], Any]
    label_of: Callable[[Any], str]
    grpc_port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(server: Server, text: str, *, timeout_s: float = 30.0) -> str:
    """One request on a connection of its own; the label of the reply. Raises ServerFailed for any other end."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        body = json.dumps(server.body_of(text))
        connection.request("POST", server.path, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
    except OSError as error:
        raise ServerFailed(f"{server.name}: {error}") from error
    finally:
        connection.close()
    if reply.status != 200:
        raise ServerFailed(f"{server.name}: status {reply.status}: {content[:300]!r}")
    return server.label_of(json.loads(content))


class Running:
    """A started server and the processes that it starts."""

    def __init__(self, server: Server, log: Path) -> None:
        self.server = server
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                server.command,
                env={**os.environ, **server.environment},
                cwd=server.directory,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Return when the server has answered a request. Raises ServerFailed with the end of its log."""
        give_up = time.monotonic() + _START_PATIENCE_S
        while True:
            try:
                ask(self.server, "ready ?")
                return
            except ServerFailed as error:
                if self._process.poll() is not None or time.monotonic() > give_up:
                    tail = self._log.read_text(errors="replace")[-1500:]
                    raise ServerFailed(f"{self.server.name} did not come up: {error}\n{tail}") from None
            time.sleep(0.2)

    def suspend(self) -> None:
        signal_all(family(self.pid), signal.SIGSTOP)

    def resume(self) -> None:
        signal_all(family(self.pid), signal.SIGCONT)

    def end(self) -> None:
        """Terminate, and kill what is left."""
        everyone = family(self.pid)
        signal_all(everyone, signal.SIGCONT)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_PATIENCE_S)
        signal_all(everyone, signal.SIGKILL)
        self._process.wait()


def family(pid: int) -> list[int]:
    """The process and all its descendants. Not the process group: some servers give their workers one of their own."""
    found = [pid]
    for parent in found:
        with suppress(OSError):  # it has ended meanwhile
            for task in Path(f"/proc/{parent}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def signal_all(processes: Sequence[int], number: signal.Signals) -> None:
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Where a bench's servers leave their logs. Ended from outside, the run still ends them: most are suspended."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        with tempfile.TemporaryDirectory(prefix="attnd-bench-") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def running(server: Server, logs: Path) -> Iterator[Running]:
    """The server up and answering; ended on leaving."""
    started = Running(server, logs / f"{server.name}.log")
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.end()


@contextmanager
def awake(process: Running) -> Iterator[None]:
    """Resumed while inside, suspended outside."""
    process.resume()
    try:
        yield
    finally:
        process.suspend()
