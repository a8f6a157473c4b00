"""The process of a lane: `python -m service.worker.generation.lane_process FD`, FD being its end of a pair of sockets.

The main thread reads what the server says, the engine thread does it and tells of it. It ends when the server closes
its end, or has gone; signals that are meant for the server are none of its concern.
"""

import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from service.domain import Finish, Progress, PromptTokens, Token
from service.errors import BundleError, ConfigError
from service.logs import configure_logging
from service.worker.bundle import load_bundle
from service.worker.generation.lane_messages import (
    Add,
    Close,
    Frames,
    Load,
    Marks,
    OfFinish,
    OfPrompt,
    OfToken,
    Ready,
    Refused,
    Told,
    ToProcess,
    ToServer,
    decode_to_process,
    framed,
)
from service.worker.generation.outputs import OutputPlan, Outputs
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.report import Report
from service.worker.generation.scheduler import slots_for
from service.worker.generation.sequence import Job, Prompt
from service.worker.generation.thread_lane import ThreadLane
from service.worker.generation.translator import TranslatorEngine

_OF = {Token: OfToken, Finish: OfFinish, PromptTokens: OfPrompt}


class Channel:
    """This end of the sockets. Any thread may speak, one hears. To a server that has gone nothing is said."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._lock = threading.Lock()

    def say(self, message: ToServer) -> None:
        frame = framed(message)
        with self._lock, suppress(ConnectionError):
            self._channel.sendall(frame)

    def hear(self) -> Iterator[ToProcess]:
        """What the server says, until it says no more."""
        frames = Frames()
        with suppress(ConnectionError):
            while data := self._channel.recv(1 << 16):
                for body in frames.feed(data):
                    yield decode_to_process(body)

    def shut(self) -> None:
        """Say and hear no more."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)


class Desk:
    """Between the channel and the lane: jobs have numbers on one side. The lock is for who is known."""

    def __init__(self, lane: ThreadLane, channel: Channel) -> None:
        self._lane = lane
        self._channel = channel
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._numbers: dict[Job, int] = {}
        self._num_left: dict[Job, int] = {}  # outputs, or searches, that have not ended

    def add(self, asked: Add) -> None:
        job = Job(asked.num_places, Progress(), asked.wants_tokens)
        prompts = [Prompt(index, ids, is_whole=True) for index, ids in asked.prompts]
        plans = [OutputPlan(prompts[at], index, seed, most) for at, index, seed, most in asked.plans]
        with self._lock:
            self._jobs[asked.job], self._numbers[job], self._num_left[job] = job, asked.job, len(plans)
        self._lane.add(job, asked.request, plans)

    def close(self, number: int, closed_at: float | None) -> None:
        with self._lock:
            if (job := self._jobs.get(number)) is None:
                return
            self._forget(job)
        job.closed_at = closed_at
        self._lane.close(job)

    def tell(self, report: Report) -> None:
        """In the engine thread. The server knows nothing any more of a job that it has closed."""
        with self._lock:
            told = self._told(report)
            for job, _ in (*report.ended, *report.failed):
                if job in self._numbers:
                    self._leave(job)
        self._channel.say(told)

    def _told(self, report: Report) -> Told:
        number = self._numbers.get
        return Told(
            [_OF[type(event)](at, event) for job, event in report.events if (at := number(job)) is not None],
            [(at, ended) for job, ended in report.ended if (at := number(job)) is not None],
            [(at, index) for job, index in report.failed if (at := number(job)) is not None],
            report.steps,
            report.released,
            [_marks(at, job.progress) for job in report.marked if (at := number(job)) is not None],
            self._lane.num_kept_tokens,
        )

    def _leave(self, job: Job) -> None:
        """One output less."""
        self._num_left[job] -= 1
        if not self._num_left[job]:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        del self._jobs[self._numbers.pop(job)], self._num_left[job]


def _marks(number: int, progress: Progress) -> Marks:
    gaps, progress.untold_gaps = progress.untold_gaps, []
    return Marks(number, progress.started, progress.first_token, gaps)


def serve(channel: Channel, asked: Iterator[ToProcess]) -> None:
    """Until the server closes its end. Raises BundleError and ConfigError before it has said that it is ready."""
    load = next(asked)
    assert isinstance(load, Load)
    configure_logging(load.log_level)
    bundle = load_bundle(Path(load.directory))
    engine = TranslatorEngine(
        bundle, num_slots=slots_for(load.max_rows), threads=1, provider=load.provider, fallback=load.fallback
    )
    engine.warm_up()
    outputs = Outputs(bundle, PromptTokenizer(bundle.tokenizer_path), vocab_size=engine.vocab_size)
    lane = ThreadLane(engine, outputs, max_rows=load.max_rows, num_blocks=0, name=bundle.manifest.id)
    desk = Desk(lane, channel)
    lane.open(desk.tell, lambda _: channel.shut())
    channel.say(Ready())
    for message in asked:
        match message:
            case Add():
                desk.add(message)
            case Close(job=number, closed_at=closed_at):
                desk.close(number, closed_at)
    lane.shut()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        serve(channel, channel.hear())
    except (BundleError, ConfigError) as error:
        channel.say(Refused(type(error).__name__, error.message, error.param))


if __name__ == "__main__":
    main()
