"""The roles from inside, over a backend without a model; test_cli.py starts them as processes."""

import asyncio
import gc
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from fakes import CHAT, MODEL, FakeBackend, until
from processes import free_ports, needs_ipv6, until_draining
from rpc import details_of, failure_of

from service import roles
from service.address import address_text
from service.config import Settings
from service.observed import Observed
from service.rpc.inference import SERVICE
from service.rpc.pb.attnd.v1 import inference_pb2 as pb
from service.rpc.server import RpcServer
from service.worker.session import runtime_facts

CLASSIFY = pb.ClassifyRequest(inputs=[pb.TextInput(text="a fine film")])


@pytest.fixture
def thawed() -> Iterator[None]:
    """What a test leaves frozen is not, afterwards."""
    yield
    gc.unfreeze()


class FakeLocal(FakeBackend):
    """Is loaded at once. `signal` is what a signal sets."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = asyncio.Event()
        self.signal = asyncio.Event()

    async def start(self) -> None:
        self.loaded.set()


@dataclass(frozen=True)
class Process:
    """A running role: its end, its backend, a client of its HTTP port and a gRPC channel."""

    ended: "asyncio.Future[None]"
    backend: FakeLocal
    http: httpx.AsyncClient
    channel: Any

    def classify(self) -> Any:
        method = self.channel.unary_unary(f"/{SERVICE}/Classify", None, pb.ClassifyResponse.FromString)
        return method(CLASSIFY.SerializeToString(), timeout=30)

    def stream(self) -> Any:
        reply = pb.ClassifyStreamResponse.FromString
        return self.channel.stream_stream(f"/{SERVICE}/ClassifyStream", None, reply)(timeout=30)

    def generate(self) -> Any:
        message = pb.GenerateRequest(prompts=[pb.Prompt(text="a fine film")])
        return self.channel.unary_stream(f"/{SERVICE}/Generate")(message.SerializeToString(), timeout=30)


Run = Callable[..., AbstractAsyncContextManager[Process]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, thawed: None) -> Run:
    """Runs a role on free ports of `host` until it has ended."""

    @asynccontextmanager
    async def run(
        role: Callable[[Settings], Coroutine[Any, Any, None]], host: str, *, drain_timeout: float = 30
    ) -> AsyncIterator[Process]:
        backend = FakeLocal()
        monkeypatch.setattr(roles, "_local_backend", lambda settings, metrics: backend)
        monkeypatch.setattr(roles, "_signal", backend.signal.wait)
        http_port, grpc_port = free_ports(2)
        settings = Settings(
            host=host,
            http_port=http_port,
            metrics_port=http_port,
            grpc_port=grpc_port,
            drain_timeout=drain_timeout,
        )
        ended = asyncio.ensure_future(role(settings))
        loaded = asyncio.ensure_future(backend.loaded.wait())
        await asyncio.wait((ended, loaded), return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
        async with (
            httpx.AsyncClient(base_url=f"http://{address_text(host, http_port)}") as client,
            grpc.aio.insecure_channel(address_text(host, grpc_port)) as channel,
        ):
            try:
                yield Process(ended, backend, client, channel)
            finally:
                backend.release()
                backend.signal.set()
                await ended

    return run


@pytest.mark.parametrize("role", [roles._serve, roles._worker])
async def test_probes_and_scrapers_are_answered_until_grpc_has_drained(run: Run, role: Any) -> None:
    async with run(role, "127.0.0.1") as process:
        process.backend.hold()
        held = asyncio.ensure_future(process.classify())
        await until(lambda: process.backend.num_waiting == 1)
        assert (await process.http.get("/readyz")).status_code == 200
        process.backend.signal.set()
        await until_draining(process.http)
        assert (await process.http.get("/healthz")).status_code == 200
        scraped = (await process.http.get("/metrics")).text
        assert 'attnd_requests_in_flight{route="/attnd.v1.Inference/Classify"} 1.0' in scraped
        assert (await process.http.get("/readyz")).status_code == 503
        assert not held.done()
        process.backend.release()
        assert (await held).model == MODEL.id
        await process.ended
        with pytest.raises(httpx.ConnectError):
            await process.http.get("/healthz")


async def test_new_work_is_refused_in_words_until_grpc_has_drained(run: Run) -> None:
    async with run(roles._serve, "127.0.0.1") as process:
        process.backend.hold()
        held = asyncio.ensure_future(process.classify())
        await until(lambda: process.backend.num_waiting == 1)
        process.backend.signal.set()
        await until_draining(process.http)
        late = await process.http.post("/v1/classify", json={"input": "late"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in late.headers
        process.backend.release()
        assert (await held).model == MODEL.id


async def test_what_is_open_when_the_drain_is_over_ends_in_words(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = roles.make_metrics(Settings())
    monkeypatch.setattr(roles, "make_metrics", lambda *_: metrics)
    async with run(roles._serve, "127.0.0.1", drain_timeout=0.2) as process:
        process.backend.served = [MODEL, CHAT]
        process.backend.hold()
        over_http = [
            asyncio.ensure_future(process.http.post(path, json=body))
            for path, body in (("/v1/classify", {"input": "a"}), ("/v1/generate", {"prompt": "a", "stream": True}))
        ]
        over_grpc = [process.classify(), process.generate().read(), (stream := process.stream()).read()]
        await stream.write(pb.ClassifyStreamRequest(request=CLASSIFY).SerializeToString())
        failing = [asyncio.ensure_future(failure_of(call)) for call in over_grpc[:2]]
        await until(lambda: process.backend.num_waiting == 5)
        process.backend.signal.set()
        for asked in over_http:
            reply = await asked
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
            assert "retry-after" in reply.headers
        for failed in failing:
            failure = await failed
            assert failure.code() is grpc.StatusCode.UNAVAILABLE
            assert "RetryInfo" in str(details_of(failure))
        assert (await over_grpc[2]).error.code == "draining"
        await process.ended
    counted = {
        (sample.labels["route"], sample.labels["outcome"])
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "attnd_request_seconds_count" and sample.value
    }
    routes = (
        "/v1/classify",
        "/v1/generate",
        *(f"/{SERVICE}/{name}" for name in ("Classify", "ClassifyStream", "Generate")),
    )
    assert counted == {(route, "error") for route in routes}
    assert process.backend.num_cancelled == 5


@pytest.mark.parametrize("role", [roles._serve, roles._worker])
async def test_a_process_with_models_says_what_they_run_on(run: Run, role: Any) -> None:
    async with run(role, "127.0.0.1") as process:
        (line,) = re.findall(r"^attnd_build_info{.*$", (await process.http.get("/metrics")).text, re.MULTILINE)
        facts = {"version": roles.package_version(), **runtime_facts()}
        assert {f'{name}="{value}"' for name, value in facts.items()} <= set(re.findall(r'\w+="[^"]*"', line))


@needs_ipv6
@pytest.mark.parametrize("role", [roles._serve, roles._worker])
async def test_a_role_listens_on_ipv6(run: Run, role: Any) -> None:
    async with run(role, "::1") as process:
        assert (await process.http.get("/readyz")).status_code == 200
        assert (await process.classify()).model == MODEL.id


@pytest.mark.usefixtures("thawed")
async def test_a_gateway_that_nobody_probes_knows_what_its_workers_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that fail have their model's label, too."""
    signal, worker = asyncio.Event(), FakeBackend()
    monkeypatch.setattr(roles, "_signal", signal.wait)
    http_port, grpc_port = free_ports(2)
    settings = Settings(http_port=http_port, grpc_port=grpc_port, worker=(f"127.0.0.1:{grpc_port}",))
    server = RpcServer(Observed(worker, roles.make_metrics(settings)), settings)
    await server.start()
    worker.hold()
    ended = asyncio.ensure_future(roles._gateway(settings))
    client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", headers={"x-request-timeout-ms": "50"})
    async with client, asyncio.timeout(30):
        scraped = ""
        while f'model="{MODEL.id}",outcome="deadline"' not in scraped:
            with suppress(httpx.ConnectError):  # while it starts
                assert (await client.post("/v1/classify", json={"input": "held"})).status_code == 504
                scraped = (await client.get("/metrics")).text
    signal.set()
    await ended
    await server.stop()


class NoFront:
    """Nobody asks."""

    async def drain(self) -> None: ...

    async def stop(self) -> None: ...


@pytest.mark.usefixtures("thawed")
async def test_what_is_loaded_is_not_looked_through_for_cycles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    loaded = asyncio.Event()

    async def load() -> None:
        kept.extend([] for _ in range(1000))
        loaded.set()

    monkeypatch.setattr(roles, "_signal", loaded.wait)
    backend = Observed(FakeBackend(), roles.make_metrics(Settings()))
    await roles._run(backend, NoFront(), None, load)
    young = {id(one) for one in gc.get_objects()}
    assert not any(id(one) in young for one in kept)
