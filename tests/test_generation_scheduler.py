"""The generation scheduler as lists. A memory made of lists executes its steps and checks that every row is its own."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from service.domain import Progress
from service.worker.generation.pieces import GRAIN, IDLE_BUDGET, budget_beside, cost, piece
from service.worker.generation.prefix_cache import CHUNK
from service.worker.generation.scheduler import Scheduler, slots_for
from service.worker.generation.sequence import Job, Prompt, Sequence
from service.worker.generation.step import Step

NOBODY: Any = None  # writes no text


class Machine:
    """What an engine would do: slots and blocks as lists of tokens, each step executed in its order."""

    def __init__(self, *, max_rows: int = 4, num_blocks: int = 16, seed: int = 0) -> None:
        self.max_rows = max_rows
        self.draw = random.Random(seed)
        self.scheduler = Scheduler(max_rows=max_rows, num_blocks=num_blocks)
        self.slots: list[list[int]] = [[] for _ in range(slots_for(max_rows))]
        self.blocks: list[list[int]] = [[] for _ in range(num_blocks)]
        self.read: dict[Sequence, list[int]] = {}  # what each sequence's slot must hold
        self.spans: dict[Sequence, list[tuple[int, int]]] = {}  # what was computed of each prompt
        self.written: dict[Sequence, int] = {}

    def add(
        self, *prompts: list[int], n: int = 1, is_echoed: bool = False, num_beams: int = 1, is_whole: bool = False
    ) -> list[Sequence]:
        """One request."""
        job = Job(len(prompts) * n * num_beams, Progress())
        read = [Prompt(index // n, prompts[index // n], is_whole) for index in range(0, len(prompts) * n, n)]
        added = [
            Sequence(job, index, read[index // n], NOBODY, is_echoed, num_beams=num_beams)
            for index in range(len(prompts) * n)
        ]
        self.scheduler.add(added)
        return added

    def step(self) -> Step:
        step = self.scheduler.next_step()
        read_now = {row for sources in step.sources for one in sources for row in (one.sequence, *one.forks)}
        assert set(step.rows) == {one for one in self.written if not one.has_left} | read_now
        for move in step.moves:
            self.slots[move.target][move.start :] = self.slots[move.source][move.start : move.end]
        for restore in step.restores:
            del self.slots[restore.slot][restore.start :]
            self.slots[restore.slot] += self.blocks[restore.block]
        for sources in step.sources:
            assert len({len(chunk.sequence.prompt.ids) for chunk in sources}) == 1
            for chunk in sources:
                self._encode(chunk)
        for chunk in step.chunks:
            self._prefill(chunk)
        assert [row.slot for row in step.rows] == list(range(len(step.rows)))
        for row, length in zip(step.rows, step.lengths, strict=True):
            self._read(row, length, [-row.last_id])
        for row in step.rows:
            if not row.is_follower:
                self._write(row)
        assert len(step.rows) + len(self.scheduler._prefilling) <= self.max_rows
        return step

    def _encode(self, chunk: Any) -> None:
        """All but the last token, which the row is to read next."""
        *ids, last = chunk.sequence.prompt.ids
        self.spans.setdefault(chunk.sequence, []).append((chunk.start, chunk.end))
        for row in (chunk.sequence, *chunk.forks):
            assert row.num_computed == len(ids) + 1  # with what this step's row reads
            self.slots[row.slot][:] = self.read[row] = list(ids)
            row.last_id = -last

    def _prefill(self, chunk: Any) -> None:
        sequence = chunk.sequence
        self.read.setdefault(sequence, list(sequence.prompt.ids[: chunk.start]))
        self._read(sequence, chunk.start, sequence.prompt.ids[chunk.start : chunk.end])
        self.spans.setdefault(sequence, []).append((chunk.start, chunk.end))
        if (block := self.scheduler.computed(chunk)) is not None:
            self.blocks[block] = self.slots[sequence.slot][chunk.end - CHUNK : chunk.end]
        for fork in chunk.forks:
            self.slots[fork.slot][:] = self.slots[sequence.slot]
            self.read[fork] = list(sequence.prompt.ids)
        for complete in (sequence, *chunk.forks) if chunk.is_last else ():
            if not complete.is_follower:
                self._write(complete)

    def _read(self, sequence: Sequence, start: int, ids: Any) -> None:
        slot = self.slots[sequence.slot]
        assert slot[:start] == self.read[sequence], f"slot {sequence.slot} holds somebody else's tokens"
        slot[start:] = ids
        self.read[sequence] += ids

    def _write(self, sequence: Sequence) -> None:
        for place, row in enumerate(sequence.rows):
            self.written[row] = self.written.get(row, 0) + 1
            row.last_id = 100 * (sequence.rank[1] + 1) + place
        self._choose_parents(sequence.rows)

    def _choose_parents(self, rows: tuple[Sequence, ...]) -> None:
        """As a search may: some beams live on in their rows, the other rows go on from one of them."""
        living = [row for row in rows if self.draw.random() < 0.5] or [rows[0]]
        for row in rows:
            row.parent = None if row in living else self.draw.choice(living)
            if row.parent is not None:
                self.read[row] = list(self.read[row.parent])

    def run_until(self, condition: Callable[[], bool], *, at_most: int = 1000) -> int:
        for count in range(at_most):
            if condition():
                return count
            self.step()
        raise AssertionError(f"not after {at_most} steps")

    def finish(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.finish(sequence)


def ids(length: int, first: int = 1) -> list[int]:
    return list(range(first, first + length))


def rows(step: Step) -> list[int]:
    return [row.rank[1] for row in step.rows]


def covered(spans: list[tuple[int, int]]) -> tuple[int, int]:
    """What pieces cover that follow one another without a gap."""
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]
    return spans[0][0], spans[-1][1]


def planned(step: Step) -> list[tuple[int, int, int]]:
    return [(chunk.sequence.rank[1], chunk.start, chunk.end) for chunk in step.chunks]


def encoded(step: Step) -> list[list[int]]:
    """The ranks of what is read in each run."""
    return [[chunk.sequence.rank[1] for chunk in sources] for sources in step.sources]


def test_nothing_to_do_is_an_empty_step() -> None:
    assert Machine().step().is_empty


def test_a_complete_prompt_joins_the_rows_at_the_next_step_while_others_run() -> None:
    machine = Machine()
    machine.add(ids(10))
    assert (planned(machine.step()), rows(machine.step())) == ([(0, 0, 10)], [0])
    machine.add(ids(20, 100))
    step = machine.step()
    assert (planned(step), rows(step)) == ([(1, 0, 20)], [0])
    assert rows(machine.step()) == [0, 1]


def test_an_ended_row_leaves_at_once_and_the_last_one_fills_its_hole() -> None:
    machine = Machine()
    first, *_ = machine.add(ids(5), ids(6), ids(7))
    machine.run_until(lambda: machine.scheduler.num_running == 3)
    machine.step()
    machine.finish(first)
    step = machine.step()
    assert rows(step) == [2, 1]
    assert [(move.source, move.target) for move in step.moves] == [(2, 0)]


def test_a_newcomer_takes_the_hole_of_an_ended_row() -> None:
    machine = Machine()
    first, *_ = machine.add(ids(5), ids(6))
    machine.run_until(lambda: len(machine.scheduler._rows) == 2)
    machine.add(ids(7, 50))
    machine.step()
    machine.finish(first)
    step = machine.step()
    assert rows(step) == [2, 1]
    assert [(move.source, move.target) for move in step.moves] == [(2, 0)]


def test_all_rows_ending_together_leave_nothing() -> None:
    machine = Machine()
    everything = machine.add(ids(5), ids(6), ids(7))
    machine.run_until(lambda: len(machine.scheduler._rows) == 3)
    machine.finish(*everything)
    assert machine.step().is_empty
    assert machine.scheduler.num_running == 0


def test_what_nobody_waits_for_leaves_before_the_next_step() -> None:
    machine = Machine()
    (kept,), (writing,), (reading,) = machine.add(ids(5)), machine.add(ids(6)), machine.add(ids(600))
    machine.run_until(lambda: len(machine.scheduler._rows) == 2)
    assert machine.scheduler.num_running == 3
    machine.scheduler.close(writing.job)
    machine.scheduler.close(reading.job)
    step = machine.step()
    assert (step.rows, step.chunks) == ([kept], [])
    assert step.released == [reading.job, writing.job]
    assert machine.scheduler.num_running == 1


def test_what_is_closed_while_it_waits_gives_its_places_back_at_once() -> None:
    machine = Machine()
    (first, _) = machine.add(ids(5), ids(6))
    machine.scheduler.close(first.job)
    machine.scheduler.close(first.job)  # twice changes nothing
    assert machine.scheduler.num_waiting == 0
    assert machine.step().is_empty


def test_what_was_closed_before_it_came_is_never_queued() -> None:
    machine = Machine()
    job = Job(1, Progress())
    machine.scheduler.close(job)
    machine.scheduler.add([Sequence(job, 0, Prompt(0, ids(5)), NOBODY)])
    assert machine.step().is_empty
    assert machine.scheduler.num_waiting == 0


def test_only_as_many_hold_a_slot_as_there_are_rows() -> None:
    machine = Machine(max_rows=2)
    sequences = machine.add(*(ids(5 + at) for at in range(5)))
    for _ in range(4):
        machine.step()
    assert machine.scheduler.num_running == 2
    machine.finish(sequences[0])
    machine.step()
    assert rows(machine.step()) == [1, 2]


@pytest.mark.parametrize("others", [0, 1, 3])
def test_a_prompt_is_always_cut_at_the_same_places(others: int) -> None:
    machine = Machine()
    machine.add(*(ids(30 + at, 1000 * at) for at in range(others)))
    (long,) = machine.add(ids(200, 7))
    machine.run_until(lambda: long in machine.written)
    spans = machine.spans[long]
    assert covered(spans) == (0, 200)
    assert {64, 128, 192, 200} <= {end for _, end in spans}
    assert all(end - start > 1 for start, end in spans)


@pytest.mark.parametrize("budget", [1, 2, 8, 19, 63, 64, 500])
@pytest.mark.parametrize("start", [0, 64, 1900])
@pytest.mark.parametrize("length", [1, 2, 3, 20, 63, 64])
def test_a_piece_never_leaves_a_single_token(length: int, start: int, budget: int) -> None:
    end = piece(start, start + length, budget)
    assert start < end <= start + length
    assert start + length - end != 1
    assert end - start > 1 or length == 1
    assert cost(end - start, start) <= max(budget, cost(GRAIN, start)) + cost(GRAIN // 2, start)
    assert end == start + length or (end - start) % GRAIN == 0


def test_a_piece_uses_its_budget() -> None:
    for start in range(0, 2048, 64):
        for budget in range(cost(GRAIN, start), 100):
            end = piece(start, start + 64, budget)
            assert end == start + 64 or cost(end - start + GRAIN, start) > budget


def test_a_token_far_from_the_start_costs_more_and_so_does_a_run() -> None:
    assert cost(16, 1100) == 2 * cost(16, 0)
    assert cost(16, 0) + cost(16, 16) > cost(32, 0)
    assert piece(0, 64, 48) == 40
    assert piece(1100, 1164, 48) == 1116


def test_a_step_reads_no_more_than_its_budget_and_always_writes() -> None:
    machine = Machine(max_rows=8)
    machine.add(ids(5))
    machine.run_until(lambda: len(machine.scheduler._rows) == 1)
    machine.add(*(ids(40 + 10 * at, 1000 * at) for at in range(6)))
    for _ in range(12):
        step = machine.step()
        assert sum(cost(end - start, start) for _, start, end in planned(step)) <= budget_beside(len(step.rows))
        assert 0 in rows(step)


def test_more_is_read_where_nothing_is_written() -> None:
    machine = Machine()
    machine.add(ids(2000))
    assert IDLE_BUDGET * 0.7 < sum(end - start for _, start, end in planned(machine.step())) <= IDLE_BUDGET


def test_several_short_prompts_share_a_step() -> None:
    machine = Machine(max_rows=8)
    machine.add(ids(5))
    machine.run_until(lambda: len(machine.scheduler._rows) == 1)
    machine.add(*(ids(4, 1000 * at) for at in range(1, 5)))
    assert [rank for rank, *_ in planned(machine.step())] == [1, 2]  # 24 of 31
    assert [rank for rank, *_ in planned(machine.step())] == [3, 4]


def test_short_prompts_do_not_wait_for_a_long_one() -> None:
    machine = Machine()
    machine.add(ids(5))
    machine.run_until(lambda: len(machine.scheduler._rows) == 1)
    machine.add(ids(1500))
    machine.step()
    (short,) = machine.add(ids(20, 5000))
    assert machine.run_until(lambda: short in machine.written) <= 2


def num_pieces(length: int, budget: int) -> int:
    count = start = 0
    while start < length:
        start, count = piece(start, min((start // 64 + 1) * 64, length), budget), count + 1
    return count


def test_a_piece_that_is_too_dear_beside_another_begins_the_next_step() -> None:
    machine = Machine(max_rows=9)
    machine.add(*(ids(5, 1000 * at) for at in range(7)))
    machine.run_until(lambda: len(machine.scheduler._rows) == 7)
    (long,) = machine.add(ids(1500, 50_000))
    machine.run_until(lambda: long.num_computed >= 1400)
    (short,) = machine.add(ids(20, 90_000))
    seen = [planned(machine.step()) for _ in range(4)]
    assert [len(chunks) for chunks in seen] == [1] * 4
    assert {rank for ((rank, *_),) in seen[:2]} == {long.rank[1], short.rank[1]}


def test_a_long_prompt_is_read_under_a_stream_of_short_ones() -> None:
    machine = Machine()
    machine.add(ids(5))
    machine.run_until(lambda: len(machine.scheduler._rows) == 1)
    (long,) = machine.add(ids(320, 100_000))
    alone = num_pieces(320, budget_beside(1))
    for count in range(4 * alone):
        machine.finish(*machine.add(ids(60, 1000 * count)))
        newest = machine.add(ids(60, 1000 * count))
        machine.step()
        machine.finish(*[one for one in newest if one in machine.written])
        for row in machine.scheduler._rows[1:]:
            if row is not long:
                machine.finish(row)
        if long in machine.written:
            break
    assert long in machine.written
    assert count <= 2 * alone + 2


def test_the_first_of_a_request_comes_before_the_rest_of_a_long_one() -> None:
    machine = Machine(max_rows=1)
    many = machine.add(*(ids(10, 1000 * at) for at in range(20)))
    machine.step()
    (single,) = machine.add(ids(10, 50_000))
    machine.finish(many[0])
    machine.step()
    machine.finish(many[1])
    machine.step()
    assert single in machine.written
    assert many[2] not in machine.written


def test_a_shared_beginning_is_computed_once() -> None:
    machine = Machine()
    (first,) = machine.add(ids(150))
    machine.run_until(lambda: first in machine.written)
    (second,) = machine.add([*ids(130), *ids(70, 5000)])
    machine.run_until(lambda: second in machine.written)
    assert covered(machine.spans[second]) == (128, 200)
    assert second.num_cached == 128


@pytest.mark.parametrize(("length", "cached"), [(63, 0), (64, 0), (65, 64), (128, 64), (129, 128)])
def test_the_last_token_of_a_prompt_is_always_computed(length: int, cached: int) -> None:
    machine = Machine()
    for _ in range(2):
        (sequence,) = machine.add(ids(length))
        machine.run_until(lambda: sequence in machine.written)  # noqa: B023
    assert sequence.num_cached == cached


def test_what_was_reused_lately_stays() -> None:
    machine = Machine(num_blocks=2)
    for first in (1, 1000, 1, 2000, 1):  # the fourth takes the place of the second
        (sequence,) = machine.add(ids(70, first))
        machine.run_until(lambda: sequence in machine.written)  # noqa: B023
        machine.finish(sequence)
    assert sequence.num_cached == CHUNK


def test_prompts_that_come_together_wait_for_the_beginning_that_one_of_them_computes() -> None:
    machine = Machine(max_rows=8)
    sequences = [machine.add([*ids(256), *ids(20, 1000 * at)])[0] for at in range(1, 5)]
    machine.run_until(lambda: all(one in machine.written for one in sequences))
    assert sum(end - start for spans in machine.spans.values() for start, end in spans) == 256 + 4 * 20


def test_outputs_of_one_prompt_read_it_once() -> None:
    machine = Machine(max_rows=4)
    machine.add(ids(100), n=4)
    machine.run_until(lambda: len(machine.written) == 4)
    assert list(machine.spans.values()) == [[(0, 64), (64, 100)]]
    assert len(rows(machine.step())) == 4


def test_outputs_of_one_prompt_take_no_slot_whose_turn_is_another_s() -> None:
    machine = Machine(max_rows=3)
    machine.add(ids(10), n=4)
    machine.add(ids(400, 5000))
    step = machine.step()
    started = [one.rank[1] for one in step.started]
    assert sorted(started) == [0, 1, 4]


def test_a_prompt_whose_every_logit_is_wanted_is_computed_whole_but_kept_for_others() -> None:
    machine = Machine()
    (first,) = machine.add(ids(100))
    machine.run_until(lambda: first in machine.written)
    (echoed,) = machine.add(ids(200), is_echoed=True)
    machine.run_until(lambda: echoed in machine.written)
    assert covered(machine.spans[echoed]) == (0, 200)
    (third,) = machine.add(ids(200))
    machine.run_until(lambda: third in machine.written)
    assert third.num_cached == 192


# --- sources, which are read whole


def add_sources(machine: Machine, *lengths: int, **options: Any) -> list[Sequence]:
    """One request with a source of each length."""
    return machine.add(*(ids(length, 100 * at) for at, length in enumerate(lengths)), is_whole=True, **options)


def test_a_source_is_read_at_once_joins_the_rows_of_that_step_and_is_kept_for_nobody() -> None:
    machine = Machine()
    (first,) = add_sources(machine, 10)
    assert rows(machine.step()) == [0]
    for _ in range(2):
        source, next_one = add_sources(machine, 192, 192)  # each costs more than a step may
        assert [row.num_computed for row in machine.step().rows] == [machine.written[first] + 9, 192]
        assert rows(machine.step())[1:] == [source.rank[1], next_one.rank[1]]
        machine.finish(source, next_one)
        machine.step()
    assert machine.scheduler._cache.num_used == 0


def test_sources_of_one_length_are_read_in_one_run() -> None:
    machine = Machine(max_rows=8)
    add_sources(machine, 15, 14, 15, 16, 14)
    step = machine.step()
    assert encoded(step) == [[1, 4], [0, 2], [3]]  # by turns the shortest and the one that came first
    assert rows(step) == [1, 4, 0, 2, 3]


def test_as_many_sources_are_read_as_the_budget_and_the_rows_allow() -> None:
    machine = Machine(max_rows=4)
    (running,) = add_sources(machine, 12)
    machine.step()
    others = add_sources(machine, *[12] * 6)
    assert encoded(machine.step()) == [[1, 2]]  # 24 of 31 tokens beside one row
    assert encoded(machine.step()) == [[3]]
    assert machine.step().sources == []
    machine.finish(running, *others[:2])
    assert encoded(machine.step()) == [[4, 5]]


def test_a_source_that_came_first_is_not_passed_over_for_ever() -> None:
    machine = Machine(max_rows=1)
    (long,) = add_sources(machine, 40)
    for _ in range(3):
        add_sources(machine, 5, 5)  # shorter ones keep coming
        machine.finish(*machine.step().rows)
    assert long in machine.written


def test_the_beams_of_a_source_are_rows_of_the_step_that_reads_it() -> None:
    machine = Machine(max_rows=4)
    (search,) = add_sources(machine, 9, num_beams=3)
    (chunk,) = machine.step().sources[0]
    assert (chunk.sequence, chunk.forks) == (search, search.followers)
    assert [row.num_computed for row in search.rows] == [9, 9, 9]
    for _ in range(5):
        machine.step()  # which compares each row's slot with what it must hold


def test_outputs_of_one_source_share_its_run() -> None:
    machine = Machine(max_rows=4)
    outputs = add_sources(machine, 9, 9, n=2)
    sources = machine.step().sources
    assert [(one.sequence, one.forks) for one in sources[0]] == [
        (outputs[0], (outputs[1],)),
        (outputs[2], (outputs[3],)),
    ]


# --- beams


def test_the_beams_of_a_search_start_and_end_together_and_read_their_prompt_once() -> None:
    machine = Machine()
    (search,) = machine.add(ids(100), num_beams=3)
    step = machine.step()
    assert (len(step.started), machine.scheduler.num_waiting) == (3, 0)
    machine.run_until(lambda: search in machine.written)
    assert machine.spans == {search: [(0, 64), (64, 100)]}
    assert set(machine.step().rows) == {search, *search.followers}
    assert any(row.parent for row in search.rows)
    machine.finish(search)
    step = machine.step()
    assert (step.is_empty, step.moves) == (True, [])
    assert machine.scheduler.num_running == 0


def test_a_beam_takes_over_what_its_parent_has_behind_the_prompt() -> None:
    machine = Machine()
    machine.draw.random = lambda: 0.0  # all beams live on
    (search,) = machine.add(ids(100), num_beams=3)
    machine.run_until(lambda: search in machine.written)
    machine.step()
    first, second, third = search.rows
    first.parent = third.parent = second
    for row in (first, third):
        machine.read[row] = list(machine.read[second])
    step = machine.step()
    moves = [(move.source, move.target, move.start, move.end) for move in step.moves]
    assert moves == [(second.slot, row.slot, 100, 101) for row in step.rows if row is not second]


def test_beams_keep_their_own_when_others_leave_and_change_their_places() -> None:
    machine = Machine(max_rows=8, seed=1)
    others = machine.add(*(ids(5 + at) for at in range(4)))
    (search,) = machine.add(ids(20, 100), num_beams=4)
    machine.run_until(lambda: search in machine.written)
    for other in others:
        machine.finish(other)
        machine.step()  # which compares each row's slot with what it must hold
    assert sorted(row.slot for row in search.rows) == [0, 1, 2, 3]


def test_a_search_waits_for_all_its_rows_and_nobody_who_came_later_takes_them() -> None:
    machine = Machine(max_rows=4)
    first, second = machine.add(ids(5), ids(6))
    machine.run_until(lambda: len(machine.scheduler._rows) == 2)
    (search,) = machine.add(ids(10, 100), num_beams=3)
    later = [machine.add(ids(3, 1000 * at))[0] for at in range(1, 5)]
    for _ in range(5):
        assert machine.step().started == []
    machine.finish(first)
    assert machine.step().started == [*search.rows]
    assert machine.scheduler.num_running == 4
    machine.finish(second)
    assert machine.step().started == [later[0]]


def test_a_stream_of_short_requests_does_not_starve_a_search() -> None:
    machine = Machine(max_rows=4, seed=3)
    machine.add(ids(5), ids(6), ids(7))
    machine.run_until(lambda: len(machine.scheduler._rows) == 3)
    (search,) = machine.add(ids(200, 100), num_beams=4)
    for count in range(60):
        machine.add(ids(2, 1000 * count + 500))
        for row in machine.step().rows:
            if machine.draw.random() < 0.3:
                machine.finish(row)
        if search in machine.written:
            break
    assert search in machine.written


def test_what_fits_beside_a_search_that_could_start_starts() -> None:
    """The shortest prompt is read first in every other turn, and leaves the search the rows that it needs."""
    machine = Machine(max_rows=4)
    machine.add(ids(5))
    machine.run_until(lambda: len(machine.scheduler._rows) == 1)
    (search,) = machine.add(ids(400, 100), num_beams=3)
    for at in range(1, 4):
        machine.add(ids(2, 1000 * at))
    for _ in range(3):
        machine.step()
    assert [row.slot >= 0 for row in search.rows] == [True] * 3
    assert machine.scheduler.num_running == 4


def test_other_outputs_of_a_prompt_leave_a_waiting_search_its_rows() -> None:
    machine = Machine(max_rows=5)
    outputs = machine.add(ids(10), n=4)
    (search,) = machine.add(ids(300, 5000), num_beams=3)
    assert machine.step().started == [*outputs[:2], *search.rows]


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
@pytest.mark.parametrize("is_failure", [False, True])
def test_a_search_that_is_left_gives_everything_back(steps: int, is_failure: bool) -> None:
    machine = Machine(max_rows=3)
    (first,), (search,) = machine.add(ids(10)), machine.add(ids(300, 1000), num_beams=2)
    for _ in range(steps):
        machine.step()
    if is_failure and search.slot >= 0:
        machine.finish(search)
    else:
        machine.scheduler.close(search.job)
    machine.run_until(lambda: first in machine.written)
    machine.finish(first)
    machine.step()
    assert (machine.scheduler.num_running, machine.scheduler.num_waiting) == (0, 0)
    assert all(block.num_users == 0 for block in machine.scheduler._cache._by_age)


@pytest.mark.parametrize("num_blocks", [0, 1, 3])
def test_a_pool_too_small_for_a_prompt_changes_nothing_but_the_reuse(num_blocks: int) -> None:
    machine = Machine(num_blocks=num_blocks)
    for _ in range(2):
        (sequence,) = machine.add(ids(400))
        machine.run_until(lambda: sequence in machine.written)  # noqa: B023
        machine.finish(sequence)
    assert sequence.num_cached == num_blocks * CHUNK
    assert machine.scheduler._cache.num_used == num_blocks


def test_everything_is_given_back_whatever_the_end() -> None:
    machine = Machine(max_rows=3, num_blocks=8)
    done, cancelled, failed = machine.add(ids(100)), machine.add(ids(300, 1000)), machine.add(ids(300, 2000), n=3)
    machine.step()
    machine.scheduler.close(cancelled[0].job)
    machine.finish(failed[0])
    machine.scheduler.close(failed[0].job)
    machine.run_until(lambda: done[0] in machine.written)
    machine.finish(*done)
    machine.step()
    scheduler = machine.scheduler
    assert (scheduler.num_waiting, scheduler.num_running, scheduler._waiting) == (0, 0, [])
    assert all(block.num_users == 0 for block in scheduler._cache._by_age)
    assert scheduler._cache.root.num_users == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_course_of_events_keeps_every_row_its_own_and_ends(seed: int) -> None:
    """Prompts with shared beginnings come, end, fail and go at random; the machine checks each slot at each step."""
    draw = random.Random(seed)
    machine = Machine(max_rows=draw.choice([1, 2, 3, 6]), num_blocks=draw.choice([0, 2, 9]), seed=seed)
    are_whole = seed % 4 == 0
    everything: list[Sequence] = []
    for _ in range(150):
        if draw.random() < 0.3:
            shared = [*ids(64 * draw.randrange(4), draw.choice([1, 1000]))]
            prompts = [
                [*shared, *ids(draw.randrange(1, 150), draw.randrange(9999))] for _ in range(draw.choice([1, 2]))
            ]
            num_beams = draw.randrange(1, machine.max_rows + 1) if draw.random() < 0.3 else 1
            n = draw.choice([1, 1, 3]) if num_beams == 1 else 1
            everything += machine.add(*prompts, n=n, num_beams=num_beams, is_whole=are_whole)
        for row in machine.step().rows:
            if draw.random() < 0.2 and not row.is_follower:
                machine.finish(row)
        if everything and draw.random() < 0.1:
            machine.scheduler.close(draw.choice(everything).job)
    alive = [one for one in everything if not one.has_left]
    machine.run_until(lambda: all([_ended(machine, one) for one in alive]))  # noqa: C419 (each must be asked)
    machine.step()
    assert (machine.scheduler.num_running, machine.scheduler.num_waiting) == (0, 0)
    assert all(block.num_users == 0 for block in machine.scheduler._cache._by_age)
    for sequence, spans in machine.spans.items():
        if sequence.prompt.is_whole:
            assert spans == [(0, len(sequence.prompt.ids))]
            continue
        assert all(start // CHUNK == (end - 1) // CHUNK for start, end in spans)
        assert all(end - start > 1 or start % CHUNK == 0 for start, end in spans)


def _ended(machine: Machine, sequence: Sequence) -> bool:
    """True once it was written at all, and then it ends."""
    if sequence in machine.written:
        machine.finish(sequence)
    return sequence.has_left
