"""The bench's reading of streams: off the wire, into figures, and a whole load against a gateway without a model."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from itertools import islice

import pytest
from bench.generation_ceiling import BareLoop, BarePlan, bare_plan_from, rate_of
from bench.prompts import PromptPlan, prompts_of
from bench.sse import Chunks, Events, Reply, Sized, fetch
from bench.stream_generator import Arrivals, StreamLoad, load_from, measure
from bench.streams import Stream, sample_of, stream_of, stream_sample_from
from fakes import CHAT, FakeBackend
from wire import serve

# --- the wire


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    events = [b'{"text": "a\\n\\nb"}', b'{"text": "\xc3\xa9"}', b"[DONE]"]
    wire = chunked(*(b"data: %b\n\n" % event for event in events[:2]), b": ping\n\ndata: [DO", b"NE]\n\n")
    chunks, reader, found = Chunks(), Events(), []
    for at in range(0, len(wire), size):
        assert not chunks.is_over
        found += reader.feed(chunks.feed(wire[at : at + size]))
    assert found == events
    assert chunks.is_over


def test_chunk_size_may_have_an_extension_and_must_be_a_number() -> None:
    assert Chunks().feed(b"2;name=value\r\nhi\r\n") == b"hi"
    with pytest.raises(ValueError, match="invalid literal"):
        Chunks().feed(b"data: {}\r\n")


def test_body_of_a_stated_length_ends_with_its_last_byte() -> None:
    body = Sized(3)
    assert (body.feed(b"ab"), body.is_over) == (b"ab", False)
    assert (body.feed(b"c"), body.is_over) == (b"c", True)


@asynccontextmanager
async def raw_server(*pieces: bytes) -> AsyncIterator[int]:
    """Answers a request with these pieces, one after another, and hangs up."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


REQUEST = b"POST / HTTP/1.1\r\n\r\n"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(text: str = "", reason: str | None = None, **others: object) -> bytes:
    found = {"choices": [{"index": 0, "text": text, "finish_reason": reason}], **others}
    return b"data: %b\n\n" % json.dumps(found).encode()


async def test_stream_is_read_with_an_instant_for_each_event() -> None:
    usage = {"completion_tokens": 2, "prompt_tokens": 9}
    first = 0

    def count() -> None:
        nonlocal first
        first += 1

    whole = chunked(chunk("a"), chunk("b"), chunk(reason="length", usage=usage), b"data: [DONE]\n\n")
    async with raw_server(STREAM[:20], STREAM[20:] + whole[:30], whole[30:]) as port:
        reply = await fetch("127.0.0.1", port, REQUEST, on_first=count)
    stream = stream_of(reply, 2)
    assert first == 1
    assert (stream.fault, stream.tokens, stream.prompt_tokens, len(stream.arrivals)) == ("", 2, 9, 2)
    assert stream.sent < stream.arrivals[0] <= stream.arrivals[1] <= stream.ended


async def test_server_that_hangs_up_or_is_not_there_or_never_ends_is_a_fault() -> None:
    async with raw_server(STREAM + chunked(chunk("a"))[:-5]) as port:
        assert "connection was lost" in stream_of(await fetch("127.0.0.1", port, REQUEST), 1).fault
    told: list[bool] = []
    gone = await fetch("127.0.0.1", port, REQUEST, on_first=lambda: told.append(True))
    assert "refused" in gone.fault.lower() or "connect" in gone.fault.lower()
    assert told == [True]
    async with raw_server(b"SSH-2.0-what\r\n\r\n") as port:
        assert "not HTTP as expected" in (await fetch("127.0.0.1", port, REQUEST)).fault
    backend = FakeBackend()
    backend.served = [CHAT]
    backend.hold()
    async with serve(backend) as served:
        body = b'{"prompt": "a b", "max_tokens": 1}'
        message = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        assert "no end" in (await fetch("127.0.0.1", served.port, message, patience_s=0.05)).fault


# --- what a reply says


