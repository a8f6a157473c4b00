"""/v1/attention and /v1/explain: field names are the domain's; how weights are written is this edge's own matter."""

import asyncio
import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import orjson
from pydantic import TypeAdapter, ValidationError

from service.domain import (
    AttendedToken,
    AttentionMap,
    AttentionMaps,
    AttentionRequest,
    ExplainRequest,
    Kind,
    Prediction,
    Score,
    Timing,
    Usage,
)
from service.gateway.bodies import body_model, read
from service.gateway.endpoint import Entrance, send_json
from service.gateway.exchange import Receive, Scope, Send
from service.validation import invalid

Encoding = Literal["json", "base64"]

_ABOUT = "`encoding`: how weights are written, as nested lists of numbers or as the base64 of float32, little endian."
_FIELDS = tuple(one.name for one in fields(AttentionRequest))
_EXPLAIN = TypeAdapter(ExplainRequest)
_FLOAT_BYTES = 4
_WHOLE_BYTES = 65_536  # of float32; a reply with more is sent in pieces, so that no other request waits for its text
_HEADERS = ((b"content-type", b"application/json"),)

AttentionBody = body_model(
    "AttentionBody",
    f"{AttentionRequest.__doc__}\n\n{_ABOUT}",
    _FIELDS,
    nullable=False,
    of=AttentionRequest,
    encoding=(Encoding, "json"),
)


@dataclass(frozen=True)
class MapObject:
    """`shape` is heads, queries, keys. `layer` is null for several together, `heads` where they are reduced to one."""

    kind: Kind
    layer: int | None
    heads: list[int] | None
    shape: list[int]
    weights: list[list[list[float]]] | str


@dataclass(frozen=True)
class PredictionObject:
    """`scores` from a model that classifies, `text` from one that writes."""

    scores: list[Score] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Attention:
    """The reply of /v1/attention; what does not apply is not there. Offsets count Unicode code points."""

    model: str
    graph: str
    tokens: list[AttendedToken]
    prediction: PredictionObject
    usage: Usage
    timing: Timing
    maps: list[MapObject]
    target_tokens: list[AttendedToken] | None = None


@dataclass(frozen=True)
class AttentionEndpoint:
    """`route` labels the metrics."""

    route: str
    entrance: Entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises an AttndError, which the middleware answers."""
        (request, encoding), call = await self.entrance.admit(self.route, parse, scope, receive)
        result = await self.entrance.backend.attention(request, call)
        pieces = pieces_of(result, encoding)
        if result.num_bytes <= _WHOLE_BYTES:
            await send_json(send, b"".join(pieces))
        else:
            await _send_pieces(send, pieces)


@dataclass(frozen=True)
class ExplainEndpoint:
    """`route` labels the metrics."""

    route: str
    entrance: Entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises an AttndError, which the middleware answers."""
        request, call = await self.entrance.admit(self.route, parse_explain, scope, receive)
        await send_json(send, orjson.dumps(await self.entrance.backend.explain(request, call)))


def parse(body: bytes, _path: Mapping[str, Any]) -> tuple[AttentionRequest, Encoding]:
    """Raises InvalidRequest."""
    sent: Any = read(AttentionBody, body)
    try:
        request = AttentionRequest(**{name: getattr(sent, name) for name in sent.model_fields_set - {"encoding"}})
    except ValidationError as error:
        raise invalid(error) from None
    return request, sent.encoding


def parse_explain(body: bytes, _path: Mapping[str, Any]) -> ExplainRequest:
    """Raises InvalidRequest."""
    try:
        return _EXPLAIN.validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def pieces_of(result: AttentionMaps, encoding: Encoding) -> Iterator[bytes]:
    """The body of the reply in order; no piece is long, and each is made when it is its turn."""
    about: dict[str, Any] = {"model": result.model, "graph": result.graph, "tokens": result.tokens}
    if result.target_tokens is not None:
        about["target_tokens"] = result.target_tokens
    about |= {"prediction": _prediction(result.prediction), "usage": result.usage, "timing": result.timing}
    yield orjson.dumps(about)[:-1] + b',"maps":['
    for at, one in enumerate(result.maps):
        map_about = {"kind": one.kind, "layer": one.layer, "heads": one.heads, "shape": one.shape}
        yield (b"," if at else b"") + orjson.dumps(map_about)[:-1] + b',"weights":'
        yield from _lists(one) if encoding == "json" else (b'"', base64.b64encode(one.weights), b'"')
        yield b"}"
    yield b"]}"


def _prediction(prediction: Prediction) -> dict[str, Any]:
    return {"scores": prediction.scores} if prediction.text is None else {"text": prediction.text}


def _lists(one: AttentionMap) -> Iterator[bytes]:
    """The weights as nested lists, a head a piece."""
    num_heads, num_queries, num_keys = one.shape
    size = num_queries * num_keys * _FLOAT_BYTES
    for head in range(num_heads):
        rows = memoryview(one.weights)[head * size : (head + 1) * size].cast("f", (num_queries, num_keys))
        yield (b"," if head else b"[") + orjson.dumps(rows.tolist())
    yield b"]"


async def _send_pieces(send: Send, pieces: Iterator[bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})
