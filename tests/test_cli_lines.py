"""Many lines at once: in order, side by side, and translated by a real model here and by a real server."""

import asyncio
import io
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest
import wire
from fakes import FakeBackend, until
from processes import attnd, serving

from service.__main__ import _parser
from service.cli.client import Answers, HttpClient
from service.cli.commands import PLACES, plan
from service.cli.lines import Line, about, in_order, patiently
from service.domain import Call, Event, GenerateRequest, ModelInfo
from service.errors import EngineFailed, InvalidRequest, Overloaded, TooLarge

TRANSLATOR = ModelInfo(id="translator", task="translation", created=1_700_000_002, facts={})


class Asked:
    """Answers each item with itself, once the test says so; a negative one with an error."""

    def __init__(self) -> None:
        self.under_way: dict[int, asyncio.Future[int]] = {}
        self.abandoned: list[int] = []

    async def __call__(self, item: int) -> int:
        self.under_way[item] = asyncio.get_running_loop().create_future()
        try:
            return await self.under_way[item]
        except asyncio.CancelledError:
            self.abandoned.append(item)
            raise
        finally:
            del self.under_way[item]

    def answer(self, item: int) -> None:
        if item < 0:
            self.under_way[item].set_exception(EngineFailed(str(item)))
        else:
            self.under_way[item].set_result(item)


def told_by(answers: AsyncGenerator[int, None]) -> tuple[list[int], "asyncio.Task[None]"]:
    """What `answers` have said by now, and the task that listens."""
    told: list[int] = []

    async def listen() -> None:
        async with aclosing(answers):
            async for one in answers:
                told.append(one)

    return told, asyncio.create_task(listen())


async def test_answers_are_told_in_order_and_as_soon_as_they_can_be() -> None:
    ask = Asked()
    told, listening = told_by(in_order([0, 1, 2, 3], ask, size=lambda item: 1, most=3))
    await until(lambda: len(ask.under_way) == 3)
    ask.answer(1)
    await until(lambda: 1 not in ask.under_way)
    assert told == []
    ask.answer(0)
    await until(lambda: told == [0, 1])
    ask.answer(2)
    await until(lambda: told == [0, 1, 2])
    ask.answer(3)
    await listening
    assert told == [0, 1, 2, 3]


async def test_no_more_are_under_way_than_have_room() -> None:
    ask = Asked()
    told, listening = told_by(in_order([2, 1, 9, 3], ask, size=lambda item: item, most=4))
    for together in ([2, 1], [9], [3]):  # 9 is more than there is room for, and goes alone
        await until(lambda together=together: list(ask.under_way) == together)
        await asyncio.sleep(0.01)
        assert list(ask.under_way) == together
        for item in together:
            ask.answer(item)
    await listening
    assert told == [2, 1, 9, 3]


async def test_an_error_comes_in_its_turn_and_abandons_what_is_behind_it() -> None:
    ask = Asked()
    told, listening = told_by(in_order([0, -1, 2], ask, size=lambda item: 1, most=3))
    await until(lambda: len(ask.under_way) == 3)
    ask.answer(-1)
    await asyncio.sleep(0.01)
    assert not listening.done()
    ask.answer(0)
    async with asyncio.timeout(60):
        with pytest.raises(EngineFailed, match="-1"):
            await listening
    assert (told, ask.abandoned) == ([0], [2])


async def test_whoever_stops_listening_abandons_all_of_them() -> None:
    ask = Asked()
    _, listening = told_by(in_order([0, 1, 2], ask, size=lambda item: 1, most=2))
    await until(lambda: len(ask.under_way) == 2)
    listening.cancel()
    async with asyncio.timeout(60):
        await asyncio.gather(listening, return_exceptions=True)
    assert sorted(ask.abandoned) == [0, 1]


def call(seconds: float) -> Call:
    return Call("id", "command line", time.monotonic() + seconds)


async def test_a_full_queue_is_tried_again_when_it_says() -> None:
    tries: list[float] = []

    async def ask(call: Call) -> str:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise Overloaded("full", retry_after_s=0.2 if len(tries) == 1 else 0.0)
        return "done"

    assert await patiently(ask, call(60)) == "done"
    assert tries[1] - tries[0] >= 0.2
    assert tries[2] - tries[1] >= 0.09  # never at once


async def test_a_full_queue_is_an_error_when_there_is_no_time_to_come_back() -> None:
    async def ask(call: Call) -> str:
        raise Overloaded("full", retry_after_s=0.3)

    with pytest.raises(Overloaded, match="full"):
        await patiently(ask, call(0.5))


def test_an_error_names_the_line() -> None:
    line = Line("line 7", "Hi.")
    for name in ("prompt", "prompt.0"):
        error = about(line, TooLarge(f"sentence 2 of {name} has 83 tokens", param=name, code="too_many_tokens"))
        assert (type(error), error.message) == (TooLarge, "sentence 2 of line 7 has 83 tokens")
        assert error.code == "too_many_tokens"
    assert str(about(line, Overloaded("the queue is full"))) == "line 7: the queue is full"


async def translate(backend: Answers, *arguments: str) -> None:
    options = vars(_parser().parse_args(["translate", *arguments]))
    options.pop("command")
    async with aclosing(backend):
        await plan("translate", options).run(backend, 60.0)


