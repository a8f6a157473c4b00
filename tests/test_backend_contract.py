"""What every Backend promises, asserted of each kind of it: one in process, and one over a real socket."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from fakes import CHAT, MODEL, FakeBackend, fake_logprob, fake_maps, fake_scores, fake_tokens, fake_words, until

from service.backend import Backend
from service.config import Settings
from service.domain import (
    AttentionRequest,
    Call,
    ClassifyRequest,
    End,
    Event,
    ExplainRequest,
    Finish,
    GenerateRequest,
    GenerateUsage,
    Message,
    Progress,
    Start,
    TextInput,
    Token,
)
from service.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unavailable,
    Unsupported,
)
from service.metrics import Metrics
from service.observed import Observed
from service.rpc.client import RemoteBackend
from service.rpc.server import RpcServer


@pytest.fixture(params=["in process", "observed", "remote"])
async def seam(request: pytest.FixtureRequest, backend: FakeBackend) -> AsyncIterator[Backend]:
    """Each kind of Backend, with `backend` behind it."""
    settings = Settings(grpc_port=0, drain_timeout=0.1)
    observed = Observed(backend, Metrics(settings.latency_buckets, {}))
    if request.param == "in process":
        yield backend
    elif request.param == "observed":
        yield observed
    else:
        server = RpcServer(observed, settings)
        remote = RemoteBackend((f"127.0.0.1:{await server.start()}",), settings)
        yield remote
        await remote.aclose()
        await server.stop()


def asking(*texts: str, **fields: Any) -> ClassifyRequest:
    return ClassifyRequest(input=tuple(TextInput(text) for text in texts), **fields)


def call() -> Call:
    return Call("trace", "test", time.monotonic() + 10)


async def test_scores_come_in_input_order_highest_first(seam: Backend) -> None:
    result = await seam.classify(asking("one", "two", "", "naïve 🎬"), call())
    assert result.model == MODEL.id
    assert result.results == tuple(fake_scores(TextInput(text)) for text in ("one", "two", "", "naïve 🎬"))


async def test_options_reach_the_model(seam: Backend, backend: FakeBackend) -> None:
    request = asking("one", model="sentiment", top_k=1, function_to_apply="none", truncate=False)
    result = await seam.classify(request, call())
    assert [len(scores) for scores in result.results] == [1]
    assert backend.requests == [request]


async def test_pairs_are_not_two_texts(seam: Backend) -> None:
    pair = TextInput("premise", "hypothesis")
    result = await seam.classify(ClassifyRequest(input=(pair,)), call())
    assert result.results == (fake_scores(pair),)


async def test_usage_and_timing_are_told(seam: Backend) -> None:
    result = await seam.classify(asking("three short words"), call())
    assert (result.usage.prompt_tokens, result.usage.truncated) == (5, 0)
    assert result.timing.total_seconds == 0.0051


async def test_the_time_that_is_counted_is_that_of_who_was_asked(seam: Backend) -> None:
    """At a gateway the network and the codec are in it; the reply's timing stays that of who has the model."""
    metrics = Metrics(Settings().latency_buckets, {})
    gateway = Observed(seam, metrics, clock=lambda: 7.5)
    asked = [
        gateway.classify(asking("one"), replace(call(), route="/c", progress=Progress(begun=7.0))),
        gateway.attention(ATTENTIONS[0], replace(call(), route="/a", progress=Progress(begun=7.0))),
        gateway.explain(ExplainRequest(text="a"), replace(call(), route="/e", progress=Progress(begun=7.0))),
    ]
    assert [(await one).timing.total_seconds for one in asked] == [0.0051] * 3
    for route in ("/c", "/a", "/e"):
        labels = {"route": route, "model": MODEL.id, "outcome": "ok"}
        assert metrics.registry.get_sample_value("attnd_request_seconds_sum", labels) == 0.5
        assert metrics.registry.get_sample_value("attnd_request_compute_seconds_sum", labels) == 0.004


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="input.0"),
        TooLarge("no", param="input"),
        Overloaded("no", retry_after_s=2.5),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_are_the_same_everywhere(seam: Backend, backend: FakeBackend, error: Any) -> None:
    backend.error = error
    with pytest.raises(type(error)) as caught:
        await seam.classify(asking("one"), call())
    assert vars(caught.value) | {"code": caught.value.code} == vars(error) | {"code": error.code}


async def test_an_unknown_model_is_not_found(seam: Backend) -> None:
    with pytest.raises(NotFound):
        await seam.classify(asking("one", model="nope"), call())


