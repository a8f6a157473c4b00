"""A tiny translator and a tiny chat model, asked over HTTP in the dialects of others."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import wire
from processes import ROOT
from reached import Running, serving
from wire import Reply

tiny = pytest.importorskip("tiny", reason="exporting needs torch", exc_type=ImportError)
tiny_translator = pytest.importorskip("tiny_translator")

HUGGINGFACE, CHATS = "/models/tiny-translation", "/v1/chat/completions"
LONG = f"A dog. {'X' * 80}. Hi."  # its second sentence has 83 tokens
AT = "parameters.generate_parameters"
SPECIAL = ("<pad>", "<s>", "</s>")  # tokens that are not shown


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
        ([""], 422, "inputs has nothing to translate"),
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
            f"{AT}.repetition_penalty goes with {AT}.num_beams 1 only, not 4",
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


SENTENCES = ("A dog runs through the snow.", "Where is the station?", "Two children are playing!")
TEXT = f"\t{SENTENCES[0]}\n{SENTENCES[1]}\n\n\n\n{SENTENCES[2]}\n"
COMPLETIONS = "/v1/completions"


async def complete(running: Running, **fields: Any) -> list[dict[str, Any]]:
    """The choices of a completion."""
    reply = await post(running, COMPLETIONS, **{"model": "tiny-translation", "max_tokens": 20} | fields)
    assert reply.status == 200, reply.body
    choices: list[dict[str, Any]] = reply.json["choices"]
    return choices


async def streamed(running: Running, **fields: Any) -> list[dict[str, Any]]:
    """The same, put together from the chunks of a stream."""
    fields = {"model": "tiny-translation", "max_tokens": 20, "stream": True} | fields
    *chunks, done, rest = (await post(running, COMPLETIONS, **fields)).body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (piece,) = orjson.loads(chunk.removeprefix(b"data: "))["choices"]
        choice = choices.setdefault(piece["index"], {"index": piece["index"], "text": "", "logprobs": None})
        choice["text"] += piece["text"]
        choice["finish_reason"] = piece["finish_reason"]
        for name, values in (piece["logprobs"] or {}).items():
            choice["logprobs"] = choice["logprobs"] or {}
            choice["logprobs"].setdefault(name, []).extend(values)
    return [choices[index] for index in sorted(choices)]


async def test_a_completion_is_the_translation(running: Running) -> None:
    native = await post(running, "/v1/generate", model="tiny-translation", prompt=TEXT, max_tokens=20, logprobs=1)
    (output,) = native.json["outputs"]
    (choice,) = await complete(running, prompt=TEXT, logprobs=1)
    assert (choice["text"], choice["finish_reason"]) == (output["text"], output["finish_reason"])
    assert choice["logprobs"]["tokens"] == [one["text"] for one in output["logprobs"]]
    assert choice["logprobs"]["token_logprobs"] == [one["logprob"] for one in output["logprobs"]]
    (plain,) = await complete(running, prompt=TEXT)
    assert plain == choice | {"logprobs": None}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"logprobs": 2},
        {"logprobs": 0, "ignore_eos": True},
        {"logprobs": 0, "stop": ["\ufffdZ", "8Z"]},
        {"logprobs": 0, "temperature": 1.0, "seed": 4, "n": 2, "prompt": [TEXT, SENTENCES[1]]},
        {"temperature": 1.0, "seed": 4, "n": 2, "prompt": [TEXT, SENTENCES[1]]},
    ],
)
async def test_a_streamed_completion_says_the_same(running: Running, fields: dict[str, Any]) -> None:
    asked = {"prompt": TEXT} | fields
    assert await streamed(running, **asked) == await complete(running, **asked)


async def test_every_sentences_tokens_stand_where_it_does(running: Running) -> None:
    (choice,) = await complete(running, prompt=TEXT, logprobs=0)
    starts, text, at = [], choice["text"], 0
    for sentence in SENTENCES:
        (alone,) = await complete(running, prompt=sentence, logprobs=0)
        at = text.index(alone["text"], at)
        starts += [at + offset for offset in alone["logprobs"]["text_offset"]]
        assert alone["logprobs"]["text_offset"][0] == 0
        at += len(alone["text"])
    assert choice["logprobs"]["text_offset"] == starts
    for token, start in zip(choice["logprobs"]["tokens"], starts, strict=True):
        if token not in SPECIAL and "\ufffd" not in token:
            assert text[start:].startswith((token, token.lstrip()))


async def test_the_shipped_translators_tokens_stand_where_they_do() -> None:
    asked = {"model": "translation", "prompt": "A dog.\n\n\n\nA cat sleeps.", "logprobs": 0}
    async with serving(ROOT / "model" / "zoo" / "translation", threads=1) as running:
        (choice,) = await complete(running, **asked)
        assert await streamed(running, **asked) == [choice]
    assert choice["text"] == "Ein Hund.\n\n\n\nEine Katze schläft."
    assert choice["logprobs"]["tokens"] == [" Ein", " Hund", ".", " Eine", " Katze", " schläft", "."]
    assert choice["logprobs"]["text_offset"] == [0, 3, 8, 13, 17, 23, 31]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{}, {"logprobs": 0}, {"prompt": [5, 6, 2]}])
async def test_a_source_is_never_put_before_its_translation(
    running: Running, fields: dict[str, Any], stream: bool
) -> None:
    asked = {"model": "tiny-translation", "prompt": SENTENCES[0], "echo": True} | fields
    native = await post(running, "/v1/generate", **asked)
    assert (native.status, native.json["error"]["code"]) == (501, "no_echo")
    reply = await post(running, COMPLETIONS, stream=stream, **asked)
    assert (reply.status, reply.json["error"]) == (400, native.json["error"] | {"type": "invalid_request_error"})
    labels = {"route": COMPLETIONS, "model": "tiny-translation", "outcome": "invalid"}
    assert running.count("attnd_request_seconds_count", **labels) == 1


async def test_a_text_that_is_continued_is_put_before_what_follows(running: Running) -> None:
    (plain,) = await complete(running, model="tiny-chat", prompt="a b")
    (choice,) = await complete(running, model="tiny-chat", prompt="a b", echo=True)
    assert choice["text"] == "a b" + plain["text"]
    assert await streamed(running, model="tiny-chat", prompt="a b", echo=True) == [choice]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_translator_does_not_chat(running: Running, stream: bool) -> None:
    messages = [{"role": "user", "content": "Hi."}]
    reply = await post(running, CHATS, model="tiny-translation", messages=messages, stream=stream)
    assert (reply.status, reply.json["error"]["param"], reply.json["error"]["code"]) == (400, "model", "wrong_task")
    assert "is for translation, not generation; models for generation: tiny-chat" in reply.json["error"]["message"]
