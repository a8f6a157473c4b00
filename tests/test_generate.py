"""POST /v1/generate over a socket: fields, replies, streams to the byte, errors before and after the first of them."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import wire
from fakes import CHAT, MODEL, FakeBackend, fake_words, until
from wire import Reply, ask

from service.domain import (
    End,
    Finish,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    Message,
    PromptTokens,
    Start,
    Token,
    TokenLogprob,
)
from service.gateway import native
from service.gateway.bodies import generate_request
from service.gateway.errors import STATUS

TIMING = {
    "queue_seconds": 0.001,
    "tokenize_seconds": 0.0001,
    "prefill_seconds": 0.01,
    "decode_seconds": 0.1,
    "first_token_seconds": 0.02,
    "total_seconds": 0.2,
}


@pytest.fixture
async def served(backend: FakeBackend) -> AsyncIterator[wire.Served]:
    backend.served = [MODEL, CHAT]
    async with wire.serve(backend) as served:
        yield served


async def generate(served: wire.Served, headers: str = "x-request-id: r1\r\n", **fields: Any) -> Reply:
    return await ask(served.port, "POST", "/v1/generate", orjson.dumps(fields), headers)


def events_of(reply: Reply) -> list[Any]:
    """The events' data, which must be framed exactly; [DONE] is left as it is."""
    *events, rest = reply.body.split(b"\n\n")
    assert rest == b""
    assert all(event.startswith(b"data: ") for event in events)
    data = [event.removeprefix(b"data: ") for event in events]
    return [one if one == b"[DONE]" else orjson.loads(one) for one in data]


async def test_one_prompt(served: wire.Served) -> None:
    reply = await generate(served, prompt="a fine film")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json == {
        "id": "r1",
        "model": "chat",
        "outputs": [
            {"index": 0, "text": "a fine film ", "finish_reason": "stop", "stop": None, "score": None, "logprobs": None}
        ],
        "prompt_logprobs": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": 3, "cached_tokens": 0},
        "timing": TIMING,
    }
    assert served.count("ok", "/v1/generate", "chat") == 1


async def test_several_prompts_with_several_outputs_each(served: wire.Served) -> None:
    reply = await generate(served, prompt=["a b", "c d"], n=2, max_tokens=1)
    assert [(one["index"], one["text"], one["finish_reason"]) for one in reply.json["outputs"]] == [
        (0, "a ", "length"),
        (1, "a ", "length"),
        (2, "c ", "length"),
        (3, "c ", "length"),
    ]


async def test_a_chat(served: wire.Served) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}]
    reply = await generate(served, messages=messages)
    assert reply.json["outputs"][0]["text"] == "hello there "
    assert served.backend.generations[0].messages == (Message("system", "be brief"), Message("user", "hello there"))


async def test_log_probabilities_and_echo(served: wire.Served) -> None:
    reply = await generate(served, prompt="a bb", logprobs=2, echo=True)
    token = {"id": 2, "text": "a ", "logprob": -0.25}
    other = {"id": 100, "text": "<0>", "logprob": -1.5}
    assert reply.json["outputs"][0]["logprobs"][0] == token | {"top": [token, other]}
    first, second = reply.json["prompt_logprobs"][0]
    assert first == {"id": 2, "text": "a ", "logprob": None, "top": []}
    assert (second["text"], second["logprob"]) == ("bb ", -0.25)


FIELDS = {
    "model": "chat",
    "max_tokens": 7,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": -1,
    "frequency_penalty": 1,
    "logit_bias": {"5": -2.5},
    "stop": ["x", "y"],
    "stop_token_ids": [1, 2],
    "ignore_eos": True,
    "seed": -3,
    "n": 2,
    "logprobs": 0,
    "echo": True,
    "length_penalty": 0.5,
}


@pytest.mark.parametrize("stream", [{}, {"stream": False}, {"stream": True}])
async def test_every_field_reaches_the_backend(served: wire.Served, stream: dict[str, bool]) -> None:
    assert (await generate(served, prompt="x", **stream, **FIELDS)).status == 200
    meant = FIELDS | {"logit_bias": {5: -2.5}, "stop": ("x", "y"), "stop_token_ids": (1, 2)}
    assert served.backend.generations == [generate_request({"prompt": ("x",)} | meant)]


async def test_only_a_stream_wants_each_token(served: wire.Served) -> None:
    for fields in ({}, {"stream": False}, {"stream": True}):
        await generate(served, prompt="x", **fields)
    assert [call.wants_tokens for call in served.backend.calls] == [False, False, True]


async def test_what_is_not_given_has_the_domains_defaults(served: wire.Served) -> None:
    await generate(served, prompt="x")
    await generate(served, prompt="x", max_tokens=None, temperature=None)
    plain, unlimited = served.backend.generations
    assert plain == GenerateRequest(prompt=("x",))
    assert unlimited == GenerateRequest(prompt=("x",), max_tokens=None)


