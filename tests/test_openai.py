"""OpenAI's dialect as raw requests: bytes of both routes, streams, every kind of field, errors and their headers."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import wire
from fakes import CHAT, MODEL, FakeBackend
from wire import Reply, ask

from service import errors
from service.domain import (
    End,
    Finish,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    Message,
    Start,
    Token,
)
from service.gateway.bodies import generate_request
from service.gateway.errors import STATUS
from service.gateway.openai import chat, completions

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "a b"}]


@pytest.fixture
async def served(backend: FakeBackend) -> AsyncIterator[wire.Served]:
    backend.served = [MODEL, CHAT]
    async with wire.serve(backend) as served:
        yield served


async def post(served: wire.Served, path: str, **fields: Any) -> Reply:
    return await ask(served.port, "POST", path, orjson.dumps(fields), "x-request-id: r1\r\n")


def chunks_of(body: bytes) -> list[Any]:
    """The chunks of a stream, which must be framed exactly and end with [DONE]."""
    *events, done, rest = body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") for event in events)
    return [orjson.loads(event.removeprefix(b"data: ")) for event in events]


def encoded(answer: Any, *events: Any) -> list[Any]:
    """The chunks that an answer makes of `events`, put between a Start and an End."""
    start, end = Start("chat", 3), End(GenerateUsage(3, 2, 1), GenerateTiming(0, 0, 0, 0, 0, 0))
    return chunks_of(b"".join(map(answer.piece, (start, *events, end))) + b"data: [DONE]\n\n")


async def test_a_completion(served: wire.Served) -> None:
    reply = await post(served, TEXTS, model="chat", prompt="a b c", max_tokens=2)
    assert (reply.status, reply.headers["content-type"], reply.headers["x-request-id"]) == (
        200, "application/json", "r1",
    )  # fmt: skip
    created = reply.json["created"]
    assert isinstance(created, int)
    assert reply.json == {
        "id": "cmpl-r1",
        "object": "text_completion",
        "created": created,
        "model": "chat",
        "choices": [{"index": 0, "text": "a b ", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 2,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_chat_completion(served: wire.Served) -> None:
    reply = await post(served, CHATS, model="chat", messages=USER)
    created = reply.json["created"]
    assert reply.json == {
        "id": "chatcmpl-r1",
        "object": "chat.completion",
        "created": created,
        "model": "chat",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a b ", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_streamed_completion_to_the_byte(served: wire.Served) -> None:
    reply = await post(served, TEXTS, prompt="a é", stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    created = chunks_of(reply.body)[0]["created"]
    head = b'data: {"id":"cmpl-r1","object":"text_completion","created":%d,"model":"chat","choices":[' % created
    choice = b'{"index":0,"text":"%b","logprobs":null,"finish_reason":%b}],"usage":null}\n\n'
    assert reply.body == (
        head + choice % (b"a ", b"null")
        + head + choice % ("é ".encode(), b"null")
        + head + choice % (b"", b'"stop"')
        + head + b'],"usage":{"prompt_tokens":2,"completion_tokens":2,"total_tokens":4,'
        + b'"prompt_tokens_details":{"cached_tokens":0}}}\n\n'
        + b"data: [DONE]\n\n"
    )  # fmt: skip


async def test_a_streamed_chat_to_the_byte(served: wire.Served) -> None:
    reply = await post(served, CHATS, messages=USER, stream=True)
    created = chunks_of(reply.body)[0]["created"]
    head = (
        b'data: {"id":"chatcmpl-r1","object":"chat.completion.chunk","created":%d,"model":"chat","choices":[' % created
    )
    choice = b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}]}\n\n'
    assert reply.body == (
        head + choice % (b'{"role":"assistant","content":""}', b"null")
        + head + choice % (b'{"content":"a "}', b"null")
        + head + choice % (b'{"content":"b "}', b"null")
        + head + choice % (b"{}", b'"stop"')
        + b"data: [DONE]\n\n"
    )  # fmt: skip


async def test_usage_so_far_on_every_chunk(served: wire.Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, fields in ((TEXTS, {"prompt": "a b"}), (CHATS, {"messages": USER})):
        *chunks, last = chunks_of((await post(served, path, stream=True, stream_options=options, **fields)).body)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == ([1, 2, 2] if path == TEXTS else [0, 1, 2, 2])
        assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 4)


async def test_usage_is_only_said_when_asked_for(served: wire.Served) -> None:
    for options in (None, {}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": True}):
        reply = await post(served, CHATS, messages=USER, stream=True, stream_options=options)
        assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks_of(reply.body))


async def test_log_probabilities_of_completions(served: wire.Served) -> None:
    fields = {"prompt": "a bb", "logprobs": 2, "echo": True}
    whole = (await post(served, TEXTS, **fields)).json["choices"][0]
    assert whole["text"] == "a bba bb "
    top = {"a ": -0.25, "<0>": -1.5}
    assert whole["logprobs"] == {
        "tokens": ["a ", "bb ", "a ", "bb "],
        "token_logprobs": [None, -0.25, -0.25, -0.25],
        "top_logprobs": [None, {"bb ": -0.25, "<0>": -1.5}, top, {"bb ": -0.25, "<0>": -1.5}],
        "text_offset": [0, 2, 4, 6],  # the prompt as it was sent has no space at its end
    }
    assert served.backend.generations[0].echo
    pieces = [chunk["choices"][0] for chunk in chunks_of((await post(served, TEXTS, stream=True, **fields)).body)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for piece in pieces if piece["logprobs"] for value in piece["logprobs"][name]] == values


async def test_echo_without_log_probabilities_computes_nothing_more(served: wire.Served) -> None:
    for stream in (False, True):
        reply = await post(served, TEXTS, prompt=["a", "b c"], n=2, echo=True, max_tokens=1, stream=stream)
        texts = ["", "", "", ""]
        for chunk in chunks_of(reply.body) if stream else [reply.json]:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == ["aa ", "aa ", "b cb ", "b cb "]
        assert not served.backend.generations[-1].echo
    reply = await post(served, TEXTS, prompt=[7, 8], echo=True, max_tokens=1)  # only the backend can read ids
    assert reply.json["choices"][0]["text"] == "7 8 7 "
    assert served.backend.generations[-1].echo


async def test_log_probabilities_of_chats(served: wire.Served) -> None:
    fields = {"messages": USER, "logprobs": True, "top_logprobs": 2}
    whole = (await post(served, CHATS, **fields)).json["choices"][0]["logprobs"]
    own = {"token": "a ", "logprob": -0.25, "bytes": [97, 32]}
    other = {"token": "<0>", "logprob": -1.5, "bytes": list(b"<0>")}
    assert (whole["content"][0], whole["refusal"]) == (own | {"top_logprobs": [own, other]}, None)
    chunks = chunks_of((await post(served, CHATS, stream=True, **fields)).body)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [one for logprobs in streamed if logprobs for one in logprobs["content"]] == whole["content"]
    plain = (await post(served, CHATS, messages=USER, logprobs=True)).json["choices"][0]["logprobs"]
    assert plain["content"][0] == own | {"top_logprobs": []}


async def test_several_choices_of_a_streamed_chat(served: wire.Served) -> None:
    chunks = chunks_of((await post(served, CHATS, messages=USER, n=2, stream=True)).body)
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "a b "
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


def test_what_cannot_be_shown_yet_makes_no_chunk_and_comes_at_the_end() -> None:
    chat_answer = chat.parse(orjson.dumps({"messages": USER, "stream": True}), {}).answer("r")
    chunks = encoded(chat_answer, Token(0, 1, ""), Token(0, 2, "x"), Finish(0, "stop", "held", "###"))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", "x", "held", None]
    text_answer = completions.parse(b'{"prompt": "a", "stream": true}', {}).answer("r")
    chunks = encoded(text_answer, Token(0, 1, ""), Token(0, 2, "x"), Finish(0, "length", "held"))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["x", "held"]


async def test_defaults_are_openais(served: wire.Served) -> None:
    await post(served, TEXTS, prompt="x")
    await post(served, CHATS, messages=USER)
    text, talk = served.backend.generations
    assert text == GenerateRequest(prompt=("x",), max_tokens=16)
    assert talk == GenerateRequest(messages=(Message("user", "a b"),), max_tokens=None)


TAKEN = {
    "model": "chat", "max_tokens": 7, "min_tokens": 1, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1,
    "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 1, "logit_bias": {"5": -2.5},
    "stop": ["x", "y"], "stop_token_ids": [1, 2], "ignore_eos": True, "seed": 3, "n": 2,
}  # fmt: skip
HARMLESS = {
    "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "priority": 1,
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "skip_special_tokens": True,
    "include_stop_str_in_output": False, "stream_options": None, "stream": False,
}  # fmt: skip
HARMLESS_IN_CHATS = {
    "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "auto",
    "response_format": {"type": "text"}, "modalities": ["text"], "reasoning_effort": "none", "audio": None,
}  # fmt: skip


async def test_every_field_reaches_the_backend(served: wire.Served) -> None:
    meant = TAKEN | {"logit_bias": {5: -2.5}, "stop": ("x", "y"), "stop_token_ids": (1, 2)}
    assert (await post(served, TEXTS, prompt="x", best_of=2, suffix="", **TAKEN, **HARMLESS)).status == 200
    messages = (Message("user", "a b"),)
    assert (await post(served, CHATS, messages=USER, **TAKEN, **HARMLESS, **HARMLESS_IN_CHATS)).status == 200
    assert served.backend.generations == [
        generate_request({"prompt": ("x",)} | meant),
        generate_request({"messages": messages} | meant),
    ]


async def test_null_is_not_given(served: wire.Served) -> None:
    nulls = dict.fromkeys([*TAKEN, *HARMLESS])
    await post(served, TEXTS, prompt="x", echo=None, logprobs=None, best_of=None, suffix=None, **nulls)
    more = dict.fromkeys(["logprobs", "top_logprobs", "max_completion_tokens", *HARMLESS_IN_CHATS])
    await post(served, CHATS, messages=USER, **nulls, **more)
    text, talk = served.backend.generations
    assert text == GenerateRequest(prompt=("x",), max_tokens=16)
    assert talk == GenerateRequest(messages=(Message("user", "a b"),), max_tokens=None)


async def test_names_that_mean_another(served: wire.Served) -> None:
    await post(served, CHATS, messages=USER, max_completion_tokens=5, top_k=-1, stop="x")
    asked = served.backend.generations[0]
    assert (asked.max_tokens, asked.top_k, asked.stop) == (5, 0, ("x",))


async def test_what_messages_may_be(served: wire.Served) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    before = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "Ann"}, before]
    assert (await post(served, CHATS, messages=messages)).status == 200
    assert served.backend.generations[0].messages == (
        Message("system", "be brief"),
        Message("user", "one\ntwo"),
        Message("assistant", "yes"),
    )


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
TOOL = {"type": "function", "function": {"name": "f"}}

WRONG: list[tuple[str, dict[str, Any], str | None]] = [
    (TEXTS, {}, "prompt"),
    (TEXTS, {"prompt": None}, "prompt"),
    (TEXTS, {"prompt": ["a", 4]}, "prompt.1"),
    (TEXTS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (TEXTS, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (TEXTS, {"prompt": "a", "top_k": -2}, "top_k"),
    (TEXTS, {"prompt": "a", "echo": 1}, "echo"),
    (TEXTS, {"prompt": "a", "model": 4}, "model"),
    (TEXTS, {"prompt": "a", "stream": "yes"}, "stream"),
    (TEXTS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (TEXTS, {"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    (TEXTS, {"prompt": "a", "min_tokens": 17}, "min_tokens"),
    (TEXTS, {"prompt": "a", "messages": USER}, "messages"),
    (TEXTS, {"prompt": "a", "temprature": 1}, "temprature"),
    (CHATS, {}, "messages"),
    (CHATS, {"messages": []}, "messages"),
    (CHATS, {"messages": "hello"}, "messages"),
    (CHATS, {"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    (CHATS, {"messages": [{"role": "user"}]}, "messages.0.content"),
    (CHATS, {"messages": [*USER, {"role": "user", "content": 4}]}, "messages.1.content"),
    (CHATS, {"messages": [{"role": "user", "content": ["a"]}]}, "messages.0.content.0"),
    (CHATS, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
    (CHATS, {"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages.0.colour"),
    (CHATS, {"messages": USER, "logprobs": 3}, "logprobs"),
    (CHATS, {"messages": USER, "top_logprobs": 3}, "top_logprobs"),
    (CHATS, {"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHATS, {"messages": USER, "prompt": "a"}, "prompt"),
]
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    (TEXTS, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXTS, {"prompt": "a", "best_of": 3, "n": 2}, "best_of"),
    (TEXTS, {"prompt": "a", "skip_special_tokens": False}, "skip_special_tokens"),
    (CHATS, {"messages": USER, "tools": [TOOL]}, "tools"),
    (CHATS, {"messages": USER, "tool_choice": "required"}, "tool_choice"),
    (CHATS, {"messages": USER, "functions": [{}]}, "functions"),
    (CHATS, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
    (CHATS, {"messages": USER, "modalities": ["text", "audio"]}, "modalities"),
    (CHATS, {"messages": USER, "reasoning_effort": "high"}, "reasoning_effort"),
    (CHATS, {"messages": USER, "web_search_options": {}}, "web_search_options"),
    (CHATS, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
    (CHATS, {"messages": [{"role": "tool", "content": "4", "tool_call_id": "x"}]}, "messages.0.tool_call_id"),
    (CHATS, {"messages": [{"role": "function", "content": "4", "name": "x"}]}, "messages.0.role"),
    (CHATS, {"messages": [{"role": "assistant", "tool_calls": [TOOL]}]}, "messages.0.tool_calls"),
]


async def test_a_wrong_field_is_named(served: wire.Served) -> None:
    for path, fields, param in WRONG:
        reply = await post(served, path, **fields)
        assert (reply.status, reply.json["error"]["param"]) == (400, param), reply.body
        assert (param or "") in reply.json["error"]["message"]
        assert reply.json["error"]["type"] == "invalid_request_error"
    assert served.backend.generations == []
    assert sum(served.count("invalid", path) for path in (TEXTS, CHATS)) == len(WRONG)


async def test_what_cannot_be_honoured_is_refused(served: wire.Served) -> None:
    for path, fields, param in UNSUPPORTED:
        reply = await post(served, path, **fields)
        assert (reply.status, reply.json["error"]["param"]) == (400, param), reply.body
        assert (reply.json["error"]["code"], reply.json["error"]["type"]) == (
            "unsupported_parameter", "invalid_request_error",
        )  # fmt: skip
    assert served.backend.generations == []


async def test_the_model_must_be_one_that_generates(served: wire.Served) -> None:
    reply = await post(served, CHATS, messages=USER, model="gpt-4o", stream=True)
    assert (reply.status, reply.json["error"]["code"]) == (404, "model_not_found")
    reply = await post(served, CHATS, messages=USER, model="sentiment")
    assert (reply.status, reply.json["error"]["code"]) == (400, "wrong_task")
    assert (await post(served, CHATS, messages=USER)).json["model"] == "chat"


RENAMED = {errors.InvalidRequest: 400, errors.Unsupported: 400}
CODES = {"overloaded": "slow_down"}
RETRY = {429: "true", 503: "true", 504: "false"}


async def test_every_error_in_the_dialect(served: wire.Served) -> None:
    for path, fields in ((TEXTS, {"prompt": "a b"}), (CHATS, {"messages": USER})):
        for cls, native in STATUS.items():
            status = RENAMED.get(cls, native)
            code = CODES.get(cls.code, cls.code)
            served.backend.error, served.backend.error_after = cls("it did not work", param="seed"), None
            for stream in (False, True):
                reply = await post(served, path, stream=stream, **fields)
                assert (reply.status, reply.json["error"]["code"]) == (status, code)
                assert set(reply.json["error"]) == {"message", "type", "param", "code"}
                assert reply.headers.get("x-should-retry") == RETRY.get(status)
                assert ("retry-after" in reply.headers) == ("retry-after-ms" in reply.headers) == (status in (429, 503))
            served.backend.error_after = 1
            *_, last, rest = (await post(served, path, stream=True, **fields)).body.split(b"\n\n")
            assert orjson.loads(last.removeprefix(b"data: "))["error"] == reply.json["error"]
            assert rest == b""


async def test_overload_and_a_prompt_that_is_too_long_have_openais_codes(served: wire.Served) -> None:
    served.backend.error = errors.Overloaded("later", retry_after_s=1.25)
    reply = await post(served, CHATS, messages=USER)
    assert (reply.status, reply.json["error"]["code"], reply.json["error"]["type"]) == (
        429, "slow_down", "rate_limit_error",
    )  # fmt: skip
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("2", "1250")
    served.backend.error = errors.TooLarge("3000 tokens of 2048", param="messages", code="too_many_tokens")
    reply = await post(served, CHATS, messages=USER)
    assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
