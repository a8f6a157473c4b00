"""The gRPC port over real sockets, asked by gRPC's own client."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from fakes import MODEL, FakeBackend, fake_scores, until
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from processes import needs_ipv6
from rpc import LIMIT, SERVICE, Running, Start, details_of, failure_of

from service.domain import TextInput
from service.errors import ConfigError, Overloaded, Unavailable
from service.observed import NO_ROUTE
from service.rpc import core, server
from service.rpc.pb.attnd.v1 import inference_pb2 as pb


def request(text: str) -> pb.ClassifyStreamRequest:
    return pb.ClassifyStreamRequest(request=pb.ClassifyRequest(inputs=[pb.TextInput(text=text)]))


async def test_classify_answers_with_scores_usage_and_timing(running: Running) -> None:
    reply = await running.classify("a fine film", "a dull one")
    assert reply.model == MODEL.id
    expected = [
        [(score.label, score.score) for score in fake_scores(TextInput(text))] for text in ("a fine film", "a dull one")
    ]
    assert [[(score.label, score.score) for score in row.scores] for row in reply.results] == expected
    assert (reply.usage.prompt_tokens, reply.usage.truncated) == (10, 0)
    assert reply.timing.total_seconds == 0.0051
    assert running.count("Classify", "ok") == 1


async def test_every_field_reaches_the_backend(running: Running, backend: FakeBackend) -> None:
    await running.send(
        pb.ClassifyRequest(
            inputs=[pb.TextInput(text="a", text_pair="b")],
            model="sentiment",
            top_k=1,
            function_to_apply=pb.FUNCTION_TO_APPLY_SIGMOID,
            truncate=False,
        )
    )
    (asked,) = backend.requests
    assert asked.input == (TextInput("a", "b"),)
    assert (asked.model, asked.top_k, asked.function_to_apply, asked.truncate) == ("sentiment", 1, "sigmoid", False)


async def test_the_request_id_is_the_callers(running: Running, backend: FakeBackend) -> None:
    call = running.classify("a", metadata=(("x-request-id", "trace:7.b_c-d"),))
    assert dict(await call.trailing_metadata())["x-request-id"] == "trace:7.b_c-d"
    await call
    assert backend.calls[0].request_id == "trace:7.b_c-d"


@pytest.mark.parametrize("given", [(), (("x-request-id", "not ok!"),), (("x-request-id", "x" * 129),)])
async def test_an_unfit_request_id_is_replaced(running: Running, backend: FakeBackend, given: Any) -> None:
    call = running.classify("a", metadata=given)
    request_id = dict(await call.trailing_metadata())["x-request-id"]
    await call
    assert backend.calls[0].request_id == request_id
    assert len(request_id) == 32


async def test_the_callers_deadline_reaches_the_backend(running: Running, backend: FakeBackend) -> None:
    before = time.monotonic()
    await running.classify("a", timeout=5)
    deadline = backend.calls[0].deadline
    assert before < deadline < time.monotonic() + 5.5  # the client rounds up a little


@pytest.mark.parametrize("own_s", [None, 1000])
async def test_the_request_timeout_bounds_every_deadline(start: Start, backend: FakeBackend, own_s: Any) -> None:
    running = await start(request_timeout=30)
    await running.classify("a", timeout=own_s)
    assert backend.calls[0].deadline <= time.monotonic() + 30


async def test_a_call_past_its_deadline_is_abandoned(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    failure = await failure_of(running.classify("a", timeout=0.1))
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: backend.num_cancelled == 1)
    assert (running.count("Classify", "deadline"), running.count("Classify", "cancelled")) == (1, 0)


async def test_a_cancelled_call_is_abandoned(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    call = running.classify("a")
    await until(lambda: backend.num_waiting == 1)
    call.cancel()
    await until(lambda: backend.num_cancelled == 1)
    await until(lambda: running.count("Classify", "cancelled") == 1)


async def test_a_caller_that_vanishes_is_abandoned(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    call = running.classify("a")
    await until(lambda: backend.num_waiting == 1)
    await running.channel.close()
    await until(lambda: backend.num_cancelled == 1)
    assert call.done()


async def test_an_invalid_value_is_an_invalid_argument(running: Running) -> None:
    failure = await failure_of(running.send(pb.ClassifyRequest()))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, violations = ErrorInfo(), BadRequest()
    status = details_of(failure)
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(violations)
    assert (info.reason, info.metadata["param"]) == ("invalid_request", "inputs")
    assert violations.field_violations[0].field == "inputs"
    assert violations.field_violations[0].description == status.message == failure.details()
    assert failure.details().startswith("inputs: ")
    assert running.count("Classify", "invalid") == 1


@pytest.mark.parametrize("garbage", [b"\xff" * 9, b"\x0a\x04\x0a\x02\xff\xfe"])
async def test_garbage_is_an_invalid_argument_and_is_counted(running: Running, garbage: bytes) -> None:
    failure = await failure_of(running.send(garbage))
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert running.count("Classify", "invalid") == 1


async def test_a_message_over_the_limit_is_out_of_range(running: Running) -> None:
    failure = await failure_of(running.classify("x" * 100_000))
    assert failure.code() is grpc.StatusCode.OUT_OF_RANGE
    assert f"{LIMIT} bytes" in failure.details()
    assert running.count("Classify", "invalid") == 1
    assert (await running.classify("x")).model == MODEL.id


TOO_LARGE = "x" * 2_000_000  # more than gRPC itself takes where our limit is LIMIT


async def test_what_grpc_refuses_has_its_status_and_is_counted_as_too_large(start: Start) -> None:
    lines: list[dict[str, object]] = []
    running = await start(log=lines.append)
    failure = await failure_of(running.classify(TOO_LARGE))
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in failure.details()
    await until(lambda: running.count("Classify", "invalid") == 1)
    assert "refused the message as too large" in str(lines[0]["error"])


async def test_what_grpc_refuses_ends_its_stream_and_is_counted(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    stream = running.stream()
    await stream.write(request("open"))
    await until(lambda: backend.num_waiting == 1)
    await stream.write(request(TOO_LARGE))
    assert (await failure_of(stream.read())).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: running.count("ClassifyStream", "cancelled") == 1)
    assert running.count("ClassifyStream", "invalid") == 1


async def test_a_call_without_a_message_is_told_so(running: Running) -> None:
    call = running.channel.stream_stream(f"/{SERVICE}/Classify")(timeout=10)
    await call.done_writing()
    failure = await failure_of(call.read())
    assert (failure.code(), failure.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
    assert running.count("Classify", "invalid") == 1


@pytest.mark.parametrize("name", ["Classify", "Generate"])
@pytest.mark.parametrize("outcome", ["cancelled", "deadline"])
async def test_who_leaves_before_the_message_is_there_is_not_wrong(start: Start, name: str, outcome: str) -> None:
    running = await start()

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.sleep(30)
        yield b""

    method = running.channel.stream_unary(f"/{SERVICE}/{name}")
    calls = [method(nothing(), timeout=1 if outcome == "deadline" else 10) for _ in range(20)]
    await until(lambda: len(running.server._tasks) == 2 * len(calls))  # two a call that is there
    if outcome == "cancelled":
        for call in calls:
            call.cancel()
    await until(lambda: sum(running.count(name, other) for other in ("cancelled", "deadline", "invalid")) == 20)
    assert running.count(name, outcome) == 20


async def test_an_overload_says_when_to_come_back(running: Running, backend: FakeBackend) -> None:
    backend.error = Overloaded("the queue is full (8)", retry_after_s=1.5)
    failure = await failure_of(running.classify("a"))
    assert failure.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = RetryInfo()
    assert details_of(failure).details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_a_bug_is_internal_and_keeps_its_secrets(running: Running, backend: FakeBackend) -> None:
    backend.error = ZeroDivisionError("password is hunter2")
    failure = await failure_of(running.classify("a"))
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert "hunter2" not in failure.details()
    assert running.count("Classify", "error") == 1


async def test_more_calls_than_the_core_was_asked_for_are_open_at_once(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    calls = [running.classify("a") for _ in range(3 * core.NUM_REQUESTED)]
    await until(lambda: backend.num_waiting == len(calls))
    backend.release()
    assert {reply.model for reply in await asyncio.gather(*calls)} == {MODEL.id}


async def test_a_port_has_one_server(start: Start) -> None:
    first = await start()
    with pytest.raises(ConfigError, match=f"cannot listen for gRPC on 127.0.0.1:{first.port}: "):
        await start(grpc_port=first.port)
    assert (await first.classify("a")).model == MODEL.id


async def model_at(address: str) -> str:
    """The model that answers there."""
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.unary_unary(f"/{SERVICE}/ListModels", None, pb.ListModelsResponse.FromString)
        return (await method(b"", timeout=10)).models[0].id


@needs_ipv6
async def test_an_ipv6_address_needs_no_brackets(start: Start) -> None:
    running = await start(host="::1")
    assert await model_at(f"[::1]:{running.port}") == MODEL.id


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name stands for two, as localhost often does."""

    async def both(host: str) -> list[str]:
        return ["::1", "127.0.0.1"]

    monkeypatch.setattr(server, "addresses_of", both)