async def test_requests_run_side_by_side(seam: Backend, backend: FakeBackend) -> None:
    backend.hold()
    tasks = [asyncio.create_task(seam.classify(asking(f"text {i}"), call())) for i in range(20)]
    await until(lambda: backend.num_waiting == 20)
    backend.release()
    results = await asyncio.gather(*tasks)
    assert [result.results[0] for result in results] == [fake_scores(TextInput(f"text {i}")) for i in range(20)]


async def test_cancelling_abandons_the_work(seam: Backend, backend: FakeBackend) -> None:
    backend.hold()
    task = asyncio.create_task(seam.classify(asking("one"), call()))
    await until(lambda: backend.num_waiting == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: backend.num_cancelled == 1)


async def test_models_tell_readiness(seam: Backend, backend: FakeBackend) -> None:
    assert await seam.models() == [MODEL]
    backend.unready = Unavailable("the server is draining", code="draining")
    with pytest.raises(Unavailable, match="draining"):
        await seam.models()


ATTENTIONS = [
    AttentionRequest(text="a fine film"),
    AttentionRequest(text="naïve 🎬", text_pair="b", layers="all", top_k=1),
    AttentionRequest(text="one two three four", layers=(2, 0), heads=(1,), model="sentiment", kind="encoder"),
    AttentionRequest(text="a b c", layers="all", reduce="mean"),
    AttentionRequest(text="word " * 300, layers="last", heads=(0,)),
]


@pytest.mark.parametrize("request_", ATTENTIONS, ids=range(len(ATTENTIONS)))
async def test_attention_is_the_same_everywhere(
    seam: Backend, backend: FakeBackend, request_: AttentionRequest
) -> None:
    result = await seam.attention(request_, call())
    assert result.maps == fake_maps(request_)
    assert result.tokens == fake_tokens(request_.text)
    assert result == await backend.attention(request_, call())
    assert backend.requests == [request_, request_]


async def test_an_explanation_is_the_same_everywhere(seam: Backend, backend: FakeBackend) -> None:
    for request in (ExplainRequest(text="a fine film"), ExplainRequest(text="a", label="NEGATIVE", method="rollout")):
        assert await seam.explain(request, call()) == await backend.explain(request, call())


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="layers"),
        TooLarge("no", param="layers", code="attention_too_large"),
        Unsupported("no", param="model", code="no_attention"),
        Overloaded("no", retry_after_s=2.5),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_of_attention_are_the_same_everywhere(seam: Backend, backend: FakeBackend, error: Any) -> None:
    backend.error = error
    for asked in (seam.attention(ATTENTIONS[0], call()), seam.explain(ExplainRequest(text="a"), call())):
        with pytest.raises(type(error)) as caught:
            await asked
        assert vars(caught.value) | {"code": caught.value.code} == vars(error) | {"code": error.code}


async def test_cancelling_attention_abandons_the_work(seam: Backend, backend: FakeBackend) -> None:
    backend.hold()
    asked = (seam.attention(ATTENTIONS[0], call()), seam.explain(ExplainRequest(text="a"), call()))
    tasks = [asyncio.ensure_future(one) for one in asked]
    await until(lambda: backend.num_waiting == 2)
    for task in tasks:
        task.cancel()
    assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True))
    await until(lambda: backend.num_cancelled == 2)


@pytest.fixture
def talker(backend: FakeBackend) -> FakeBackend:
    """`backend`, serving a model that generates too."""
    backend.served = [MODEL, CHAT]
    return backend


async def listen(generation: AsyncGenerator[Event, None], into: list[Event]) -> None:
    async with aclosing(generation) as events:
        async for event in events:
            into.append(event)


async def events_of(seam: Backend, request: GenerateRequest) -> list[Event]:
    return [event async for event in seam.generate(request, call())]


GENERATIONS = [
    GenerateRequest(prompt="one two three"),
    GenerateRequest(prompt="naïve 🎬 film", logprobs=3),
    GenerateRequest(prompt=("a b", "", "c d e f", (1, 2, 3)), n=3, seed=-(2**63)),
    GenerateRequest(messages=(Message("system", "be brief"), Message("user", "say a b c")), max_tokens=2),
    GenerateRequest(prompt="all of it", max_tokens=None, temperature=0.0, logit_bias={5: -100.0}, stop=("\n", "x")),
    GenerateRequest(prompt=" ".join(map(str, range(1000))), max_tokens=1000, n=2, logprobs=0),
]