def reply(*events: bytes, status: int = 200) -> Reply:
    payloads = [event.removeprefix(b"data: ").rstrip(b"\n") for event in events]
    return Reply(sent=1.0, ended=9.0, status=status, events=[(2.0 + at, one) for at, one in enumerate(payloads)])


USAGE = chunk(usage={"completion_tokens": 2, "prompt_tokens": 5}, reason="length")
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        (reply(chunk("a"), chunk("b"), USAGE, DONE), ""),
        (reply(chunk("a"), chunk("b"), USAGE), "without [DONE]"),
        (reply(chunk("a"), chunk(usage={"completion_tokens": 1}, reason="length"), DONE), "tokens: 1 instead of 2"),
        (reply(chunk("a"), USAGE.replace(b"length", b"stop"), DONE), "finish reasons: ['stop']"),
        (reply(chunk("a"), USAGE, USAGE, DONE), "finish reasons: ['length', 'length']"),
        (reply(chunk("a"), b'data: {"error": {"message": "no"}}\n\n', DONE), "an error in the stream"),
        (reply(b"data: {oh\n\n"), "not JSON"),
        (Reply(status=503, body=b'{"error": "busy"}'), "status 503"),
        (Reply(fault="gone"), "gone"),
    ],
)
def test_reply_that_is_not_exactly_what_was_asked_has_a_fault(found: Reply, fault: str) -> None:
    assert fault in stream_of(found, 2).fault
    assert bool(fault) == bool(stream_of(found, 2).fault)


def test_text_that_is_not_there_yet_is_no_arrival() -> None:
    assert stream_of(reply(chunk(""), chunk("a"), USAGE, DONE), 2).arrivals == (3.0,)
    # Nothing but half a character came: the first chunk is when it began.
    assert stream_of(reply(chunk(""), USAGE, DONE), 2).arrivals == (2.0,)


def test_reply_in_one_piece_is_read_too() -> None:
    body = chunk("ab", "length", usage={"completion_tokens": 2, "prompt_tokens": 5}).removeprefix(b"data: ")
    stream = stream_of(Reply(sent=1.0, ended=3.0, status=200, body=body), 2)
    assert (stream.fault, stream.arrivals, stream.first, stream.tokens) == ("", (), 2.0, 2)


# --- figures


def test_window_counts_what_came_in_it() -> None:
    streams = [
        Stream(0.0, 5.0, (1.0, 2.0, 4.0, 5.0), tokens=4, prompt_tokens=10),  # began before: no time to first token
        Stream(2.5, 9.0, (3.0, 3.5, 9.0), tokens=3, prompt_tokens=30),
        Stream(2.5, 3.0, (), 0, 0, fault="gone"),
    ]
    sample = sample_of(streams, opens=2.0, closes=4.0, client_cpu=0.1, others=[replace(streams[2], fault="late")])
    assert sample.tokens_per_s == pytest.approx((1 + 2) / 2)
    assert (sample.gap.p50, sample.gap.worst) == (0.5, 1.0)
    assert (sample.first.p50, sample.prefill_per_s) == (0.5, 60.0)
    assert (sample.streams, sample.prompt_tokens, sample.errors) == (2, 20.0, 2)
    assert sample.faults == {"gone": 1, "late": 1}
    assert stream_sample_from(json.loads(json.dumps(sample.as_dict()))) == sample


def test_tokens_of_one_piece_are_spread_over_its_time() -> None:
    stream = Stream(0.0, 4.0, (), tokens=8, prompt_tokens=1)
    assert [stream.tokens_within(*window) for window in ((0, 4), (1, 2), (3, 9), (5, 6))] == [8, 2, 2, 0]


# --- prompts


def test_prompts_repeat_by_seed_and_never_begin_alike() -> None:
    plan = PromptPlan((3, 8), seed=4)
    texts = [text for text in islice(prompts_of(plan), 20) if isinstance(text, str)]
    assert texts == list(islice(prompts_of(plan), 20))
    assert sorted(len(text.split()) for text in texts) == [3] * 10 + [8] * 10
    others = [str(text) for text in islice(prompts_of(replace(plan, seed=5)), 20)]
    assert len({text.split()[0] for text in texts + others}) == 40
    ids = list(islice(prompts_of(PromptPlan((512,), unit="ids")), 2))
    assert [len(prompt) for prompt in ids] == [512, 512]
    assert ids[0] != ids[1]


