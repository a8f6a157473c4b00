"""A lane in its own process: what it hears from the server, what it does, and what it says.

One thread does it all, since another would have to be woken: between two steps it looks at what the server says, and
waits for that where there is nothing to do. It ends when the server closes its end, or has gone.
"""

import logging
import os
import socket
from contextlib import suppress
from typing import NoReturn

from service.domain import Finish, Progress, PromptTokens, Token
from service.worker.generation.lane_messages import (
    Add,
    Close,
    Closed,
    Frames,
    Load,
    Marks,
    OfFinish,
    OfPrompt,
    OfToken,
    Ready,
    Told,
    ToProcess,
    ToServer,
    decode_to_process,
    framed,
)
from service.worker.generation.outputs import OutputPlan
from service.worker.generation.report import Report
from service.worker.generation.sequence import Job, Prompt
from service.worker.generation.thread_lane import ThreadLane

_log = logging.getLogger("attnd.engine")

MOST_BYTES = 1 << 18  # at once: all that a socket holds, so that a close is not left behind what came before it

_OF = {Token: OfToken, Finish: OfFinish, PromptTokens: OfPrompt}


class Channel:
    """This end of the sockets. To a server that has gone nothing is said."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._frames = Frames()

    def close(self) -> None:
        self._channel.close()

    def say(self, message: ToServer) -> None:
        with suppress(ConnectionError):
            self._channel.sendall(framed(message))

    def hear(self, *, wait: bool) -> list[ToProcess]:
        """What the server has said meanwhile; `wait` until it says something. Raises EOFError when it will not."""
        try:
            data = self._channel.recv(MOST_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError
        return [decode_to_process(body) for body in self._frames.feed(data)]

    def first(self) -> Load:
        """What the server says before all else."""
        while not (messages := self.hear(wait=True)):
            pass  # a piece of it
        (load,) = messages
        assert isinstance(load, Load)
        return load


class Desk:
    """Between the channel and the lane: jobs have numbers on one side."""

    def __init__(self, lane: ThreadLane, channel: Channel) -> None:
        self._lane = lane
        self._channel = channel
        self._jobs: dict[int, Job] = {}
        self._numbers: dict[Job, int] = {}
        self._num_left: dict[Job, int] = {}  # outputs, or searches, that have not ended

    def take(self, message: ToProcess) -> None:
        match message:
            case Add():
                self._add(message)
            case Close(job=number, closed_at=closed_at):
                self._close(number, closed_at)

    def _add(self, asked: Add) -> None:
        job = Job(asked.num_places, Progress(is_told_late=asked.is_told_late), asked.wants_tokens)
        prompts = [Prompt(index, ids, is_whole=True) for index, ids in asked.prompts]
        plans = [OutputPlan(prompts[at], index, seed, most) for at, index, seed, most in asked.plans]
        self._jobs[asked.job], self._numbers[job], self._num_left[job] = job, asked.job, len(plans)
        try:
            self._lane.add(job, asked.request, plans)
        except Exception as error:  # whatever it is, it concerns this request alone
            _log.error("outputs could not be made", exc_info=error)
            self.tell(Report(failed=[(job, plan.index) for plan in plans]))

    def _close(self, number: int, closed_at: float | None) -> None:
        """It may have ended while the server was saying so."""
        if (job := self._jobs.get(number)) is not None:
            job.closed_at = closed_at
            self._forget(job)
            self._lane.close(job)
        self._channel.say(Closed(number))

    def tell(self, report: Report) -> None:
        """The server knows nothing any more of a job that it has closed."""
        number = self._numbers.get
        told = Told(
            [_OF[type(event)](at, event) for job, event in report.events if (at := number(job)) is not None],
            [(at, ended) for job, ended in report.ended if (at := number(job)) is not None],
            [(at, index) for job, index in report.failed if (at := number(job)) is not None],
            report.steps,
            report.released,
            [_marks(at, job.progress) for job in report.marked if (at := number(job)) is not None],
            self._lane.num_kept_tokens,
        )
        for job, _ in (*report.ended, *report.failed):
            if job in self._num_left:
                self._leave(job)
        self._channel.say(told)

    def _leave(self, job: Job) -> None:
        """One output less."""
        self._num_left[job] -= 1
        if not self._num_left[job]:
            self._forget(job)

    def _forget(self, job: Job) -> None:
        del self._jobs[self._numbers.pop(job)], self._num_left[job]


def _marks(number: int, progress: Progress) -> Marks:
    gaps, progress.untold_gaps = progress.untold_gaps, []
    return Marks(number, progress.started, progress.prefilled, progress.first_token, gaps)


def serve(lane: ThreadLane, channel: Channel) -> NoReturn:
    """Raises EOFError when the server closes its end."""
    desk = Desk(lane, channel)
    lane.open(desk.tell, print)
    channel.say(Ready(os.getpid()))
    is_busy = False
    while True:
        for message in channel.hear(wait=not is_busy):
            desk.take(message)
        is_busy = lane.step()