@pytest.mark.parametrize("request_", GENERATIONS, ids=range(len(GENERATIONS)))
async def test_a_generation_is_the_same_everywhere(
    seam: Backend, talker: FakeBackend, request_: GenerateRequest
) -> None:
    direct = [event async for event in talker.generate(request_, call())]
    assert await events_of(seam, request_) == direct
    assert talker.generations == [request_, request_]


async def test_a_generation_says_what_it_is_made_of(seam: Backend, talker: FakeBackend) -> None:
    request = GenerateRequest(prompt=("a b", "c"), logprobs=2)
    start, *tokens, end = await events_of(seam, request)
    assert start == Start(CHAT.id, 3)
    assert tokens == [
        Token(0, 2, "a ", fake_logprob("a ", 2)),
        Token(1, 2, "c ", fake_logprob("c ", 2)),
        Token(0, 2, "b ", fake_logprob("b ", 2)),
        Finish(0, "stop"),
        Finish(1, "stop"),
    ]
    assert isinstance(end, End)
    assert end.usage == GenerateUsage(3, 3, cached_tokens=0)


@pytest.mark.parametrize("wants_tokens", [True, False])
async def test_whether_tokens_are_wanted_is_known_everywhere(
    seam: Backend, talker: FakeBackend, wants_tokens: bool
) -> None:
    asked = replace(call(), wants_tokens=wants_tokens)
    assert [event async for event in seam.generate(GenerateRequest(prompt="a b"), asked)]
    assert [one.wants_tokens for one in talker.calls] == [wants_tokens]


async def test_generations_run_side_by_side(seam: Backend, talker: FakeBackend) -> None:
    requests = [GenerateRequest(prompt=f"text number {i}") for i in range(20)]
    talker.hold()
    tasks = [asyncio.create_task(events_of(seam, request)) for request in requests]
    await until(lambda: talker.num_waiting == 20)
    talker.release()
    for request, events in zip(requests, await asyncio.gather(*tasks), strict=True):
        assert [event.text for event in events if isinstance(event, Token)] == fake_words(request, 0)


@pytest.mark.parametrize("num_tokens", [None, 0, 1, 5])
@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="prompt.0"),
        Overloaded("no", retry_after_s=2.5),
        DeadlineExceeded("the deadline passed after 1.000 s"),
        EngineFailed("no"),
        Unavailable("gone", code="draining", retry_after_s=0.25),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_of_a_generation_are_the_same_everywhere(
    seam: Backend, talker: FakeBackend, error: Any, num_tokens: int | None
) -> None:
    """Before its first event (None), and after so many tokens: none of those is lost."""
    talker.error, talker.error_after = error, num_tokens
    events: list[Event] = []
    with pytest.raises(type(error)) as caught:
        await listen(seam.generate(GenerateRequest(prompt="a b c d e f g"), call()), events)
    assert vars(caught.value) | {"code": caught.value.code} == vars(error) | {"code": error.code}
    assert sum(isinstance(event, Token) for event in events) == (num_tokens or 0)


async def test_a_model_that_cannot_generate_is_refused(seam: Backend, backend: FakeBackend) -> None:
    with pytest.raises(NotFound, match="no model for generation"):
        await events_of(seam, GenerateRequest(prompt="a"))
    backend.served = [MODEL, CHAT]
    with pytest.raises(NotFound, match="'nope'"):
        await events_of(seam, GenerateRequest(prompt="a", model="nope"))


async def test_cancelling_a_generation_before_its_first_event(seam: Backend, talker: FakeBackend) -> None:
    talker.hold()
    task = asyncio.create_task(events_of(seam, GenerateRequest(prompt="one")))
    await until(lambda: talker.num_waiting == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: talker.num_cancelled == 1)


ENDLESS = GenerateRequest(prompt="word " * 100_000, max_tokens=None)


async def test_closing_a_generation_abandons_the_work(seam: Backend, talker: FakeBackend) -> None:
    async with aclosing(seam.generate(ENDLESS, call())) as events:
        assert isinstance(await anext(events), Start)
        assert isinstance(await anext(events), Token)
    await until(lambda: talker.num_cancelled == 1)


async def test_cancelling_the_task_of_a_generation_abandons_the_work(seam: Backend, talker: FakeBackend) -> None:
    events: list[Event] = []
    task = asyncio.create_task(listen(seam.generate(ENDLESS, call()), events))
    await until(lambda: len(events) > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: talker.num_cancelled == 1)