async def test_what_a_prompt_may_be(served: wire.Served) -> None:
    for given, meant in [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [3]], ("a", (3,))),
    ]:
        assert (await generate(served, prompt=given)).status == 200
        assert served.backend.generations[-1].prompt == meant


WRONG: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": 4}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": ["a", 4]}, "prompt.1"),
    ({"prompt": [1, -1]}, "prompt.0"),
    ({"prompt": [True]}, "prompt.0"),
    ({"prompt": [[1], ["a"]]}, "prompt.1"),
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": "7"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 2**31}, "max_tokens"),
    ({"prompt": "a", "temperature": -0.1}, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "top_p": 0}, "top_p"),
    ({"prompt": "a", "repetition_penalty": 1e-38}, "repetition_penalty"),  # a logit divided by it is not finite
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"prompt": "a", "stop": [""]}, "stop.0"),
    ({"prompt": "a", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "a", "n": 129}, "n"),
    ({"prompt": "a", "seed": 2**63}, "seed"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "stream": None}, "stream"),
    ({"prompt": "a", "max_token": 4}, "max_token"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": 4}]}, "messages.0.content"),
    ({}, None),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, None),
    ({"prompt": ["a", "b"], "n": 65}, "n"),
    ({"prompt": "a", "min_tokens": 300}, "min_tokens"),
    ({"prompt": "a", "min_tokens": 10, "max_tokens": 4}, "min_tokens"),
    ({"prompt": "a", "num_beams": 4, "temperature": 0.5}, "temperature"),
]


async def test_a_wrong_field_is_named(served: wire.Served) -> None:
    for fields, param in WRONG:
        reply = await generate(served, **fields)
        assert reply.status == (413 if fields.get("prompt") == ["a"] * 129 else 422), fields
        assert reply.json["error"]["param"] == param, fields
        assert (param or "the body") in reply.json["error"]["message"]
        assert (await generate(served, **{"stream": False, **fields})).json == reply.json, fields
    assert served.backend.generations == []
    assert served.count("invalid", "/v1/generate") == 2 * len(WRONG)


async def test_a_model_that_does_not_generate(served: wire.Served) -> None:
    assert (await generate(served, prompt="a", model="sentiment")).status == 501
    assert (await generate(served, prompt="a", model="other")).status == 404
    assert (await generate(served, prompt="a", model="other", stream=True)).status == 404


async def test_a_stream(served: wire.Served) -> None:
    reply = await generate(served, prompt="a é", stream=True)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-request-id"] == "r1"
    assert reply.body == (
        b'data: {"index":0,"text":"a ","token":{"id":2}}\n\n'
        + 'data: {"index":0,"text":"é ","token":{"id":2}}\n\n'.encode()
        + b'data: {"index":0,"text":"","finish_reason":"stop","stop":null,"score":null}\n\n'
        + b'data: {"id":"r1","model":"chat","finish_reasons":["stop"],'
        + b'"usage":{"prompt_tokens":2,"completion_tokens":2,"cached_tokens":0},"timing":'
        + orjson.dumps(TIMING)
        + b"}\n\ndata: [DONE]\n\n"
    )


@pytest.mark.parametrize("fields", [{"prompt": ["a b c", "d e"], "n": 2, "logprobs": 1}, {"prompt": "a", "echo": True}])
async def test_a_stream_says_what_the_whole_says(served: wire.Served, fields: dict[str, Any]) -> None:
    whole = (await generate(served, **fields)).json
    *events, end, done = events_of(await generate(served, stream=True, **fields))
    assert done == b"[DONE]"
    assert {name: end[name] for name in ("id", "model", "usage", "timing")} == {
        name: whole[name] for name in ("id", "model", "usage", "timing")
    }
    for output in whole["outputs"]:
        mine = [event for event in events if event.get("index") == output["index"]]
        assert "".join(event["text"] for event in mine) == output["text"]
        assert mine[-1]["finish_reason"] == output["finish_reason"] == end["finish_reasons"][output["index"]]
        if output["logprobs"] is not None:
            assert [event["token"] for event in mine[:-1]] == output["logprobs"]
    echoed = [event["prompt_logprobs"] for event in events if "prompt" in event]
    assert echoed == (whole["prompt_logprobs"] or [])


