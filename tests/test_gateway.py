"""What holds for every HTTP route: errors, ids, keys, deadlines, health, the description, draining."""

import asyncio
import dataclasses
import json
import re
import time
from http import HTTPStatus

import pytest
import wire
from fakes import FakeBackend, until
from wire import ask, classify

import service.errors
from service import errors
from service.domain import GenerateRequest
from service.gateway.errors import STATUS, failure_of
from service.observed import NO_ROUTE


def _subclasses(cls: type) -> set[type]:
    return {cls, *(found for sub in cls.__subclasses__() for found in _subclasses(sub))}


def test_every_error_has_a_status() -> None:
    in_tree = {cls for cls in _subclasses(errors.AttndError) if cls.__module__ == service.errors.__name__}
    assert set(STATUS) == in_tree
    assert STATUS[errors.Cancelled] == 499
    assert all(status in {499, *HTTPStatus} for status in STATUS.values())


@pytest.mark.parametrize("cls", STATUS)
async def test_every_error_is_answered_in_the_shape(served: wire.Served, cls: type[errors.AttndError]) -> None:
    served.backend.error = cls("it did not work", param="input")
    reply = await classify(served.port)
    assert reply.status == STATUS[cls]
    assert set(reply.json) == {"error"}
    expected = {"message": "it did not work", "param": "input", "code": cls.code, "type": failure_of(cls("")).type}
    assert reply.json["error"] == expected


async def test_an_exception_is_a_500_that_tells_no_secret(served: wire.Served) -> None:
    served.backend.error = ZeroDivisionError("the secret")
    reply = await classify(served.port, headers="x-request-id: abc\r\n")
    assert reply.status == 500
    assert reply.json["error"]["code"] == "internal_error"
    assert "abc" in reply.json["error"]["message"]
    assert b"secret" not in reply.body
    assert served.count("error", model="") == 1


@pytest.mark.parametrize("cls", [errors.Overloaded, errors.Unavailable])
async def test_what_passes_says_when_to_come_back(
    served: wire.Served, cls: type[errors.Overloaded] | type[errors.Unavailable]
) -> None:
    served.backend.error = cls("later", retry_after_s=1.25)
    reply = await classify(served.port)
    assert (reply.headers["retry-after"], reply.headers["retry-after-ms"]) == ("2", "1250")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "route_not_found"),
        ("GET", "/v1/classify/", 404, "route_not_found"),
        ("GET", "/v1/classify", 405, "method_not_allowed"),
        ("DELETE", "/v1/classify", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/classify", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
    ],
)
async def test_what_is_not_there(served: wire.Served, method: str, path: str, status: int, code: str) -> None:
    reply = await ask(served.port, method, path)
    assert reply.status == status
    assert reply.json["error"]["code"] == code
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert reply.headers["x-request-id"]
    assert served.count("invalid", NO_ROUTE) == (code != "model_not_found")


async def test_what_is_not_there_is_told_and_counted_without_what_callers_make_up(served: wire.Served) -> None:
    reply = await ask(served.port, "GET", "/" + "x" * 10_000)
    assert len(reply.body) < 1000
    text = (await ask(served.port, "GET", "/metrics")).body.decode()
    assert set(re.findall('route="([^"]*)"', text)) == {NO_ROUTE}


async def test_what_asks_no_model_is_not_counted(backend: FakeBackend) -> None:
    async with wire.serve(backend, api_key="key") as served:
        for path in ("/v1/models", "/v1/models/sentiment", "/info"):
            await ask(served.port, "GET", path)
            await ask(served.port, "GET", path, headers="authorization: Bearer key\r\n")
        for path in ("/healthz", "/readyz", "/health", "/metrics", "/", "/docs", "/openapi.json"):
            assert (await ask(served.port, "GET", path)).status == 200
        assert b"attnd_request_seconds_count" not in (await ask(served.port, "GET", "/metrics")).body


async def test_a_wrong_method_is_told_the_right_one(served: wire.Served) -> None:
    assert (await ask(served.port, "GET", "/v1/classify")).headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/v1/classify", "/healthz", "/nothing"])
async def test_a_request_id_comes_back(served: wire.Served, path: str) -> None:
    reply = await ask(served.port, "GET", path, headers="X-Request-Id: a.b:c-1_D\r\n")
    assert reply.headers["x-request-id"] == "a.b:c-1_D"


async def test_a_request_id_reaches_the_backend(served: wire.Served) -> None:
    await classify(served.port, headers="X-Request-Id: mine\r\n")
    assert served.backend.calls[0].request_id == "mine"
    assert served.backend.calls[0].route == "/v1/classify"


