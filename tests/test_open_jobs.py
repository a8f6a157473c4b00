"""service.worker.classification.open_jobs: how long those who are refused are told to wait."""

import asyncio
import time
from typing import Any

import pytest

from service.domain import Call, Progress
from service.errors import Overloaded
from service.metrics import Metrics
from service.worker.classification.loop import Finished
from service.worker.classification.open_jobs import OpenJobs
from service.worker.classification.sequence import Job, Sequence


def open_jobs(*, num_threads: int, max_waiting: int) -> OpenJobs:
    """Its threads are never started: what is admitted waits."""

    def run(_: Any) -> Any:
        raise NotImplementedError

    jobs = OpenJobs(
        run,
        Metrics((0.001, 1.0), {}),
        name="tiny",
        num_threads=num_threads,
        max_batch_tokens=1024,
        max_waiting=max_waiting,
        max_inputs=1000,
    )
    jobs._asyncio = asyncio.get_running_loop()
    return jobs


def sequences(job: Job, length: int) -> list[Sequence]:
    return [Sequence(job, index, (1,), None, length) for index in range(job.num_inputs)]


def finish(jobs: OpenJobs, num_inputs: int, seconds: float, *, length: int = 8) -> None:
    """A thread has run a batch for so long."""
    batch = sequences(Job(num_inputs, Progress(0.0)), length)
    jobs._publish(Finished(batch, [(0.0,)] * num_inputs, seconds))


def refused(jobs: OpenJobs, num_waiting: int, *, length: int = 8) -> float | None:
    """What the next one is told while so many wait."""
    call = Call("id", "/v1/classify", time.monotonic() + 30)
    job = Job(num_waiting, call.progress)
    with jobs.admitted(job, call):
        jobs.add(job, sequences(job, length))
        try:
            with jobs.admitted(Job(1, call.progress), call):
                return None
        except Overloaded as error:
            return error.retry_after_s


@pytest.mark.parametrize("num_threads", [1, 2, 4])
async def test_who_is_refused_waits_for_all_threads_together(num_threads: int) -> None:
    """Each does 8 inputs a second; 64 wait."""
    jobs = open_jobs(num_threads=num_threads, max_waiting=64)
    for _ in range(5):
        finish(jobs, 4, 0.5)
    assert refused(jobs, 64) == pytest.approx(64 / (8 * num_threads))


async def test_what_waits_counts_by_its_tokens() -> None:
    """64 tokens a second; 8 inputs of 96 wait."""
    jobs = open_jobs(num_threads=1, max_waiting=8)
    finish(jobs, 4, 0.5)
    assert refused(jobs, 8, length=96) == pytest.approx(8 * 96 / 64)


@pytest.mark.parametrize(("seconds", "expected"), [(1e-5, 0.1), (100.0, 30.0)])
async def test_the_wait_that_is_named_has_bounds(seconds: float, expected: float) -> None:
    jobs = open_jobs(num_threads=2, max_waiting=8)
    finish(jobs, 1, seconds)
    assert refused(jobs, 8) == expected


async def test_before_anything_has_run_it_is_a_second() -> None:
    assert refused(open_jobs(num_threads=2, max_waiting=8), 8) == 1.0
