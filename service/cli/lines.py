"""Many lines at once: asked about side by side, told in their order.

A line is a request of its own, so that no line is too large because of its neighbours; batches are made by the server,
of those that are under way together. Knows neither what is asked nor what is told.
"""

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from service.domain import Call
from service.errors import AttndError, Overloaded

SHORTEST_WAIT_SECONDS = 0.1  # until a full queue is tried again, even if the server would have it sooner

_PROMPT = re.compile(r"\bprompt(\.0)?\b")  # as a server calls it, or a model in this process

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Line:
    """`place` is what people call it: line 3, if it was read, or text 3, if it was an argument."""

    place: str
    text: str


async def in_order(
    items: Sequence[Item],
    ask: Callable[[Item], Coroutine[Any, Any, Answer]],
    *,
    size: Callable[[Item], int],
    most: int,
) -> AsyncGenerator[Answer, None]:
    """What `ask` says of each item, in their order, each as soon as it and all before it are there.

    The sizes of those under way are together `most` at the most, but for an item that is larger by itself. Raises what
    the first item that fails raises, after the answers of those before it. Whatever ends this early, those that are
    still under way are abandoned.
    """
    asked: deque[tuple[int, asyncio.Task[Answer]]] = deque()
    num_taken = 0
    try:
        for item in items:
            own = size(item)
            while asked and num_taken + own > most:
                taken, task = asked.popleft()
                yield await task
                num_taken -= taken
            asked.append((own, asyncio.create_task(ask(item))))
            num_taken += own
        while asked:
            yield await asked.popleft()[1]
    finally:
        for _, task in asked:
            task.cancel()
        await asyncio.gather(*(task for _, task in asked), return_exceptions=True)


async def patiently(ask: Callable[[Call], Awaitable[Answer]], call: Call) -> Answer:
    """What `ask` says. While the queue is full it is asked again, whenever the server says, until the call's deadline.

    Raises Overloaded when there is no time for another try.
    """
    while True:
        try:
            return await ask(call)
        except Overloaded as error:
            seconds = max(error.retry_after_s, SHORTEST_WAIT_SECONDS)
            if time.monotonic() + seconds >= call.deadline:
                raise
        await asyncio.sleep(seconds)


def about(line: Line, error: AttndError) -> AttndError:
    """The `error` of a request whose only prompt is `line`, in terms of whoever wrote it."""
    named = _PROMPT.sub(lambda _: line.place, error.message, count=1)
    message = named if named != error.message else f"{line.place}: {error.message}"
    return type(error)(message, param=error.param, code=error.code)
