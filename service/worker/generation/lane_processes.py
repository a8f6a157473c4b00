"""The processes of a model's lanes, as their server starts and ends them.

One loads the model and forks the others (lane_loader), a lane for each channel, so that all read the same weights in
the same memory: what one lane's step has brought into the processor's cache is there for the next step of any. They
end with their server: their channels are closed then, however that came.
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
FAILING_S = 1.0  # the same where the start has failed, so that no step is under way
# A process that forks has one thread, or a lock that another one holds stays locked for ever in what it forks.
_ONE_THREAD = {"ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1"}


class LaneProcesses:
    """Thread-safe; `open` and `end` block."""

    def __init__(self, load: Load, num_lanes: int) -> None:
        self.max_rows = load.max_rows
        self._load = load
        self._num_lanes = num_lanes
        self._lock = threading.Lock()
        self._loader: subprocess.Popen[bytes] | None = None
        self._channels: list[socket.socket] = []

    def open(self, lane: int) -> tuple[socket.socket, int]:
        """The channel of a lane that is ready, and its process.

        Raises BundleError and ConfigError, EngineFailed if they end first, OSError if none can be started.
        """
        with self._lock:
            if self._loader is None:
                self._start()
        channel = self._channels[lane]
        try:
            return channel, self._ready(channel)
        except BaseException:
            channel.close()
            self.end(FAILING_S)
            raise

    def give_up(self, lane: int) -> None:
        """Nobody waits for a lane any more that is being opened: all have ended FAILING_S seconds from now."""
        with suppress(IndexError, OSError):  # none is started; it has ended
            self._channels[lane].shutdown(socket.SHUT_RDWR)  # who reads it sees its end

    def end(self, patience_s: float | None = None) -> int:
        """Wait until all have ended: once their channels are closed they do, after the step under way.

        Those that have not after `patience_s` (LAST_STEP_S) seconds are killed, or that are left of a loader that
        failed. The loader's status.
        """
        with self._lock:
            loader = self._loader
            if loader is None or loader.returncode is not None:
                return 0 if loader is None else loader.returncode
            with suppress(subprocess.TimeoutExpired):
                loader.wait(LAST_STEP_S if patience_s is None else patience_s)
            if loader.returncode != 0:
                with suppress(ProcessLookupError):
                    os.killpg(loader.pid, signal.SIGKILL)
            return loader.wait()

    def _start(self) -> None:
        """They find modules where this process does, and are in a group of their own, which Ctrl-C does not reach."""
        pairs = [socket.socketpair() for _ in range(self._num_lanes)]
        theirs = [end.fileno() for _, end in pairs]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self._loader = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "service.worker.generation.lane_loader", *map(str, theirs)],
                stdin=subprocess.DEVNULL,
                pass_fds=theirs,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": paths},
                process_group=0,
            )
        except BaseException:
            for end, _ in pairs:
                end.close()
            raise
        finally:
            for _, end in pairs:
                end.close()
        self._channels = [end for end, _ in pairs]
        with suppress(ConnectionError):
            self._channels[0].sendall(framed(self._load))

    def _ready(self, channel: socket.socket) -> int:
        channel.settimeout(LOAD_S)
        frames = Frames()
        try:
            while data := channel.recv(4096):
                for body in frames.feed(data):
                    match decode_to_server(body):
                        case Ready(pid=pid):
                            return pid
                        case Refused(error="ConfigError", message=message, param=param):
                            raise ConfigError(message, param=param)
                        case Refused(message=message):
                            raise BundleError(message)
        except TimeoutError:
            raise EngineFailed(f"a process that writes for a model was not ready after {LOAD_S:g} s") from None
        except ConnectionError:
            pass  # it ended
        status = self.end(FAILING_S)
        raise EngineFailed(f"a process that writes for a model ended before it was ready (its loader: status {status})")
