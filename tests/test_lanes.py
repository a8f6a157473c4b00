"""Lanes: which of them an output goes to, one queue before all, and a generator with several, bit by bit."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fakes import until
from generations import call, collect, in_threads, serving

from service.domain import GenerateRequest, Progress
from service.errors import BundleError, EngineFailed, Overloaded, Unavailable
from service.metrics import Metrics
from service.worker.bundle import load_bundle
from service.worker.generation.generator import Generator
from service.worker.generation.lanes import Lanes
from service.worker.generation.loop import Done, GenerationLoop
from service.worker.generation.outputs import OutputPlan
from service.worker.generation.scheduler import Scheduler, slots_for
from service.worker.generation.sequence import Job, Prompt, Sequence
from service.worker.generation.step import Step
from service.worker.generation.translator import TranslatorEngine
from service.worker.local import LocalBackend

tiny = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)

NOBODY: Any = None  # writes no text
SOURCES = [[3 + place % 7] * (2 + place % 5) for place in range(20)]


class OneLane:
    """A lane without a thread: steps are planned when the test says so."""

    def __init__(self, *, failure: Exception | None = None) -> None:
        self.scheduler = Scheduler(max_rows=2, num_blocks=0)
        self.close = self.scheduler.close
        self.failure = failure
        self.calls: list[str] = []
        self.sequences: list[Sequence] = []

    async def start(self, tell: object, died: object) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append("start")

    async def stop(self) -> None:
        self.calls.append("stop")

    def add(self, job: Job, request: GenerateRequest, plans: list[OutputPlan]) -> None:
        made = [Sequence(job, one.index, one.prompt, NOBODY, num_beams=request.num_beams) for one in plans]
        self.sequences += made
        self.scheduler.add(made)

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    @property
    def num_rows(self) -> int:
        return self.num_waiting + self.num_running

    @property
    def num_kept_tokens(self) -> int:
        return self.scheduler.num_kept_tokens


class Machine:
    def __init__(self, num_lanes: int = 2, *, max_rows: int = 2, max_waiting: int = 100) -> None:
        self.list = [OneLane() for _ in range(num_lanes)]
        self.lanes = Lanes(self.list, max_rows=max_rows, max_waiting=max_waiting)  # type: ignore[arg-type]

    def add(self, num_prompts: int, *, num_beams: int = 1) -> Job:
        """One request, of outputs or of searches."""
        job = Job(num_prompts * num_beams, Progress())
        self.lanes.admit(job)
        self.queue(job, num_prompts, num_beams)
        return job

    def queue(self, job: Job, num_prompts: int, num_beams: int = 1) -> None:
        request = GenerateRequest(prompt=[[5, 6]] * num_prompts, num_beams=num_beams)
        plans = [OutputPlan(Prompt(at, [5, 6], is_whole=True), at, 0, 9) for at in range(num_prompts)]
        self.lanes.add(job, request, plans)

    def step(self) -> None:
        for lane in self.list:
            lane.scheduler.next_step()

    @property
    def held(self) -> list[tuple[int, int]]:
        """What waits and what runs in each lane."""
        return [(lane.num_waiting, lane.num_running) for lane in self.list]


def test_an_output_goes_where_the_fewest_wait_or_run() -> None:
    machine = Machine(3)
    machine.add(4)
    assert machine.held == [(2, 0), (1, 0), (1, 0)]
    machine.step()
    machine.add(1)
    assert machine.held == [(0, 2), (1, 1), (0, 1)]


def test_one_request_at_a_time_always_finds_the_first_lane() -> None:
    machine = Machine()
    for _ in range(3):
        machine.add(1)
        machine.step()
        assert machine.held == [(0, 1), (0, 0)]
        machine.list[0].sequences.pop().is_finished = True
        machine.step()


def test_the_beams_of_a_search_stay_together_and_count_as_rows() -> None:
    machine = Machine()
    machine.add(1, num_beams=3)
    machine.add(2)
    assert machine.held == [(3, 0), (2, 0)]
    machine.add(2, num_beams=2)
    assert machine.held == [(5, 0), (4, 0)]


def test_the_outputs_of_a_prompt_stay_together_as_far_as_a_lane_has_rows() -> None:
    machine = Machine(max_rows=3)
    prompts = [Prompt(0, [5, 6], is_whole=True), Prompt(1, [5, 6], is_whole=True)]
    job = Job(9, Progress())
    machine.lanes.admit(job)
    request = GenerateRequest(prompt=[[5, 6]] * 2, n=4)
    machine.lanes.add(job, request, [OutputPlan(prompts[at // 4], at, 0, 9) for at in range(8)])
    assert [[one.index for one in lane.sequences] for lane in machine.list] == [[0, 1, 2, 7], [3, 4, 5, 6]]


def test_the_queue_before_all_lanes_is_one() -> None:
    machine = Machine(max_waiting=6)
    machine.add(5)
    with pytest.raises(Overloaded, match="5 outputs wait, 2 more do not fit under the limit of 6"):
        machine.add(2)
    machine.step()  # two of each lane get a slot
    machine.add(5)
    assert (machine.lanes.num_waiting, machine.lanes.num_running) == (6, 4)
    assert machine.lanes.num_kept_tokens == 4 * 2


def test_places_are_taken_while_prompts_are_read_and_free_once_the_job_is_closed() -> None:
    machine = Machine(max_waiting=3)
    coming = Job(2, Progress())
    machine.lanes.admit(coming)
    with pytest.raises(Overloaded, match="2 outputs wait"):
        machine.add(2)
    for _ in range(2):  # twice changes nothing
        machine.lanes.close(coming)
        assert machine.lanes.num_waiting == 0
    machine.queue(coming, 1)
    assert machine.lanes.num_waiting == 0


def test_what_is_closed_leaves_every_lane() -> None:
    machine = Machine()
    first, other = machine.add(7), machine.add(1)
    machine.step()
    assert machine.held == [(2, 2), (2, 2)]
    machine.lanes.close(first)
    machine.step()
    machine.step()
    assert machine.held == [(0, 0), (0, 1)]
    assert not other.is_closed


async def test_every_lane_starts_and_stops() -> None:
    machine = Machine()
    await machine.lanes.start(print, print)
    await machine.lanes.stop()
    assert [lane.calls for lane in machine.list] == [["start", "stop"]] * 2


async def test_all_lanes_start_or_none() -> None:
    machine = Machine(3)
    machine.list[1].failure = BundleError("it is broken")
    with pytest.raises(BundleError, match="it is broken"):
        await machine.lanes.start(print, print)
    assert [lane.calls for lane in machine.list] == [["start", "stop"], [], ["start", "stop"]]


# --- a generator with several


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_translation_bundle(tmp_path_factory.mktemp("lanes") / "translation")


async def serve(directory: Path, num_lanes: int) -> tuple[LocalBackend, Generator]:
    bundle = load_bundle(directory)
    engines = [TranslatorEngine(bundle, num_slots=slots_for(8), threads=1) for _ in range(num_lanes)]
    generator = in_threads(bundle, engines, Metrics((1.0,), {}), max_rows=8, max_waiting=200)
    return await serving(generator), generator


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"n": 2, "temperature": 1.0, "seed": 4}])
async def test_outputs_are_the_same_bits_in_whatever_lane(bundle: Path, options: dict[str, Any]) -> None:
    """One request whose outputs are spread, and its like at the same time, so that each is in lanes of all kinds."""
    found = []
    for num_lanes in (1, 3):
        backend, _ = await serve(bundle, num_lanes)
        asked = {"prompt": SOURCES, "max_tokens": 12, "logprobs": 2, **options}
        found += await asyncio.gather(*(collect(backend, call(), **asked) for _ in range(2)))
        await backend.aclose()
    for other in found[1:]:
        for index in range(len(SOURCES) * options.get("n", 1)):
            assert other.tokens(index) == found[0].tokens(index)
            assert other.finish(index) == found[0].finish(index)
        assert other.end.usage == found[0].end.usage


async def test_a_request_has_ended_with_the_last_of_its_outputs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, generator = await serve(bundle, 2)
    take, ends = generator._take, list[float]()
    monkeypatch.setattr(
        generator, "_take", lambda report: (ends.extend(one.at for _, one in report.ended), take(report))
    )
    circumstances = call()
    timing = (await collect(backend, circumstances, prompt=SOURCES, max_tokens=12)).end.timing
    await backend.aclose()
    progress = circumstances.progress
    assert len(ends) == len(SOURCES)
    assert progress.finished == max(ends) > progress.first_token
    assert timing.decode_seconds == progress.finished - progress.first_token


async def test_a_lane_that_dies_fails_the_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, generator = await serve(bundle, 2)

    def broken(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(generator._lanes._lanes[1]._loop, "_execute", broken)
    with pytest.raises(EngineFailed, match="the engine of tiny-translation has failed"):
        await collect(backend, call(), prompt=SOURCES)
    await until(lambda: generator._lanes.num_waiting == 0)
    with pytest.raises(Unavailable):
        await backend.models()
    await backend.aclose()


def test_a_search_that_fails_is_one_output_less() -> None:
    """Its rows have one event, one error and one count together."""
    scheduler, told = Scheduler(max_rows=4, num_blocks=0), {"tell": print, "publish": print, "died": print}
    loop = GenerationLoop(NOBODY, scheduler, NOBODY, name="x", **told)
    lead, done = Sequence(Job(3, Progress()), 0, Prompt(0, [5]), NOBODY, num_beams=3), Done(Step(), 0.0)
    loop._fail(lead.rows, None, done)
    assert done.failed == [lead]
    assert all(row.is_finished for row in lead.rows)
