"""/v1/attention and /v1/explain over a socket: what goes in, how maps are written, what is refused."""

import array
import base64
import dataclasses
import json
from typing import Any

import orjson
import pytest
import wire
from fakes import CHAT, MODEL, FakeBackend, fake_maps, fake_tokens, until

from service import errors
from service.domain import (
    AttendedToken,
    AttentionMap,
    AttentionMaps,
    AttentionRequest,
    ExplainRequest,
    GenerateOptions,
    Prediction,
    Timing,
    Usage,
)
from service.gateway import attend
from service.gateway.attend import pieces_of


async def ask(served: wire.Served, **body: Any) -> wire.Reply:
    return await wire.ask(served.port, "POST", "/v1/attention", orjson.dumps(body))


async def explain(served: wire.Served, **body: Any) -> wire.Reply:
    return await wire.ask(served.port, "POST", "/v1/explain", orjson.dumps(body))


async def test_a_reply(served: wire.Served) -> None:
    reply = await ask(served, text="a film")
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    weights = [[[2000 + 100 * head + 10 * query + key for key in range(3)] for query in range(3)] for head in range(2)]
    assert reply.json == {
        "model": "sentiment",
        "graph": "classify",
        "tokens": [
            {"id": 0, "text": "[CLS]", "start": 0, "end": 0, "special": True, "part": None},
            {"id": 1, "text": "a", "start": 0, "end": 1, "special": False, "part": "text"},
            {"id": 4, "text": "film", "start": 2, "end": 6, "special": False, "part": "text"},
        ],
        "maps": [{"kind": "encoder", "layer": 2, "heads": [0, 1], "shape": [2, 3, 3], "weights": weights}],
        "prediction": {"scores": reply.json["prediction"]["scores"]},
        "usage": {"prompt_tokens": 3, "truncated": 0},
        "timing": {
            "queue_seconds": 0.001,
            "tokenize_seconds": 0.0001,
            "compute_seconds": 0.004,
            "total_seconds": 0.0051,
        },
    }


async def test_base64_holds_the_very_floats(served: wire.Served) -> None:
    reply = await ask(served, text="a film", layers="all", encoding="base64")
    direct = fake_maps(AttentionRequest(text="a film", layers="all"))
    assert [base64.b64decode(one["weights"]) for one in reply.json["maps"]] == [one.weights for one in direct]
    plain = await ask(served, text="a film", layers="all", encoding="json")
    for one, other in zip(plain.json["maps"], direct, strict=True):
        flat = [number for rows in one["weights"] for row in rows for number in row]
        assert array.array("f", flat).tobytes() == other.weights


async def test_what_is_asked_reaches_the_backend(served: wire.Served) -> None:
    fields: dict[str, Any] = {
        "text": "naïve 🎬", "text_pair": "b", "model": "sentiment", "layers": [2, 0], "heads": [1], "reduce": "max",
        "kind": "encoder", "top_k": 1,
    }  # fmt: skip
    assert (await ask(served, **fields)).status == 200
    assert served.backend.requests == [AttentionRequest(**fields | {"layers": (2, 0), "heads": (1,)})]
    served.backend.served = [MODEL, CHAT]
    await ask(served, text="a", generate={"max_tokens": 3, "seed": 7})
    assert served.backend.requests[-1] == AttentionRequest(text="a", generate=GenerateOptions(max_tokens=3, seed=7))
    await explain(served, text="a", text_pair="b", model="sentiment", method="rollout", label="NEGATIVE")
    wanted = ExplainRequest(text="a", text_pair="b", model="sentiment", method="rollout", label="NEGATIVE")
    assert served.backend.requests[-1] == wanted


@pytest.mark.parametrize("encoding", ["json", "base64"])
async def test_a_large_reply_comes_in_pieces_and_whole(served: wire.Served, encoding: str) -> None:
    text = "word " * 120
    reply = await ask(served, text=text, layers="all", encoding=encoding)
    assert reply.headers["transfer-encoding"] == "chunked"
    direct = fake_maps(AttentionRequest(text=text, layers="all"))
    assert [one["shape"] for one in reply.json["maps"]] == [list(one.shape) for one in direct]
    if encoding == "base64":
        assert [base64.b64decode(one["weights"]) for one in reply.json["maps"]] == [one.weights for one in direct]
    else:
        assert reply.json["maps"][2]["weights"][1][120][119] == 2000 + 100 + 1200 + 119


async def test_other_requests_are_answered_between_the_pieces(served: wire.Served) -> None:
    """A client that does not read its maps holds up nobody."""
    async with wire.connect(served.port) as slow:
        await slow.send(wire.request("POST", "/v1/attention", orjson.dumps({"text": "word " * 250, "layers": "all"})))
        await until(lambda: served.count("ok", "/v1/attention", "sentiment") == 1)
        assert (await wire.classify(served.port)).status == 200
        reply = await slow.read()
    assert len(reply.json["maps"]) == 3