async def test_the_longest_request_id_comes_back(served: wire.Served) -> None:
    longest = "aZ09._:-" * 16
    assert (await ask(served.port, "GET", "/healthz", headers=f"X-Request-Id: {longest}\r\n")).headers[
        "x-request-id"
    ] == longest


@pytest.mark.parametrize("bad", ["", "a b", "a/b", "a+b", "a=", "x" * 129, "é"])
async def test_a_bad_request_id_is_replaced(served: wire.Served, bad: str) -> None:
    reply = await ask(served.port, "GET", "/healthz", headers=f"X-Request-Id: {bad}\r\n")
    assert len(reply.headers["x-request-id"]) == 32
    assert int(reply.headers["x-request-id"], 16) >= 0


async def test_two_requests_get_two_ids(served: wire.Served) -> None:
    replies = [await ask(served.port, "GET", "/healthz") for _ in range(2)]
    assert replies[0].headers["x-request-id"] != replies[1].headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/classify", "/", "/models/sentiment"])
@pytest.mark.parametrize("header", ["", "authorization: Bearer wrong\r\n", "authorization: Basic k\xc3y\r\n"])
async def test_classifying_needs_the_key(backend: FakeBackend, path: str, header: str) -> None:
    async with wire.serve(backend, api_key="kéy") as served:
        reply = await ask(served.port, "POST", path, b'{"input": "x"}', header)
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert backend.requests == []
        route = path.replace("sentiment", "{model_id}")
        assert served.count("invalid", route) == 1


async def test_the_key_opens(backend: FakeBackend) -> None:
    async with wire.serve(backend, api_key="kéy") as served:
        for path in ("/v1/models", "/v1/models/sentiment", "/info"):
            assert (await ask(served.port, "GET", path)).status == 401
            assert (await ask(served.port, "GET", path, headers="Authorization: bearer kéy\r\n")).status == 200
        assert (await classify(served.port, headers="Authorization: Bearer kéy\r\n")).status == 200
        for path in ("/healthz", "/readyz", "/metrics", "/health", "/docs", "/openapi.json"):
            assert (await ask(served.port, "GET", path)).status == 200


async def test_the_deadline_is_the_callers_when_sooner(served: wire.Served) -> None:
    before = time.monotonic()
    for milliseconds in (1500, 86_400_000):
        await classify(served.port, headers=f"X-Request-Timeout-Ms: {milliseconds}\r\n")
    await classify(served.port)
    short, long, default = (call.deadline - before for call in served.backend.calls)
    assert 1.5 <= short < 60
    assert 60 <= long < 86_400
    assert 60 <= default < 86_400


@pytest.mark.parametrize("bad", ["0", "-5", "1.5", "abc", "", "9" * 30, "86400001", "٣"])
async def test_a_bad_deadline_is_named(served: wire.Served, bad: str) -> None:
    reply = await classify(served.port, headers=f"X-Request-Timeout-Ms: {bad}\r\n")
    assert reply.status == 422
    assert reply.json["error"]["param"] == "X-Request-Timeout-Ms"
    assert served.count("invalid") == 1


async def test_a_compressed_body_is_refused_by_name(served: wire.Served) -> None:
    reply = await classify(served.port, headers="Content-Encoding: gzip\r\n")
    assert (reply.status, reply.json["error"]["code"]) == (422, "unsupported_encoding")


async def test_health_and_readiness(served: wire.Served) -> None:
    assert (await ask(served.port, "GET", "/healthz")).json == {"status": "alive"}
    assert (await ask(served.port, "GET", "/readyz")).json == {"status": "ready", "models": ["sentiment"]}
    served.backend.unready = errors.Unavailable("loading")
    assert (await ask(served.port, "GET", "/healthz")).status == 200
    reply = await ask(served.port, "GET", "/readyz")
    assert (reply.status, reply.json["error"]["message"]) == (503, "loading")
    assert (await ask(served.port, "GET", "/health")).status == 503
    served.backend.failure = "the engine of sentiment has failed"
    reply = await ask(served.port, "GET", "/healthz")
    assert (reply.status, reply.json["error"]["message"]) == (503, served.backend.failure)


async def test_head_has_no_body(served: wire.Served) -> None:
    async with wire.connect(served.port) as client:
        for path in ("/healthz", "/nothing", "/docs"):
            assert (await client.ask("HEAD", path)).headers["content-length"] != "0"
        assert (await client.ask("GET", "/healthz")).json == {"status": "alive"}


async def test_metrics_count_every_end_once(served: wire.Served) -> None:
    await classify(served.port)
    await classify(served.port, b"{")
    served.backend.error = errors.DeadlineExceeded("late")
    await classify(served.port)
    text = (await ask(served.port, "GET", "/metrics")).body.decode()
    assert served.count("ok", model="sentiment") == 1
    assert served.count("invalid") == 1
    assert 'outcome="deadline"' in text
    assert 'attnd_requests_in_flight{route="/v1/classify"} 0.0' in text


