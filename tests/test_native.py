"""The native dialect: /v1/classify and the models, over a socket."""

import orjson
import pytest
import wire
from fakes import MODEL, fake_scores
from wire import ask, classify

from service import errors
from service.domain import ClassifyRequest, ModelInfo, TextInput
from service.gateway import native


def _body(**fields: object) -> bytes:
    return orjson.dumps(fields)


async def test_one_text(served: wire.Served) -> None:
    reply = await classify(served.port, _body(input="a fine film"))
    assert reply.status == 200
    assert reply.headers["content-type"] == "application/json"
    scores = [{"label": score.label, "score": score.score} for score in fake_scores(TextInput("a fine film"))]
    assert reply.json == {
        "model": "sentiment",
        "results": [scores],
        "usage": {"prompt_tokens": 5, "truncated": 0},
        "timing": {
            "queue_seconds": 0.001,
            "tokenize_seconds": 0.0001,
            "compute_seconds": 0.004,
            "total_seconds": 0.0051,
        },
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a", (TextInput("a"),)),
        ("", (TextInput(""),)),
        ("\u0000 é 😀", (TextInput("\u0000 é 😀"),)),
        (["a", "b"], (TextInput("a"), TextInput("b"))),
        ({"text": "a"}, (TextInput("a"),)),
        ({"text": "a", "text_pair": "b"}, (TextInput("a", "b"),)),
        (["a", {"text": "b", "text_pair": "c"}], (TextInput("a"), TextInput("b", "c"))),
    ],
)
async def test_what_an_input_may_be(served: wire.Served, given: object, meant: tuple[TextInput, ...]) -> None:
    reply = await classify(served.port, _body(input=given))
    assert reply.status == 200
    assert served.backend.requests == [ClassifyRequest(input=meant)]
    assert [scores[0]["score"] for scores in reply.json["results"]] == [fake_scores(text)[0].score for text in meant]


async def test_options_reach_the_backend(served: wire.Served) -> None:
    options = {"model": "sentiment", "top_k": 1, "function_to_apply": "sigmoid", "truncate": False}
    reply = await classify(served.port, _body(input="x", **options))
    assert len(reply.json["results"][0]) == 1
    asked = served.backend.requests[0]
    assert {name: getattr(asked, name) for name in options} == options


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (_body(input=4), "input"),
        (_body(input=None), "input"),
        (_body(input=[]), "input"),
        (_body(input=["a", 4]), "input.1"),
        (_body(input=[{"text_pair": "a"}]), "input.0.text"),
        (_body(input=[["a", "b"]]), "input.0"),
        (_body(input={"text": 4}), "input.text"),
        (_body(input={"text": "a", "pair": "b"}), "input.pair"),
        (_body(), "input"),
        (_body(input="a", top_k=0), "top_k"),
        (_body(input="a", top_k=1.5), "top_k"),
        (_body(input="a", top_k=True), "top_k"),
        (_body(input="a", model=""), "model"),
        (_body(input="a", model=7), "model"),
        (_body(input="a", function_to_apply="tanh"), "function_to_apply"),
        (_body(input="a", truncate="yes"), "truncate"),
        (_body(input="a", inputs="b"), "inputs"),
    ],
)
async def test_a_wrong_field_is_named(served: wire.Served, body: bytes, param: str) -> None:
    reply = await classify(served.port, body)
    assert reply.status == 422
    assert reply.json["error"]["param"] == param
    assert param in reply.json["error"]["message"]
    assert served.backend.requests == []
    assert served.count("invalid") == 1


@pytest.mark.parametrize("content_type", ["application/json", "application/x-www-form-urlencoded", "text/plain", ""])
async def test_the_body_is_json_whatever_it_is_called(served: wire.Served, content_type: str) -> None:
    reply = await classify(served.port, headers=f"content-type: {content_type}\r\n" if content_type else "")
    assert reply.status == 200


async def test_an_unknown_model_is_not_found(served: wire.Served) -> None:
    reply = await classify(served.port, _body(input="a", model="other"))
    assert (reply.status, reply.json["error"]["param"]) == (404, "model")
    assert "sentiment" in reply.json["error"]["message"]


async def test_models_have_openais_shape_and_the_facts(served: wire.Served) -> None:
    reply = await ask(served.port, "GET", "/v1/models")
    expected = {
        "id": "sentiment",
        "object": "model",
        "created": MODEL.created,
        "owned_by": "attnd",
        "task": "classification",
        **MODEL.facts,
    }
    assert reply.json == {"object": "list", "data": [expected]}
    assert (await ask(served.port, "GET", "/v1/models/sentiment")).json == expected


async def test_a_models_id_may_have_slashes(served: wire.Served) -> None:
    served.backend.served = [ModelInfo("owner/name", "classification", 1, {})]
    assert (await ask(served.port, "GET", "/v1/models/owner/name")).json["id"] == "owner/name"
    assert (await ask(served.port, "GET", "/v1/models/owner%2Fname")).json["id"] == "owner/name"


async def test_models_are_unavailable_while_loading(served: wire.Served) -> None:
    served.backend.unready = errors.Unavailable("loading")
    assert (await ask(served.port, "GET", "/v1/models")).status == 503


def test_no_fact_hides_a_field() -> None:
    assert native.model_object(ModelInfo("a", "t", 1, {"id": "b", "task": "c"}))["id"] == "a"
