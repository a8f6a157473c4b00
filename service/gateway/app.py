"""The HTTP application: the routes of routes.py, put together behind the Edge."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from service.config import Settings
from service.errors import AttndError, InvalidRequest
from service.gateway.attend import AttentionEndpoint, ExplainEndpoint
from service.gateway.door import Door
from service.gateway.endpoint import ClassifyEndpoint, Entrance
from service.gateway.errors import Failure, body_of, crash_failure, failure_of, headers_of, in_dialect
from service.gateway.exchange import BEGUN, App, TurnedAway
from service.gateway.generation import GenerateEndpoint
from service.gateway.middleware import REQUEST_ID, Edge
from service.gateway.pages import add_pages
from service.gateway.routes import add_huggingface_routes, add_native_routes, add_openai_routes, add_status_routes
from service.metrics import Metrics
from service.observed import Observed

_SHOWN = 128  # characters of a path that an error repeats
_ABOUT = "Transformers from ONNX, over REST. The same models answer over gRPC."


@dataclass(frozen=True)
class Gateway:
    """`entry` is the ASGI app to serve, `fastapi` the application behind it, `door` what closes it.

    `turned_away` is for requests that never come to `entry`.
    """

    fastapi: FastAPI
    entry: App
    door: Door
    turned_away: TurnedAway


def create_app(backend: Observed, metrics: Metrics, settings: Settings) -> Gateway:
    """Every route, over `backend`."""
    app, door = _bare_app(backend.turned_away), Door(settings.api_key)
    entrance = Entrance(backend, door, settings.request_timeout)
    add_status_routes(app, backend, door, metrics)
    add_native_routes(app, entrance)
    add_openai_routes(app, entrance)
    add_huggingface_routes(app, entrance, settings.max_inputs)
    add_pages(app)
    return Gateway(app, _edge(app), door, backend.turned_away)


def _bare_app(turned_away: TurnedAway) -> FastAPI:
    app = FastAPI(title="attnd", description=_ABOUT, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _no_route(turned_away))
    app.add_exception_handler(AttndError, _failed)
    app.add_exception_handler(Exception, _crashed)
    return app


def _edge(app: FastAPI) -> Edge:
    """`app` behind the Edge; an endpoint of ours that has a fixed path is reached without FastAPI."""
    direct = {
        ("POST", route.path): route.app
        for route in app.router.routes
        if isinstance(route, APIRoute)
        and isinstance(route.app, (ClassifyEndpoint, GenerateEndpoint, AttentionEndpoint, ExplainEndpoint))
        and not route.param_convertors
    }
    return Edge(app, direct)


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


def _no_route(turned_away: TurnedAway) -> Callable[[Request, Exception], Awaitable[Response]]:
    """404 and 405 from the router, counted, and in the shape of all errors."""

    async def answer(request: Request, error: Exception) -> Response:
        failure = _no_route_failure(request, cast(HTTPException, error).status_code)
        error = InvalidRequest(failure.message, code=failure.code)
        turned_away(request.scope[REQUEST_ID], request.scope[BEGUN], error)
        return _reply(failure, request)

    return answer


def _no_route_failure(request: Request, status: int) -> Failure:
    path = request.url.path[:_SHOWN]
    if status != 405:
        return Failure(status, f"there is no {path}; /docs lists what there is", "route_not_found")
    allowed = _allowed_methods(request)
    message = f"{path} does not take {request.method}, only {allowed}"
    return Failure(405, message, "method_not_allowed", headers=((b"allow", allowed.encode()),))


async def _failed(request: Request, error: Exception) -> Response:
    return _reply(failure_of(cast(AttndError, error)), request)


async def _crashed(request: Request, error: Exception) -> Response:
    """Starlette raises `error` again after this, and the Edge logs it."""
    return _reply(crash_failure(request.scope[REQUEST_ID]), request)
