"""A tiny translator and a tiny chat model, asked over HTTP in the dialects of others."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import wire
from reached import Running, serving
from wire import Reply

tiny = pytest.importorskip("tiny", reason="exporting needs torch", exc_type=ImportError)
tiny_translator = pytest.importorskip("tiny_translator")

HUGGINGFACE, CHATS = "/models/tiny-translation", "/v1/chat/completions"
LONG = f"A dog. {'X' * 80}. Hi."  # its second sentence has 83 tokens
AT = "parameters.generate_parameters"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("dialects")
    translation = tiny_translator.tiny_translation_bundle(folder / "translation", precision="float32")
    return [translation, tiny.tiny_generation_bundle(folder / "chat", precision="float32")]


@pytest.fixture
async def running(bundles: list[Path]) -> AsyncIterator[Running]:
    async with serving(*bundles, threads=1) as running:
        yield running


async def post(running: Running, path: str, **fields: Any) -> Reply:
    return await wire.ask(running.http_port, "POST", path, orjson.dumps(fields))


# --- Hugging Face


@pytest.mark.parametrize(
    ("inputs", "status", "message"),
    [
        ("", 422, "inputs has nothing to translate"),
        ([""], 422, "inputs.0 has nothing to translate"),
        (["Hi.", " "], 422, "inputs.1 has nothing to translate"),
        (LONG, 413, "sentence 2 of inputs has 83 tokens, the limit is 64"),
        (["Hi.", LONG], 413, "sentence 2 of inputs.1 has 83 tokens, the limit is 64"),
        ("Hi. " * 129, 413, "inputs brings more than 128 sentences, the limit of a request"),
    ],
)
async def test_a_text_that_cannot_be_translated_is_an_input(
    running: Running, inputs: object, status: int, message: str
) -> None:
    reply = await post(running, HUGGINGFACE, inputs=inputs)
    assert (reply.status, reply.json["error"]) == (status, message)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        (
            {"min_new_tokens": 10, "max_new_tokens": 4},
            422,
            f"{AT}.min_new_tokens (10) must not be over {AT}.max_new_tokens (4)",
        ),
        ({"min_new_tokens": 65}, 413, f"{AT}.min_new_tokens is 65, the 5 tokens of inputs leave room for 64"),
        (
            {"num_beams": 4, "repetition_penalty": 2.0},
            422,
            f"{AT}.repetition_penalty goes with {AT}.num_beams 1 only, got 2.0",
        ),
    ],
)
async def test_a_parameter_of_a_translation_has_its_path(
    running: Running, fields: object, status: int, message: str
) -> None:
    reply = await post(running, HUGGINGFACE, inputs="Hi.", parameters={"generate_parameters": fields})
    assert (reply.status, reply.json["error"]) == (status, message)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_text_that_cannot_be_continued_is_an_input(running: Running, stream: bool) -> None:
    reply = await post(running, "/models/tiny-chat", inputs="x" * 300, stream=stream)
    assert reply.status == 413
    assert reply.json["error"].startswith("inputs has ")


# --- OpenAI


@pytest.mark.parametrize("stream", [False, True])
async def test_a_chat_is_not_called_a_prompt(running: Running, stream: bool) -> None:
    messages = [{"role": "user", "content": "a"}]
    reply = await post(running, CHATS, model="tiny-chat", messages=messages, min_tokens=5000, stream=stream)
    assert (reply.status, reply.json["error"]["param"]) == (413, "min_tokens")
    assert " tokens of messages leave room for " in reply.json["error"]["message"]