# --- a whole load


def load(port: int, **others: object) -> StreamLoad:
    plan = PromptPlan((40,), unit="ids")
    template = {"model": "chat", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    made = StreamLoad("127.0.0.1", port, "/v1/completions", template, plan, concurrency=3, num_tokens=9, seconds=0.1)
    return replace(made, **others)  # type: ignore[arg-type]


async def test_load_against_a_gateway_gets_every_token() -> None:
    backend = FakeBackend()
    backend.served = [CHAT]
    async with serve(backend) as served:
        arrivals = Arrivals(PromptPlan((150,), unit="ids"), period_s=0.04, num_tokens=2)
        sample = await measure(load_from(json.loads(json.dumps(asdict(load(served.port, arrivals=arrivals))))))
    assert sample.faults == {}
    assert sample.prompt_tokens == 40
    assert sample.tokens_per_s > 0
    assert 0 < sample.first.p50 <= sample.first.p99
    asked = [request.max_tokens for request in backend.generations]
    assert asked[:3] == [3, 6, 9]  # the first of each lane, so that lanes do not end in step
    assert {len(request.prompt[0]) for request in backend.generations if request.prompt} == {40, 150}
    assert all(request.ignore_eos for request in backend.generations)


async def test_load_counts_streams_that_are_too_short_and_requests_that_are_refused() -> None:
    backend = FakeBackend()
    backend.served = [CHAT]
    async with serve(backend) as served:
        short = await measure(load(served.port, num_tokens=41, concurrency=1))
        assert [fault.partition(": ")[2] for fault in short.faults] == ["40 instead of 41"]
        refused = await measure(load(served.port, template={"model": "none"}, concurrency=1, seconds=0.01))
    assert (refused.streams, refused.tokens_per_s) == (0, 0.0)
    ((fault, num),) = refused.faults.items()  # of one kind, though each has an id of its own
    assert (fault[:11], num > 1) == ("status 404:", True)


# --- the bare loop


class CountingEngine:
    """Checks that rows are fed as a decoder must be; the next token is the length so far."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}
        self.prefills: list[tuple[int, int, int, str]] = []

    def prefill(self, slot: int, ids: Sequence[int], start: int, *, keep: str) -> list[int]:
        assert start == 0 or self.lengths[slot] == start
        self.prefills.append((slot, start, len(ids), keep))
        self.lengths[slot] = start + len(ids)
        return [self.lengths[slot]] if keep == "last" else []

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> list[int]:
        assert lengths == [self.lengths[row] for row in range(len(ids))]
        assert list(ids) == list(lengths)
        for row in range(len(ids)):
            self.lengths[row] += 1
        return [self.lengths[row] for row in range(len(ids))]


def test_bare_loop_keeps_every_row_full_and_counts_every_token() -> None:
    plan = BarePlan("-", PromptPlan((130,), unit="ids"), rows=2, num_tokens=4, seconds=0.0, threads=1)
    assert bare_plan_from(json.loads(json.dumps(asdict(plan)))) == plan
    engine = CountingEngine()
    loop = BareLoop(engine, plan, list, lambda: int)  # type: ignore[arg-type]
    assert engine.prefills == [(row, start, size, keep) for row in (0, 1) for start, size, keep in PIECES]
    assert loop.num_written == 2  # the first token of each row
    ticks = iter(range(100))
    assert rate_of(loop, 4.0, lambda: float(next(ticks))) == 8 / 4  # 3 steps of 2 rows, and 2 first tokens
    # Row 0, whose first answer was cut to two tokens, began again after one step, row 1 after three.
    assert [slot for slot, start, _, _ in engine.prefills[6:] if start == 0] == [0, 1]


PIECES = ((0, 64, "none"), (64, 64, "none"), (128, 2, "last"))
