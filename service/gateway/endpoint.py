"""One request over HTTP, in any dialect: who may come in, and a classification from body to body.

A dialect is how a body becomes a request, and a result a body. Endpoints are ASGI apps of their own: FastAPI's request
and response objects would cost more than all of this. The body is read as JSON whatever its content type says, as other
servers do: nothing else is understood here, and `curl -d` just works.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from service.domain import Call, Classification, ClassifyRequest, ModelInfo, Progress, choose_model
from service.errors import AttndError, InvalidRequest, NotFound, Unsupported
from service.gateway.door import Door
from service.gateway.exchange import BEGUN, Receive, Scope, Send
from service.gateway.middleware import HEADERS, REQUEST_ID
from service.gateway.names import FIELD_ERRORS, Names, told_as
from service.observed import Observed

MAX_TIMEOUT_MS = 86_400_000

T = TypeVar("T")
Parse = Callable[[bytes, Mapping[str, Any]], T]
Render = Callable[[Classification], bytes]

_JSON = (b"content-type", b"application/json")


@dataclass(frozen=True)
class Entrance:
    """What every request passes on its way to `backend`. `timeout_s` bounds any request."""

    backend: Observed
    door: Door
    timeout_s: float

    async def admit(self, route: str, parse: Parse[T], scope: Scope, receive: Receive) -> tuple[T, Call]:
        """What the body asks for. `parse` gets the body and the path's parameters. Raises an AttndError, counted."""
        headers = scope[HEADERS]
        call = Call(scope[REQUEST_ID], route, time.monotonic() + self.timeout_s, Progress(scope[BEGUN]))
        try:
            body = await read_body(receive)
            self.door.check_open()
            self.door.check_key(headers)
            call = check_headers(call, headers)
            return parse(body, scope.get("path_params", {})), call
        except AttndError as error:
            self.backend.rejected(call, error)
            raise

    async def model_for(self, tasks: Sequence[str], wanted: str | None) -> ModelInfo:
        """Of those last told, so that a worker that is slow to tell holds up nothing; else of those that are now.

        Raises what `models` and `choose_model` do.
        """
        try:
            return choose_model(self.backend.known_models, tasks, wanted)
        except (NotFound, Unsupported):
            return choose_model(await self.backend.models(), tasks, wanted)


@dataclass(frozen=True)
class ClassifyEndpoint:
    """`route` labels the metrics. `parse` tells the caller's names, too."""

    route: str
    entrance: Entrance
    parse: Parse[tuple[ClassifyRequest, Names]]
    render: Render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises an AttndError, which the middleware answers."""
        (request, names), call = await self.entrance.admit(self.route, self.parse, scope, receive)
        try:
            result = await self.entrance.backend.classify(request, call)
        except FIELD_ERRORS as error:
            raise told_as(names, error) from None
        await send_json(send, self.render(result))


async def send_json(send: Send, body: bytes) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": 200, "headers": [_JSON, length]})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive) -> bytes:
    """The request's body. Raises TooLarge when it was refused while it came in."""
    message = await receive()
    body: bytes = message.get("body", b"")
    while message.get("more_body", False):
        message = await receive()
        body += message.get("body", b"")
    return body


def check_headers(call: Call, headers: Mapping[bytes, bytes]) -> Call:
    """`call` with the deadline that the caller asks for, if that is sooner. Raises InvalidRequest."""
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding != b"identity":
        message = f"Content-Encoding: only plain bodies are taken, got {encoding.decode('latin-1')[:60]!r}"
        raise InvalidRequest(message, param="Content-Encoding", code="unsupported_encoding")
    wanted = headers.get(b"x-request-timeout-ms")
    if wanted is None:
        return call
    milliseconds = int(wanted) if wanted.isdigit() and len(wanted) < 12 else 0
    if not 1 <= milliseconds <= MAX_TIMEOUT_MS:
        shown = wanted.decode("latin-1")[:60]
        message = f"X-Request-Timeout-Ms: expected whole milliseconds from 1 to {MAX_TIMEOUT_MS}, got {shown!r}"
        raise InvalidRequest(message, param="X-Request-Timeout-Ms")
    return replace(call, deadline=min(call.deadline, time.monotonic() + milliseconds / 1000))
