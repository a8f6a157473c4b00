"""From settings to served models of both kinds, and these over HTTP with real neighbours."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wire
from fakes import until

from service.config import Settings
from service.errors import ConfigError
from service.gateway.app import create_app
from service.gateway.server import HttpServer
from service.metrics import Metrics
from service.observed import Observed
from service.worker import load
from service.worker.classification.classifier import Classifier
from service.worker.generation.generator import Generator
from service.worker.generation.kv_memory import BLOCK
from service.worker.generation.prefix_cache import CHUNK
from service.worker.generation.process_lane import ProcessLane
from service.worker.load import load_models
from service.worker.local import LocalBackend

tiny = pytest.importorskip("tiny", reason="exporting needs torch", exc_type=ImportError)
tiny_translator = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)

LONG = "the hour in the hall, all the while the well will hold, and all in the hold will hear the call " * 2


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_generation_bundle(tmp_path_factory.mktemp("chat") / "bundle")


def make_settings(*bundles: Path, **fields: Any) -> Settings:
    return Settings(http_port=0, models=tuple(map(str, bundles)), threads=1, drain_timeout=5.0, **fields)


def metrics_of(settings: Settings) -> Metrics:
    return Metrics(settings.latency_buckets, {})


def test_each_bundle_is_opened_for_its_task(tiny_bundles: dict[str, Path], chat: Path) -> None:
    settings = make_settings(tiny_bundles["int8"], chat)
    loaded = load_models(settings, metrics_of(settings))
    assert [type(one) for one in loaded] == [Classifier, Generator]


def test_pieces_of_prefill_are_the_blocks_that_the_engine_keeps() -> None:
    assert CHUNK == BLOCK


def test_too_little_memory_is_refused_with_the_numbers(chat: Path) -> None:
    settings = make_settings(chat, kv_cache_bytes=1000)
    with pytest.raises(ConfigError, match="1000 bytes do not hold one sequence of 256 tokens, which takes"):
        load_models(settings, metrics_of(settings))


def test_less_memory_means_fewer_at_once(chat: Path) -> None:
    settings = make_settings(chat, kv_cache_bytes=256 * 512 * 4, prefix_cache=False)  # 512 bytes a token
    (generator,) = load_models(settings, metrics_of(settings))
    assert isinstance(generator, Generator)
    assert generator._max_rows == 3


def test_a_translator_s_memory_is_all_for_sources_and_translations(tmp_path: Path) -> None:
    bundle = tiny_translator.tiny_translation_bundle(tmp_path / "translation")
    settings = make_settings(bundle, kv_cache_bytes=64 * 1024 * 4)  # 512 bytes a token, on either side
    (generator,) = load_models(settings, metrics_of(settings))
    assert isinstance(generator, Generator)
    assert generator._max_rows == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a translation has one lane")
def test_every_thread_is_a_lane_of_a_translation_and_all_of_them_one_of_a_chat(
    chat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "available_threads", lambda: 3)
    translation = tiny_translator.tiny_translation_bundle(tmp_path / "translation")
    for wanted, num_lanes in [(0, 3), (2, 2), (40, 8)]:
        settings = replace(make_settings(chat, translation), threads=wanted)
        (of_chat,), of_translation = map(lanes_of, load_models(settings, metrics_of(settings)))
        assert of_chat._engine._session.threads == (wanted or 3)
        assert [type(lane) for lane in of_translation] == [ProcessLane] * num_lanes


def test_where_there_is_one_thread_no_process_is_needed(tmp_path: Path) -> None:
    translation = tiny_translator.tiny_translation_bundle(tmp_path / "translation")
    settings = replace(make_settings(translation), threads=1)
    ((lane,),) = map(lanes_of, load_models(settings, metrics_of(settings)))
    assert lane._engine._decoder.threads == 1


def lanes_of(generator: Classifier | Generator) -> list[Any]:
    assert isinstance(generator, Generator)
    return list(generator._lanes._lanes)


@pytest.mark.parametrize(("max_batch", "expected"), [(0, [16, 32]), (5, [5, 5])])
def test_how_many_are_written_in_one_step_depends_on_the_task_unless_it_is_set(
    chat: Path, tmp_path: Path, max_batch: int, expected: list[int]
) -> None:
    translation = tiny_translator.tiny_translation_bundle(tmp_path / "translation")
    settings = make_settings(chat, translation, max_batch=max_batch)
    loaded = load_models(settings, metrics_of(settings))
    assert [one._max_rows for one in loaded if isinstance(one, Generator)] == expected


class Served:
    def __init__(self, port: int, metrics: Metrics, backend: LocalBackend) -> None:
        self.port, self.metrics, self.backend = port, metrics, backend

    async def generate(self, **fields: Any) -> dict[str, Any]:
        body = json.dumps({"max_tokens": 20, "ignore_eos": True} | fields).encode()
        reply = await wire.ask(self.port, "POST", "/v1/generate", body)
        assert reply.status == 200, reply.body
        found: dict[str, Any] = reply.json
        return found

    def sample(self, name: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model": "tiny-chat"}) or 0.0


@pytest.fixture
async def served(tiny_bundles: dict[str, Path], chat: Path) -> AsyncIterator[Served]:
    """What `attnd serve` starts for HTTP, with models of both kinds."""
    settings = make_settings(tiny_bundles["int8"], chat)
    metrics = metrics_of(settings)
    backend = LocalBackend(lambda: load_models(settings, metrics), drain_timeout_s=5.0)
    await backend.start()
    server = HttpServer(create_app(Observed(backend, metrics), metrics, settings), settings)
    yield Served(await server.start(), metrics, backend)
    await server.stop()
    await backend.aclose()


async def test_over_http_a_request_gets_the_same_bits_alone_and_among_fifteen_others(served: Served) -> None:
    asked: dict[str, Any] = {"prompt": LONG[:150], "max_tokens": 60, "logprobs": 3, "temperature": 0.8, "seed": 3}
    alone = await served.generate(**asked)

    async def neighbour(number: int) -> None:
        """Two requests one after the other, so that rows leave and join all the time."""
        await served.generate(prompt=LONG[: 10 + 9 * number], max_tokens=3 + 2 * number)
        await served.generate(prompt="x" * number, max_tokens=40 - 2 * number, temperature=1.0, n=1 + number % 2)

    neighbours = [asyncio.ensure_future(neighbour(number)) for number in range(1, 16)]
    classified = asyncio.ensure_future(wire.classify(served.port))
    among = await served.generate(**asked)
    await asyncio.gather(*neighbours, classified)
    assert among["outputs"] == alone["outputs"]
    assert len(among["outputs"][0]["logprobs"]) == 60
    assert served.sample("attnd_step_rows_sum") > 3 * served.sample("attnd_step_rows_count")


async def test_over_http_a_client_that_leaves_frees_its_slot(served: Served) -> None:
    body = json.dumps({"prompt": "the hall", "max_tokens": 240, "ignore_eos": True, "stream": True}).encode()
    async with wire.connect(served.port) as connection:
        await connection.send(wire.request("POST", "/v1/generate", body))
        assert b" 200 " in await connection.reader.readline()
    await until(lambda: served.sample("attnd_release_seconds_count") == 1)
    assert served.sample("attnd_running_sequences") == 0
    assert served.sample("attnd_cancelled_generations_total") == 1


async def test_a_chat_goes_to_the_model_that_chats_and_a_text_to_classify_to_the_other(served: Served) -> None:
    answer = await served.generate(messages=[{"role": "user", "content": "hello"}], max_tokens=4)
    assert answer["model"] == "tiny-chat"
    assert answer["usage"]["completion_tokens"] == 4
    assert (await wire.classify(served.port)).json["model"] == "tiny"
