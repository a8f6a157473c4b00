"""The lanes of one generation model, each an engine loop with rows of its own, and the queue before all of them.

Everything here runs on the asyncio thread. The outputs of a prompt go to the lane with the fewest rows and stay there,
so that it is read once, that one request at a time always finds the same lane, and that the sentences of a long text
find all. More outputs than a lane has rows are shared out. The beams of a search are one sequence. A lane that hangs
keeps the rows of those who have given up on it, so that others come to it only while it has the fewest still. Knows
neither what a lane does nor where: in a thread of this process, or in another one.
"""

import asyncio
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from itertools import groupby
from operator import attrgetter
from typing import Protocol

from service.domain import GenerateRequest
from service.errors import Overloaded
from service.worker.generation.outputs import OutputPlan
from service.worker.generation.report import Report
from service.worker.generation.sequence import Job

Tell = Callable[[Report], None]
Died = Callable[[BaseException], None]


class Lane(Protocol):
    """ThreadLane and ProcessLane. Called on the asyncio thread; `start` comes before all else, `stop` after it."""

    async def start(self, tell: Tell, died: Died) -> None:
        """`tell` is called with every report, in whatever thread, `died` once if the lane ends other than by `stop`."""
        ...

    async def stop(self) -> None:
        """Let the step under way end; what still waits is left to the caller."""
        ...

    def add(self, job: Job, request: GenerateRequest, plans: Several[OutputPlan]) -> None:
        """Queue some outputs of one job."""
        ...

    def close(self, job: Job) -> None:
        """Nobody waits for `job` any more: its slots are free before the next step. It may be unknown here."""
        ...

    @property
    def num_waiting(self) -> int:
        """Outputs and beams without a slot."""
        ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_rows(self) -> int:
        """What waits and runs, and what was closed and the lane has not let go of yet."""
        ...

    @property
    def num_kept_tokens(self) -> int:
        """Tokens whose K/V are in use."""
        ...


class Lanes:
    """Each lane has `max_rows`. `max_waiting` bounds the outputs and beams, of all lanes together, that were admitted
    and have no slot yet.
    """

    def __init__(self, lanes: Several[Lane], *, max_rows: int, max_waiting: int) -> None:
        self._lanes = lanes
        self._max_rows = max_rows
        self._max_waiting = max_waiting
        self._coming: set[Job] = set()  # admitted, but their prompts are still being read

    async def start(self, tell: Tell, died: Died) -> None:
        """All of them or none. Raises what a lane raises."""
        starting = [lane.start(tell, died) for lane in self._lanes]
        failures = await asyncio.gather(*starting, return_exceptions=True)
        if any(failures):
            started = [lane for lane, failure in zip(self._lanes, failures, strict=True) if failure is None]
            await asyncio.gather(*(lane.stop() for lane in started))
            raise next(filter(None, failures))

    async def stop(self) -> None:
        await asyncio.gather(*(lane.stop() for lane in self._lanes))

    def admit(self, job: Job) -> None:
        """Take the places that `job` needs, before any work is done for it. Raises Overloaded."""
        num_waiting = self.num_waiting
        if num_waiting + job.num_places > self._max_waiting:
            message = (
                f"the queue is full: {num_waiting} outputs wait, {job.num_places} more do not fit "
                f"under the limit of {self._max_waiting}"
            )
            raise Overloaded(message)
        self._coming.add(job)

    def add(self, job: Job, request: GenerateRequest, plans: Several[OutputPlan]) -> None:
        """Queue the outputs of one admitted job."""
        self._coming.discard(job)
        num_rows = [lane.num_rows for lane in self._lanes]
        shares: list[list[OutputPlan]] = [[] for _ in self._lanes]
        for together in self._of_one_prompt(plans):
            at = num_rows.index(min(num_rows))
            num_rows[at] += len(together) * request.num_beams
            shares[at] += together
        for lane, share in zip(self._lanes, shares, strict=True):
            if share:
                lane.add(job, request, share)

    def _of_one_prompt(self, plans: Several[OutputPlan]) -> Iterator[list[OutputPlan]]:
        """Those that share a prompt, and find room in a lane."""
        for _, sharing in groupby(plans, key=attrgetter("prompt")):
            shared = list(sharing)
            for first in range(0, len(shared), self._max_rows):
                yield shared[first : first + self._max_rows]

    def close(self, job: Job) -> None:
        """Nobody waits for `job` any more: its places are free now, its slots before each lane's next step."""
        self._coming.discard(job)
        job.is_closed = True
        for lane in self._lanes:
            lane.close(job)

    @property
    def num_waiting(self) -> int:
        return sum(job.num_places for job in self._coming) + sum(lane.num_waiting for lane in self._lanes)

    @property
    def num_running(self) -> int:
        return sum(lane.num_running for lane in self._lanes)

    @property
    def num_kept_tokens(self) -> int:
        return sum(lane.num_kept_tokens for lane in self._lanes)
