"""Which path is whose, and what OpenAPI says about it.

What asks a model is declared to FastAPI, which documents and routes it, but an `Endpoint` answers it on the bare ASGI
call. Everything else is plain FastAPI.
"""

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Annotated, Any, cast

import orjson
from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from service.domain import Classification, ClassifyRequest, ExplainRequest, Explanation, Score
from service.errors import Unavailable
from service.gateway import native
from service.gateway.attend import Attention, AttentionBody, AttentionEndpoint, ExplainEndpoint
from service.gateway.door import Door
from service.gateway.endpoint import ClassifyEndpoint, Entrance
from service.gateway.errors import ErrorBody, HuggingFaceErrorBody
from service.gateway.generation import GenerateEndpoint
from service.gateway.huggingface.classification import HuggingFaceRequest
from service.gateway.huggingface.endpoint import EndpointInfo, PipelineEndpoint, endpoint_info
from service.gateway.huggingface.text_generation import GeneratedText, TextGenerationBody
from service.gateway.huggingface.translation import Translation, TranslationBody
from service.gateway.middleware import HEADERS
from service.gateway.openai import chat, completions
from service.metrics import Metrics
from service.observed import Observed

Endpoint = ClassifyEndpoint | GenerateEndpoint | AttentionEndpoint | ExplainEndpoint | PipelineEndpoint
Signature = Callable[..., Awaitable[Any]]
_ID_ABOUT = "Comes back in the reply and is in the log: 1 to 128 of A-Z a-z 0-9 . _ : -; made up when absent or another"
RequestId = Annotated[str | None, Header(description=_ID_ABOUT)]
TimeoutMs = Annotated[int | None, Header(description="Milliseconds after which the request fails with 504")]

_STATUSES = {
    401: "The API key is missing or wrong",
    404: "No such model",
    413: "The body or the list of inputs is over its limit",
    422: "The request is malformed or out of range; `param` names the field",
    429: "The queue is full; Retry-After says when to come back",
    500: "Our fault",
    501: "The model exists but cannot do this",
    503: "Loading, draining, or no worker can be reached",
    504: "The deadline has passed",
}

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With `stream`, server-sent events instead; an error after the first is an event too",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


