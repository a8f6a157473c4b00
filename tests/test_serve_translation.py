"""A tiny translator's bundle, loaded as `attnd serve` does, on two lanes, and asked over HTTP and gRPC."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import rpc
import torch
import wire
from fakes import until
from huggingface_hub import InferenceClient

from service.config import Settings
from service.gateway.app import create_app
from service.gateway.server import HttpServer
from service.metrics import Metrics
from service.observed import Observed
from service.rpc.pb.attnd.v1 import inference_pb2 as pb
from service.rpc.server import RpcServer
from service.worker.generation.translator import TranslatorEngine
from service.worker.load import load_models
from service.worker.local import LocalBackend

tiny = pytest.importorskip("tests.tiny_translator", reason="exporting needs torch", exc_type=ImportError)

SENTENCES = ("A dog runs through the snow.", "Where is the station?", "Two children are playing!")
TEXT = f" {SENTENCES[0]} {SENTENCES[1]}\n\n\t{SENTENCES[2]}\n"


class Served:
    def __init__(self, port: int, running: rpc.Running, metrics: Metrics) -> None:
        self.port, self.running, self.metrics = port, running, metrics

    async def ask(self, **fields: Any) -> wire.Reply:
        body = json.dumps({"max_tokens": 20} | fields).encode()
        return await wire.ask(self.port, "POST", "/v1/generate", body)

    async def generate(self, **fields: Any) -> dict[str, Any]:
        reply = await self.ask(**fields)
        assert reply.status == 200, reply.body
        found: dict[str, Any] = reply.json
        return found

    async def texts(self, **fields: Any) -> list[str]:
        return [output["text"] for output in (await self.generate(**fields))["outputs"]]

    async def events(self, **fields: Any) -> list[Any]:
        reply = await self.ask(stream=True, **fields)
        *events, done, rest = reply.body.split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        return [json.loads(event.removeprefix(b"data: ")) for event in events]

    def sample(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, {"model": "tiny-translation"} | labels) or 0.0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("translation")
    return {name: tiny.tiny_translation_bundle(folder / name, precision=name) for name in ("float32", "int8")}


@pytest.fixture
async def served(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> AsyncIterator[Served]:
    """The int8 bundle, written by two processes, unless the test says otherwise."""
    precision, threads = getattr(request, "param", ("int8", 2))
    models = (str(bundles[precision]),)
    settings = Settings(http_port=0, grpc_port=0, models=models, threads=threads, drain_timeout=5.0)
    metrics = Metrics(settings.latency_buckets, {})
    backend = LocalBackend(lambda: load_models(settings, metrics), drain_timeout_s=5.0)
    await backend.start()
    observed = Observed(backend, metrics)
    http = HttpServer(create_app(observed, metrics, settings), settings)
    server = RpcServer(observed, settings)
    running = rpc.Running(server, metrics, await server.start())
    yield Served(await http.start(), running, metrics)
    await running.channel.close()
    await server.stop()
    await http.stop()
    await backend.aclose()


in_a_thread = pytest.mark.parametrize("served", [("int8", 1)], indirect=True)


@torch.no_grad()
def reference(sentence: str, max_tokens: int, *, num_beams: int = 1) -> str:
    """What the PyTorch module says, by its own search."""
    from model.search import beam_search
    from model.translate import until_end

    tokenizer = tiny.subwords()
    source = torch.tensor([tokenizer.encode(sentence).ids])
    found = beam_search(tiny.seeded_translator(), source, num_beams=num_beams, max_new=[max_tokens])
    text: str = tokenizer.decode(until_end(found[0][0].ids))
    return text


@pytest.mark.parametrize("served", [("float32", 2)], indirect=True)
@pytest.mark.parametrize("num_beams", [1, 4])
async def test_a_sentence_gets_the_reference_s_translation(served: Served, num_beams: int) -> None:
    for sentence in SENTENCES:
        assert await served.texts(prompt=sentence, num_beams=num_beams) == [
            reference(sentence, 20, num_beams=num_beams)
        ]


async def test_a_text_is_its_sentences_translations_and_white_space(served: Served) -> None:
    whole = await served.generate(prompt=TEXT)
    parts = [await served.generate(prompt=sentence) for sentence in SENTENCES]
    first, second, third = (part["outputs"][0]["text"] for part in parts)
    assert whole["outputs"][0]["text"] == f" {first} {second}\n\n\t{third}\n"
    for name in ("prompt_tokens", "completion_tokens"):
        assert whole["usage"][name] == sum(part["usage"][name] for part in parts)
    assert whole["usage"]["completion_tokens"] > 20  # each sentence has its own limit
    assert all(seconds > 0 for name, seconds in whole["timing"].items() if name != "queue_seconds")
    assert served.sample("attnd_kv_cache_capacity_tokens") == 2 * 33 * 2 * 64


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "seed": 4, "n": 2}, {"num_beams": 3, "n": 2}])
async def test_a_stream_says_the_same_in_order(served: Served, fields: dict[str, Any]) -> None:
    prompts = [TEXT, SENTENCES[1]]
    whole = await served.generate(prompt=prompts, **fields)
    *events, end = await served.events(prompt=prompts, **fields)
    for output in whole["outputs"]:
        own = [event for event in events if event["index"] == output["index"]]
        assert "".join(event["text"] for event in own) == output["text"]
        assert [event["finish_reason"] for event in own if "finish_reason" in event] == [output["finish_reason"]]
    assert end["usage"] == whole["usage"]
    assert len(whole["outputs"]) == 2 * fields.get("n", 1)


@pytest.mark.parametrize("prompt", [SENTENCES[0], TEXT])
async def test_tokens_and_the_gaps_between_them_are_measured_whether_they_are_told_or_not(
    served: Served, prompt: str
) -> None:
    names = ("attnd_generated_tokens_total", "attnd_inter_token_seconds_count")
    asked = {"prompt": prompt, "max_tokens": 9, "ignore_eos": True}
    await served.generate(**asked)
    told_none = [served.sample(name) for name in names]
    await served.events(**asked)
    assert [served.sample(name) for name in names] == [2 * value for value in told_none]
    assert told_none[1] > 0


async def test_a_search_is_prefilled_when_its_first_step_is_over_and_has_no_gaps(served: Served) -> None:
    for fields in ({}, {"logprobs": 1}):
        timing = (await served.generate(prompt=SENTENCES[0], num_beams=3, **fields))["timing"]
        assert timing["prefill_seconds"] > 0
        assert timing["decode_seconds"] > 0
        assert timing["first_token_seconds"] >= timing["prefill_seconds"] + timing["decode_seconds"]
    await served.events(prompt=SENTENCES[0], num_beams=3)
    assert served.sample("attnd_inter_token_seconds_count") == 0
    assert served.sample("attnd_generated_tokens_total") > 0


async def test_what_was_written_before_a_client_left_is_counted_though_it_was_not_told(served: Served) -> None:
    body = json.dumps({"prompt": f"{SENTENCES[0]} " * 60, "max_tokens": 60, "ignore_eos": True, "stream": True})
    async with wire.connect(served.port) as connection:
        await connection.send(wire.request("POST", "/v1/generate", body.encode()))
        await connection.reader.readuntil(b"data: ")
        await until(lambda: served.sample("attnd_step_tokens_total", phase="decode") > 600)
    await until(lambda: served.sample("attnd_generated_tokens_total") > 500)


async def test_a_prompt_is_read_once_for_all_its_outputs(served: Served) -> None:
    read = []
    for n in (1, 6):
        before = served.sample("attnd_step_tokens_total", phase="prefill")
        await served.generate(prompt=SENTENCES[0], n=n)
        await until(lambda: served.sample("attnd_running_sequences") == 0)
        read.append(served.sample("attnd_step_tokens_total", phase="prefill") - before)
    assert read[0] == read[1] > 0


async def test_without_a_seed_equal_prompts_and_sentences_are_drawn_for_themselves(served: Served) -> None:
    asked = {"temperature": 5.0, "max_tokens": 12, "ignore_eos": True}
    assert len(set(await served.texts(prompt=[SENTENCES[0]] * 3, **asked))) == 3
    (text,) = await served.texts(prompt="\n".join([SENTENCES[0]] * 3), **asked)
    assert len(set(text.split("\n"))) == 3


async def test_a_stop_between_sentences_is_found_and_ends_the_writing(served: Served) -> None:
    asked = {"prompt": "\n".join(SENTENCES[:1] * 50), "ignore_eos": True, "max_tokens": 60}
    (whole,) = await served.texts(**asked)
    stopped = await served.generate(stop="\n", **asked)
    assert stopped["outputs"][0]["text"] == whole.split("\n")[0]
    assert stopped["outputs"][0]["stop"] == "\n"
    await until(lambda: served.sample("attnd_running_sequences") == 0)
    assert 60 <= stopped["usage"]["completion_tokens"] < 50 * 60


@in_a_thread
async def test_a_source_that_cannot_be_read_fails_alone(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [[3 + place] * 5 for place in range(5)]
    alone = [await served.texts(prompt=source) for source in sources]
    encode, poison = TranslatorEngine.encode, sources[2]
    runs, gate = list[int](), threading.Event()

    def poisoned(engine: TranslatorEngine, slots: Any, ids: Any) -> None:
        runs.append(len(ids))
        assert gate.wait(10)
        if poison in [list(one) for one in ids]:
            raise RuntimeError("poisoned")
        encode(engine, slots, ids)

    monkeypatch.setattr(TranslatorEngine, "encode", poisoned)
    asked = [asyncio.ensure_future(served.ask(prompt=source)) for source in sources]
    await until(lambda: served.sample("attnd_queue_inputs") + served.sample("attnd_running_sequences") == 5)
    gate.set()
    replies = await asyncio.gather(*asked)
    assert [reply.status for reply in replies] == [200, 200, 500, 200, 200]
    assert [[reply.json["outputs"][0]["text"]] for reply in replies if reply.status == 200] == alone[:2] + alone[3:]
    assert max(runs) > 1  # some were to be read together


async def test_sampling_follows_the_seed(served: Served) -> None:
    asked = {"prompt": TEXT, "temperature": 1.0, "n": 2}
    (one, other), again, changed = [await served.texts(seed=seed, **asked) for seed in (3, 3, 13)]
    assert again == [one, other]
    assert one != other
    assert not {one, other} & set(changed)


async def test_a_stop_string_ends_the_whole_text(served: Served) -> None:
    (text,) = await served.texts(prompt=TEXT)
    (first,) = await served.texts(prompt=SENTENCES[0])
    stop = text[len(first) + 4 : len(first) + 7]  # in the second sentence's translation
    (output,) = (await served.generate(prompt=TEXT, stop=[stop]))["outputs"]
    assert output["text"] == text[: text.index(stop)]
    assert (output["finish_reason"], output["stop"]) == ("stop", stop)


async def test_log_probabilities_are_of_every_token_in_order(served: Served) -> None:
    (output,) = (await served.generate(prompt=TEXT, logprobs=2))["outputs"]
    parts = [(await served.generate(prompt=one, logprobs=2))["outputs"][0] for one in SENTENCES]
    assert output["logprobs"] == [logprob for part in parts for logprob in part["logprobs"]]
    assert all(len(logprob["top"]) == 2 for logprob in output["logprobs"])


@in_a_thread
@pytest.mark.parametrize("fields", [{"temperature": 0.9, "seed": 3, "logprobs": 3}, {"num_beams": 3, "logprobs": 1}])
async def test_a_request_gets_the_same_bits_alone_and_among_fifteen_others(
    served: Served, fields: dict[str, Any]
) -> None:
    asked = {"prompt": TEXT, "max_tokens": 40, "ignore_eos": True} | fields
    alone = await served.generate(**asked)

    async def neighbour(number: int) -> None:
        """Two requests one after the other, so that rows leave and join all the time."""
        await served.generate(prompt="snow " * number, max_tokens=3 + 2 * number, num_beams=1 + number % 3)
        await served.generate(prompt="x" * number, max_tokens=40 - 2 * number, temperature=1.0, n=1 + number % 2)

    neighbours = [asyncio.ensure_future(neighbour(number)) for number in range(1, 16)]
    among = await served.generate(**asked)
    await asyncio.gather(*neighbours)
    assert among["outputs"] == alone["outputs"]
    assert served.sample("attnd_step_rows_sum") > 2 * served.sample("attnd_step_rows_count")


async def test_grpc_says_the_same(served: Served) -> None:
    whole = await served.generate(prompt=TEXT, num_beams=2)
    asked = pb.GenerateRequest(prompts=[pb.Prompt(text=TEXT)], max_tokens=20, num_beams=2)
    events = [event async for message in served.running.generate(asked) for event in message.events]
    assert "".join(event.token.text + event.finish.text for event in events) == whole["outputs"][0]["text"]
    assert events[-1].end.usage.completion_tokens == whole["usage"]["completion_tokens"]


async def test_grpc_tells_whole_texts_where_no_token_is_wanted(served: Served) -> None:
    asked = pb.GenerateRequest(prompts=[pb.Prompt(text=TEXT)], max_tokens=20)
    told = [event async for reply in served.running.generate(asked) for event in reply.events]
    asked.wants_tokens = False
    start, finish, end = [event async for reply in served.running.generate(asked) for event in reply.events]
    assert start == told[0]
    assert finish.finish.text == "".join(event.token.text + event.finish.text for event in told)
    assert end.end.usage == told[-1].end.usage


async def test_the_hugging_face_client_translates(served: Served) -> None:
    client = InferenceClient(base_url=f"http://127.0.0.1:{served.port}", provider="hf-inference", timeout=60)
    asked = {"generate_parameters": {"max_new_tokens": 20, "num_beams": 2}, "src_lang": "en", "tgt_lang": "de"}
    found = await asyncio.to_thread(client.translation, TEXT, **asked)
    assert [found.translation_text] == await served.texts(prompt=TEXT, num_beams=2)


async def test_the_name_of_a_special_token_is_text(served: Served) -> None:
    plain = (await served.generate(prompt="a b"))["usage"]["prompt_tokens"]
    assert (await served.generate(prompt="a</s> b"))["usage"]["prompt_tokens"] == plain + len("</s>")
    assert (await served.generate(prompt=[5, 6, 2]))["usage"]["prompt_tokens"] == 3


async def test_as_many_tokens_can_be_written_as_the_source_may_have(served: Served) -> None:
    ids = [7] * 64
    reply = await served.generate(prompt=ids, max_tokens=None, ignore_eos=True)
    assert reply["usage"] == {"prompt_tokens": 64, "completion_tokens": 64, "cached_tokens": 0}
    assert reply["outputs"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        (
            {"prompt": f"A dog. {'X' * 80}. Hi."},
            413,
            "prompt",
            "sentence 2 of prompt has 83 tokens, the limit is 64",
        ),
        ({"prompt": ["Hi.", "\n"]}, 422, "prompt.1", "prompt.1 has nothing to translate"),
        ({"prompt": [[]]}, 422, "prompt", "prompt has no tokens, at least one is needed"),
        ({"prompt": "Hi. " * 129}, 413, "prompt", "prompt brings more than 128 sentences"),
        ({"prompt": "Hi.", "echo": True}, 501, "echo", "echo: the tokens of a source have no log-probabilities"),
        ({"prompt": "Hi.", "min_tokens": 65, "max_tokens": 90}, 413, "min_tokens", "leave room for 64"),
        (
            {"messages": [{"role": "user", "content": "Hi."}], "model": "tiny-translation"},
            501,
            "model",
            "for translation",
        ),
    ],
)
async def test_what_cannot_be_translated_is_refused(
    served: Served, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    reply = await served.ask(**fields)
    assert (reply.status, reply.json["error"]["param"]) == (status, param)
    assert message in reply.json["error"]["message"]
    assert served.sample("attnd_queue_inputs") == served.sample("attnd_running_sequences") == 0


async def test_grpc_names_the_sentence_too(served: Served) -> None:
    asked = pb.GenerateRequest(prompts=[pb.Prompt(text=f"A dog. {'X' * 80}. Hi.")])
    failure = await rpc.failure_of(anext(aiter(served.running.generate(asked))))
    assert failure.code() == grpc.StatusCode.OUT_OF_RANGE
    assert "sentence 2 of prompts.0 has 83 tokens" in (failure.details() or "")


@pytest.mark.parametrize("fields", [{}, {"num_beams": 3}])
async def test_a_client_that_leaves_frees_its_slots(served: Served, fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "Hi. " * 40, "max_tokens": 64, "ignore_eos": True} | fields).encode()
    async with wire.connect(served.port) as connection:
        await connection.send(wire.request("POST", "/v1/generate", body))
        await until(lambda: served.sample("attnd_running_sequences") > 2 and served.sample("attnd_step_rows_count") > 0)
    await until(lambda: served.sample("attnd_running_sequences") == 0)
    await until(lambda: served.sample("attnd_release_seconds_count") >= 1)
    assert served.sample("attnd_queue_inputs") == 0
    assert (await served.generate(prompt=TEXT))["model"] == "tiny-translation"