@pytest.mark.parametrize(("num_beams", "num_sentences"), [(1, 1), (5, 1), (5, 3), (16, 9)])
async def test_lines_are_side_by_side_as_their_sentences_and_beams_leave_room(
    backend: FakeBackend, monkeypatch: pytest.MonkeyPatch, num_beams: int, num_sentences: int
) -> None:
    backend.served = [TRANSLATOR]
    backend.hold()
    monkeypatch.setattr(sys, "stdin", io.StringIO((" ".join(["Hi."] * num_sentences) + "\n") * 100))
    translating = asyncio.create_task(translate(backend, f"--num-beams={num_beams}"))
    most = max(1, PLACES // (num_beams * num_sentences))
    await until(lambda: backend.num_waiting == most)
    await asyncio.sleep(0.02)
    assert backend.num_waiting == most
    backend.release()
    await translating
    assert {request.prompt for request in backend.generations} == {(" ".join(["Hi."] * num_sentences),)}
    assert not any(call.wants_tokens for call in backend.calls)
    assert len({call.deadline for call in backend.calls}) > 1  # each has its time, not all of them together
    assert len({id(call.progress) for call in backend.calls}) == len(backend.generations) == 100


class Busy(FakeBackend):
    """Refuses every line once."""

    def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        if request not in self.generations:
            self.generations.append(request)
            raise Overloaded("the queue is full", retry_after_s=0.05)
        return super().generate(request, call)


@pytest.mark.parametrize("is_remote", [False, True])
async def test_a_line_that_finds_the_queue_full_comes_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    busy = Busy()
    busy.served = [TRANSLATOR]
    lines = [f"line {at}" for at in range(80)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    async with wire.serve(busy) as served:
        client = HttpClient(f"http://127.0.0.1:{served.port}")
        await translate(client if is_remote else busy)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == lines
    assert len(busy.generations) == 160


@pytest.mark.parametrize("is_remote", [False, True])
async def test_a_translation_that_fails_names_its_line_behind_what_was_told(
    backend: FakeBackend,
    served: wire.Served,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_remote: bool,
) -> None:
    backend.served = [TRANSLATOR]
    generate = backend.generate

    def picky(request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        if request.prompt == ("bad",):
            raise InvalidRequest("prompt.0 has nothing to translate", param="prompt.0")
        return generate(request, call)

    monkeypatch.setattr(backend, "generate", picky)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\nbad\nthree\n"))
    client = HttpClient(f"http://127.0.0.1:{served.port}")
    with pytest.raises(InvalidRequest, match=r"^line 4 has nothing to translate"):
        await translate(client if is_remote else backend)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == ["one", "", "two"]
    with pytest.raises(InvalidRequest, match=r"^text 2 has nothing to translate"):
        await translate(client if is_remote else backend, "one", "bad")


# --- a real model

NUM_LINES = 70  # three sentences each: more than a request may have
THREE = "Where is the station? {} dogs run. Two children are playing!"
GOOD = "".join(THREE.format(at) + "\n" for at in range(NUM_LINES))
FLAGS = ("--num-beams=5", "--max-tokens=6")  # more places than there are in the queue


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)
    found: Path = tiny.tiny_translation_bundle(tmp_path_factory.mktemp("lines") / "translation")
    return found


async def one_by_one(port: int, lines: list[str]) -> str:
    """Their translations, each asked for alone, as lines."""
    told = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        for line in lines:
            body = {"prompt": line.rstrip("\n"), "num_beams": 5, "max_tokens": 6}
            told.append((await client.post("/v1/generate", json=body)).json()["outputs"][0]["text"] + "\n")
    return "".join(told)


async def test_lines_of_several_sentences_and_beams_are_translated_as_each_alone(bundle: Path) -> None:
    async with serving(f"--models={bundle}", "--threads=2") as (port, _):
        alone = await one_by_one(port, GOOD.splitlines())
        for where in (f"--url=http://127.0.0.1:{port}", f"--model={bundle}"):
            done = await asyncio.to_thread(attnd, "translate", *FLAGS, where, given=GOOD)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == alone


async def test_a_queue_for_one_line_is_enough_for_all(bundle: Path) -> None:
    """One sentence is written, one line waits: the others that are under way are refused, and come back."""
    lines = GOOD.splitlines(keepends=True)[:8]
    small = ("--threads=1", "--max-batch=5", "--max-queue-outputs=15")
    async with serving(f"--models={bundle}", *small) as (port, _):
        alone = await one_by_one(port, lines)
        done = await asyncio.to_thread(
            attnd, "translate", *FLAGS, f"--url=http://127.0.0.1:{port}", given="".join(lines)
        )
        assert (done.returncode, done.stderr, done.stdout) == (0, "", alone)


async def test_a_line_that_is_too_long_is_named_by_its_number(bundle: Path) -> None:
    given = f"A dog.\n\nA dog. {'X' * 80}. Hi.\nA dog.\n"
    async with serving(f"--models={bundle}", "--threads=2") as (port, _):
        first = await one_by_one(port, ["A dog."])
        for where in (f"--url=http://127.0.0.1:{port}", f"--model={bundle}"):
            done = await asyncio.to_thread(attnd, "translate", *FLAGS, where, given=given)
            assert done.stderr == "attnd: sentence 2 of line 3 has 83 tokens, the limit is 64\n"
            assert (done.returncode, done.stdout) == (2, first + "\n")
