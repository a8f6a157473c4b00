"""Around every request: its id on the way in and out, HEAD as GET, and errors given the shape their dialect has.

Pure ASGI, for the cost of a few function calls a request. Knows no route but by the map it is given: those skip
FastAPI's own middleware and routing, which cost 19 microseconds a request where all the rest of the gateway costs 9.
"""

import logging
from collections.abc import Mapping

from service.errors import AttndError
from service.gateway.errors import Failure, body_of, crash_failure, failure_of, headers_of, in_dialect
from service.gateway.exchange import App, Message, Receive, Scope, Send, request_id_of

REQUEST_ID = "attnd.request_id"  # keys of an ASGI scope, set here for the endpoints
HEADERS = "attnd.headers"

_log = logging.getLogger("attnd.http")


class Edge:
    """The outermost middleware. Whatever the app raises is answered here. `direct` is by method and path."""

    def __init__(self, app: App, direct: Mapping[tuple[str, str], App]) -> None:
        self._app = app
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope[HEADERS] = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope[REQUEST_ID] = request_id.decode()
        if scope["method"] == "HEAD":
            scope["method"] = "GET"  # the connection leaves the body out
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            app = self._direct.get((scope["method"], scope["path"]), self._app)
            await app(scope, receive, send_with_id)
        except AttndError as error:
            failure = failure_of(error)
        except Exception:
            _log.exception("request %s failed", scope[REQUEST_ID])
            failure = crash_failure(scope[REQUEST_ID])
        else:
            return
        if not is_started:  # else the reply stays incomplete, which the client can tell
            await send_failure(failure, scope, send_with_id)


async def send_failure(failure: Failure, scope: Scope, send: Send) -> None:
    failure = in_dialect(failure, scope["path"])
    body = body_of(failure, scope["path"])
    await send({"type": "http.response.start", "status": failure.status, "headers": headers_of(failure, body)})
    await send({"type": "http.response.body", "body": body})