def test_what_was_held_back_comes_with_the_finish() -> None:
    """And every character that JSON must escape arrives, without a line end on the wire."""
    text = '"\\\n\r\t\0\u2028</script>😀'
    answer = native.parse_generate(b'{"prompt": "a"}', {}).answer("r")
    lines = answer.piece(Token(0, 5, text)) + answer.piece(Finish(0, "stop", text, "###", score=-0.5))
    assert lines.count(b"\n") == 4
    token, finish = (orjson.loads(line.removeprefix(b"data: ")) for line in lines.split(b"\n\n")[:-1])
    assert (token["text"], finish["text"], finish["stop"], finish["score"]) == (text, text, "###", -0.5)


def test_outputs_that_interleave_keep_apart() -> None:
    answer = native.parse_generate(b'{"prompt": ["a", "b"], "echo": true}', {}).answer("r")
    logprob = TokenLogprob(1, "x", b"x", -1.0)
    events = [
        Start("chat", 2),
        PromptTokens(1, (logprob, logprob)),
        Token(1, 7, "y"),
        Token(0, 6, "x"),
        Finish(1, "length"),
        Finish(0, "stop"),
        End(GenerateUsage(2, 2, 1), GenerateTiming(0, 0, 0, 0, 0, 0)),
    ]
    lines = b"".join(map(answer.piece, events)).split(b"\n\n")[:-1]
    prompt, *outputs, end = (orjson.loads(line.removeprefix(b"data: ")) for line in lines)
    assert prompt["prompt"] == 1
    assert [one["logprob"] for one in prompt["prompt_logprobs"]] == [None, -1.0]
    assert [event["index"] for event in outputs] == [1, 0, 1, 0]
    assert end["finish_reasons"] == ["stop", "length"]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_error_before_the_first_token_is_a_status(served: wire.Served, stream: bool) -> None:
    for cls, status in STATUS.items():
        served.backend.error = cls("it did not work", param="prompt")
        reply = await generate(served, prompt="a", stream=stream)
        assert (reply.status, reply.headers["content-type"]) == (status, "application/json")
        assert reply.json["error"]["code"] == cls.code


async def test_every_error_after_it_is_an_event(served: wire.Served) -> None:
    for cls, status in STATUS.items():
        served.backend.error, served.backend.error_after = cls("it broke", param="prompt"), 1
        reply = await generate(served, prompt="a b", stream=True)
        token, failed = events_of(reply)
        assert (reply.status, token["text"]) == (200, "a ")
        assert {name: failed["error"][name] for name in ("message", "param", "code")} == {
            "message": "it broke",
            "param": "prompt",
            "code": cls.code,
        }
        assert (await generate(served, prompt="a b")).status == status  # not streamed, it is a status still


async def test_an_exception_in_a_stream_tells_no_secret(served: wire.Served) -> None:
    served.backend.error, served.backend.error_after = ZeroDivisionError("the secret"), 1
    _, failed = events_of(await generate(served, prompt="a b", stream=True))
    assert failed["error"]["code"] == "internal_error"
    assert "r1" in failed["error"]["message"]
    assert "secret" not in str(failed)


async def test_the_deadline_and_the_id_reach_the_backend(served: wire.Served) -> None:
    await generate(served, headers="x-request-timeout-ms: 1500\r\nx-request-id: mine\r\n", prompt="a", stream=True)
    await generate(served, prompt="a")
    short, default = served.backend.calls
    assert (short.request_id, short.route) == ("mine", "/v1/generate")
    assert default.deadline - short.deadline > 50


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
async def test_the_key_is_asked_for(backend: FakeBackend, path: str) -> None:
    backend.served = [CHAT]
    body = orjson.dumps({"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": "a"})
    async with wire.serve(backend, api_key="key") as served:
        reply = await ask(served.port, "POST", path, body, "authorization: Bearer other\r\n")
        assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
        assert served.count("invalid", path) == 1
        assert (await ask(served.port, "POST", path, body, "authorization: Bearer key\r\n")).status == 200


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/completions", "/v1/chat/completions"])
async def test_only_post_is_taken(served: wire.Served, path: str) -> None:
    async with wire.connect(served.port) as client:
        for method in ("GET", "HEAD", "PUT", "OPTIONS"):
            reply = await client.ask(method, path)
            assert (reply.status, reply.headers["allow"]) == (405, "POST")
        assert (await client.ask("GET", "/healthz")).status == 200


async def test_draining_finishes_a_stream(served: wire.Served) -> None:
    served.backend.hold()
    async with wire.connect(served.port) as client:
        body = orjson.dumps({"prompt": "a b", "stream": True})
        await client.send(wire.request("POST", "/v1/generate", body))
        await until(lambda: served.backend.num_waiting == 1)
        served.gateway.door.close()
        assert (await generate(served, prompt="a")).status == 503
        served.backend.release()
        assert events_of(await client.read())[-1] == b"[DONE]"


def test_the_fake_says_what_was_asked() -> None:
    assert fake_words(GenerateRequest(prompt=("a b",)), 0) == ["a ", "b "]
