"""A lane's process from within, in a thread of the test: what it says and of whom, and how it ends."""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.domain import Finish, GenerateRequest, Progress, PromptTokens, Token, TokenLogprob
from service.worker.generation.lane_loader import load_lane
from service.worker.generation.lane_messages import (
    Add,
    Close,
    Closed,
    Frames,
    Load,
    Marks,
    OfFinish,
    OfPrompt,
    OfToken,
    Ready,
    Refused,
    Told,
    ToProcess,
    ToServer,
    decode_to_process,
    decode_to_server,
    framed,
)
from service.worker.generation.lane_process import Channel, Desk, serve
from service.worker.generation.loop import GenerationLoop
from service.worker.generation.report import Ended, Report, StepFacts
from service.worker.generation.sequence import Job

LOGPROB = TokenLogprob(5, "a", b"\xff", float("-inf"), (TokenLogprob(6, "b", b"b", -0.5),))
REQUEST = GenerateRequest(prompt=["a source"], logit_bias={5: 1.5}, stop=["x"], seed=2**63 - 1, n=2, logprobs=1)
ADD = Add(7, 2, True, False, REQUEST, [(0, [3, 4])], [(0, 0, 2**63 + 1, 9), (0, 1, -4, 9)])
TOLD = Told(
    [
        OfToken(7, Token(0, 5, "ä", LOGPROB)),
        OfFinish(7, Finish(0, "stop", "", 3)),
        OfPrompt(7, PromptTokens(0, (LOGPROB,))),
    ],
    [(7, Ended(0, 3, 0, 12.5, 0.25))],
    [(7, 1)],
    [StepFacts(2, 0, 0.0, 0.125)],
    [0.5],
    [Marks(7, 1.0, 1.5, None, [None, 0.5])],
    17,
)
SAID: list[ToServer] = [Ready(12), Refused("ConfigError", "no such provider", "provider"), Closed(7), TOLD]
ASKED: list[ToProcess] = [Load("bundle", 8, "cpu", False, "info"), ADD, Close(7, None), Close(7, 2.5)]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_messages_arrive_as_they_were_sent_however_their_bytes_are_cut(step: int) -> None:
    for messages, decode in ((SAID, decode_to_server), (ASKED, decode_to_process)):
        data, frames = b"".join(map(framed, messages)), Frames()
        pieces = [data[at : at + step] for at in range(0, len(data), step)]
        assert [decode(body) for piece in pieces for body in frames.feed(piece)] == messages


class OneLane:
    num_kept_tokens = 17

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.closed: list[Job] = []

    def add(self, job: Job, request: GenerateRequest, plans: list[Any]) -> None:
        assert (request, [plan.index for plan in plans], plans[0].prompt is plans[1].prompt) == (REQUEST, [0, 1], True)
        self.jobs.append(job)

    def close(self, job: Job) -> None:
        self.closed.append(job)


class Broken(OneLane):
    def add(self, job: Job, request: GenerateRequest, plans: list[Any]) -> None:
        raise MemoryError


class Written:
    """A channel that keeps what is said."""

    def __init__(self) -> None:
        self.told: list[Told | Closed] = []

    def say(self, message: Told | Closed) -> None:
        self.told.append(message)


def test_a_job_is_told_of_until_its_last_output_has_ended() -> None:
    lane, channel = OneLane(), Written()
    desk = Desk(lane, channel)  # type: ignore[arg-type]
    desk.take(ADD)
    (job,) = lane.jobs
    job.progress.untold_gaps = [None, 0.5]
    for index in range(3):  # the last is one too many
        event = Finish(index, "stop")
        desk.tell(Report(events=[(job, event)], ended=[(job, Ended(index, 1, 0, 1.0, 1.0))], marked={job}))
    told = [one for one in channel.told if isinstance(one, Told)]
    assert [one.events for one in told] == [[OfFinish(7, Finish(at, "stop"))] for at in range(2)] + [[]]
    assert [one.marks for one in told] == [
        [Marks(7, None, None, None, [None, 0.5])],
        [Marks(7, None, None, None, [])],
        [],
    ]
    assert [one.num_kept_tokens for one in told] == [17] * 3
    desk.take(Close(7, 1.0))
    assert lane.closed == []
    assert channel.told[3:] == [Closed(7)]


def test_what_cannot_be_made_fails_alone() -> None:
    channel = Written()
    desk = Desk(Broken(), channel)  # type: ignore[arg-type]
    desk.take(ADD)
    assert channel.told == [Told([], [], [(7, 0), (7, 1)], [], [], [], 17)]
    assert desk._jobs == {}


def test_nothing_more_is_told_of_a_closed_job() -> None:
    lane, channel = OneLane(), Written()
    desk = Desk(lane, channel)  # type: ignore[arg-type]
    desk.take(ADD)
    desk.take(Close(7, 2.5))
    (job,) = lane.jobs
    assert (lane.closed, job.closed_at) == ([job], 2.5)
    stranger = Job(1, Progress())
    for one in (job, stranger):
        desk.tell(Report(events=[(one, Finish(0, "stop"))], failed=[(one, 0)], marked={one}, released=[0.5]))
    assert channel.told == [Closed(7)] + [Told([], [], [], [], [0.5], [], 17)] * 2


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    tiny = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)
    found: Path = tiny.tiny_translation_bundle(tmp_path / "translation")
    return found


@pytest.fixture
def ends(bundle: Path) -> Iterator[tuple[socket.socket, Future[None]]]:
    """The server's end of the channel of a process that is a thread, and how that ends."""
    lane = load_lane(Load(str(bundle), 8, "cpu", False, "error"))
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as threads, ours, theirs:
        ours.settimeout(20)
        yield ours, threads.submit(serve, lane, Channel(theirs))


def test_what_kills_an_engine_thread_ends_the_process(
    ends: tuple[socket.socket, Future[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    server, end = ends
    monkeypatch.setattr(GenerationLoop, "_execute", broken)
    assert server.recv(100) == framed(Ready(os.getpid()))
    server.sendall(framed(ADD))
    with pytest.raises(MemoryError):
        end.result(20)


def test_it_ends_when_the_server_says_no_more(ends: tuple[socket.socket, Future[None]]) -> None:
    server, end = ends
    assert server.recv(100) == framed(Ready(os.getpid()))
    server.sendall(framed(ADD)[:-1])
    server.close()
    with pytest.raises(EOFError):
        end.result(20)


def test_what_to_load_may_come_in_pieces() -> None:
    load = Load("bundle", 8, "cpu", False, "error")
    ours, theirs = socket.socketpair()
    with ours, theirs, ThreadPoolExecutor(1) as threads:
        first = threads.submit(Channel(theirs).first)
        for piece in (framed(load)[:9], framed(load)[9:]):
            ours.sendall(piece)
        assert first.result(20) == load
