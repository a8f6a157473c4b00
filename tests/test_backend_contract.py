"""What every Backend promises, asserted of each kind of it: one in process, and one over a real socket."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakes import MODEL, FakeBackend, fake_scores, until

from service.backend import Backend
from service.config import Settings
from service.domain import Call, ClassifyRequest, TextInput
from service.errors import InvalidRequest, NotFound, Overloaded, TooLarge, Unavailable
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