@needs_ipv6
@pytest.mark.usefixtures("two_addresses")
async def test_a_name_is_listened_on_by_all_its_addresses(start: Start) -> None:
    running = await start(host="localhost")
    assert [await model_at(f"{host}:{running.port}") for host in ("[::1]", "127.0.0.1")] == [MODEL.id] * 2


@needs_ipv6
@pytest.mark.usefixtures("two_addresses")
async def test_a_port_that_is_taken_on_one_address_is_taken(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"on localhost:{taken}: 127.0.0.1:{taken} is taken"):
            await start(host="localhost", grpc_port=taken)


async def test_an_unknown_method_is_unimplemented(running: Running) -> None:
    method = running.channel.unary_unary(f"/{SERVICE}/{'Nothing' * 100}")
    failure = await failure_of(method(b"", timeout=10, metadata=(("x-request-id", "mine"),)))
    assert failure.code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(failure.details()) < 200
    assert dict(failure.trailing_metadata())["x-request-id"] == "mine"
    info = ErrorInfo()
    assert details_of(failure).details[0].Unpack(info)
    assert info.reason == "method_not_found"
    labels = {"route": NO_ROUTE, "model": "", "outcome": "invalid"}
    assert running.metrics.registry.get_sample_value("attnd_request_seconds_count", labels) == 1


