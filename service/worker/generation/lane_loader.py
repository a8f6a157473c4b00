"""`python -m service.worker.generation.lane_loader FD...` loads a model and forks a lane for each channel.

The FDs are ends of the channels, and what to load is said over the first. Signals that are meant for the server are no
concern of these processes: they end when their channels do.
"""

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from collections.abc import Sequence as Several
from contextlib import suppress
from functools import partial
from pathlib import Path

from service.errors import BundleError, ConfigError
from service.logs import configure_logging
from service.worker.bundle import load_bundle
from service.worker.generation.lane_messages import Load, Refused
from service.worker.generation.lane_process import Channel, serve
from service.worker.generation.outputs import Outputs
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.scheduler import slots_for
from service.worker.generation.thread_lane import ThreadLane
from service.worker.generation.translator import TranslatorEngine
from service.worker.machine import cores_for

_log = logging.getLogger("attnd.engine")


def load_lane(load: Load) -> ThreadLane:
    """Raises BundleError and ConfigError if the model cannot be loaded."""
    bundle = load_bundle(Path(load.directory))
    engine = TranslatorEngine(
        bundle, num_slots=slots_for(load.max_rows), threads=1, provider=load.provider, fallback=load.fallback
    )
    engine.warm_up()
    outputs = Outputs(bundle, PromptTokenizer(bundle.tokenizer_path), vocab_size=engine.vocab_size)
    return ThreadLane(engine, outputs, max_rows=load.max_rows, num_blocks=0, name=bundle.manifest.id)


def load_and_fork(channels: Several[Channel]) -> int:
    """The status to end with, once all lanes have ended. Raises EOFError if the server never says what to load."""
    load = channels[0].first()
    configure_logging(load.log_level)
    try:
        lane = load_lane(load)
    except (BundleError, ConfigError) as error:
        for channel in channels:
            channel.say(Refused(type(error).__name__, error.message, error.param))
        return 0
    fork(lane, channels)
    return wait_for_all()


def fork(lane: ThreadLane, channels: Several[Channel]) -> None:
    """A process for each channel, which holds that one only: who waits at its other end learns of its death at once."""
    gc.collect()
    gc.freeze()  # what is there now stays, and looking at it would copy its memory
    for channel, cores in zip(channels, cores_for(len(channels)), strict=True):
        if not os.fork():
            with suppress(OSError):  # a container may forbid it
                os.sched_setaffinity(0, cores)
            for other in channels:
                if other is not channel:
                    other.close()
            os._exit(status_of(partial(serve, lane, channel)))
        channel.close()


def wait_for_all() -> int:
    """1 if one of them has died."""
    found = 0
    with suppress(ChildProcessError):  # there are no more
        while True:
            pid, status = os.wait()
            if status:
                found = 1
                _log.critical("process %d of a lane ended with status %d", pid, os.waitstatus_to_exitcode(status))
    return found


def status_of(work: Callable[[], int]) -> int:
    """What a process that does this ends with."""
    try:
        return work()
    except EOFError:  # the server ends, or has ended
        return 0
    except Exception as error:
        _log.critical("process %d died", os.getpid(), exc_info=error)
        return 1


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channels = [Channel(socket.socket(fileno=int(end))) for end in sys.argv[1:]]
    sys.exit(status_of(partial(load_and_fork, channels)))


if __name__ == "__main__":
    main()
