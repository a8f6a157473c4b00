"""RemoteBackend against workers on real sockets: errors, deadlines, cancellation, several workers, dead ones."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import pytest
from fakes import CHAT, MODEL, FakeBackend, fake_maps, fake_words, until

from service.config import Settings
from service.domain import (
    AttentionRequest,
    Call,
    ClassifyRequest,
    Event,
    ExplainRequest,
    GenerateRequest,
    ModelInfo,
    Start,
    TextInput,
    Token,
)
from service.errors import (
    AttndError,
    Cancelled,
    ConfigError,
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
from service.rpc import channel
from service.rpc.client import RemoteBackend
from service.rpc.server import RpcServer

REQUEST = ClassifyRequest(input=(TextInput("a fine film"),))
FORTY = ClassifyRequest(input=REQUEST.input * 40)
GENERATE = GenerateRequest(prompt="one two three", model="chat")
ENDLESS = GenerateRequest(prompt="word " * 1_500, max_tokens=None, logprobs=20)  # longer than what buffers hold
ERRORS = [
    InvalidRequest("top_k: at least 1, got 0", param="top_k"),
    TooLarge("at most 3 inputs, got 4", param="input"),
    NotFound("no model 'nope'", param="model", code="special"),
    Unsupported("'chat' cannot classify", param="model"),
    Overloaded("the queue is full (8)", retry_after_s=1.25),
    DeadlineExceeded("the deadline passed after 1.000 s"),
    Cancelled("the caller has gone"),
    Unavailable("the models are being loaded", retry_after_s=0.5, code="loading"),
    EngineFailed("the engine has failed: ü%\n"),
]


def call(seconds: float = 10.0, request_id: str = "trace-1") -> Call:
    return Call(request_id, "/v1/classify", time.monotonic() + seconds)


class Relay:
    """Passes on what a worker and its gateway say to each other, until `freeze`: then the worker seems to hang."""

    def __init__(self, address: str) -> None:
        self._port = int(address.rsplit(":", 1)[1])
        self._connecting: list[asyncio.Task[Any] | None] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> "Relay":
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await asyncio.gather(*filter(None, self._connecting))
        self.freeze()
        for writer in self._writers:
            writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connecting.append(asyncio.current_task())
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, far_writer]
        self._pumps += [asyncio.create_task(_pump(*ends)) for ends in ((reader, far_writer), (far_reader, writer))]

    def freeze(self) -> None:
        for pump in self._pumps:
            pump.cancel()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)


class Workers:
    """Starts workers, each over a backend of its own."""

    def __init__(self) -> None:
        self._servers: list[RpcServer] = []
        self._remotes: list[RemoteBackend] = []

    async def start(self, backend: FakeBackend, **settings: Any) -> str:
        """The address of a new worker over `backend`."""
        chosen = Settings(**{"grpc_port": 0, "drain_timeout": 0.1} | settings)
        server = RpcServer(Observed(backend, Metrics(chosen.latency_buckets, {})), chosen)
        self._servers.append(server)
        return f"127.0.0.1:{await server.start()}"

    def remote(self, *addresses: str, **settings: Any) -> RemoteBackend:
        self._remotes.append(RemoteBackend(addresses, Settings(**settings)))
        return self._remotes[-1]

    async def stop(self, number: int) -> None:
        await self._servers[number].stop()

    async def aclose(self) -> None:
        await asyncio.gather(*(remote.aclose() for remote in self._remotes))
        await asyncio.gather(*(server.stop() for server in self._servers))


@pytest.fixture
async def workers() -> AsyncIterator[Workers]:
    started = Workers()
    yield started
    await started.aclose()


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_every_error_arrives_as_it_was_raised(workers: Workers, backend: FakeBackend, error: AttndError) -> None:
    backend.error = error
    remote = workers.remote(await workers.start(backend))
    with pytest.raises(AttndError) as caught:
        await remote.classify(REQUEST, call())
    assert type(caught.value) is type(error)
    assert vars(caught.value) | {"code": caught.value.code} == vars(error) | {"code": error.code}


async def test_the_request_id_and_the_deadline_travel(workers: Workers, backend: FakeBackend) -> None:
    remote = workers.remote(await workers.start(backend))
    asked = call(5.0, "trace:42")
    await remote.classify(REQUEST, asked)
    (arrived,) = backend.calls
    assert arrived.request_id == "trace:42"
    assert abs(arrived.deadline - asked.deadline) < 0.5
    assert backend.requests == [REQUEST]


async def test_a_deadline_that_passes_at_the_worker(workers: Workers, backend: FakeBackend) -> None:
    backend.hold()
    remote = workers.remote(await workers.start(backend))
    with pytest.raises(DeadlineExceeded):
        await remote.classify(REQUEST, call(0.1))
    await until(lambda: backend.num_cancelled == 1)


async def test_what_grpc_says_is_for_the_log(
    workers: Workers, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """It names addresses, and speaks of streams."""
    address = free_address()
    with pytest.raises(Unavailable) as unreachable:
        await workers.remote(address).classify(REQUEST, call())
    assert unreachable.value.message == "a worker cannot be reached"
    assert f"worker {address} is down: " in caplog.text
    backend.hold()
    with pytest.raises(DeadlineExceeded, match=r"^the deadline passed after 0\.[1-9]\d\d s$"):
        await workers.remote(await workers.start(backend, request_timeout=60)).classify(REQUEST, call(0.1))


async def test_a_deadline_that_has_passed_asks_nobody(workers: Workers, backend: FakeBackend) -> None:
    remote = workers.remote(await workers.start(backend))
    with pytest.raises(DeadlineExceeded):
        await remote.classify(REQUEST, call(-1.0))
    assert backend.requests == []


async def test_cancelling_reaches_the_worker(workers: Workers, backend: FakeBackend) -> None:
    backend.hold()
    remote = workers.remote(await workers.start(backend))
    task = asyncio.create_task(remote.classify(REQUEST, call()))
    await until(lambda: backend.num_waiting == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: backend.num_cancelled == 1)


async def test_the_api_key_is_sent(workers: Workers, backend: FakeBackend) -> None:
    address = await workers.start(backend, api_key="sesame")
    assert (await workers.remote(address, api_key="sesame").models()) == [MODEL]


async def test_a_worker_that_refuses_the_key_is_down(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """The gateway's key is not the caller's fault, and another worker may take it."""
    backends = [talker(), talker()]
    stale = await workers.start(backends[0], api_key="old")
    alone = workers.remote(stale, api_key="new")
    with pytest.raises(Unavailable, match="refuses the gateway's API key"):
        await alone.models()
    with pytest.raises(Unavailable, match="refuses the gateway's API key"):
        await alone.classify(REQUEST, call())
    assert f"worker {stale} is down: it refuses this gateway's API key" in caplog.text
    remote = workers.remote(stale, await workers.start(backends[1], api_key="new"), api_key="new")
    for _ in range(4):
        assert (await remote.classify(REQUEST, call())).model == "sentiment"
        assert await texts_of(remote) == ["one ", "two ", "three "]
    assert backends[0].requests == []


async def test_no_worker_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError, match="at least"):
        RemoteBackend((), Settings())


async def test_nobody_there_is_unavailable(workers: Workers) -> None:
    remote = workers.remote(free_address(), free_address())
    with pytest.raises(Unavailable):
        await remote.models()
    with pytest.raises(Unavailable):
        await remote.classify(REQUEST, call())


async def test_a_worker_that_is_not_ready_is_unavailable(workers: Workers, backend: FakeBackend) -> None:
    backend.unready = Unavailable("the models are being loaded", code="loading")
    remote = workers.remote(await workers.start(backend))
    with pytest.raises(Unavailable, match="being loaded"):
        await remote.models()


async def test_a_worker_that_never_answers_is_unavailable(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "LOOK_TIMEOUT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        remote = workers.remote(f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unavailable):
            await remote.models()


async def test_a_worker_that_comes_back_is_used_again(workers: Workers, backend: FakeBackend) -> None:
    address = await workers.start(backend)
    remote = workers.remote(address)
    assert await remote.models() == [MODEL]
    await workers.stop(0)
    with pytest.raises(Unavailable):
        await remote.models()
    await workers.start(backend, grpc_port=int(address.rsplit(":", 1)[1]))

    async with asyncio.timeout(10):
        for _ in range(500):
            with suppress(Unavailable):
                assert await remote.models() == [MODEL]
                return
            await asyncio.sleep(0.02)
    pytest.fail("the worker that came back was never asked again")


class Stuck(FakeBackend):
    """Answers nothing as long as it `is_stuck`, not even what it serves."""

    is_stuck = False

    async def models(self) -> list[ModelInfo]:
        if self.is_stuck:
            await asyncio.Event().wait()
        return await super().models()


async def test_a_worker_that_hangs_makes_no_other_slow(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    """Neither the first look at it, which it may yet answer, nor those after it is known to be down."""
    stuck, other = Stuck(), FakeBackend()
    stuck.served = [MODEL, replace(MODEL, id="topic")]
    remote = workers.remote(await workers.start(stuck), await workers.start(other))
    assert [model.id for model in await remote.models()] == ["sentiment", "topic"]
    stuck.is_stuck = True
    begun = time.monotonic()
    assert [model.id for model in await remote.models()] == ["sentiment", "topic"]
    assert time.monotonic() - begun < 0.9
    await until(lambda: "is down" in caplog.text)
    begun = time.monotonic()
    for _ in range(20):
        assert [model.id for model in await remote.models()] == ["sentiment", "topic"]
        assert (await remote.classify(REQUEST, call())).model == "sentiment"
    assert time.monotonic() - begun < 0.9
    assert stuck.requests == []


async def test_what_a_worker_that_is_down_served_is_known_and_unavailable(workers: Workers) -> None:
    first, second = FakeBackend(), FakeBackend()
    second.served = [replace(MODEL, id="topic")]
    remote = workers.remote(await workers.start(first), await workers.start(second))
    await remote.models()
    await workers.stop(1)
    assert [model.id for model in await remote.models()] == ["sentiment", "topic"]
    with pytest.raises(Unavailable):
        await remote.classify(replace(REQUEST, model="topic"), call())


async def test_a_worker_that_hangs_fails_what_it_has_for_another(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all times of the channel a twentieth: 1.25 s instead of 25, where the core's own default is 60 more."""
    times = {name: value // 20 for name, value in channel._OPTIONS if "keepalive" in name or "ping" in name}
    monkeypatch.setattr(channel, "_OPTIONS", tuple((dict(channel._OPTIONS) | times).items()))
    backends = [FakeBackend(), FakeBackend()]
    async with Relay(await workers.start(backends[0])) as relay:
        remote = workers.remote(relay.address, await workers.start(backends[1]))
        backends[0].hold()
        held = asyncio.create_task(remote.classify(REQUEST, call()))
        await until(lambda: backends[0].num_waiting == 1)
        relay.freeze()
        async with asyncio.timeout(5):
            assert (await held).model == "sentiment"
    assert len(backends[1].requests) == 1


async def test_models_are_those_of_all_workers(workers: Workers) -> None:
    first, second = FakeBackend(), FakeBackend()
    second.served = [replace(MODEL, id="topic"), MODEL]
    remote = workers.remote(await workers.start(first), await workers.start(second), free_address())
    assert [model.id for model in await remote.models()] == ["sentiment", "topic"]


async def test_a_request_finds_the_worker_that_has_its_model(workers: Workers) -> None:
    first, second = FakeBackend(), FakeBackend()
    second.served = [replace(MODEL, id="topic")]
    remote = workers.remote(await workers.start(first), await workers.start(second))
    for _ in range(4):
        assert (await remote.classify(replace(REQUEST, model="topic"), call())).model == "topic"
    with pytest.raises(NotFound):
        await remote.classify(replace(REQUEST, model="nope"), call())


async def test_only_workers_that_serve_the_model_are_asked(workers: Workers) -> None:
    """Others would count what is none of theirs as invalid, and they answer first."""
    first, second = FakeBackend(), FakeBackend()
    second.served = [CHAT]
    remote = workers.remote(await workers.start(first), await workers.start(second))
    for _ in range(4):
        assert (await remote.classify(REQUEST, call())).model == "sentiment"
        assert await texts_of(remote, replace(GENERATE, model=None)) == ["one ", "two ", "three "]
    assert (len(first.calls), len(second.calls)) == (4, 4)
    with pytest.raises(Unsupported, match="models for classification: sentiment"):
        await remote.classify(replace(REQUEST, model="chat"), call())
    with pytest.raises(NotFound, match="served are: chat, sentiment"):
        await texts_of(remote, replace(GENERATE, model="nope"))
    assert (len(first.calls), len(second.calls)) == (4, 4)


async def test_a_model_may_be_at_a_worker_that_never_said_what_it_serves(
    workers: Workers, backend: FakeBackend
) -> None:
    loading = FakeBackend()
    loading.unready = Unavailable("the models are being loaded", code="loading")
    remote = workers.remote(await workers.start(backend), await workers.start(loading))
    with pytest.raises(Unavailable, match="not said yet"):
        await texts_of(remote)
    loading.served, loading.unready = [CHAT], None
    while CHAT not in await remote.models():  # noqa: ASYNC110 - the next look at it
        await asyncio.sleep(0.01)
    assert await texts_of(remote) == ["one ", "two ", "three "]
    with pytest.raises(NotFound):
        await texts_of(remote, replace(GENERATE, model="nope"))


async def test_looking_for_a_model_ends_with_the_deadline(workers: Workers) -> None:
    stuck = Stuck()
    stuck.is_stuck = True
    remote, begun = workers.remote(await workers.start(stuck)), time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await remote.classify(REQUEST, call(0.1))
    assert time.monotonic() - begun < 1


async def test_attention_finds_a_worker_that_can_tell_it(workers: Workers) -> None:
    """One that serves the model says best why not."""
    unable, able = FakeBackend(error=Unsupported("'chat' tells no attention", code="no_attention")), FakeBackend()
    addresses = [await workers.start(unable), await workers.start(able)]
    remote = workers.remote(*addresses, free_address())
    request = AttentionRequest(text="a")
    for _ in range(6):
        assert (await remote.attention(request, call())).maps == fake_maps(request)
        assert (await remote.explain(ExplainRequest(text="a"), call())).label
    able.served = []
    with pytest.raises(Unsupported, match="'chat' tells no attention"):
        await workers.remote(*addresses).attention(AttentionRequest(text="a"), call())


async def test_workers_share_the_requests(workers: Workers) -> None:
    backends = [FakeBackend(), FakeBackend()]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    for _ in range(10):
        await remote.classify(REQUEST, call())
    assert [len(each.requests) for each in backends] == [5, 5]


async def test_the_least_busy_worker_is_asked(workers: Workers) -> None:
    backends = [FakeBackend(), FakeBackend()]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    backends[0].hold()
    held = asyncio.create_task(remote.classify(REQUEST, call()))
    await until(lambda: backends[0].num_waiting == 1)
    for _ in range(10):
        await remote.classify(REQUEST, call())
    assert len(backends[0].requests) == 1
    backends[0].release()
    await held


async def test_a_worker_that_dies_costs_no_request(workers: Workers) -> None:
    backends = [FakeBackend(), FakeBackend()]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    for each in backends:
        each.hold()
    open_requests = [asyncio.create_task(remote.classify(REQUEST, call())) for _ in range(10)]
    await until(lambda: all(each.num_waiting == 5 for each in backends))
    await workers.stop(0)
    backends[1].release()
    results = await asyncio.gather(*open_requests)
    assert [result.model for result in results] == ["sentiment"] * 10
    assert (await remote.classify(REQUEST, call())).model == "sentiment"


async def test_a_worker_that_dies_behind_a_name_costs_no_request(workers: Workers) -> None:
    """One channel spreads the requests over all addresses of a name, as here of a list."""
    backends = [talker(), talker()]
    remote = workers.remote("ipv4:" + ",".join([await workers.start(each) for each in backends]))

    async def answered_by(each: FakeBackend) -> None:
        while not each.requests:
            await remote.classify(REQUEST, call())

    async with asyncio.timeout(30):
        await asyncio.gather(*map(answered_by, backends))  # it is connected to both
    for each in backends:
        each.hold()
    asked = [asyncio.ensure_future(remote.classify(REQUEST, call())) for _ in range(4)]
    asked += [asyncio.ensure_future(texts_of(remote)) for _ in range(4)]
    await until(lambda: sum(each.num_waiting for each in backends) == 8)
    assert backends[0].num_waiting
    await workers.stop(0)
    backends[1].release()
    await asyncio.gather(*asked)


async def test_where_one_worker_is_full_another_is_asked(workers: Workers) -> None:
    full, other = talker(error=Overloaded("full", retry_after_s=2.0)), talker()
    remote = workers.remote(*[await workers.start(each) for each in (full, other)])
    for _ in range(4):
        assert (await remote.classify(REQUEST, call())).model == "sentiment"
    for _ in range(4):
        assert await texts_of(remote) == ["one ", "two ", "three "]
    assert (len(full.requests), len(full.generations)) == (2, 2)


async def test_where_all_workers_are_full_the_first_to_have_room_says_when(workers: Workers) -> None:
    backends = [talker(error=Overloaded("full", retry_after_s=seconds)) for seconds in (2.0, 0.5, 3.0)]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    for ask in (remote.classify(REQUEST, call()), texts_of(remote)):
        with pytest.raises(Overloaded) as caught:
            await ask
        assert caught.value.retry_after_s == 0.5


@pytest.mark.parametrize("is_text", [True, False])
async def test_a_request_weighs_as_much_as_it_has_inputs_or_outputs(workers: Workers, is_text: bool) -> None:
    """Six requests of one text each are less than one of forty, or for forty outputs."""
    backends = [talker(), talker()]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    await remote.models()
    for each in backends:
        each.hold()
    large = texts_of(remote, replace(GENERATE, n=40)) if is_text else remote.classify(FORTY, call())
    small = [remote.classify(REQUEST, call()) for _ in range(6)]
    asked = [asyncio.ensure_future(one) for one in (large, *small)]
    await until(lambda: sum(each.num_waiting for each in backends) == 7)
    assert sorted(each.num_waiting for each in backends) == [1, 6]
    for each in backends:
        each.release()
    await asyncio.gather(*asked)


async def test_after_aclose_nothing_is_asked(workers: Workers, backend: FakeBackend) -> None:
    remote = workers.remote(await workers.start(backend))
    await remote.aclose()
    with pytest.raises(Unavailable):
        await remote.classify(REQUEST, call())


def talker(**fields: Any) -> FakeBackend:
    backend = FakeBackend(**fields)
    backend.served = [MODEL, CHAT]
    return backend


async def texts_of(
    remote: RemoteBackend, request: GenerateRequest = GENERATE, into: list[str] | None = None
) -> list[str]:
    """The tokens of a generation; also those before its error, in `into`."""
    texts: list[str] = [] if into is None else into
    async for event in remote.generate(request, call()):
        if isinstance(event, Token):
            texts.append(event.text)
    return texts


@pytest.mark.parametrize("num_tokens", [None, 2])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_every_error_of_a_generation_arrives_as_it_was_raised(
    workers: Workers, error: AttndError, num_tokens: int | None
) -> None:
    """Before its first event (None), and after two tokens, which are not lost."""
    backend = talker(error=error)
    backend.error_after = num_tokens
    remote = workers.remote(await workers.start(backend))
    texts: list[str] = []
    with pytest.raises(AttndError) as caught:
        await texts_of(remote, into=texts)
    assert type(caught.value) is type(error)
    assert vars(caught.value) | {"code": caught.value.code} == vars(error) | {"code": error.code}
    assert texts == ["one ", "two "][: num_tokens or 0]


async def test_a_generation_has_its_id_its_deadline_and_its_key(workers: Workers) -> None:
    backend = talker()
    remote = workers.remote(await workers.start(backend, api_key="sesame"), api_key="sesame")
    asked = call(5.0, "trace:42")
    assert [event async for event in remote.generate(GENERATE, asked)]
    (arrived,) = backend.calls
    assert arrived.request_id == "trace:42"
    assert abs(arrived.deadline - asked.deadline) < 0.5


async def test_a_generation_past_its_deadline(workers: Workers) -> None:
    backend = talker()
    backend.hold()
    remote = workers.remote(await workers.start(backend))
    with pytest.raises(DeadlineExceeded):
        await anext(remote.generate(GENERATE, call(0.1)))
    await until(lambda: backend.num_cancelled == 1)
    with pytest.raises(DeadlineExceeded):
        await anext(remote.generate(GENERATE, call(-1.0)))
    assert len(backend.generations) == 1


async def test_closing_a_generation_reaches_the_worker(workers: Workers) -> None:
    backend = talker()
    remote = workers.remote(await workers.start(backend))
    async with aclosing(remote.generate(ENDLESS, call())) as events:
        assert isinstance(await anext(events), Start)
    await until(lambda: backend.num_cancelled == 1)


async def test_a_reader_that_pauses_holds_the_worker_back_and_loses_nothing(workers: Workers) -> None:
    backend = talker()
    address = await workers.start(backend)
    seen = []
    async with aclosing(workers.remote(address).generate(ENDLESS, call(60))) as events:
        seen.append(await anext(events))
        assert await texts_of(workers.remote(address)) == fake_words(GENERATE, 0)  # another is not held back
        seen += [event async for event in events]
    assert [event.text for event in seen if isinstance(event, Token)] == ["word "] * 1_500


async def test_a_generation_finds_the_worker_that_has_its_model(workers: Workers) -> None:
    remote = workers.remote(await workers.start(FakeBackend()), await workers.start(talker()), free_address())
    for _ in range(6):
        assert await texts_of(remote) == ["one ", "two ", "three "]
    with pytest.raises(NotFound):
        await texts_of(workers.remote(await workers.start(FakeBackend())))


async def test_generations_go_to_the_least_busy_worker(workers: Workers) -> None:
    backends = [talker(), talker()]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    backends[0].hold()
    held = asyncio.create_task(texts_of(remote))
    await until(lambda: backends[0].num_waiting == 1)
    for _ in range(10):
        await texts_of(remote)
    assert [len(each.generations) for each in backends] == [1, 10]
    backends[0].release()
    await held


async def test_a_worker_that_dies_before_the_first_event_costs_no_generation(workers: Workers) -> None:
    backends = [talker(), talker()]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    for each in backends:
        each.hold()
    open_requests = [asyncio.create_task(texts_of(remote)) for _ in range(10)]
    await until(lambda: all(each.num_waiting == 5 for each in backends))
    await workers.stop(0)
    backends[1].release()
    assert await asyncio.gather(*open_requests) == [["one ", "two ", "three "]] * 10


async def test_a_worker_that_dies_after_the_first_event_ends_the_generation(workers: Workers) -> None:
    backends = [talker(), talker()]
    remote = workers.remote(*[await workers.start(each) for each in backends])
    events: list[Event] = []

    async def listen() -> None:
        async for event in remote.generate(replace(ENDLESS, prompt="word " * 15_000), call(60)):
            events.append(event)
            if len(events) == 1:
                await workers.stop(0 if backends[0].generations else 1)

    with pytest.raises(Unavailable):
        await listen()
    assert isinstance(events[0], Start)
    assert sum(isinstance(event, Start) for event in events) == 1
    assert sum(len(each.generations) for each in backends) == 1


@pytest.mark.parametrize("error", [NotFound("gone"), Unavailable("draining")], ids=lambda error: type(error).__name__)
async def test_after_the_first_event_no_other_worker_is_tried(workers: Workers, error: AttndError) -> None:
    backends = [talker(error=error), talker(error=error)]
    for each in backends:
        each.error_after = 1
    remote = workers.remote(*[await workers.start(each) for each in backends])
    with pytest.raises(type(error)):
        await texts_of(remote)
    assert sum(len(each.generations) for each in backends) == 1


async def test_after_aclose_nothing_is_generated(workers: Workers) -> None:
    remote = workers.remote(await workers.start(talker()))
    await remote.aclose()
    with pytest.raises(Unavailable):
        await texts_of(remote)
