"""The load generator of generation: so many streams at once over OpenAI's /v1/completions, and what they delivered.

Runs as a process of its own (`python -m tests.bench.stream_generator < load.json`) and prints one `StreamSample` as
JSON. A closed loop: a stream that has ended is followed by the next prompt at once. Knows no server but by its address
and by what its requests hold besides the prompt.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import orjson
import uvloop

from .http1 import request_bytes
from .prompts import PromptPlan, plan_from, prompts_of
from .sse import Reply, fetch
from .streams import Stream, StreamSample, sample_of, stream_of

# Streams that are sent while it is measured, at the least: a slow server gets more time instead of no figure.
_AT_LEAST = 3
# After a failure a lane waits this long, so that a dead server is not hammered.
_PAUSE_AFTER_FAILURE_S = 0.2
_FAILURES_THAT_END = 20


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Long prompts that come while others stream: one every `period_s` seconds, or when the one before is answered."""

    prompts: PromptPlan
    period_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """What to send, where and how hard.

    `template` is every request but its prompt, its max_tokens and its seed. `concurrency` lanes each keep one stream of
    `num_tokens` going. It is measured for `seconds` from when every lane has had its first token; a server that does
    not stream (`streams` false) is measured from the start.
    """

    host: str
    port: int
    path: str
    template: dict[str, Any]
    prompts: PromptPlan
    concurrency: int
    num_tokens: int
    seconds: float
    streams: bool = True
    arrivals: Arrivals | None = None


def load_from(described: dict[str, Any]) -> StreamLoad:
    """The inverse of `asdict`, after a way through JSON."""
    arrivals = described["arrivals"]
    return StreamLoad(
        **{
            **described,
            "prompts": plan_from(described["prompts"]),
            "arrivals": arrivals and Arrivals(**{**arrivals, "prompts": plan_from(arrivals["prompts"])}),
        }
    )


class Window:
    """When it is measured: opens when every lane has had a first token, closes `seconds` later."""

    def __init__(self, num_lanes: int, seconds: float) -> None:
        self.opens = self.closes = float("inf")
        self.opened = asyncio.Event()
        self._waiting = num_lanes
        self._seconds = seconds

    def lane_started(self) -> None:
        self._waiting -= 1
        if self._waiting == 0:
            self.open()

    def open(self) -> None:
        if not self.opened.is_set():
            self.opens = time.perf_counter()
            self.closes = self.opens + self._seconds
            self.opened.set()


class Run:
    """One load under way. Replies are kept as they came and read when it is over."""

    def __init__(self, load: StreamLoad) -> None:
        self.window = Window(load.concurrency, load.seconds)
        self.lane_replies: list[tuple[Reply, int]] = []
        self.arrival_replies: list[tuple[Reply, int]] = []
        self._load = load
        self._prompts = prompts_of(load.prompts)
        self._numbers = count()
        self._sent_in_window = 0
        self._failures = 0

    async def lane(self, place: int) -> None:
        """One stream after another. The first is cut short by the lane's place, so that lanes do not end in step."""
        load, started = self._load, False
        num_tokens = -(-load.num_tokens * (place + 1) // load.concurrency) if load.streams else load.num_tokens
        while self._goes_on():
            reply = await self._send(self._prompts, num_tokens, started)
            self.lane_replies.append((reply, num_tokens))
            started, num_tokens = True, load.num_tokens
            await self._pause_if_failed(reply)

    async def arrive(self, arrivals: Arrivals) -> None:
        """The long prompts, from the moment at which it is measured; the first after a short while."""
        await self.window.opened.wait()
        prompts = prompts_of(arrivals.prompts)
        due = self.window.opens + arrivals.period_s / 8
        while due < self.window.closes:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            reply = await self._send(prompts, arrivals.num_tokens, True)
            self.arrival_replies.append((reply, arrivals.num_tokens))
            due += arrivals.period_s

    def _goes_on(self) -> bool:
        if self._failures >= _FAILURES_THAT_END:
            return False
        return time.perf_counter() < self.window.closes or self._sent_in_window < _AT_LEAST

    async def _send(self, prompts: Iterator[Any], num_tokens: int, started: bool) -> Reply:
        load = self._load
        self._sent_in_window += self.window.opened.is_set()
        request = {"prompt": next(prompts), "max_tokens": num_tokens, "seed": next(self._numbers)}
        message = request_bytes(f"{load.host}:{load.port}", load.path, orjson.dumps({**load.template, **request}))
        on_first = (lambda: None) if started else self.window.lane_started
        return await fetch(load.host, load.port, message, on_first=on_first)

    async def _pause_if_failed(self, reply: Reply) -> None:
        if reply.fault or reply.status != 200:
            self._failures += 1
            await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)


async def measure(load: StreamLoad) -> StreamSample:
    """Run one load against a listening server; streams that are under way at the end are read to theirs."""
    run = Run(load)
    cpu, wall = time.process_time(), time.perf_counter()
    if not load.streams:
        run.window.open()
    async with asyncio.TaskGroup() as tasks:
        for place in range(load.concurrency):
            tasks.create_task(run.lane(place))
        if load.arrivals:
            tasks.create_task(run.arrive(load.arrivals))
    used = (time.process_time() - cpu) / (time.perf_counter() - wall)
    window = run.window
    return sample_of(
        _read(run.lane_replies),
        opens=window.opens,
        closes=window.closes,
        client_cpu=used,
        others=_read(run.arrival_replies),
    )


def _read(replies: list[tuple[Reply, int]]) -> list[Stream]:
    return [stream_of(reply, num_tokens) for reply, num_tokens in replies]


def main() -> None:
    load = load_from(json.load(sys.stdin))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sample = runner.run(measure(load))
    print(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
