"""The engine loops of one generation model side by side, its lanes, and the queue before all of them.

Everything here runs on the asyncio thread. An output goes to the lane with the fewest rows and stays there, so that one
request at a time always finds the same lane, and the sentences of a long text find all. The beams of a search are one
sequence and stay together. Knows neither what a lane does nor what it takes for that.
"""

from collections.abc import Sequence as Several

from service.errors import Overloaded
from service.worker.generation.loop import GenerationLoop
from service.worker.generation.sequence import Job, Sequence


class Lanes:
    """`max_waiting` bounds the outputs and beams, of all lanes together, that were admitted and have no slot yet."""

    def __init__(self, loops: Several[GenerationLoop], *, max_waiting: int) -> None:
        self._loops = loops
        self._max_waiting = max_waiting
        self._coming: set[Job] = set()  # admitted, but their prompts are still being read

    def start(self) -> None:
        for loop in self._loops:
            loop.start()

    def stop(self) -> None:
        """See EngineThreads.stop."""
        for loop in self._loops:
            loop.stop()

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

    def add(self, job: Job, sequences: Several[Sequence]) -> None:
        """Queue the outputs of one admitted job; of a search the beam that leads."""
        self._coming.discard(job)
        num_rows = [loop.num_waiting + loop.num_running for loop in self._loops]
        shares: list[list[Sequence]] = [[] for _ in self._loops]
        for sequence in sequences:
            lane = num_rows.index(min(num_rows))
            num_rows[lane] += len(sequence.rows)
            shares[lane].append(sequence)
        for loop, share in zip(self._loops, shares, strict=True):
            if share:
                loop.add(share)

    def close(self, job: Job) -> None:
        """Nobody waits for `job` any more: its places are free now, its slots before each lane's next step."""
        self._coming.discard(job)
        for loop in self._loops:
            loop.close(job)

    @property
    def num_waiting(self) -> int:
        return sum(job.num_places for job in self._coming) + sum(loop.num_waiting for loop in self._loops)

    @property
    def num_running(self) -> int:
        return sum(loop.num_running for loop in self._loops)

    @property
    def num_kept_tokens(self) -> int:
        return sum(loop.num_kept_tokens for loop in self._loops)
