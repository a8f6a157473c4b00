"""A lane in a process of its own, as seen by the server: it is told what to write, and its reports come back.

Threads of one process take turns at Python, and a small model's steps leave half of their time to it: with lanes in
threads a quarter of two cores lies idle.
"""

import asyncio
import logging
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import count

from service.domain import GenerateRequest
from service.errors import EngineFailed
from service.worker.generation.lane_messages import (
    Add,
    Close,
    Closed,
    Frames,
    Marks,
    Told,
    ToProcess,
    decode_to_server,
    framed,
)
from service.worker.generation.lane_processes import LaneProcesses
from service.worker.generation.lanes import Died, Tell
from service.worker.generation.outputs import OutputPlan
from service.worker.generation.report import Report
from service.worker.generation.sequence import Job

_log = logging.getLogger("attnd.engine")


@dataclass(slots=True)
class _Share:
    """What this lane writes of a job: so many rows, `width` an output."""

    number: int
    width: int
    num_rows: int


class ProcessLane:
    """See Lane. `tell` is called on the asyncio thread.

    What runs and what waits is counted here, as if an output took a row as soon as one is free, so that only those over
    `max_rows` wait. A search that waits for several rows leaves a few of them free, which is not seen here.
    """

    def __init__(self, processes: LaneProcesses, place: int) -> None:
        """It is the lane `place` of those that `processes` can open."""
        self._processes = processes
        self._place = place
        self._max_rows = processes.max_rows
        self._unsaid: list[bytes] = []
        self._numbers = count()
        self._jobs: dict[int, Job] = {}
        self._shares: dict[Job, _Share] = {}
        self._num_rows = 0
        self._closed: dict[int, int] = {}  # rows of jobs that the lane has not said to be closed yet
        self.num_kept_tokens = 0

    async def start(self, tell: Tell, died: Died) -> None:
        """Raises BundleError, ConfigError and EngineFailed."""
        try:
            channel, self.pid = await asyncio.to_thread(self._processes.open, self._place)
        except asyncio.CancelledError:  # the server ends, and would wait for that thread
            self._processes.give_up(self._place)
            raise
        self._tell, self._died = tell, died
        self._ends = _Ends(self._hear, self._lost)
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_unix_connection(lambda: self._ends, sock=channel)

    async def stop(self) -> None:
        self._ends.is_expected = True
        self._transport.abort()  # what it has not been told yet concerns nobody any more
        await asyncio.to_thread(self._processes.end)

    def add(self, job: Job, request: GenerateRequest, plans: Several[OutputPlan]) -> None:
        if job.is_closed:
            return
        share = _Share(next(self._numbers), request.num_beams, len(plans) * request.num_beams)
        self._jobs[share.number], self._shares[job] = job, share
        self._num_rows += share.num_rows
        prompts = list(dict.fromkeys(plan.prompt for plan in plans))
        self._say(
            Add(
                share.number,
                job.num_places,
                job.wants_tokens,
                job.progress.is_told_late,
                request,
                [(prompt.index, list(prompt.ids)) for prompt in prompts],
                [(prompts.index(plan.prompt), plan.index, plan.seed, plan.max_tokens) for plan in plans],
            )
        )

    def close(self, job: Job) -> None:
        if (share := self._shares.get(job)) is not None:
            self._closed[share.number] = share.num_rows
            self._forget(job, share)
            self._say(Close(share.number, job.closed_at))

    @property
    def num_waiting(self) -> int:
        return max(0, self._num_rows - self._max_rows)

    @property
    def num_running(self) -> int:
        return min(self._num_rows, self._max_rows)

    @property
    def num_rows(self) -> int:
        return self._num_rows + sum(self._closed.values())

    def _say(self, message: ToProcess) -> None:
        """What one turn of the event loop has to say goes in one piece: every piece wakes the process."""
        if not self._unsaid:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsaid.append(framed(message))

    def _flush(self) -> None:
        unsaid, self._unsaid = self._unsaid, []
        if not self._transport.is_closing():
            self._transport.write(b"".join(unsaid))

    def _lost(self, error: Exception | None) -> None:
        gone = EngineFailed(f"process {self.pid}, which writes for this model, has ended or is not understood")
        _log.critical("%s", gone.message, exc_info=error)
        self.num_kept_tokens = 0
        self._died(gone)

    def _hear(self, told: Told | Closed) -> None:
        """What is told of jobs that were closed meanwhile concerns nobody."""
        if isinstance(told, Closed):
            del self._closed[told.job]
            return
        jobs = self._jobs
        self.num_kept_tokens = told.num_kept_tokens
        for marks in told.marks:
            if (job := jobs.get(marks.job)) is not None:
                _mark(job, marks)
        report = Report(
            events=[(job, one.event) for one in told.events if (job := jobs.get(one.job)) is not None],
            ended=[(job, ended) for number, ended in told.ended if (job := jobs.get(number)) is not None],
            failed=[(job, index) for number, index in told.failed if (job := jobs.get(number)) is not None],
            steps=told.steps,
            released=told.released,
        )
        for job, _ in (*report.ended, *report.failed):
            self._leave(job)
        self._tell(report)

    def _leave(self, job: Job) -> None:
        """One output less."""
        if (share := self._shares.get(job)) is not None:
            self._num_rows -= share.width
            share.num_rows -= share.width
            if not share.num_rows:
                self._forget(job, share)

    def _forget(self, job: Job, share: _Share) -> None:
        self._num_rows -= share.num_rows
        del self._shares[job], self._jobs[share.number]


class _Ends(asyncio.Protocol):
    """The server's end of the channel."""

    def __init__(self, hear: Callable[[Told | Closed], None], lost: Callable[[Exception | None], None]) -> None:
        self._hear = hear
        self._lost = lost
        self._frames = Frames()
        self.is_expected = False

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            told = decode_to_server(body)
            assert isinstance(told, Told | Closed)
            self._hear(told)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.is_expected:
            self._lost(error)


def _mark(job: Job, marks: Marks) -> None:
    progress = job.progress
    progress.started = _earlier(progress.started, marks.started)
    progress.prefilled = _earlier(progress.prefilled, marks.prefilled)
    progress.first_token = _earlier(progress.first_token, marks.first_token)
    for gap in marks.gaps:
        progress.leave_untold(gap)


def _earlier(one: float | None, other: float | None) -> float | None:
    return min((at for at in (one, other) if at is not None), default=None)
