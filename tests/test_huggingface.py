"""Hugging Face's dialect, with the real client over a real socket and as raw requests."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest
import wire
from fakes import CHAT, MODEL, FakeBackend, fake_scores
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, OverloadedError, UnknownError
from wire import ask

from service import errors
from service.domain import ModelInfo, TextInput

TRANSLATION = ModelInfo("translation", "translation", 1_700_000_002, {})


async def _with_client(base_url: str, action: Callable[[InferenceClient], Any]) -> Any:
    """What `action` gives, in a thread, since the client blocks."""
    return await asyncio.to_thread(action, InferenceClient(base_url=base_url, provider="hf-inference", timeout=60))


@pytest.mark.parametrize("path", ["", "/models/sentiment"])
async def test_the_client_classifies(served: wire.Served, path: str) -> None:
    found = await _with_client(
        f"http://127.0.0.1:{served.port}{path}", lambda client: client.text_classification("a fine film")
    )
    assert [(one.label, one.score) for one in found] == [
        (score.label, score.score) for score in fake_scores(TextInput("a fine film"))
    ]


async def test_the_clients_parameters_arrive(served: wire.Served) -> None:
    found = await _with_client(
        f"http://127.0.0.1:{served.port}",
        lambda client: client.text_classification("a", top_k=1, function_to_apply="sigmoid"),
    )
    assert len(found) == 1
    request = served.backend.requests[0]
    assert (request.top_k, request.function_to_apply, request.truncate) == (1, "sigmoid", True)


async def test_the_client_sends_the_key(backend: Any) -> None:
    async with wire.serve(backend, api_key="secret") as served:
        url = f"http://127.0.0.1:{served.port}"
        found = await asyncio.to_thread(InferenceClient(base_url=url, api_key="secret").text_classification, "a")
        assert len(found) == 2
        with pytest.raises(HfHubHTTPError, match="401"):
            await asyncio.to_thread(InferenceClient(base_url=url, api_key="wrong").text_classification, "a")


async def test_the_client_sees_errors(served: wire.Served) -> None:
    url = f"http://127.0.0.1:{served.port}"
    served.backend.error = errors.Overloaded("the queue is full")
    with pytest.raises(HfHubHTTPError, match="429"):
        await _with_client(url, lambda client: client.text_classification("a"))
    served.backend.error = errors.Unavailable("loading")
    with pytest.raises((InferenceTimeoutError, HfHubHTTPError)):
        await _with_client(url, lambda client: client.text_classification("a"))


async def test_the_client_asks_about_the_server(served: wire.Served) -> None:
    url = f"http://127.0.0.1:{served.port}"
    info = await _with_client(url, lambda client: client.get_endpoint_info())
    assert info["model_id"] == "sentiment"
    assert info["max_client_batch_size"] == 1024
    assert await _with_client(url, lambda client: client.health_check())


@pytest.mark.parametrize(
    ("inputs", "meant"),
    [
        ("a", [TextInput("a")]),
        (["a"], [TextInput("a")]),
        (["a", "b"], [TextInput("a"), TextInput("b")]),
        ({"text": "a", "text_pair": "b"}, [TextInput("a", "b")]),
        ([{"text": "a", "text_pair": "b"}, "c"], [TextInput("a", "b"), TextInput("c")]),
    ],
)
@pytest.mark.parametrize("path", ["/", "/models/sentiment"])
async def test_the_reply_is_nested(served: wire.Served, path: str, inputs: object, meant: list[TextInput]) -> None:
    reply = await ask(served.port, "POST", path, orjson.dumps({"inputs": inputs}))
    assert reply.status == 200
    assert reply.json == [[{"label": s.label, "score": s.score} for s in fake_scores(text)] for text in meant]


async def test_the_path_names_the_model(served: wire.Served) -> None:
    await ask(served.port, "POST", "/models/sentiment", b'{"inputs": "a"}')
    await ask(served.port, "POST", "/", b'{"inputs": "a"}')
    assert [request.model for request in served.backend.requests] == ["sentiment", None]
    assert [call.route for call in served.backend.calls] == ["/models/{model_id}", "/"]
    reply = await ask(served.port, "POST", "/models/owner/name", b'{"inputs": "a"}')
    assert reply.status == 404
    assert reply.json["error_type"] == "model_not_found"
    assert "owner/name" in reply.json["error"]


async def test_options_and_truncation_are_known(served: wire.Served) -> None:
    for given, truncate in ((False, False), (True, True), (None, True)):
        body = {"inputs": "a", "parameters": {"truncation": given}, "options": {"wait_for_model": True}}
        assert (await ask(served.port, "POST", "/", orjson.dumps(body))).status == 200
        assert served.backend.requests[-1].truncate is truncate


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"inputs": 4}, "inputs"),
        ({"inputs": []}, "inputs"),
        ({"input": "a"}, "input"),
        ({"inputs": "a", "parameters": {"top_k": 0}}, "parameters.top_k"),
        ({"inputs": "a", "parameters": {"temperature": 1}}, "parameters.temperature"),
    ],
)
async def test_errors_are_a_text_that_names_the_field(served: wire.Served, body: object, named: str) -> None:
    reply = await ask(served.port, "POST", "/", orjson.dumps(body))
    assert reply.status == 422
    assert isinstance(reply.json["error"], str)
    assert named in reply.json["error"]
    assert reply.headers["x-request-id"]
    assert served.count("invalid", "/") == 1


async def test_loading_says_for_how_long(served: wire.Served) -> None:
    served.backend.error = errors.Unavailable("loading", retry_after_s=20)
    reply = await ask(served.port, "POST", "/", b'{"inputs": "a"}')
    assert (reply.status, reply.json["estimated_time"], reply.headers["retry-after"]) == (503, 20.0, "20")


async def test_a_wrong_method_is_answered_in_the_dialect(served: wire.Served) -> None:
    reply = await ask(served.port, "GET", "/models/sentiment")
    assert (reply.status, isinstance(reply.json["error"], str)) == (405, True)


# --- translation and text generation


@pytest.fixture
def serving_all(backend: FakeBackend) -> None:
    backend.served = [CHAT, TRANSLATION, MODEL]


@pytest.mark.usefixtures("serving_all")
async def test_the_client_translates(served: wire.Served) -> None:
    found = await _with_client(
        f"http://127.0.0.1:{served.port}/models/translation",
        lambda client: client.translation(
            "a fine film",
            src_lang="en",
            tgt_lang="de",
            clean_up_tokenization_spaces=True,
            truncation="do_not_truncate",
            generate_parameters={"max_new_tokens": 2, "num_beams": 3, "length_penalty": 0.6},
        ),
    )
    assert found.translation_text == "a fine "
    (request,) = served.backend.generations
    assert (request.prompt, request.model, request.max_tokens) == (("a fine film",), "translation", 2)
    assert (request.num_beams, request.length_penalty, request.temperature) == (3, 0.6, 0.0)
    assert served.count("ok", "/models/{model_id}", "translation") == 1


@pytest.mark.usefixtures("serving_all")
async def test_several_texts_are_translated_in_order(served: wire.Served) -> None:
    reply = await ask(served.port, "POST", "/models/translation", b'{"inputs": ["a b", "c"]}')
    assert reply.json == [{"translation_text": "a b "}, {"translation_text": "c "}]


@pytest.mark.usefixtures("serving_all")
async def test_a_translation_is_as_long_as_it_is(served: wire.Served) -> None:
    body = {"inputs": "a", "parameters": {"generate_parameters": {"do_sample": False, "top_k": 3, "num_beams": 2}}}
    assert (await ask(served.port, "POST", "/models/translation", orjson.dumps(body))).status == 200
    assert served.backend.generations[0].max_tokens is None


@pytest.mark.usefixtures("serving_all")
async def test_the_client_continues_a_text(served: wire.Served) -> None:
    url = f"http://127.0.0.1:{served.port}/models/chat"
    assert await _with_client(url, lambda client: client.text_generation("a fine film")) == "a fine film "
    found = await _with_client(
        url,
        lambda client: client.text_generation(
            "a fine film",
            details=True,
            decoder_input_details=True,
            return_full_text=True,
            max_new_tokens=2,
            do_sample=True,
            temperature=0.5,
            top_k=3,
            top_p=0.9,
            top_n_tokens=2,
            repetition_penalty=1.1,
            frequency_penalty=0.2,
            seed=7,
            stop=["x"],
            best_of=1,
            watermark=False,
        ),
    )
    assert found.generated_text == "a fine filma fine "
    details = found.details
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 2, 7)
    assert [token.text for token in details.prefill] == ["a ", "fine ", "film "]
    assert [(token.text, token.logprob, token.special) for token in details.tokens] == [
        ("a ", -0.25, False),
        ("fine ", -0.25, False),
    ]
    assert [len(tokens) for tokens in details.top_tokens] == [2, 2]
    plain, request = served.backend.generations
    assert (plain.temperature, plain.logprobs, plain.echo) == (0.0, None, False)
    sampling = (request.temperature, request.top_k, request.top_p, request.seed, request.stop)
    assert sampling == (0.5, 3, 0.9, 7, ("x",))
    assert (request.repetition_penalty, request.frequency_penalty) == (1.1, 0.2)


@pytest.mark.usefixtures("serving_all")
async def test_the_client_streams(served: wire.Served) -> None:
    url = f"http://127.0.0.1:{served.port}/models/chat"
    texts = await _with_client(url, lambda client: list(client.text_generation("a fine film", stream=True)))
    assert texts == ["a ", "fine ", "film ", ""]
    *events, end = await _with_client(
        url, lambda client: list(client.text_generation("a b", stream=True, details=True, top_n_tokens=1, seed=5))
    )
    assert [(event.index, event.token.text, event.token.special) for event in events] == [
        (1, "a ", False),
        (2, "b ", False),
    ]
    assert [len(event.top_tokens) for event in events] == [1, 1]
    assert {(event.generated_text, event.details) for event in events} == {(None, None)}
    assert (end.token.special, end.generated_text) == (True, "a b ")
    details = end.details
    assert (details.finish_reason, details.generated_tokens, details.input_length) == ("eos_token", 2, 2)
    assert details.seed == 5


@pytest.mark.usefixtures("serving_all")
async def test_the_client_sees_why_a_text_is_not_continued(served: wire.Served) -> None:
    url = f"http://127.0.0.1:{served.port}/models/chat"
    with pytest.raises(UnknownError, match=r"parameters\.typical_p is not supported; it may only be 1\.0"):
        await _with_client(url, lambda client: client.text_generation("a", typical_p=0.5))
    served.backend.error = errors.Overloaded("the queue is full")
    with pytest.raises(OverloadedError, match="the queue is full"):
        await _with_client(url, lambda client: client.text_generation("a"))
    served.backend.error_after = 1
    with pytest.raises(OverloadedError, match="the queue is full"):
        await _with_client(url, lambda client: list(client.text_generation("a b", stream=True)))


@pytest.mark.parametrize(
    ("parameters", "temperature", "top_k"),
    [
        ({}, 0.0, 0),
        ({"do_sample": False, "temperature": 0.7, "top_k": 5}, 0.0, 0),
        ({"do_sample": True}, 1.0, 0),
        ({"top_k": 5}, 1.0, 5),
        ({"temperature": 0.7}, 0.7, 0),
    ],
)
async def test_sampling_is_asked_for_or_not(
    served: wire.Served, parameters: object, temperature: float, top_k: int
) -> None:
    served.backend.served = [CHAT]
    await ask(served.port, "POST", "/models/chat", orjson.dumps({"inputs": "a", "parameters": parameters}))
    request = served.backend.generations[0]
    assert (request.temperature, request.top_k) == (temperature, top_k)


@pytest.mark.parametrize(
    ("models", "model", "task"),
    [
        ([CHAT, TRANSLATION, MODEL], "sentiment", "text-classification"),
        ([CHAT, TRANSLATION], "translation", "translation"),
        ([CHAT], "chat", "text-generation"),
    ],
)
async def test_without_a_name_it_is_the_first_task_that_is_served(
    served: wire.Served, models: list[ModelInfo], model: str, task: str
) -> None:
    served.backend.served = models
    info = await ask(served.port, "GET", "/info")
    assert (info.json["model_id"], info.json["model_pipeline_tag"]) == (model, task)
    reply = await ask(served.port, "POST", "/", b'{"inputs": "a"}')
    assert reply.status == 200
    assert served.count("ok", "/", model) == 1


async def test_a_model_that_came_later_is_found(served: wire.Served) -> None:
    assert (await ask(served.port, "POST", "/models/chat", b'{"inputs": "a"}')).status == 404
    served.backend.served = [MODEL, CHAT]
    assert (await ask(served.port, "POST", "/models/chat", b'{"inputs": "a"}')).json == [{"generated_text": "a "}]


@pytest.mark.parametrize("body", [{"inputs": "a"}, {"inputs": "a", "parameters": {"max_new_tokens": 2}}])
async def test_what_cannot_tell_its_models_is_unavailable(served: wire.Served, body: object) -> None:
    """Whatever the body, which cannot be read while nobody knows what the model does."""
    served.backend.unready = served.backend.error = errors.Unavailable("loading", code="loading")
    reply = await ask(served.port, "POST", "/models/chat", orjson.dumps(body))
    assert (reply.status, reply.json["error_type"]) == (503, "loading")
    assert served.count("error", "/models/{model_id}") == 1


async def test_a_model_that_is_not_served_is_not_found_whatever_the_body(served: wire.Served) -> None:
    reply = await ask(served.port, "POST", "/models/chat", b'{"inputs": "a", "parameters": {"max_new_tokens": 2}}')
    assert (reply.status, reply.json["error_type"]) == (404, "model_not_found")
    assert served.count("invalid", "/models/{model_id}") == 1


async def test_no_models_are_asked_for_without_the_key(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    async with wire.serve(backend, api_key="secret") as served:
        monkeypatch.setattr(backend, "models", None)  # would fail if it were called
        assert (await ask(served.port, "POST", "/models/chat", b'{"inputs": "a"}')).status == 401
        assert served.count("invalid", "/models/{model_id}") == 1


@pytest.mark.usefixtures("serving_all")
@pytest.mark.parametrize(
    ("model", "body", "status", "named"),
    [
        ("translation", {"inputs": []}, 422, "inputs"),
        (
            "translation",
            {"inputs": "a", "parameters": {"src_lang": "fr", "tgt_lang": "de"}},
            422,
            "parameters.src_lang",
        ),
        ("translation", {"inputs": "a", "parameters": {"tgt_lang": "fra_Latn"}}, 422, "English (en) to German (de)"),
        ("translation", {"inputs": "a", "parameters": {"truncation": "longest_first"}}, 501, "parameters.truncation"),
        ("translation", {"inputs": "a", "parameters": {"generate_parameters": {"early_stopping": True}}}, 422, "early"),
        ("translation", {"inputs": "a", "parameters": {"generate_parameters": {"num_beams": 99}}}, 422, "num_beams"),
        (
            "translation",
            {"inputs": "a", "parameters": {"generate_parameters": {"num_beams": 2, "do_sample": True}}},
            422,
            "parameters.generate_parameters.do_sample goes with num_beams 1 only",
        ),
        (
            "translation",
            {"inputs": "a", "parameters": {"generate_parameters": {"num_beams": 2, "top_k": 0}}},
            422,
            "parameters.generate_parameters.top_k goes with num_beams 1 only",
        ),
        ("chat", {"inputs": ["a"]}, 422, "inputs"),
        ("chat", {"inputs": "a", "parameters": {"max_new_tokens": 0}}, 422, "parameters.max_new_tokens"),
        ("chat", {"inputs": "a", "parameters": {"grammar": {"type": "json"}}}, 501, "parameters.grammar"),
        ("chat", {"inputs": "a", "parameters": {"best_of": 2}}, 501, "parameters.best_of"),
        ("chat", {"inputs": "a", "parameters": {"function_to_apply": "none"}}, 422, "parameters.function_to_apply"),
    ],
)
async def test_what_cannot_be_honoured_is_named(
    served: wire.Served, model: str, body: object, status: int, named: str
) -> None:
    reply = await ask(served.port, "POST", f"/models/{model}", orjson.dumps(body))
    assert reply.status == status
    assert named in reply.json["error"]
    assert served.count("invalid", "/models/{model_id}") == 1


@pytest.mark.usefixtures("serving_all")
@pytest.mark.parametrize("language", ["en", "EN", "eng_Latn", "en-GB", "English"])
async def test_a_language_has_many_names(served: wire.Served, language: str) -> None:
    body = {"inputs": "a", "parameters": {"src_lang": language, "tgt_lang": "deu_Latn"}}
    assert (await ask(served.port, "POST", "/models/translation", orjson.dumps(body))).status == 200
