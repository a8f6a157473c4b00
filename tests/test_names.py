"""Errors that are found after a body was read tell of its fields by the names that they were sent under."""

import orjson
import pytest
import wire
from fakes import CHAT, FakeBackend

from service.errors import InvalidRequest, NotFound, Overloaded, TooLarge
from service.gateway.huggingface import classification, text_generation, translation
from service.gateway.names import FIELD_ERRORS, SAME, FieldError, told_as
from service.gateway.openai import chat

NAMES = {"prompt": "inputs", "prompt.0": "inputs", "top_k": "parameters.top_k", "max_tokens": "max_new_tokens"}


@pytest.mark.parametrize("cls", FIELD_ERRORS)
def test_message_and_param_have_the_callers_name(cls: type[FieldError]) -> None:
    error = told_as(NAMES, cls("prompt.0 has nothing, max_tokens is 4", param="prompt.0", code="nothing"))
    assert type(error) is cls
    assert (error.message, str(error)) == ("inputs has nothing, max_new_tokens is 4",) * 2
    assert (error.param, error.code) == ("inputs", "nothing")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("prompt.1 has no tokens", "inputs.1 has no tokens"),
        ("prompt.01", "inputs.01"),
        ("sentence 2 of prompt.0 has 9 tokens", "sentence 2 of inputs has 9 tokens"),
        ("prompts, prompt's, my_prompt and reprompt", "prompts, prompt's, my_prompt and reprompt"),
        ("parameters.top_k and top_k", "parameters.top_k and parameters.top_k"),
        ("got 'prompt' or \"top_k\"", "got 'prompt' or \"top_k\""),
        ("stop goes with (prompt)", "stop goes with (inputs)"),
    ],
)
def test_only_whole_names_are_replaced_and_no_values(said: str, meant: str) -> None:
    assert told_as(NAMES, InvalidRequest(said)).message == meant


async def test_what_is_about_no_field_stays(served: wire.Served) -> None:
    for error, status in ((Overloaded("input.0 prompt"), 429), (NotFound("input.0 prompt", param="model"), 404)):
        served.backend.error = error
        reply = await wire.ask(served.port, "POST", "/", b'{"inputs": "a"}')
        assert (reply.status, reply.json["error"]) == (status, "input.0 prompt")


def test_where_the_names_are_the_same_the_error_is_too() -> None:
    error = InvalidRequest("prompt", param="prompt")
    assert told_as(SAME, error) is error


INPUT = "input.{} has 52 tokens, the limit is 12; set truncate to true to cut it"


@pytest.mark.parametrize(
    ("inputs", "at", "place"),
    [
        ("a", 0, ""),
        ({"text": "a", "text_pair": "b"}, 0, ""),
        (["a"], 0, ""),
        (["a"] * 3, 2, ".2"),
    ],
)
async def test_a_text_to_classify_has_the_callers_name(
    served: wire.Served, inputs: object, at: int, place: str
) -> None:
    served.backend.error = TooLarge(INPUT.format(at), param=f"input.{at}", code="too_many_tokens")
    reply = await wire.ask(served.port, "POST", "/", orjson.dumps({"inputs": inputs}))
    message = f"inputs{place} has 52 tokens, the limit is 12; set parameters.truncation to true to cut it"
    assert (reply.status, reply.json["error"], reply.json["error_type"]) == (413, message, "too_many_tokens")
    error = (await wire.classify(served.port, orjson.dumps({"input": inputs}))).json["error"]
    assert error["message"] == f"input{place} has 52 tokens, the limit is 12; set truncate to true to cut it"
    assert error["param"] == f"input{place}"


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions"])
@pytest.mark.parametrize(("prompt", "at", "place"), [("a", 0, ""), ([1, 2], 0, ""), (["a"] * 2, 1, ".1")])
async def test_a_prompt_has_no_number_when_it_is_the_only_one(
    served: wire.Served, path: str, prompt: object, at: int, place: str
) -> None:
    served.backend.error = TooLarge(f"sentence 2 of prompt.{at} has 9 tokens", param=f"prompt.{at}")
    error = (await wire.ask(served.port, "POST", path, orjson.dumps({"prompt": prompt}))).json["error"]
    assert (error["message"], error["param"]) == (f"sentence 2 of prompt{place} has 9 tokens", f"prompt{place}")


