"""Generate over real sockets, asked by gRPC's own client."""

import asyncio
from typing import Any

import grpc
import pytest
from fakes import CHAT, MODEL, FakeBackend, fake_logprob, until
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from rpc import LIMIT, Running, Start, details_of, failure_of

from service.domain import GenerateRequest, Message
from service.errors import DeadlineExceeded, Overloaded
from service.rpc.pb.attnd.v1 import inference_pb2 as pb


@pytest.fixture(autouse=True)
def talking(backend: FakeBackend) -> None:
    backend.served = [MODEL, CHAT]


def asking(text: str = "one two three", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompts=[pb.Prompt(text=text)], **fields)


# More than a connection takes in when nobody reads: it cannot be over before its caller has read it.
NUM_LONG = 2_000
LONG = asking("word " * NUM_LONG, logprobs=20, max_tokens=0)


async def start_long(start: Start, asked: Any = LONG, **settings: Any) -> tuple[Running, Any]:
    """A server, and a generation on it of which the first message has come."""
    running = await start(max_body_bytes=1_000_000, **settings)
    call = running.generate(asked, timeout=60)
    assert (await anext(aiter(call))).events[0].HasField("start")
    return running, call


async def events_of(call: Any) -> list[pb.GenerateEvent]:
    return [event async for message in call for event in message.events]


def texts_of(events: list[pb.GenerateEvent]) -> list[str]:
    return [event.token.text for event in events if event.HasField("token")]


async def test_generate_sends_the_events_in_order(running: Running) -> None:
    start, *middle, finish, end = await events_of(running.generate(asking(logprobs=1)))
    assert start.start == pb.Start(model=CHAT.id, prompt_tokens=3)
    assert texts_of(middle) == ["one ", "two ", "three "]
    own = fake_logprob("two ", 0)
    alone = {"id": own.id, "text": own.text, "bytes": own.bytes, "logprob": own.logprob}
    logprob = pb.TokenLogprob(**alone, top=[pb.TokenLogprob(**alone)])
    assert middle[1].token == pb.Token(index=0, id=4, text="two ", logprob=logprob)
    assert finish.finish == pb.Finish(index=0, finish_reason=pb.FINISH_REASON_STOP)
    assert end.end.usage == pb.GenerateUsage(prompt_tokens=3, completion_tokens=3)
    assert end.end.timing.first_token_seconds == 0.02
    assert running.count("Generate", "ok") == 1


async def test_every_field_reaches_the_backend(running: Running, backend: FakeBackend) -> None:
    await events_of(running.generate(asking("a", model="chat", seed=-(2**63), n=2, max_tokens=0, stop=["x"])))
    turns = [pb.Message(role="system", content="be brief"), pb.Message(role="user", content="naïve 🎬")]
    await events_of(running.generate(pb.GenerateRequest(messages=turns, temperature=0.0)))
    assert backend.generations == [
        GenerateRequest(prompt="a", model="chat", seed=-(2**63), n=2, max_tokens=None, stop="x"),
        GenerateRequest(messages=(Message("system", "be brief"), Message("user", "naïve 🎬")), temperature=0.0),
    ]


async def test_the_request_id_is_the_callers(running: Running, backend: FakeBackend) -> None:
    call = running.generate(asking(), metadata=(("x-request-id", "trace:7"),))
    await events_of(call)
    assert dict(await call.trailing_metadata())["x-request-id"] == "trace:7"
    assert backend.calls[0].request_id == "trace:7"


