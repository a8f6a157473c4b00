"""What comes one by one, taken together: a message costs its sender the same, whatever is in it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

MAX_WAITING = 256  # items of one source that may wait; a receiver that takes none stops its source there

Item = TypeVar("Item")


async def together(source: AsyncGenerator[Item, None]) -> AsyncGenerator[list[Item], None]:
    """All of `source`, in lists of what came since the last list was taken; then the error that it ends with, if any.

    Closing this closes `source`, and so does cancelling the task that awaits it.
    """
    waiting: asyncio.Queue[Item | None] = asyncio.Queue(MAX_WAITING)
    reader = asyncio.create_task(_read_all(source, waiting))
    try:
        while (item := await waiting.get()) is not None:
            items = [item]
            while not waiting.empty() and (item := waiting.get_nowait()) is not None:
                items.append(item)
            yield items
            if item is None:
                break
        await reader
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read_all(source: AsyncGenerator[Item, None], waiting: asyncio.Queue[Item | None]) -> None:
    """Put every item of `source` into `waiting`, then None, also when it ends with an error."""
    async with aclosing(source):
        try:
            async for item in source:
                await waiting.put(item)
        except Exception:
            await waiting.put(None)
            raise
        await waiting.put(None)
