"""A lane in a process of its own: the same outputs as in a thread, the same marks and counts, and every way it ends."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from fakes import until
from generations import call, collect, in_threads, serving

from service.domain import GenerateRequest, Progress, Token
from service.errors import BundleError, ConfigError, DeadlineExceeded, EngineFailed, Unavailable
from service.metrics import Metrics
from service.worker.bundle import load_bundle
from service.worker.generation import lane_processes
from service.worker.generation.generator import Generator
from service.worker.generation.lane_messages import Load
from service.worker.generation.lane_processes import LaneProcesses
from service.worker.generation.outputs import OutputPlan
from service.worker.generation.process_lane import ProcessLane
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.prompts import PromptReader
from service.worker.generation.scheduler import slots_for
from service.worker.generation.sequence import Job, Prompt
from service.worker.generation.translator import TranslatorEngine, vocabulary_of
from service.worker.local import LocalBackend

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere lanes are no processes")
tiny = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)

ROWS = 8
SOURCES = [[3 + place % 7] * (2 + place % 5) for place in range(20)]
LONG = {"prompt": SOURCES, "max_tokens": 64, "ignore_eos": True}
KINDS = [
    {},
    {"num_beams": 3, "n": 2},
    {"n": 2, "temperature": 1.0, "seed": 4, "logprobs": 2},
    {"stop": ["e"], "logit_bias": {"7": 1.5}},
    {"stop_token_ids": list(range(3, 19)), "min_tokens": 2},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_translation_bundle(tmp_path_factory.mktemp("lanes") / "translation")


class Running:
    def __init__(self, directory: Path, num_lanes: int) -> None:
        bundle = load_bundle(directory)
        self.metrics = Metrics((0.001, 1.0), {})
        self.processes = LaneProcesses(load_of(directory), num_lanes)
        self.lanes = [ProcessLane(self.processes, place) for place in range(num_lanes)]
        vocab_size = vocabulary_of(bundle.graph("decode"))
        prompts = PromptReader(bundle, PromptTokenizer(bundle.tokenizer_path), vocab_size=vocab_size)
        sizes = {"max_rows": ROWS, "max_waiting": 400, "num_blocks": 0}
        self.generator = Generator(bundle, self.lanes, self.metrics, prompts=prompts, **sizes)

    async def start(self) -> "Running":
        self.backend = await serving(self.generator)
        return self

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model": "tiny-translation", **labels}) or 0.0


def load_of(directory: Path, **fields: Any) -> Load:
    given = {"directory": str(directory), "max_rows": ROWS, "provider": "cpu", "fallback": False}
    return Load(**given | {"log_level": "error"} | fields)


def lane_of(directory: Path, **fields: Any) -> ProcessLane:
    return ProcessLane(LaneProcesses(load_of(directory, **fields), 1), 0)


def is_alive(lane: ProcessLane) -> bool:
    try:
        os.kill(lane.pid, 0)
    except ProcessLookupError:
        return False
    return True


Start = Callable[..., Awaitable[Running]]


@pytest.fixture
async def run(bundle: Path) -> AsyncIterator[Start]:
    """Starts a backend; all of them end with the test, and so do their processes."""
    started: list[Running] = []

    async def start(num_lanes: int = 1) -> Running:
        started.append(await Running(bundle, num_lanes).start())
        return started[-1]

    yield start
    for running in started:
        await running.backend.aclose()
        assert not any(map(is_alive, running.lanes))


async def in_a_thread(directory: Path) -> LocalBackend:
    bundle = load_bundle(directory)
    engine = TranslatorEngine(bundle, num_slots=slots_for(ROWS), threads=1)
    return await serving(in_threads(bundle, [engine], Metrics((1.0,), {}), max_rows=ROWS, max_waiting=400))


async def test_outputs_are_those_of_a_thread_to_the_bit(bundle: Path, run: Start) -> None:
    thread, running = await in_a_thread(bundle), await run(2)
    for options in KINDS:
        for wants_tokens in (True, False):
            asked = {"prompt": SOURCES, "max_tokens": 12, **options}
            expected = await collect(thread, replace(call(), wants_tokens=wants_tokens), **asked)
            found = await collect(running.backend, replace(call(), wants_tokens=wants_tokens), **asked)
            for index in range(len(SOURCES) * asked.get("n", 1)):
                assert found.tokens(index) == expected.tokens(index)
                assert found.finish(index) == expected.finish(index)
            assert found.end.usage == expected.end.usage
    await thread.aclose()


async def test_a_request_s_progress_is_marked_as_if_it_were_written_here(run: Start) -> None:
    running = await run()
    told, untold = call(), replace(call(), wants_tokens=False)
    for circumstances in (told, untold):
        found = await collect(running.backend, circumstances, prompt=SOURCES[:3], max_tokens=12)
        progress, timing = circumstances.progress, found.end.timing
        assert progress.tokenized <= progress.started < progress.first_token < progress.finished
        assert timing.decode_seconds == progress.finished - progress.first_token
        num_written, num_told = found.end.usage.completion_tokens, sum(len(found.tokens(at)) for at in range(3))
        assert len(progress.untold_gaps) <= num_written - num_told
    assert told.progress.untold_gaps == []
    gaps = untold.progress.untold_gaps
    assert gaps.count(None) == 3  # each output has a first token
    assert all(gap > 0 for gap in gaps if gap is not None)


async def test_steps_are_counted_and_memory_is_free_in_the_end(run: Start) -> None:
    running = await run()
    found = await collect(running.backend, call(), **LONG)
    assert found.end.usage.completion_tokens == 64 * len(SOURCES)
    assert running.sample("attnd_step_tokens_total", phase="decode") == 64 * len(SOURCES)
    assert running.sample("attnd_step_tokens_total", phase="prefill") == sum(map(len, SOURCES))
    assert running.generator._lanes.num_kept_tokens == 0


async def test_whoever_leaves_gives_the_slots_back(run: Start) -> None:
    running = await run()
    async with aclosing(running.backend.generate(GenerateRequest(**LONG), call())) as events:
        async for event in events:
            if isinstance(event, Token):
                break
        assert (running.lanes[0].num_running, running.lanes[0].num_waiting) == (ROWS, len(SOURCES) - ROWS)
    assert (running.lanes[0].num_running, running.lanes[0].num_waiting) == (0, 0)
    await until(lambda: running.sample("attnd_release_seconds_count") >= 1)
    assert running.lanes[0].num_kept_tokens == 0
    assert len((await collect(running.backend, call(), **LONG)).ids(19)) == 64


async def test_a_lane_that_hangs_gets_no_more_until_it_goes_on(run: Start) -> None:
    running = await run(2)
    hung, other = running.lanes
    os.kill(hung.pid, signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded):
        await collect(running.backend, call(0.3), prompt=SOURCES[:1])
    assert (hung.num_waiting, hung.num_running, hung.num_rows) == (0, 0, 1)
    for _ in range(3):
        await collect(running.backend, call(), prompt=SOURCES[:1])
    os.kill(hung.pid, signal.SIGCONT)
    await until(lambda: hung.num_rows == 0)
    os.kill(other.pid, signal.SIGSTOP)
    await collect(running.backend, call(), prompt=SOURCES[:1])
    os.kill(other.pid, signal.SIGCONT)


async def test_what_runs_and_what_waits_are_counted_in_rows(bundle: Path) -> None:
    lane = lane_of(bundle)
    lane._say = lambda message: None  # type: ignore[method-assign]
    request = GenerateRequest(prompt=[[5], [6], [7]], num_beams=4)
    plans = [OutputPlan(Prompt(at, [5 + at], is_whole=True), at, 0, 9) for at in range(3)]
    job, left = Job(12, Progress()), Job(12, Progress(), is_closed=True)
    lane.add(job, request, plans)
    lane.add(left, request, plans)
    assert (lane.num_running, lane.num_waiting) == (8, 4)
    lane.close(job)
    lane.close(left)
    assert (lane.num_running, lane.num_waiting, lane.num_rows) == (0, 0, 12)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_a_killed_process_fails_what_is_open_and_turns_readiness_red(
    bundle: Path, runner: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """On either event loop: what is said to who is dead is an error on one of them."""
    runner(kill(bundle))
    assert [(one.name, one.levelname) for one in caplog.records] == [("attnd.engine", "CRITICAL")]


async def kill(bundle: Path) -> None:
    running = await Running(bundle, 2).start()
    open_ = asyncio.ensure_future(collect(running.backend, call(), **LONG | {"n": 4}))
    await until(lambda: running.generator._lanes.num_running > 0)
    os.kill(running.lanes[1].pid, signal.SIGKILL)
    with pytest.raises(EngineFailed, match="the engine of tiny-translation has failed"):
        await open_
    with pytest.raises(Unavailable, match="the engine of tiny-translation has failed"):
        await running.backend.models()
    with pytest.raises(Unavailable):
        await collect(running.backend, call(), **LONG)
    await running.backend.aclose()
    assert not any(map(is_alive, running.lanes))


async def test_signals_to_the_server_s_group_do_not_end_what_it_drains(run: Start) -> None:
    running = await run()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(os.getpgid(running.lanes[0].pid), number)
    assert len((await collect(running.backend, call(), **LONG)).ids(19)) == 64


async def test_a_provider_that_is_not_there_is_refused_by_name(bundle: Path) -> None:
    with pytest.raises(ConfigError, match="provider is 'cuda', generation runs on the cpu only") as caught:
        await lane_of(bundle, provider="cuda").start(print, print)
    assert caught.value.param == "provider"


async def test_a_broken_bundle_is_refused(broken: Path) -> None:
    with pytest.raises(BundleError, match=r"generation\.bos_id"):
        await lane_of(broken).start(print, print)


@pytest.fixture
def broken(bundle: Path, tmp_path: Path) -> Path:
    directory = shutil.copytree(bundle, tmp_path / "broken")
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["generation"]["bos_id"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


async def test_a_loader_that_hangs_ends_soon_with_the_start_of_its_server(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 300")
    hanging.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(hanging))
    processes = LaneProcesses(load_of(bundle), 2)
    starting = [asyncio.ensure_future(ProcessLane(processes, place).start(print, print)) for place in range(2)]
    await until(lambda: processes._loader is not None)
    for one in starting:
        one.cancel()
    ended = await asyncio.gather(*starting, return_exceptions=True)
    assert [type(one) for one in ended] == [asyncio.CancelledError] * 2
    begun = time.monotonic()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert time.monotonic() - begun < lane_processes.FAILING_S + 5
    assert processes.end() == -signal.SIGKILL


async def test_one_that_dies_while_it_loads_says_with_what_status(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(EngineFailed, match=r"ended before it was ready \(its loader: status 1\)"):
        await lane_of(bundle).start(print, print)


def test_it_finds_modules_where_its_server_does(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a folder that it happens to be started in."""
    (tmp_path / "service.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    processes = LaneProcesses(load_of(bundle), 1)
    channel, _ = processes.open(0)
    channel.close()
    assert processes.end() == 0


@pytest.mark.parametrize("is_abrupt", [False, True])
def test_processes_end_with_their_server(bundle: Path, is_abrupt: bool) -> None:
    """Whether that said goodbye or not."""
    processes = LaneProcesses(load_of(bundle), 2)
    channels = [processes.open(lane)[0] for lane in range(2)]
    for channel in channels:
        if is_abrupt:
            channel.sendall(b"\xff\xff")  # the beginning of something
        channel.close()
    assert processes.end() == 0


def test_those_that_do_not_end_are_killed_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lane asks for it when a server stops."""
    monkeypatch.setattr(lane_processes, "LAST_STEP_S", 0.2)
    processes = LaneProcesses(load_of(bundle), 4)
    channels = [processes.open(lane)[0] for lane in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(lambda _: processes.end(), channels)] == [-signal.SIGKILL] * 4
    for channel in channels:
        with channel:
            assert channel.recv(1) == b""


def test_a_lane_that_dies_is_told_of_in_the_end(bundle: Path) -> None:
    processes = LaneProcesses(load_of(bundle), 2)
    (first, _), (second, pid) = [processes.open(lane) for lane in range(2)]
    os.kill(pid, signal.SIGSEGV)
    assert second.recv(1) == b""
    for channel in (first, second):
        channel.close()
    assert processes.end() == 1


def test_a_start_that_fails_in_one_lane_ends_the_others_soon(bundle: Path) -> None:
    processes = LaneProcesses(load_of(bundle), 3)
    channel, _ = processes.open(0)
    processes.open(1)[0].close()
    processes.open(2)[0].shutdown(socket.SHUT_RDWR)
    begun = time.monotonic()
    with pytest.raises(EngineFailed, match="ended before it was ready"):
        processes.open(2)
    assert time.monotonic() - begun < lane_processes.FAILING_S + 5
    with channel:
        assert channel.recv(1) == b""


def test_where_no_process_can_be_started_every_lane_says_so(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere")
    processes = LaneProcesses(load_of(bundle), 2)
    for lane in range(2):
        with pytest.raises(FileNotFoundError):
            processes.open(lane)
    assert processes.end() == 0


def test_as_many_lanes_as_cores_have_one_each(bundle: Path) -> None:
    mine = os.sched_getaffinity(0)
    for num_lanes in {len(mine), len(mine) + 1}:
        processes = LaneProcesses(load_of(bundle), num_lanes)
        lanes = [processes.open(lane) for lane in range(num_lanes)]
        found = [os.sched_getaffinity(pid) for _, pid in lanes]
        for channel, _ in lanes:
            channel.close()
        assert processes.end() == 0
        if num_lanes == len(mine):
            assert [len(cores) for cores in found] == [1] * num_lanes
            assert set().union(*found) == mine
        else:
            assert found == [mine] * num_lanes


def test_lanes_share_the_model_s_memory(bundle: Path) -> None:
    """A page that several have is divided among them in what `Pss_Anon` counts, and whole in `Anonymous`."""
    processes = LaneProcesses(load_of(bundle), 3)
    lanes = [processes.open(lane) for lane in range(3)]
    try:
        for _, pid in lanes:
            told = Path(f"/proc/{pid}/smaps_rollup").read_text()
            sizes = dict(re.findall(r"^(Pss_Anon|Anonymous): +(\d+) kB", told, re.MULTILINE))
            assert int(sizes["Pss_Anon"]) < 0.5 * int(sizes["Anonymous"])
    finally:
        for channel, _ in lanes:
            channel.close()
    assert processes.end() == 0