@pytest.mark.parametrize("given", [(), (("authorization", "Bearer wrong"),), (("authorization", "sesame"),)])
async def test_a_wrong_key_is_unauthenticated(start: Start, backend: FakeBackend, given: Any) -> None:
    running = await start(api_key="sesame")
    assert (await failure_of(running.classify("a", metadata=given))).code() is grpc.StatusCode.UNAUTHENTICATED
    list_models = running.channel.unary_unary(f"/{SERVICE}/ListModels")
    assert (await failure_of(list_models(b"", metadata=given))).code() is grpc.StatusCode.UNAUTHENTICATED
    stream = running.stream(metadata=given)
    assert (await failure_of(stream.read())).code() is grpc.StatusCode.UNAUTHENTICATED
    assert backend.requests == []
    assert running.count("Classify", "invalid") == 1
    assert running.count("ClassifyStream", "invalid") == 1


async def test_the_right_key_opens(start: Start) -> None:
    running = await start(api_key="sesame")
    metadata = (("authorization", "Bearer sesame"),)
    assert (await running.classify("a", metadata=metadata)).model == MODEL.id


async def test_health_needs_no_key(start: Start) -> None:
    running = await start(api_key="sesame")
    assert await check(running, "") == health_pb2.HealthCheckResponse.SERVING


async def test_list_models_tells_the_facts(running: Running) -> None:
    method = running.channel.unary_unary(f"/{SERVICE}/ListModels", None, pb.ListModelsResponse.FromString)
    (model,) = (await method(b"", timeout=10)).models
    assert running.count("ListModels", "ok") == 0  # as README says
    assert (model.id, model.task, model.created) == (MODEL.id, MODEL.task, MODEL.created)
    assert list(model.facts["labels"]) == MODEL.facts["labels"]


async def test_a_stream_answers_in_order(running: Running) -> None:
    texts = [f"text {i}" for i in range(1000)]

    async def messages() -> AsyncIterator[Any]:
        for text in texts:
            yield request(text)

    labels = [reply.response.results[0].scores[0].label async for reply in running.stream(messages())]
    assert labels == [fake_scores(TextInput(text))[0].label for text in texts]
    assert running.count("ClassifyStream", "ok") == 1000


