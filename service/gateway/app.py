"""The HTTP application: the routes of routes.py, put together behind the Edge."""

from dataclasses import dataclass
from typing import cast

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from service.config import Settings
from service.errors import AttndError
from service.gateway.attend import AttentionEndpoint, ExplainEndpoint
from service.gateway.door import Door
from service.gateway.endpoint import ClassifyEndpoint, Entrance
from service.gateway.errors import Failure, body_of, crash_failure, failure_of, headers_of, in_dialect
from service.gateway.exchange import App
from service.gateway.generation import GenerateEndpoint
from service.gateway.middleware import REQUEST_ID, Edge
from service.gateway.pages import add_pages
from service.gateway.routes import add_huggingface_routes, add_native_routes, add_openai_routes, add_status_routes
from service.metrics import Metrics
from service.observed import Observed

_ABOUT = "Transformers from ONNX, over REST. The same models answer over gRPC."


@dataclass(frozen=True)
class Gateway:
    """`entry` is the ASGI app to serve, `fastapi` the application behind it, `door` what closes it."""

    fastapi: FastAPI
    entry: App
    door: Door


def create_app(backend: Observed, metrics: Metrics, settings: Settings) -> Gateway:
    """Every route, over `backend`."""
    app, door = _bare_app(), Door(settings.api_key)
    entrance = Entrance(backend, door, settings.request_timeout)
    add_status_routes(app, backend, door, metrics)
    add_native_routes(app, entrance)
    add_openai_routes(app, entrance)
    add_huggingface_routes(app, entrance, settings.max_inputs)
    add_pages(app)
    return _gateway(app, door)


def _bare_app() -> FastAPI:
    app = FastAPI(title="attnd", description=_ABOUT, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(AttndError, _failed)
    app.add_exception_handler(Exception, _crashed)
    return app


def _gateway(app: FastAPI, door: Door) -> Gateway:
    """`app` behind the Edge; an endpoint of ours that has a fixed path is reached without FastAPI."""
    direct = {
        ("POST", route.path): route.app
        for route in app.router.routes
        if isinstance(route, APIRoute)
        and isinstance(route.app, (ClassifyEndpoint, GenerateEndpoint, AttentionEndpoint, ExplainEndpoint))
        and not route.param_convertors
    }
    return Gateway(app, Edge(app, direct), door)


def _reply(failure: Failure, request: Request) -> Response:
    failure = in_dialect(failure, request.url.path)
    body = body_of(failure, request.url.path)
    response = Response(body, failure.status)
    response.raw_headers = headers_of(failure, body)
    return response


def _allowed_methods(request: Request) -> str:
    """Of all routes of the path: the router itself names the first one's alone."""
    routes = [route for route in request.app.router.routes if isinstance(route, Route)]
    found = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for methods in found for method in methods}))


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 from the router, in the shape of all errors."""
    raised = cast(HTTPException, error)
    path = request.url.path
    if raised.status_code == 405:
        allowed = _allowed_methods(request)
        message = f"{path} does not take {request.method}, only {allowed}"
        failure = Failure(405, message, "method_not_allowed", headers=((b"allow", allowed.encode()),))
    else:
        failure = Failure(raised.status_code, f"there is no {path}; /docs lists what there is", "route_not_found")
    return _reply(failure, request)


async def _failed(request: Request, error: Exception) -> Response:
    return _reply(failure_of(cast(AttndError, error)), request)


async def _crashed(request: Request, error: Exception) -> Response:
    """Starlette raises `error` again after this, and the Edge logs it."""
    return _reply(crash_failure(request.scope[REQUEST_ID]), request)