async def test_many_generations_at_once(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    calls = [asyncio.create_task(events_of(running.generate(asking(f"this is {i}"), timeout=60))) for i in range(300)]
    await until(lambda: backend.num_waiting == 300)
    backend.release()
    assert [texts_of(events) for events in await asyncio.gather(*calls)] == [
        ["this ", "is ", f"{i} "] for i in range(300)
    ]
    assert running.count("Generate", "ok") == 300


async def test_a_long_generation_loses_nothing(start: Start) -> None:
    running, call = await start_long(start)
    assert running.count("Generate", "ok") == 0
    events = await events_of(call)
    assert len(texts_of(events)) >= NUM_LONG - 300  # those that came with the start are not among them
    assert events[-1].end.usage.completion_tokens == NUM_LONG
    assert running.count("Generate", "ok") == 1


async def test_a_caller_that_cancels_before_the_first_token(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    call = running.generate(asking())
    await until(lambda: backend.num_waiting == 1)
    call.cancel()
    await until(lambda: backend.num_cancelled == 1)
    await until(lambda: running.count("Generate", "cancelled") == 1)


async def test_a_caller_that_cancels_in_the_middle(start: Start, backend: FakeBackend) -> None:
    running, call = await start_long(start)
    call.cancel()
    await until(lambda: backend.num_cancelled == 1)
    await until(lambda: running.count("Generate", "cancelled") == 1)


async def test_a_caller_that_vanishes_in_the_middle(start: Start, backend: FakeBackend) -> None:
    running, _ = await start_long(start)
    await running.channel.close()
    await until(lambda: backend.num_cancelled == 1)
    await until(lambda: running.count("Generate", "cancelled") == 1)


async def test_a_generation_past_its_callers_deadline_is_abandoned(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    failure = await failure_of(events_of(running.generate(asking(), timeout=0.1)))
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: backend.num_cancelled == 1)


@pytest.mark.parametrize("num_tokens", [None, 2])
async def test_a_deadline_says_so_in_detail(running: Running, backend: FakeBackend, num_tokens: int | None) -> None:
    """Before the first event (None) and after two tokens."""
    backend.error, backend.error_after = DeadlineExceeded("the deadline passed after 1.000 s"), num_tokens
    failure = await failure_of(events_of(running.generate(asking())))
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    info = ErrorInfo()
    assert details_of(failure).details[0].Unpack(info)
    assert (info.reason, failure.details()) == ("deadline_exceeded", "the deadline passed after 1.000 s")
    assert running.count("Generate", "deadline") == 1


async def test_the_request_timeout_bounds_the_deadline(start: Start, backend: FakeBackend) -> None:
    running = await start(request_timeout=30)
    await events_of(running.generate(asking(), timeout=1000))
    (call,) = backend.calls
    assert call.deadline == call.progress.begun + 30


async def test_an_overload_says_when_to_come_back(running: Running, backend: FakeBackend) -> None:
    backend.error = Overloaded("the queue is full (8)", retry_after_s=1.5)
    failure = await failure_of(events_of(running.generate(asking())))
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = RetryInfo()
    assert details_of(failure).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500
    assert running.count("Generate", "overloaded") == 1


@pytest.mark.parametrize("garbage", [b"\xff" * 9, b"\x0a\x04\x0a\x02\xff\xfe"])
async def test_garbage_is_an_invalid_argument_and_is_counted(running: Running, garbage: bytes) -> None:
    failure = await failure_of(events_of(running.generate(garbage)))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "attnd.v1.GenerateRequest" in failure.details()
    assert running.count("Generate", "invalid") == 1


async def test_an_invalid_value_names_the_field(running: Running, backend: FakeBackend) -> None:
    failure = await failure_of(events_of(running.generate(asking(top_p=1.5))))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    violations = BadRequest()
    assert details_of(failure).details[1].Unpack(violations)
    assert violations.field_violations[0].field == "top_p"
    assert "got 1.5" in violations.field_violations[0].description
    assert backend.generations == []
    assert running.count("Generate", "invalid") == 1


async def test_a_message_over_the_limit_is_out_of_range(running: Running) -> None:
    failure = await failure_of(events_of(running.generate(asking("x" * 100_000))))
    assert failure.code() is grpc.StatusCode.OUT_OF_RANGE
    assert f"{LIMIT} bytes" in failure.details()


async def test_an_unknown_model_is_not_found(running: Running) -> None:
    failure = await failure_of(events_of(running.generate(asking(model="nope"))))
    assert failure.code() is grpc.StatusCode.NOT_FOUND
    failure = await failure_of(events_of(running.generate(asking(model="sentiment"))))
    assert failure.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("num_tokens", [None, 2])
async def test_a_bug_is_internal_and_keeps_its_secrets(
    running: Running, backend: FakeBackend, num_tokens: int | None
) -> None:
    backend.error, backend.error_after = ZeroDivisionError("password is hunter2"), num_tokens
    failure = await failure_of(events_of(running.generate(asking())))
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in failure.details()
    assert running.count("Generate", "error") == 1


@pytest.mark.parametrize("given", [(), (("authorization", "Bearer wrong"),)])
async def test_a_wrong_key_is_unauthenticated(start: Start, backend: FakeBackend, given: Any) -> None:
    running = await start(api_key="sesame")
    failure = await failure_of(events_of(running.generate(asking(), metadata=given)))
    assert failure.code() is grpc.StatusCode.UNAUTHENTICATED
    assert backend.generations == []
    assert running.count("Generate", "invalid") == 1
    assert await events_of(running.generate(asking(), metadata=(("authorization", "Bearer sesame"),)))


async def test_draining_refuses_new_generations_and_finishes_the_running_ones(start: Start) -> None:
    running, call = await start_long(start, drain_timeout=30)
    stopping = asyncio.create_task(running.server.stop())
    await asyncio.sleep(0)
    failure = await failure_of(events_of(running.generate(asking())))
    # CANCELLED is gRPC's own word for a call that arrives together with the news that there is no more room.
    assert failure.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert not stopping.done()
    events = await events_of(call)
    assert events[-1].end.usage.completion_tokens == NUM_LONG
    await stopping


async def test_draining_does_not_wait_for_ever(start: Start, backend: FakeBackend) -> None:
    longer = asking("word " * 10 * NUM_LONG, logprobs=20, max_tokens=0)  # than what a stop waits for last words
    running, call = await start_long(start, longer, drain_timeout=0.1)
    await running.server.stop()
    await until(lambda: backend.num_cancelled == 1)
    assert (await failure_of(events_of(call))).code() is grpc.StatusCode.UNAVAILABLE
