"""The HTTP application: the routes of routes.py, put together behind the Edge."""

from dataclasses import dataclass
from importlib import resources
from typing import cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from service.config import Settings
from service.errors import AttndError
from service.gateway.door import Door
from service.gateway.endpoint import ClassifyEndpoint
from service.gateway.errors import Failure, body_of, crash_failure, failure_of, headers_of
from service.gateway.exchange import App
from service.gateway.middleware import REQUEST_ID, Edge
from service.gateway.routes import add_huggingface_routes, add_native_routes, add_status_routes
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
    add_status_routes(app, backend, door, metrics)
    add_native_routes(app, backend, door, settings)
    add_huggingface_routes(app, backend, door, settings)
    _add_docs(app)
    return _gateway(app, door)


def _bare_app() -> FastAPI:
    app = FastAPI(title="attnd", description=_ABOUT, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(AttndError, _failed)
    app.add_exception_handler(Exception, _crashed)
    return app


def _add_docs(app: FastAPI) -> None:
    """A page of our own: FastAPI's loads its scripts from another host, which not every network lets it."""
    page = resources.files("service.gateway").joinpath("web/docs.html").read_text("utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page)


def _gateway(app: FastAPI, door: Door) -> Gateway:
    """`app` behind the Edge; a classification route that has a fixed path is reached without FastAPI."""
    direct = {
        ("POST", route.path): route.app
        for route in app.router.routes
        if isinstance(route, APIRoute) and isinstance(route.app, ClassifyEndpoint) and not route.param_convertors
    }
    return Gateway(app, Edge(app, direct), door)


def _reply(failure: Failure, request: Request) -> Response:
    body = body_of(failure, request.url.path)
    response = Response(body, failure.status)
    response.raw_headers = headers_of(failure, body)
    return response


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 from the router, in the shape of all errors."""
    raised = cast(HTTPException, error)
    path, allowed = request.url.path, (raised.headers or {}).get("Allow", "")
    if raised.status_code == 405:
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
