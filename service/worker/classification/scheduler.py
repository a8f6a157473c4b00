"""Who runs next. Policy only: no arrays, no sockets, no threads, no clock.

There is no timer: when the engine is free it takes what is waiting. A batch holds inputs of one padded length, so that
each runs at the length that its own tokens give and its result cannot depend on its neighbours. It is capped by padded
tokens: by a limit, and by a thread's share of what waits. The first input is the one with the lowest rank; a request's
n-th input ranks like the first input of a request that came n requests later, so that a long list delays the short ones
behind it by little, and nobody for ever.
"""

import heapq
from collections.abc import Sequence as Inputs

from service.errors import Overloaded
from service.worker.classification.sequence import Job, Sequence

# A batch is not cut below this many padded tokens for the others' sake: in four times as many, a token costs only a
# twentieth less (measured with the shipped sentiment model).
MIN_SHARE_TOKENS = 128

_Entry = tuple[int, int, Sequence]  # rank, order of arrival, input


class Scheduler:
    """Waiting inputs by padded length. `max_waiting` bounds admitted inputs that are not in a batch yet.

    `num_threads` is how many take batches at the same time.
    """

    def __init__(self, *, max_batch_tokens: int, max_waiting: int, num_threads: int = 1) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._num_threads = num_threads
        self._max_waiting = max_waiting
        self._queues: dict[int, list[_Entry]] = {}
        self._num_requests = 0
        self._order = 0
        self.num_waiting = 0

    def admit(self, job: Job) -> None:
        """Take a place for each input of `job`, before any work is done for it. Raises Overloaded."""
        self._take_places(job.num_inputs)

    def widen(self, job: Job, num_more: int) -> None:
        """Take places for inputs of an admitted job that it was not known to have. Raises Overloaded."""
        self._take_places(num_more)
        job.widen(num_more)

    def _take_places(self, num_inputs: int) -> None:
        if self.num_waiting + num_inputs > self._max_waiting:
            message = (
                f"the queue is full: {self.num_waiting} inputs wait, {num_inputs} more do not fit "
                f"under the limit of {self._max_waiting}"
            )
            raise Overloaded(message)
        self.num_waiting += num_inputs

    def add(self, sequences: Inputs[Sequence]) -> None:
        """Queue the inputs of one admitted job."""
        for offset, sequence in enumerate(sequences):
            entry = (self._num_requests + offset, self._order, sequence)
            heapq.heappush(self._queues.setdefault(sequence.padded_length, []), entry)
            self._order += 1
        self._num_requests += 1

    def close(self, job: Job) -> None:
        """Nobody waits for `job` any more: give its places back and skip what is left of it."""
        job.is_closed = True
        self.num_waiting -= job.num_waiting
        job.num_waiting = 0

    @property
    def num_tokens(self) -> int:
        """Padded tokens that wait; of what is admitted and not added yet they are not known."""
        return sum(length * len(queue) for length, queue in self._queues.items())

    def next_batch(self) -> list[Sequence]:
        """The inputs to run now, all of one padded length; empty when nothing waits."""
        self._drop_closed()
        if not self._queues:
            return []
        length = min(self._queues, key=lambda length: self._queues[length][0][:2])
        queue = self._queues[length]
        most_tokens = self._most_tokens()
        batch: list[Sequence] = []
        while queue and (not batch or (len(batch) + 1) * length <= most_tokens):
            sequence = heapq.heappop(queue)[2]
            if not sequence.job.is_closed:
                batch.append(sequence)
        for sequence in batch:
            sequence.job.num_waiting -= 1
        self.num_waiting -= len(batch)
        if not queue:
            del self._queues[length]
        return batch

    def _most_tokens(self) -> int:
        """The next batch's cap. Were one thread to take all that waits, who comes next would wait for all of it."""
        share = -(-self.num_tokens // self._num_threads)
        return min(self._max_batch_tokens, max(MIN_SHARE_TOKENS, share))

    def _drop_closed(self) -> None:
        """Remove closed inputs from the heads, so that every queue starts with one that somebody waits for."""
        for length in list(self._queues):
            queue = self._queues[length]
            while queue and queue[0][2].job.is_closed:
                heapq.heappop(queue)
            if not queue:
                del self._queues[length]
