"""service.worker.long_texts, and what it needs of the tokenizers: that other threads go on while they encode."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import until
from test_detokenizer import byte_level

from service.domain import Message, TextInput
from service.errors import DeadlineExceeded, Unavailable
from service.worker.generation.chat_template import ChatTemplate
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.long_texts import LongTexts
from service.worker.tokenizer import HUGE_TEXT, LONG_TEXT, Tokenizer

BERT = Path(__file__).parents[1] / "model" / "zoo" / "sentiment" / "tokenizer.json"
LONG = "\u2014".join(["unbelievable"] * 20_000)  # dashes, before which no text is cut
PLAIN = ChatTemplate("{{ messages[0].content }}")


def read_classified() -> Callable[[], object]:
    tokenizer = Tokenizer(BERT, 512)
    return lambda: tokenizer.encode([TextInput(LONG)], truncate=True)


def read_prompts(path: Path, how: str) -> Callable[[], object]:
    byte_level().save(str(path))
    tokenizer = PromptTokenizer(path)
    if how == "encode_rendered":
        return lambda: tokenizer.encode_rendered(tokenizer.rendered(PLAIN, [Message("user", LONG)]))
    return lambda: getattr(tokenizer, how)(LONG)


@contextmanager
def ticking() -> Iterator[list[int]]:
    """Another thread, which counts milliseconds as far as it is let."""
    count, ended = [0], threading.Event()

    def tick() -> None:
        while not ended.is_set():
            time.sleep(0.001)
            count[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    yield count
    ended.set()
    thread.join()


@pytest.mark.parametrize("how", ["classified", "encode", "encode_plain", "encode_rendered"])
def test_other_threads_go_on_while_a_long_text_is_encoded(tmp_path: Path, how: str) -> None:
    read = read_classified() if how == "classified" else read_prompts(tmp_path / "tokenizer.json", how)
    with ticking() as count:
        time.sleep(0.01)
        before = count[0]
        read()
        num_ticks = count[0] - before
    assert num_ticks > 10


@pytest.fixture
async def texts() -> AsyncIterator[LongTexts]:
    texts = LongTexts("tiny")
    yield texts
    texts.close()


class Slow:
    """What reads a text until it is let go, or for too long."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.running, self.most = 0, 0

    def __call__(self) -> threading.Thread:
        self.running += 1
        self.most = max(self.most, self.running)
        assert self.gate.wait(10)
        self.running -= 1
        return threading.current_thread()


async def test_huge_texts_are_read_one_at_a_time_and_others_beside_them(texts: LongTexts) -> None:
    slow = Slow()
    huge = [asyncio.ensure_future(texts.read(slow, HUGE_TEXT)) for _ in range(8)]
    await until(lambda: slow.running == 1)
    assert await texts.read(lambda: slow.running, LONG_TEXT) == 1
    slow.gate.set()
    threads = await asyncio.gather(*huge)
    assert slow.most == 1
    assert len(set(threads)) == 1
    assert threading.current_thread() not in threads


@pytest.mark.parametrize("length", [LONG_TEXT, HUGE_TEXT])
async def test_what_fails_meanwhile_ends_the_wait(texts: LongTexts, length: int) -> None:
    slow, failed = Slow(), asyncio.get_running_loop().create_future()
    waiting = asyncio.ensure_future(texts.read(slow, length, unless=failed))
    await until(lambda: slow.running == 1)
    failed.set_exception(DeadlineExceeded("late"))
    with pytest.raises(DeadlineExceeded):
        await waiting
    assert slow.running == 1
    slow.gate.set()


async def test_whose_turn_does_not_come_before_the_end_is_told(texts: LongTexts) -> None:
    slow = Slow()
    begun, waiting = (asyncio.ensure_future(texts.read(slow, HUGE_TEXT)) for _ in range(2))
    await until(lambda: slow.running == 1)
    texts.close()
    for late in (waiting, texts.read(slow, HUGE_TEXT)):
        with pytest.raises(Unavailable, match="the server is stopping"):
            await late
    slow.gate.set()
    await begun


async def test_who_leaves_gives_up_the_turn(texts: LongTexts) -> None:
    slow, begun = Slow(), []
    first = asyncio.ensure_future(texts.read(slow, HUGE_TEXT))
    await until(lambda: slow.running == 1)
    second = asyncio.ensure_future(texts.read(lambda: begun.append(2), HUGE_TEXT))
    third = asyncio.ensure_future(texts.read(lambda: begun.append(3), HUGE_TEXT))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    slow.gate.set()
    await asyncio.gather(first, third)
    assert begun == [3]


async def test_an_error_that_nobody_waits_for_is_no_news(texts: LongTexts) -> None:
    """Both fail; whoever waits is told of one."""
    said: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    loop = asyncio.get_running_loop()
    failed: list[asyncio.Future[None]] = [loop.create_future()]
    raised = threading.Event()

    def broken() -> None:
        loop.call_soon_threadsafe(raised.wait, 0.05)  # so that both errors are there when the wait ends
        loop.call_soon_threadsafe(failed[0].set_exception, DeadlineExceeded("late"))
        raise ValueError

    with pytest.raises(DeadlineExceeded):
        await texts.read(broken, HUGE_TEXT, unless=failed[0])
    failed.clear()
    gc.collect()
    await asyncio.sleep(0)
    assert said == []
