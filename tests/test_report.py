"""Reports of steps: what is told at once, what waits for something to tell, and that nothing is told twice."""

from types import SimpleNamespace
from typing import Any

import pytest

from service.domain import Finish, Progress, Token
from service.worker.generation import report
from service.worker.generation.loop import Done
from service.worker.generation.report import LATEST_S, Ended, Report, Reports, StepFacts
from service.worker.generation.sequence import Job, Prompt, Sequence
from service.worker.generation.step import Chunk, Step


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(report, "time", clock)
    return clock


@pytest.fixture
def reports() -> Reports:
    """That have just told something."""
    made = Reports(has_prefixes=True)
    made.tell(Done(Step(), 0.0))
    return made


def output(num_tokens: int = 0, *, num_prompt: int = 4, num_cached: int = 0, index: int = 0) -> Sequence:
    writes: Any = SimpleNamespace(num_tokens=num_tokens)
    made = Sequence(Job(1, Progress()), index, Prompt(0, [5] * num_prompt), writes)
    made.num_cached, made.started, made.written = num_cached, 1.0, 3.5
    return made


def rows(*sequences: Sequence) -> Step:
    return Step(rows=list(sequences), lengths=[4] * len(sequences))


def test_what_only_counts_waits_for_an_event(reports: Reports) -> None:
    row = output(7, index=3, num_cached=2)
    token, end = Token(3, 5, "a"), Finish(3, "stop")
    assert reports.add(Done(rows(row, output()), 0.0, decode_seconds=0.5)) is None
    told = reports.add(Done(rows(row), 0.0, [(row.job, token), (row.job, end)], [row], decode_seconds=0.25))
    assert told == Report(
        events=[(row.job, token), (row.job, end)],
        ended=[(row.job, Ended(3, 7, 2, at=3.5, slot_seconds=2.5))],
        steps=[StepFacts(2, 0, 0.0, 0.5), StepFacts(1, 0, 0.0, 0.25)],
        marked={row.job},
    )
    assert reports.add(Done(rows(row), 0.0)) is None


def test_but_not_for_long(reports: Reports, clock: Clock) -> None:
    early, late = output(), output()
    clock.now += LATEST_S / 2
    assert reports.add(Done(Step(rows=[early], lengths=[4], started=[early]), 0.0)) is None
    clock.now += LATEST_S
    told = reports.add(Done(rows(late), 0.0))
    assert told is not None
    assert (len(told.steps), told.marked) == (2, {early.job, late.job})


def test_a_first_token_does_not_wait_for_its_step(reports: Reports) -> None:
    row = output(1)
    done = Done(rows(output()), 0.0, [(row.job, Finish(0, "length"))], [row])
    told = reports.tell(done)
    assert (told.events, [job for job, _ in told.ended], told.steps) == (
        [(row.job, Finish(0, "length"))],
        [row.job],
        [],
    )
    done.events, done.ended = [], []
    assert reports.add(done) is None


def test_what_failed_and_whose_slot_is_free_again_is_told_at_once(reports: Reports) -> None:
    failed, left, expired = output(index=2), output(), output()
    left.job.closed_at = 5.0
    told = reports.add(Done(rows(failed), 5.5, failed=[failed]))
    assert told is not None
    assert told.failed == [(failed.job, 2)]
    told = reports.add(Done(Step(released=[left.job, expired.job]), 5.5))
    assert told is not None
    assert told.released == [0.5]


def test_prompts_are_counted_in_pieces_and_their_prefixes_once(reports: Reports) -> None:
    prompt, echoed, source = output(num_prompt=200, num_cached=64), output(num_prompt=9), output(num_prompt=3)
    echoed.is_echoed = True
    step = Step(sources=[[Chunk(source, 0, 3)]], chunks=[Chunk(prompt, 64, 128), Chunk(echoed, 0, 9)])
    reports.add(Done(step, 0.0, prefill_seconds=0.5))
    reports.add(Done(Step(chunks=[Chunk(prompt, 128, 200)]), 0.0))
    told = reports.tell(Done(Step(), 0.0))
    assert [one.prefill_tokens for one in told.steps] == [3 + 64 + 9, 72]
    assert told.prefixes == [(200, 64)]


def test_without_a_cache_nobody_asked_it() -> None:
    reports = Reports(has_prefixes=False)
    reports.add(Done(Step(chunks=[Chunk(output(), 0, 4)]), 0.0))
    assert reports.tell(Done(Step(), 0.0)).prefixes == []