async def test_too_many_texts_to_classify_are_inputs(served: wire.Served) -> None:
    for path, named in (("/", "inputs"), ("/v1/classify", "input")):
        body = orjson.dumps({named: ["a"] * 16_385})
        message = f"{named}: at most 16384 inputs a request, got 16385"
        reply = await wire.ask(served.port, "POST", path, body)
        assert reply.status == 413
        assert message in str(reply.json["error"])
    with pytest.raises(TooLarge) as caught:
        classification.parse(orjson.dumps({"inputs": ["a"] * 16_385}), {})
    assert caught.value.param == "inputs"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"min_new_tokens": 10, "max_new_tokens": 4},
            "parameters.generate_parameters.min_new_tokens",
            "parameters.generate_parameters.min_new_tokens (10) must not be over "
            "parameters.generate_parameters.max_new_tokens (4)",
        ),
        (
            {"top_k": -1},
            "parameters.generate_parameters.top_k",
            "parameters.generate_parameters.top_k: input should be",
        ),
    ],
)
def test_parameters_of_a_translation_have_their_path(fields: object, param: str, message: str) -> None:
    body = orjson.dumps({"inputs": "a", "parameters": {"generate_parameters": fields}})
    with pytest.raises(InvalidRequest) as caught:
        translation.parse(body, "translation")
    assert caught.value.param == param
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("inputs", "param", "message"),
    [
        (4, "inputs", "inputs: expected a text or a list of texts, got 4"),
        (["a", 4], "inputs.1", "inputs.1: input should be a valid string, got 4"),
        (["a"] * 129, "inputs", "inputs: at most 128 inputs a request, got 129"),
    ],
)
def test_texts_to_translate_have_the_path_they_were_sent_under(inputs: object, param: str, message: str) -> None:
    with pytest.raises((InvalidRequest, TooLarge)) as caught:
        translation.parse(orjson.dumps({"inputs": inputs}), "translation")
    assert (caught.value.param, caught.value.message) == (param, message)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_to_continue_has_the_callers_name(backend: FakeBackend, stream: bool) -> None:
    backend.served = [CHAT]
    backend.error = TooLarge("prompt.0 has 300 tokens, max_tokens is 9, logprobs is 1", param="prompt.0")
    async with wire.serve(backend) as served:
        reply = await wire.ask(served.port, "POST", "/", orjson.dumps({"inputs": "a", "stream": stream}))
    said = "inputs has 300 tokens, parameters.max_new_tokens is 9, parameters.top_n_tokens is 1"
    assert (reply.status, reply.json["error"]) == (413, said)


def test_every_field_of_a_text_generation_is_under_parameters() -> None:
    asked = text_generation.parse(b'{"inputs": "a"}', "chat")
    assert {asked.names[name] for name in ("prompt", "prompt.0")} == {"inputs"}
    taken = set(text_generation.TextGenerationParameters.model_fields) - set(text_generation._REFUSED)
    told_by = {path.removeprefix("parameters.") for path in asked.names.values()} - {"inputs"}
    assert taken - told_by == {"do_sample", "details", "return_full_text"}  # which no field of a request stands for


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chats_limit_has_the_name_that_was_sent(limit: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "min_tokens": 10, limit: 4}
    with pytest.raises(InvalidRequest) as caught:
        chat.parse(orjson.dumps(body), {})
    assert caught.value.message == f"min_tokens (10) must not be over {limit} (4)"
    assert caught.value.param == "min_tokens"
