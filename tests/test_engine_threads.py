"""Threads that take work: each piece once, none lost, an end that waits, and a death that is told."""

import threading
import time
from collections import deque
from collections.abc import Callable

import pytest

from service.worker.engine_threads import EngineThreads

PATIENCE_S = 10.0


class Queue:
    """Work to take; what was done, and how it ended."""

    def __init__(self, *, num_threads: int = 1) -> None:
        self.waiting: deque[int] = deque()
        self.done: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_idle = threading.Event()
        self.death: list[BaseException] = []
        self.has_died = threading.Event()
        self.threads = EngineThreads(self._take, self._do, died=self._die, num_threads=num_threads, name="test")
        self.threads.start()

    def add(self, *work: int) -> None:
        with self.threads.has_work:
            self.is_idle.clear()
            self.waiting += work
            self.threads.has_work.notify()

    def _take(self) -> int | None:
        if not self.waiting:
            self.is_idle.set()
            return None
        return self.waiting.popleft()

    def _do(self, work: int) -> None:
        assert self.gate.wait(PATIENCE_S)
        if work < 0:
            raise MemoryError
        self.done.append(work)

    def _die(self, error: BaseException) -> None:
        self.death.append(error)
        self.has_died.set()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_work_is_done_whenever_it_comes_and_all_threads_end(num_threads: int) -> None:
    queue = Queue(num_threads=num_threads)
    for _ in range(2):
        assert queue.is_idle.wait(PATIENCE_S)
        queue.add(0, 1, 2)  # 0 is work, too
    assert queue.is_idle.wait(PATIENCE_S)
    queue.threads.stop()
    assert sorted(queue.done) == [0, 0, 1, 1, 2, 2]
    assert queue.death == []


def test_the_end_waits_for_the_work_under_way_and_for_no_other() -> None:
    queue = Queue()
    assert queue.is_idle.wait(PATIENCE_S)
    queue.gate.clear()
    queue.add(1, 2)
    stopping = threading.Thread(target=queue.threads.stop)
    wait_until(lambda: len(queue.waiting) == 1)  # the first is under way
    stopping.start()
    wait_until(lambda: queue.threads._is_stopped)
    assert stopping.is_alive()
    queue.gate.set()
    stopping.join(PATIENCE_S)
    assert (queue.done, list(queue.waiting)) == ([1], [2])


def test_a_death_is_told_once() -> None:
    queue = Queue()
    queue.add(-1)
    assert queue.has_died.wait(PATIENCE_S)
    queue.threads.stop()
    assert [type(error) for error in queue.death] == [MemoryError]
