"""The processes of a model's lanes, as their server starts and ends them.

One loads the model and forks the others, a lane for each channel, so that all read the same weights in the same memory:
what one lane's step has brought into the processor's cache is there for the next step of any. They end with their
server: their channels are closed then, however that came.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress

from service.errors import BundleError, ConfigError, EngineFailed
from service.worker.generation.lane_messages import Frames, Load, Ready, Refused, decode_to_server, framed

LOAD_S = 300.0  # that loading the model may take
LAST_STEP_S = 30.0  # to end, before all are killed


class LaneProcesses:
    """Thread-safe; all methods block."""

    def __init__(self, load: Load, num_lanes: int) -> None:
        self.max_rows = load.max_rows
        self._load = load
        self._num_lanes = num_lanes
        self._lock = threading.Lock()
        self._channels: list[socket.socket] = []

    def open(self, lane: int) -> tuple[socket.socket, int]:
        """The channel of a lane that is ready, and its process. Raises BundleError, ConfigError and EngineFailed."""
        with self._lock:
            if not self._channels:
                self._start()
        channel = self._channels[lane]
        try:
            return channel, self._ready(channel)
        except BaseException:
            channel.close()
            self.end()
            raise

    def end(self) -> None:
        """Wait until all have ended: once their channels are closed they do after the step under way."""
        try:
            self._loader.wait(LAST_STEP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._loader.pid, signal.SIGKILL)
            self._loader.wait()

    def _start(self) -> None:
        """They find modules where this process does, and are in a group of their own, which Ctrl-C does not reach."""
        pairs = [socket.socketpair() for _ in range(self._num_lanes)]
        theirs = [end.fileno() for _, end in pairs]
        self._channels = [end for end, _ in pairs]
        try:
            self._loader = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "service.worker.generation.lane_process", *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                pass_fds=theirs,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                process_group=0,
            )
        finally:
            for _, end in pairs:
                end.close()
        with suppress(ConnectionError):
            self._channels[0].sendall(framed(self._load))

    def _ready(self, channel: socket.socket) -> int:
        channel.settimeout(LOAD_S)
        frames = Frames()
        with suppress(ConnectionError):
            while data := channel.recv(4096):
                for body in frames.feed(data):
                    match decode_to_server(body):
                        case Ready(pid=pid):
                            return pid
                        case Refused(error="ConfigError", message=message, param=param):
                            raise ConfigError(message, param=param)
                        case Refused(message=message):
                            raise BundleError(message)
        self.end()
        status = self._loader.returncode
        raise EngineFailed(f"a process that writes for a model ended before it was ready (status {status})")
