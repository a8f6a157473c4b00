"""The bench's own load generator: closed loop or Poisson arrivals over HTTP/1.1, gRPC unary or a gRPC stream.

Runs as a process of its own (`python -m tests.bench.generator < load.json`) and prints one `Sample` as JSON. Open-loop
latencies count from the scheduled arrival, so a server that stalls cannot hide the wait of those it held up
(coordinated omission). Knows no server's API: bodies are bytes prepared by the caller.
"""

import asyncio
import json
import selectors
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Literal, Protocol

import uvloop

from .faults import counted
from .figures import Sample, arrivals, latency_of
from .http1 import Http1Connection, OnReply, request_bytes
from .http2 import StreamCall, UnaryCalls, grpc_message

Wire = Literal["http", "grpc", "stream"]

# The longest that replies are awaited after the last request was sent, in seconds.
_PATIENCE_S = 20.0
# After a failure the next request of a closed loop waits this long, so that a dead server is not hammered.
_PAUSE_AFTER_FAILURE_S = 0.02


@dataclass(frozen=True, slots=True)
class Load:
    """What to send, where and how hard.

    A closed loop keeps `concurrency` requests in flight, spread over `connections`; with a `rate` (requests a second)
    arrivals are Poisson instead and `concurrency` only bounds what is in flight at once. The first `warm_up_s` seconds
    are not measured.
    """

    wire: Wire
    host: str
    port: int
    path: str
    bodies: tuple[str, ...]
    concurrency: int
    connections: int
    seconds: float
    warm_up_s: float = 0.5
    rate: float | None = None
    seed: int = 0


class Channel(Protocol):
    """Takes prepared messages, at most `capacity` at once."""

    capacity: int

    def send(self, message: bytes, on_reply: OnReply) -> None: ...

    def close(self) -> None: ...


