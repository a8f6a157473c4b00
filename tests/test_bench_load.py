"""The bench's load generators, against servers whose answers are known."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from bench.figures import arrivals
from bench.generator import Load, Tally, measure
from bench.http1 import reply_length, request_bytes
from bench.http2 import DATA, END_STREAM, frame, grpc_message
from bench.loads import LoadFailed, has_wrk, run_generator, run_wrk
from bench.servers import free_port

# --- the wires, against servers that are not ours

SENTENCES = ("good", "bad " * 40, "fine")


class HttpServer:
    """Answers every POST with the length of its body, or as a body asks for that says "fail", "leave" or "wait"."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                body = await reader.readexactly(reply_length(head))
                self.bodies.append(body)
                if body == b"leave":
                    return
                if body == b"wait":
                    continue
                status = b"500 Oh" if body == b"fail" else b"200 OK"
                reply = json.dumps({"label": "POSITIVE", "length": len(body)}).encode()
                writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status, len(reply)))
                await asyncio.sleep(0)  # the body comes in a segment of its own
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def http_server() -> AsyncIterator[tuple[HttpServer, int]]:
    fake = HttpServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    try:
        yield fake, server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


Answer = Callable[[bytes], Awaitable[bytes]]


@asynccontextmanager
async def grpc_server(answer: Answer) -> AsyncIterator[int]:
    """A real gRPC server that answers bytes with bytes: /bench/Unary and /bench/Stream."""

    async def unary(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        try:
            return await answer(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def stream(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield await answer(request)

    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def load(wire: str, port: int, **changes: object) -> Load:
    paths = {"http": "/classify", "grpc": "/bench/Unary", "stream": "/bench/Stream"}
    plain: dict[str, object] = {
        "wire": wire,
        "host": "127.0.0.1",
        "port": port,
        "path": paths[wire],
        "bodies": SENTENCES,
        "concurrency": 4,
        "connections": 4 if wire == "http" else 1,
        "seconds": 0.3,
        "warm_up_s": 0.05,
    }
    return Load(**{**plain, **changes})  # type: ignore[arg-type]


async def test_closed_loop_over_http_sends_the_bodies_in_turn() -> None:
    async with http_server() as (fake, port):
        found = await measure(load("http", port))
    assert found.errors == 0
    assert found.requests <= len(fake.bodies)
    assert found.rate * 0.3 == pytest.approx(found.requests, abs=5)  # of four lanes' first and last only a part counts
    assert found.latency.p50 <= found.latency.p99 <= found.latency.worst
    assert fake.bodies[:3] == [text.encode() for text in SENTENCES]


def test_of_a_request_that_reaches_beyond_the_window_only_the_share_within_counts() -> None:
    tally = Tally(opens=10.0, closes=13.0)
    tally.in_flight = 7
    for began, ended in ((8.0, 9.0), (9.0, 11.0), (11.0, 12.0), (12.0, 16.0), (9.0, 15.0), (14.0, 15.0)):
        tally.land(began, ended, "")
    tally.land(11.0, 12.0, "gone")
    assert tally.num_within() == 0 + 0.5 + 1 + 0.25 + 0.5 + 0
    assert tally.latencies(by_end=True) == [2.0, 1.0]
    assert tally.latencies(by_end=False) == [1.0, 4.0]
    assert (tally.faults, tally.in_flight) == (["gone"], 0)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("fail", 'status 500: {"label": "POSITIVE", "length": 4}'),
        ("leave", "the connection was lost: closed by the server"),
    ],
)
async def test_http_failures_are_counted_by_why_and_not_timed(body: str, fault: str) -> None:
    async with http_server() as (_, port):
        found = await measure(load("http", port, bodies=(body,)))
    assert list(found.faults) == [fault]
    assert found.errors >= 4  # one on each connection, and more after a pause
    assert found.requests == 0


async def test_what_is_never_answered_is_a_failure_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.generator._PATIENCE_S", 0.05)
    async with http_server() as (_, port):
        found = await measure(load("http", port, bodies=("wait",)))
    assert found.faults == {"no reply in 0.05 s": 4}


async def test_a_closed_loop_whose_timer_ends_early_loses_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = asyncio.sleep
    monkeypatch.setattr("bench.generator.asyncio.sleep", lambda seconds: sleep(seconds / 2))
    async with http_server() as (_, port):
        found = await measure(load("http", port, concurrency=1, connections=1))
    assert found.faults == {}


async def test_poisson_arrivals_over_http_keep_their_rate() -> None:
    async with http_server() as (fake, port):
        planned = load("http", port, rate=200.0, seconds=1.0, concurrency=16, connections=16)
        found = await measure(planned)
    assert found.errors == 0
    schedule = arrivals(200.0, 1.05, seed=0)
    assert len(fake.bodies) == len(schedule)
    assert found.requests == sum(at >= 0.05 for at in schedule)


async def test_open_loop_counts_the_wait_behind_a_stall() -> None:
    # One slot, about 50 arrivals in half a second, 50 ms each: the last one waits for all that came before it.
    async def slow(_: bytes) -> bytes:
        await asyncio.sleep(0.05)
        return b"\x0a\x00"

    async with grpc_server(slow) as port:
        found = await measure(load("grpc", port, rate=100.0, seconds=0.5, warm_up_s=0.0, concurrency=1))
    assert found.requests == len(arrivals(100.0, 0.5, seed=0))
    assert found.latency.worst > 10 * 0.05


@pytest.mark.parametrize("wire", ["grpc", "stream"])
async def test_grpc_messages_arrive_whole_and_in_turn(wire: str) -> None:
    seen: list[bytes] = []

    async def note(request: bytes) -> bytes:
        seen.append(request)
        return b"\x0a\x00"

    async with grpc_server(note) as port:
        found = await measure(load(wire, port))
    assert found.errors == 0
    assert found.requests <= len(seen)
    assert seen[:3] == [text.encode() for text in SENTENCES]


async def test_stream_goes_on_past_the_flow_control_window() -> None:
    # 40 messages of 20 kB in flight are many times the initial window of 64 kB, and each is longer than a frame.
    lengths: list[int] = []

    async def note(request: bytes) -> bytes:
        lengths.append(len(request))
        return b"\x0a\x00"

    async with grpc_server(note) as port:
        found = await measure(load("stream", port, bodies=("x" * 20_000,), concurrency=40))
    assert found.errors == 0
    assert len(lengths) >= 40
    assert set(lengths) == {20_000}


async def test_grpc_status_errors_are_counted() -> None:
    async def refuse(_: bytes) -> bytes:
        raise ValueError("no cheese")

    async with grpc_server(refuse) as port:
        found = await measure(load("grpc", port, concurrency=1))
    (fault,) = found.faults
    assert fault.startswith("no message: ")
    assert "no cheese" in fault
    assert found.requests == 0


async def test_stream_error_replies_are_counted() -> None:
    async def error_reply(_: bytes) -> bytes:
        return b"\x12\x02no"

    async with grpc_server(error_reply) as port:
        found = await measure(load("stream", port))
    assert list(found.faults) == ["an error as the reply: no"]
    assert found.requests == 0


async def test_generator_process_measures_like_the_function() -> None:
    async with http_server() as (fake, port):
        found = await asyncio.to_thread(run_generator, load("http", port))
        with pytest.raises(LoadFailed, match="generator failed"):
            await asyncio.to_thread(run_generator, load("http", free_port()))
    assert found.errors == 0
    assert found.requests <= len(fake.bodies)
    assert fake.bodies[:3] == [text.encode() for text in SENTENCES]


@pytest.mark.skipif(not has_wrk(), reason="wrk is not installed")
async def test_wrk_sends_every_body_and_reports(tmp_path: Path) -> None:
    lines = [json.dumps({"input": text}) for text in SENTENCES]
    (tmp_path / "bodies").write_text("\n".join(lines) + "\n")
    async with http_server() as (fake, port):
        url = f"http://127.0.0.1:{port}/classify"
        found = await asyncio.to_thread(run_wrk, url, tmp_path / "bodies", concurrency=1, seconds=1)
    assert found.errors == 0
    assert found.requests <= len(fake.bodies)
    seen = [lines.index(body.decode()) for body in fake.bodies]
    # wrk itself takes a request or more to look at before it sends any, so only the turns are sure, not the first.
    assert all(after == (before + 1) % 3 for before, after in itertools.pairwise(seen))
    assert seen
    assert found.latency.p50 <= found.latency.p99 <= found.latency.worst


@pytest.mark.skipif(not has_wrk(), reason="wrk is not installed")
async def test_wrk_counts_failures_by_why(tmp_path: Path) -> None:
    (tmp_path / "bodies").write_text("fail\n")
    async with http_server() as (_, port):
        url = f"http://127.0.0.1:{port}/classify"
        found = await asyncio.to_thread(run_wrk, url, tmp_path / "bodies", concurrency=1, seconds=1)
    assert (list(found.faults), found.requests) == (["status over 399"], 0)


def test_frames_and_messages_are_laid_out_as_the_protocols_say() -> None:
    assert frame(DATA, END_STREAM, 3, b"ab") == b"\0\0\x02\0\x01\0\0\0\x03ab"
    assert grpc_message(b"abc") == b"\0\0\0\0\x03abc"
    assert request_bytes("h:1", "/p", b"{}").endswith(b"Content-Length: 2\r\n\r\n{}")
    with pytest.raises(ValueError, match="Content-Length"):
        reply_length(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked")
