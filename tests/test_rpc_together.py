"""What comes one by one, taken together: all of it, in order, bounded, and closed when it is no longer wanted."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from fakes import until

from service.rpc.together import MAX_WAITING, together


class Source:
    """Counts up to `end`, without a pause but before the numbers in `pauses`, and says what became of it."""

    def __init__(self, end: int, *, pauses: frozenset[int] = frozenset(), error: Exception | None = None) -> None:
        self.end, self.pauses, self.error = end, pauses, error
        self.given = 0
        self.is_closed = False
        self.resume = asyncio.Event()

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            for number in range(self.end):
                if number in self.pauses:
                    await self.resume.wait()
                self.given += 1
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


async def turns(number: int) -> None:
    """Let every other task run for so many turns of the loop."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_what_is_ready_comes_together_and_in_order() -> None:
    source = Source(10, pauses=frozenset({4}))
    async with aclosing(together(source.items())) as lists:
        assert await anext(lists) == [0, 1, 2, 3]
        source.resume.set()
        assert [numbers async for numbers in lists] == [[4, 5, 6, 7, 8, 9]]
    assert source.is_closed


@pytest.mark.parametrize("end", [0, 1, MAX_WAITING - 1, MAX_WAITING, MAX_WAITING + 1, 10 * MAX_WAITING])
async def test_nothing_is_lost(end: int) -> None:
    lists = [numbers async for numbers in together(Source(end).items())]
    assert [number for numbers in lists for number in numbers] == list(range(end))
    assert all(0 < len(numbers) <= MAX_WAITING for numbers in lists)


async def test_a_receiver_that_takes_nothing_stops_the_source() -> None:
    source = Source(100 * MAX_WAITING)
    async with aclosing(together(source.items())) as lists:
        first = await anext(lists)
        await turns(100)
        assert source.given <= len(first) + MAX_WAITING + 1


@pytest.mark.parametrize("end", [0, 3, 3 * MAX_WAITING])
async def test_an_error_comes_after_everything_that_came_before_it(end: int) -> None:
    source = Source(end, error=ValueError("broken"))
    seen: list[int] = []

    async def take() -> None:
        async for numbers in together(source.items()):
            seen.extend(numbers)

    with pytest.raises(ValueError, match="broken"):
        await take()
    assert seen == list(range(end))
    assert source.is_closed


async def test_closing_closes_a_source_that_has_nothing_yet() -> None:
    source = Source(2, pauses=frozenset({1}))
    async with aclosing(together(source.items())) as lists:
        assert await anext(lists) == [0]
    assert source.is_closed


async def test_closing_closes_a_source_that_waits_for_room() -> None:
    source = Source(100 * MAX_WAITING)
    async with aclosing(together(source.items())) as lists:
        await anext(lists)
        await turns(10)
    assert source.is_closed


async def test_cancelling_closes_the_source() -> None:
    source = Source(1, pauses=frozenset({0}))

    async def take() -> None:
        async for _ in together(source.items()):
            pass

    task = asyncio.create_task(take())
    await turns(3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: source.is_closed)