async def open_channels(load: Load) -> list[Channel]:
    loop = asyncio.get_running_loop()
    channels: list[Channel] = []
    share = -(-load.concurrency // load.connections)
    for _ in range(load.connections):
        if load.wire == "http":
            http = Http1Connection()
            await loop.create_connection(lambda http=http: http, load.host, load.port)  # type: ignore[misc]
            channels.append(http)
            continue
        kind = UnaryCalls if load.wire == "grpc" else StreamCall
        calls = kind(f"{load.host}:{load.port}", load.path, capacity=share)
        await loop.create_connection(lambda calls=calls: calls.connection, load.host, load.port)  # type: ignore[misc]
        channels.append(calls)
    return channels


def messages_of(load: Load) -> list[bytes]:
    if load.wire == "http":
        host = f"{load.host}:{load.port}"
        return [request_bytes(host, load.path, body.encode("latin-1")) for body in load.bodies]
    return [grpc_message(body.encode("latin-1")) for body in load.bodies]


class Tally:
    """Keeps what came back: when each request that was answered began, or was due, and ended; why others were not."""

    def __init__(self, opens: float, closes: float) -> None:
        self.opens = opens
        self.closes = closes
        self.spans: list[tuple[float, float]] = []
        self.faults: list[str] = []
        self.in_flight = 0
        self.is_idle = asyncio.Event()

    def land(self, began: float, ended: float, fault: str) -> None:
        self.in_flight -= 1
        if self.in_flight == 0:
            self.is_idle.set()
        if fault:
            self.faults.append(fault)
        else:
            self.spans.append((began, ended))

    def latencies(self, *, by_end: bool) -> list[float]:
        """Of the requests that ended, or began, while the window was open."""
        return [
            ended - began for began, ended in self.spans if self.opens <= (ended if by_end else began) < self.closes
        ]

    def num_within(self) -> float:
        """Requests answered in the window; of one that reaches beyond it, the share of its time that lies within.

        So a server that answers a few large batches is not measured by whether one more of them ended in time.
        """
        return sum(
            max(0.0, min(ended, self.closes) - max(began, self.opens)) / (ended - began) for began, ended in self.spans
        )


async def run_closed(load: Load, channels: Sequence[Channel], messages: Sequence[bytes]) -> Tally:
    """Keep every slot busy: a reply is followed at once by the next request on the same channel."""
    loop = asyncio.get_running_loop()
    now = time.perf_counter
    opens = now() + load.warm_up_s
    tally = Tally(opens, opens + load.seconds)
    stream = cycle(messages)

    def launch(channel: Channel) -> None:
        started = now()
        if started >= tally.closes:
            return
        tally.in_flight += 1
        channel.send(next(stream), lambda fault: landed(channel, started, fault))

    def landed(channel: Channel, started: float, fault: str) -> None:
        ended = now()
        if fault:
            loop.call_later(_PAUSE_AFTER_FAILURE_S, launch, channel)
        else:
            launch(channel)  # before this one lands: none in flight means that none will follow
        tally.land(started, ended, fault)

    slots = [channel for channel in channels for _ in range(channel.capacity)][: load.concurrency]
    for channel in slots:
        launch(channel)
    await _finish(tally)
    return tally


async def run_open(load: Load, channels: Sequence[Channel], messages: Sequence[bytes]) -> Tally:
    """Send at the scheduled times whatever the server does; a request that finds every slot busy waits its turn."""
    loop = asyncio.get_running_loop()
    now = time.perf_counter
    begin = now()
    tally = Tally(begin + load.warm_up_s, begin + load.warm_up_s + load.seconds)
    schedule = [begin + at for at in arrivals(load.rate or 1.0, load.warm_up_s + load.seconds, load.seed)]
    idle = deque(channel for channel in channels for _ in range(channel.capacity))
    due: deque[float] = deque()
    stream = cycle(messages)

    def dispatch() -> None:
        while due and idle:
            channel, scheduled = idle.popleft(), due.popleft()
            channel.send(next(stream), lambda fault, channel=channel, at=scheduled: landed(channel, at, fault))  # type: ignore[misc]

    def landed(channel: Channel, scheduled: float, fault: str) -> None:
        tally.land(scheduled, now(), fault)
        idle.append(channel)
        if due:
            loop.call_soon(dispatch)

    for scheduled in schedule:
        delay = scheduled - now()
        if delay > 0:
            await asyncio.sleep(delay)
        tally.in_flight += 1
        due.append(scheduled)
        dispatch()
    await _finish(tally)
    return tally


async def _finish(tally: Tally) -> None:
    await asyncio.sleep(max(0.0, tally.closes - time.perf_counter()))
    tally.is_idle.clear()
    if tally.in_flight > 0:
        with suppress(TimeoutError):
            await asyncio.wait_for(tally.is_idle.wait(), _PATIENCE_S)
    tally.faults += [f"no reply in {_PATIENCE_S:g} s"] * tally.in_flight


async def measure(load: Load) -> Sample:
    """Run one load against a listening server. Raises OSError when it cannot be reached."""
    channels = await open_channels(load)
    cpu, wall = time.process_time(), time.perf_counter()
    is_closed = load.rate is None
    tally = await (run_closed if is_closed else run_open)(load, channels, messages_of(load))
    used = (time.process_time() - cpu) / (time.perf_counter() - wall)
    for channel in channels:
        channel.close()
    # Of a schedule those due in the window: by their end the latest, which are the slowest, would be missing.
    latencies = tally.latencies(by_end=is_closed)
    return Sample(
        rate=(tally.num_within() if is_closed else len(latencies)) / load.seconds,
        latency=latency_of(latencies),
        requests=len(latencies),
        faults=counted(tally.faults),
        client_cpu=used,
    )


def new_event_loop(load: Load) -> asyncio.AbstractEventLoop:
    """uvloop for closed loops, because it is cheap; select() for schedules, because its timeouts are in microseconds
    where epoll and uvloop round up to milliseconds."""
    return uvloop.new_event_loop() if load.rate is None else asyncio.SelectorEventLoop(selectors.SelectSelector())


def main() -> None:
    described = json.load(sys.stdin)
    load = Load(**{**described, "bodies": tuple(described["bodies"])})
    with asyncio.Runner(loop_factory=lambda: new_event_loop(load)) as runner:
        sample = runner.run(measure(load))
    print(json.dumps(asdict(sample)))


if __name__ == "__main__":
    main()
