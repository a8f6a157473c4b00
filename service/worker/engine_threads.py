"""The threads that take work and do it until they are stopped; the lock that they share with whoever brings the work.

Knows neither what the work is nor where its results go. A thread never waits for the event loop: after a piece of work
it takes the next one at once.
"""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_log = logging.getLogger("attnd.engine")

Work = TypeVar("Work")


class EngineThreads(Generic[Work]):
    """`has_work` is the lock; to notify it wakes a thread."""

    def __init__(
        self,
        take: Callable[[], Work | None],
        do: Callable[[Work], None],
        *,
        died: Callable[[BaseException], None],
        num_threads: int,
        name: str,
    ) -> None:
        """`take` gives the next work, None if there is none; under the lock. `do` works, without it. Both in a thread.

        `died` is called by each thread that ends other than by `stop`.
        """
        self._take = take
        self._do = do
        self._died = died
        self._is_stopped = False
        self.has_work = threading.Condition()
        self._threads = [
            threading.Thread(target=self._serve, name=f"engine-{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the work under way end and join the threads; what still waits is left to the caller."""
        with self.has_work:
            self._is_stopped = True
            self.has_work.notify_all()
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        try:
            while (work := self._next()) is not None:
                self._do(work)
        except BaseException as error:  # whatever it is, nobody may wait for a dead thread
            _log.critical("an engine thread died", exc_info=error)
            self._died(error)

    def _next(self) -> Work | None:
        """Waits for it; None when the threads are to end."""
        with self.has_work:
            while not self._is_stopped:
                if (work := self._take()) is not None:
                    return work
                self.has_work.wait()
        return None