async def test_requests_of_a_stream_are_open_at_once(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    stream = running.stream()
    for i in range(50):
        await stream.write(request(f"text {i}"))
    await until(lambda: backend.num_waiting == 50)
    backend.release()
    await stream.done_writing()
    assert len([reply async for reply in stream]) == 50


async def test_a_stream_opens_no_more_than_its_window(running: Running, backend: FakeBackend) -> None:
    backend.hold()

    async def messages() -> AsyncIterator[Any]:
        for i in range(300):
            yield request(f"text {i}")

    stream = running.stream(messages())
    await until(lambda: backend.num_waiting == 256)
    await asyncio.sleep(0.05)
    assert backend.num_waiting == 256
    backend.release()
    assert len([reply async for reply in stream]) == 300


async def test_an_error_in_a_stream_is_the_reply_to_its_request_alone(running: Running, backend: FakeBackend) -> None:
    sent = [
        request("first"),
        pb.ClassifyStreamRequest(),
        pb.ClassifyStreamRequest(request=pb.ClassifyRequest(inputs=[pb.TextInput(text="a")], model="nope")),
        b"\xff",
        request("x" * 100_000),
        request("last"),
    ]

    async def messages() -> AsyncIterator[Any]:
        for message in sent:
            yield message

    replies = [reply async for reply in running.stream(messages())]
    outcomes = [reply.error.code or reply.response.model for reply in replies]
    assert outcomes == [
        "sentiment", "invalid_request", "model_not_found", "invalid_protobuf", "too_large", "sentiment",
    ]  # fmt: skip
    assert replies[1].error.status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert replies[1].error.param == "inputs"
    assert replies[1].error.message.startswith("inputs: ")
    assert running.count("ClassifyStream", "ok") == 2
    assert running.count("ClassifyStream", "invalid") == 4


async def test_a_bug_in_a_stream_is_a_reply_too(running: Running, backend: FakeBackend) -> None:
    backend.error = ZeroDivisionError("hunter2")
    stream = running.stream()
    await stream.write(request("a"))
    reply = await stream.read()
    assert (reply.error.code, reply.error.message) == ("engine_failed", "internal error")
    backend.error = None
    await stream.write(request("a"))
    assert (await stream.read()).response.model == MODEL.id


async def test_each_request_of_a_stream_has_an_id(running: Running, backend: FakeBackend) -> None:
    stream = running.stream(metadata=(("x-request-id", "trace"),))
    for _ in range(2):
        await stream.write(request("a"))
        await stream.read()
    assert [call.request_id for call in backend.calls] == ["trace.0", "trace.1"]


async def test_a_cancelled_stream_abandons_what_is_open(running: Running, backend: FakeBackend) -> None:
    backend.hold()
    stream = running.stream()
    for i in range(5):
        await stream.write(request(f"text {i}"))
    await until(lambda: backend.num_waiting == 5)
    stream.cancel()
    await until(lambda: backend.num_cancelled == 5)
    assert running.count("ClassifyStream", "cancelled") == 5


async def check(running: Running, service: str) -> int:
    method = running.channel.unary_unary(
        "/grpc.health.v1.Health/Check", None, health_pb2.HealthCheckResponse.FromString
    )
    message = health_pb2.HealthCheckRequest(service=service)
    return (await method(message.SerializeToString(), timeout=10)).status


def watch(running: Running, service: str) -> Any:
    method = running.channel.unary_stream(
        "/grpc.health.v1.Health/Watch", None, health_pb2.HealthCheckResponse.FromString
    )
    return method(health_pb2.HealthCheckRequest(service=service).SerializeToString(), timeout=20)


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_follows_readiness(running: Running, backend: FakeBackend, service: str) -> None:
    assert await check(running, service) == health_pb2.HealthCheckResponse.SERVING
    backend.unready = Unavailable("loading")
    assert await check(running, service) == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_health_does_not_know_every_service(running: Running) -> None:
    assert (await failure_of(check(running, "no.Such"))).code() is grpc.StatusCode.NOT_FOUND
    assert (await watch(running, "no.Such").read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_health_lists_every_service(running: Running) -> None:
    method = running.channel.unary_unary("/grpc.health.v1.Health/List", None, health_pb2.HealthListResponse.FromString)
    statuses = (await method(b"", timeout=10)).statuses
    assert {name: status.status for name, status in statuses.items()} == {"": 1, SERVICE: 1}


async def test_a_watcher_sees_every_change(running: Running, backend: FakeBackend) -> None:
    backend.unready = Unavailable("loading")
    watching = watch(running, SERVICE)
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    backend.unready = None
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("method", ["Check", "Watch"])
async def test_health_of_nothing_is_an_invalid_argument(
    running: Running, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    asked = running.channel.stream_stream(f"/grpc.health.v1.Health/{method}")(iter(()), timeout=10)
    failure = await failure_of(asked.read())
    assert (failure.code(), failure.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
    assert caplog.records == []


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_the_service(running: Running, version: str) -> None:
    method = running.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method(timeout=10)
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} <= names
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    files = (await call.read()).file_descriptor_response.file_descriptor_proto
    assert pb.DESCRIPTOR.serialized_pb in files
    await call.done_writing()


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(start: Start, backend: FakeBackend) -> None:
    running = await start(drain_timeout=10)
    backend.hold()
    watching = watch(running, "")
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
    accepted = running.classify("accepted")
    stream = running.stream()
    await stream.write(request("accepted too"))
    await until(lambda: backend.num_waiting == 2)
    stopping = asyncio.create_task(running.server.stop())
    assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await failure_of(running.classify("refused"))).code() is grpc.StatusCode.UNAVAILABLE
    backend.release()
    assert (await accepted).model == MODEL.id
    assert (await stream.read()).response.model == MODEL.id
    assert (await failure_of(stream.read())).code() is grpc.StatusCode.UNAVAILABLE
    await stopping


async def test_draining_does_not_wait_for_ever(start: Start, backend: FakeBackend) -> None:
    running = await start(drain_timeout=0.1)
    backend.hold()
    call = running.classify("stuck")
    await until(lambda: backend.num_waiting == 1)
    await running.server.stop()
    await until(lambda: backend.num_cancelled == 1)
    assert (await failure_of(call)).code() is grpc.StatusCode.UNAVAILABLE
