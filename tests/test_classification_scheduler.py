"""The scheduler as lists: order, grouping, caps, fairness, places."""

import pytest

from service.domain import Progress
from service.errors import Overloaded
from service.worker.classification.scheduler import Scheduler
from service.worker.classification.sequence import Job, Sequence


def make_job(scheduler: Scheduler, *lengths: int) -> Job:
    job = Job(len(lengths), Progress())
    scheduler.admit(job)
    scheduler.add([Sequence(job, index, (1,) * length, None, length) for index, length in enumerate(lengths)])
    return job


def drain(scheduler: Scheduler) -> list[list[tuple[Job, int]]]:
    batches = []
    while batch := scheduler.next_batch():
        batches.append([(sequence.job, sequence.index) for sequence in batch])
    return batches


def test_nothing_waits_nothing_runs() -> None:
    assert Scheduler(max_batch_tokens=8, max_waiting=8).next_batch() == []


def test_a_batch_holds_one_padded_length_and_starts_with_the_oldest() -> None:
    scheduler = Scheduler(max_batch_tokens=64, max_waiting=8)
    first, second, third, fourth = (make_job(scheduler, length) for length in (16, 8, 16, 8))
    assert drain(scheduler) == [[(first, 0), (third, 0)], [(second, 0), (fourth, 0)]]


def test_a_batch_is_capped_by_padded_tokens_but_never_empty() -> None:
    scheduler = Scheduler(max_batch_tokens=32, max_waiting=16)
    job = make_job(scheduler, 16, 16, 16, 64)
    assert drain(scheduler) == [[(job, 0), (job, 1)], [(job, 2)], [(job, 3)]]


def test_what_waits_is_shared_out_between_the_threads_in_batches_worth_their_while() -> None:
    scheduler = Scheduler(max_batch_tokens=384, max_waiting=16, num_threads=2)
    for _ in range(16):
        make_job(scheduler, 32)
    assert [len(batch) for batch in drain(scheduler)] == [8, 4, 4]  # halves, down to MIN_SHARE_TOKENS


def test_the_share_counts_all_lengths() -> None:
    scheduler = Scheduler(max_batch_tokens=384, max_waiting=16, num_threads=2)
    make_job(scheduler, *[32] * 6)
    make_job(scheduler, *[64] * 3)
    assert [len(batch) for batch in drain(scheduler)] == [6, 2, 1]


def test_a_share_is_capped_as_any_batch() -> None:
    scheduler = Scheduler(max_batch_tokens=96, max_waiting=16, num_threads=2)
    make_job(scheduler, *[32] * 8)
    assert [len(batch) for batch in drain(scheduler)] == [3, 3, 2]


def test_a_long_list_does_not_hold_up_later_requests() -> None:
    scheduler = Scheduler(max_batch_tokens=16, max_waiting=200)
    make_job(scheduler, *[8] * 100)
    short = make_job(scheduler, 8)
    position = next(index for index, batch in enumerate(drain(scheduler)) if (short, 0) in batch)
    assert position == 1


def test_nobody_starves_under_a_stream_of_newcomers() -> None:
    scheduler = Scheduler(max_batch_tokens=16, max_waiting=1000)
    patient = make_job(scheduler, 64)  # alone in its length
    for _ in range(3):
        make_job(scheduler, 8)
    assert (patient, 0) in [(one.job, one.index) for one in scheduler.next_batch()]
    late = make_job(scheduler, *[32] * 10)
    finished = []
    for _ in range(60):
        make_job(scheduler, 8)
        finished += [sequence.job for sequence in scheduler.next_batch()]
    assert finished.count(late) == 10


def test_a_full_queue_refuses_and_says_the_numbers() -> None:
    scheduler = Scheduler(max_batch_tokens=8, max_waiting=3)
    make_job(scheduler, 8, 8)
    with pytest.raises(Overloaded, match="2 inputs wait, 2 more do not fit under the limit of 3"):
        make_job(scheduler, 8, 8)
    make_job(scheduler, 8)  # what fits is still taken
    assert scheduler.num_waiting == 3


def test_places_are_taken_at_admission_and_given_back_when_a_batch_starts() -> None:
    scheduler = Scheduler(max_batch_tokens=8, max_waiting=2)
    job = Job(2, Progress())
    scheduler.admit(job)
    assert scheduler.num_waiting == 2
    scheduler.add([Sequence(job, 0, (1,), None, 8), Sequence(job, 1, (1,), None, 8)])
    assert len(scheduler.next_batch()) == 1
    assert scheduler.num_waiting == 1


def test_a_job_that_turns_out_wider_takes_more_places_or_is_refused() -> None:
    scheduler = Scheduler(max_batch_tokens=64, max_waiting=4)
    job = Job(1, Progress())
    scheduler.admit(job)
    scheduler.widen(job, 2)
    assert (scheduler.num_waiting, job.num_inputs, job.num_missing, len(job.rows)) == (3, 3, 3, 3)
    with pytest.raises(Overloaded, match="3 inputs wait, 2 more do not fit under the limit of 4"):
        scheduler.widen(job, 2)
    assert (scheduler.num_waiting, job.num_inputs) == (3, 3)
    scheduler.add([Sequence(job, index, (1,), None, 8) for index in range(3)])
    assert drain(scheduler) == [[(job, 0), (job, 1), (job, 2)]]
    assert scheduler.num_waiting == 0


def test_a_closed_job_is_skipped_and_its_places_are_free_at_once() -> None:
    scheduler = Scheduler(max_batch_tokens=64, max_waiting=4)
    gone = make_job(scheduler, 8, 16)
    kept = make_job(scheduler, 8)
    scheduler.close(gone)
    assert scheduler.num_waiting == 1
    assert drain(scheduler) == [[(kept, 0)]]
    assert scheduler.num_waiting == 0
    scheduler.close(gone)  # closing twice changes nothing
    assert scheduler.num_waiting == 0


def test_a_job_closed_while_part_of_it_ran_gives_back_only_what_waited() -> None:
    scheduler = Scheduler(max_batch_tokens=8, max_waiting=4)
    job = make_job(scheduler, 8, 8, 8)
    assert len(scheduler.next_batch()) == 1
    scheduler.close(job)
    assert scheduler.num_waiting == 0
    assert scheduler.next_batch() == []
