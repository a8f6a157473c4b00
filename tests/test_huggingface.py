"""Hugging Face's dialect, with the real client over a real socket and as raw requests."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest
import wire
from fakes import fake_scores
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError
from wire import ask

from service import errors
from service.domain import TextInput


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
    body = {"inputs": "a", "parameters": {"truncation": False}, "options": {"wait_for_model": True}}
    assert (await ask(served.port, "POST", "/", orjson.dumps(body))).status == 200
    assert served.backend.requests[0].truncate is False


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