def test_no_piece_is_longer_than_a_head_and_none_is_made_before_its_turn() -> None:
    one = AttentionMap("cross", 0, (0, 1, 2), (3, 2, 4), array.array("f", range(24)).tobytes())
    written = (AttendedToken(5, "ja", 0, 2, False, "target"),)
    prediction = Prediction(text="ja")
    result = AttentionMaps(
        "m", "attention", fake_tokens("a b c"), written, (one, one), prediction, Usage(1, 0), Timing(0, 0, 0, 0)
    )
    pieces = list(pieces_of(result, "json"))
    assert max(map(len, pieces[1:])) <= len(orjson.dumps(list(range(8)))) * 2 + 90
    whole = json.loads(b"".join(pieces))
    assert whole["maps"][1]["weights"][2] == [[16, 17, 18, 19], [20, 21, 22, 23]]
    assert whole["prediction"] == {"text": "ja"}
    assert whole["target_tokens"][0]["part"] == "target"
    made = pieces_of(result, "base64")
    assert next(made).endswith(b'"maps":[')


async def test_an_explanation(served: wire.Served) -> None:
    reply = await explain(served, text="a film", method="occlusion", label="NEGATIVE")
    assert reply.status == 200
    assert reply.json["scores"] == [0, 0.01, 0.04]
    assert {name: reply.json[name] for name in ("model", "method", "label")} == {
        "model": "sentiment", "method": "occlusion", "label": "NEGATIVE",
    }  # fmt: skip
    assert [token["special"] for token in reply.json["tokens"]] == [True, False, False]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": 4}, "text"),
        ({"text": None}, "text"),
        ({"text": "a", "layers": "first"}, "layers"),
        ({"text": "a", "layers": []}, "layers"),
        ({"text": "a", "layers": [1.5]}, "layers"),
        ({"text": "a", "layers": [True]}, "layers"),
        ({"text": "a", "layers": 3}, "layers"),
        ({"text": "a", "heads": "last"}, "heads"),
        ({"text": "a", "heads": [0, 0]}, "heads"),
        ({"text": "a", "heads": list(range(1025))}, "heads"),
        ({"text": "a", "reduce": "sum"}, "reduce"),
        ({"text": "a", "kind": "self"}, "kind"),
        ({"text": "a", "encoding": "npy"}, "encoding"),
        ({"text": "a", "generate": {"max_tokens": 0}}, "generate.max_tokens"),
        ({"text": "a", "generate": {"beams": 2}}, "generate.beams"),
        ({"text": "a", "top_k": 0}, "top_k"),
        ({"text": "a", "input": "b"}, "input"),
        ({"text": "a", "target": "b", "generate": {}}, None),
    ],
)
async def test_a_wrong_field_is_named(served: wire.Served, body: dict[str, Any], param: str | None) -> None:
    reply = await ask(served, **body)
    assert (reply.status, reply.json["error"]["param"]) == (422, param)
    assert (param or "do not go together") in reply.json["error"]["message"]
    assert served.backend.requests == []
    assert served.count("invalid", "/v1/attention") == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "method": "gradient"}, "method"),
        ({"text": "a", "label": 1}, "label"),
        ({"text": "a", "layers": "all"}, "layers"),
    ],
)
async def test_a_wrong_field_of_an_explanation_is_named(served: wire.Served, body: dict[str, Any], param: str) -> None:
    reply = await explain(served, **body)
    assert (reply.status, reply.json["error"]["param"]) == (422, param)
    assert served.count("invalid", "/v1/explain") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.TooLarge("the maps", param="layers", code="attention_too_large"), 413),
        (errors.Unsupported("not yet", code="no_attention"), 501),
        (errors.Overloaded("full", retry_after_s=2.0), 429),
        (errors.DeadlineExceeded("late"), 504),
    ],
    ids=lambda value: str(value),
)
async def test_errors_have_the_native_shape(
    served: wire.Served, backend: FakeBackend, error: errors.AttndError, status: int
) -> None:
    backend.error = error
    for reply in (await ask(served, text="a"), await explain(served, text="a")):
        assert (reply.status, reply.json["error"]["code"]) == (status, error.code)
        assert reply.json["error"]["message"] == error.message


async def test_a_key_is_asked_for(backend: FakeBackend) -> None:
    async with wire.serve(backend, api_key="secret") as served:
        assert [(await ask(served, text="a")).status, (await explain(served, text="a")).status] == [401, 401]
        headers = "authorization: Bearer secret\r\n"
        assert (await wire.ask(served.port, "POST", "/v1/attention", b'{"text": "a"}', headers)).status == 200


async def test_openapi_has_every_field(served: wire.Served) -> None:
    described = (await wire.ask(served.port, "GET", "/openapi.json")).json
    schemas = described["components"]["schemas"]
    asked = {field.name for field in dataclasses.fields(AttentionRequest)}
    assert set(schemas["AttentionBody"]["properties"]) == asked | {"encoding"}
    assert schemas["AttentionBody"]["required"] == ["text"]
    assert "Abnar and Zuidema 2020" in schemas["AttentionBody"]["description"]
    assert "Jain and Wallace" in schemas["ExplainRequest"]["description"]
    told = {field.name for field in dataclasses.fields(AttentionMaps)}
    assert (
        set(schemas["Attention"]["properties"])
        == told
        == {field.name for field in dataclasses.fields(attend.Attention)}
    )