async def test_openapi_describes_what_is_there(served: wire.Served) -> None:
    described = (await ask(served.port, "GET", "/openapi.json")).json
    assert set(described["paths"]) == {
        "/v1/classify",
        "/v1/generate",
        "/v1/attention",
        "/v1/explain",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/",
        "/models/{model_id}",
        "/info",
        "/health",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    post = described["paths"]["/v1/classify"]["post"]
    schemas = described["components"]["schemas"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ClassifyRequest")
    assert {kind.get("type", "object") for kind in schemas["ClassifyRequest"]["properties"]["input"]["anyOf"]} == {
        "string",
        "object",
        "array",
    }
    for path, asked in described["paths"].items():
        for operation in asked.values():
            replies = operation["responses"]
            assert all(reply["schema"] for reply in replies["200"].get("content", {}).values()), path
            needs_key = path not in ("/health", "/healthz", "/readyz", "/metrics")
            assert ("401" in replies, "503" in replies) == (needs_key, path != "/metrics"), path
    assert set(described["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}
    generated = described["paths"]["/v1/generate"]["post"]
    assert generated["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/GenerateBody")
    assert set(generated["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = {field.name for field in dataclasses.fields(GenerateRequest)} | {"stream"}
    assert set(schemas["GenerateBody"]["properties"]) == fields
    assert set(post["responses"]) >= {"200", "401", "404", "413", "422", "429", "500", "501", "503", "504"}
    assert set(schemas["ErrorDetail"]["required"]) == {"message", "type", "param", "code"}
    assert "HTTPValidationError" not in json.dumps(described)
    (request_id,) = (header for header in post["parameters"] if header["name"] == "x-request-id")
    assert "1 to 128 of A-Z a-z 0-9 . _ : -" in request_id["description"]


async def test_docs_load_nothing_from_elsewhere(served: wire.Served) -> None:
    page = (await ask(served.port, "GET", "/docs")).body.decode()
    assert "openapi.json" in page
    assert "https://" not in page
    assert "http://" not in page


async def test_draining_finishes_what_was_accepted_and_refuses_the_rest(served: wire.Served) -> None:
    served.backend.hold()
    accepted = asyncio.ensure_future(classify(served.port))
    await until(lambda: served.backend.num_waiting == 1)
    stopping = asyncio.ensure_future(served.server.stop())
    await until(lambda: not served.gateway.door.is_open)
    refused = await classify(served.port)
    assert (refused.status, refused.json["error"]["code"]) == (503, "draining")
    assert refused.headers["connection"] == "close"
    assert int(refused.headers["retry-after"]) >= 1
    assert (await ask(served.port, "GET", "/readyz")).status == 503
    assert (await ask(served.port, "GET", "/healthz")).status == 200
    served.backend.release()
    reply = await accepted
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    await stopping
    with pytest.raises(OSError):  # noqa: PT011 (which one depends on the system)
        await classify(served.port)


async def test_what_has_drained_answers_until_it_is_stopped(served: wire.Served) -> None:
    await served.server.drain()
    refused = await classify(served.port)
    assert (refused.status, refused.json["error"]["code"]) == (503, "draining")
    assert (await ask(served.port, "GET", "/readyz")).status == 503
    assert (await ask(served.port, "GET", "/healthz")).status == 200
    assert (await ask(served.port, "GET", "/metrics")).status == 200
    await served.server.stop()
    with pytest.raises(OSError):  # noqa: PT011 (which one depends on the system)
        await ask(served.port, "GET", "/healthz")


async def test_stopping_after_a_drain_has_no_grace_of_its_own(backend: FakeBackend) -> None:
    async with wire.serve(backend, drain_timeout=1.0) as served, wire.connect(served.port) as client:
        backend.hold()
        await client.send(wire.request("POST", "/v1/classify", wire.GOOD))
        await until(lambda: backend.num_waiting == 1)
        await served.server.drain()
        assert backend.num_waiting == 1
        async with asyncio.timeout(0.9):
            await served.server.stop()
        assert backend.num_cancelled == 1


async def test_draining_ends_after_the_grace(backend: FakeBackend) -> None:
    async with wire.serve(backend, drain_timeout=0.05) as served:
        backend.hold()
        async with wire.connect(served.port) as client:
            await client.send(wire.request("POST", "/v1/classify", wire.GOOD))
            await until(lambda: backend.num_waiting == 1)
            await served.server.stop()
            assert backend.num_cancelled == 1
            assert served.count("cancelled", model="") == 1
