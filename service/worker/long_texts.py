"""Long texts are read beside the event loop, huge ones one at a time, and nobody waits for one longer than it may.

Tokenizing a huge text can take seconds of a core and hundreds of megabytes: as many at once as there are threads would
take all cores from what is served meanwhile, and memory without a bound.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from service.errors import Unavailable
from service.worker.tokenizer import HUGE_TEXT

Read = TypeVar("Read")


class LongTexts:
    """Of one model. Everything here runs on the asyncio thread."""

    def __init__(self, name: str) -> None:
        self._one_at_a_time = ThreadPoolExecutor(1, thread_name_prefix=f"huge-texts-{name}")

    async def read(
        self, read: Callable[[], Read], num_characters: int, *, unless: asyncio.Future[Any] | None = None
    ) -> Read:
        """What `read` returns, called in a thread; or what `unless` raises, if it does so first.

        Who leaves gives up the turn; what has been begun is finished for nobody. Raises Unavailable for whom the turn
        had not come when `close` was called.
        """
        thread = self._one_at_a_time if num_characters >= HUGE_TEXT else None
        try:
            reading = asyncio.get_running_loop().run_in_executor(thread, read)
        except RuntimeError:  # the thread takes nothing any more
            raise _stopping() from None
        try:
            await asyncio.wait({reading} if unless is None else {reading, unless}, return_when=asyncio.FIRST_COMPLETED)
            if unless is not None and unless.done():
                unless.result()
            if reading.cancelled():
                raise _stopping()
            return reading.result()
        finally:
            reading.cancel()  # where it has failed, too, this says that nobody needs to be told

    def close(self) -> None:
        """Drop what waits for its turn."""
        self._one_at_a_time.shutdown(wait=False, cancel_futures=True)


def _stopping() -> Unavailable:
    return Unavailable("the server is stopping", code="draining")