def _errors(*statuses: int, body: type = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of errors; the default also keeps FastAPI from describing its own, which never occur."""
    described = {status: _STATUSES[status] for status in statuses} | {"default": "Any other error, in the same shape"}
    return {status: {"model": body, "description": text} for status, text in described.items()}


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _key_checks(door: Door) -> list[Any]:
    """The dependencies of a route that asks for the API key; in the documentation too when there is a key."""

    async def check_key(request: Request) -> None:
        door.check_key(request.scope[HEADERS])

    documented = [Depends(HTTPBearer(auto_error=False))] if door.has_key else []
    return [Depends(check_key), *documented]


def _signature(body: Any, reply: Any) -> Signature:
    """Never called: it tells FastAPI what to document."""

    async def signature(request: Any, x_request_id: RequestId = None, x_request_timeout_ms: TimeoutMs = None) -> Any:
        raise NotImplementedError

    signature.__annotations__ |= {"request": body, "return": reply}
    return signature


def _add_endpoint(app: FastAPI, path: str, endpoint: Endpoint, signature: Signature, **about: Any) -> None:
    """Route POST `path` to `endpoint`."""
    app.add_api_route(path, signature, methods=["POST"], **about)
    cast(APIRoute, app.router.routes[-1]).app = endpoint


def add_status_routes(app: FastAPI, backend: Observed, door: Door, metrics: Metrics) -> None:
    """Health for probes and metrics for Prometheus; no key is asked for."""

    @app.get("/healthz", tags=["status"], summary="Is the process alive, with all its engines?", responses=_errors(503))
    async def healthz() -> dict[str, str]:
        if backend.failure is not None:
            raise Unavailable(backend.failure, code="engine_dead")
        return {"status": "alive"}

    @app.get("/readyz", tags=["status"], summary="Can it serve?", responses=_errors(503))
    async def readyz() -> dict[str, Any]:
        door.check_open()
        return {"status": "ready", "models": [info.id for info in await backend.models()]}

    @app.get("/metrics", tags=["status"], summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def exposition() -> Response:
        body, content_type = metrics.render()
        return Response(body, headers={"content-type": content_type})


def add_native_routes(app: FastAPI, entrance: Entrance) -> None:
    """/v1/classify, /v1/generate, /v1/attention, /v1/explain and the models."""
    about: dict[str, Any] = {"tags": ["native"], "dependencies": _key_checks(entrance.door)}
    errors = _errors(*_STATUSES)
    _add_endpoint(
        app,
        "/v1/classify",
        ClassifyEndpoint("/v1/classify", entrance, native.parse, native.render),
        _signature(ClassifyRequest, Classification),
        summary="Label one text or many",
        responses=errors,
        **about,
    )
    _add_endpoint(
        app,
        "/v1/generate",
        GenerateEndpoint("/v1/generate", entrance, native.parse_generate),
        _signature(native.GenerateBody, native.Generation),
        summary="Continue a prompt or answer a chat, at once or as a stream",
        responses=errors | _STREAM,
        **about,
    )

    _add_endpoint(
        app,
        "/v1/attention",
        AttentionEndpoint("/v1/attention", entrance),
        _signature(AttentionBody, Attention),
        summary="Where the model looked when it predicted",
        responses=errors,
        **about,
    )
    _add_endpoint(
        app,
        "/v1/explain",
        ExplainEndpoint("/v1/explain", entrance),
        _signature(ExplainRequest, Explanation),
        summary="What each token did for a label",
        responses=errors,
        **about,
    )

    @app.get(
        "/v1/models",
        summary="The served models",
        response_model=native.ModelList,
        responses=_errors(401, 503),
        **about,
    )
    async def models() -> Response:
        return _json(native.model_list(await entrance.backend.models()))

    @app.get(
        "/v1/models/{model_id:path}",
        summary="One model",
        response_model=native.ModelObject,
        responses=_errors(401, 404, 503),
        **about,
    )
    async def model(model_id: str) -> Response:
        return _json(native.model_object(native.find_model(await entrance.backend.models(), model_id)))


def add_openai_routes(app: FastAPI, entrance: Entrance) -> None:
    """Completions and chat; the models have OpenAI's shape already."""
    about: dict[str, Any] = {"tags": ["OpenAI"], "dependencies": _key_checks(entrance.door)}
    statuses = [status for status in _STATUSES if status not in (422, 501)]
    errors = {400: _errors(422)[422]} | _errors(*statuses)
    for path, dialect, body, reply, summary in (
        ("/v1/completions", completions, completions.CompletionBody, completions.Completion, "Continue a prompt"),
        ("/v1/chat/completions", chat, chat.ChatBody, chat.ChatCompletion, "Answer a chat"),
    ):
        endpoint = GenerateEndpoint(path, entrance, dialect.parse)
        _add_endpoint(
            app, path, endpoint, _signature(body, reply), summary=summary, responses=errors | _STREAM, **about
        )


def add_huggingface_routes(app: FastAPI, entrance: Entrance, max_inputs: int) -> None:
    """POST to the base URL or to a model's, and what the client asks about the server."""
    about: dict[str, Any] = {"tags": ["Hugging Face"], "dependencies": _key_checks(entrance.door)}
    errors = _errors(*_STATUSES, body=HuggingFaceErrorBody)
    body: Any = HuggingFaceRequest | TranslationBody | TextGenerationBody
    reply = list[list[Score]] | list[Translation] | list[GeneratedText]

    async def pipeline_of_model(
        model_id: str,
        request: Any,
        x_request_id: RequestId = None,
        x_request_timeout_ms: TimeoutMs = None,
    ) -> Any:
        raise NotImplementedError

    pipeline_of_model.__annotations__ |= {"request": body, "return": reply}
    for path, signature in (("/", _signature(body, reply)), ("/models/{model_id:path}", pipeline_of_model)):
        endpoint = PipelineEndpoint(path.replace(":path", ""), entrance)
        summary = "Label, translate or continue a text: what the model is for"
        _add_endpoint(app, path, endpoint, signature, summary=summary, responses=errors | _STREAM, **about)

    @app.get(
        "/info",
        summary="What is served here",
        response_model=EndpointInfo,
        responses=_errors(401, 503, body=HuggingFaceErrorBody),
        **about,
    )
    async def info() -> Response:
        return _json(endpoint_info(await entrance.backend.models(), version("attnd"), max_inputs))

    @app.get(
        "/health",
        summary="200 when it can serve",
        tags=["Hugging Face"],
        response_class=Response,
        responses=_errors(503, body=HuggingFaceErrorBody),
    )
    async def health() -> Response:
        entrance.door.check_open()
        await entrance.backend.models()
        return Response()
