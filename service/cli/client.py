"""A server's native API over HTTP, in the shape of a Backend.

A connection is kept for the next request. The gateway's HTTP parser.
"""

import asyncio
import base64
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httptools
import orjson
from pydantic import TypeAdapter, ValidationError

from service.domain import (
    AttentionMaps,
    AttentionRequest,
    Call,
    Classification,
    ClassifyRequest,
    Event,
    Finish,
    GenerateRequest,
    ModelInfo,
    Token,
)
from service.errors import (
    AttndError,
    ConfigError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

T = TypeVar("T")
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_CLASSIFICATION = TypeAdapter(Classification)
_MAPS = TypeAdapter(AttentionMaps)
_OUTPUTS = TypeAdapter(tuple[Finish, ...])
# What a status says of whose fault it is; any other is an AttndError, and 429 comes with more than a message.
_ERRORS: dict[int, type[AttndError]] = {
    401: Unauthenticated,
    404: NotFound,
    413: TooLarge,
    422: InvalidRequest,
    501: Unsupported,
    503: Unavailable,
    504: DeadlineExceeded,
}
_CONNECT_SECONDS = 10.0
_PORTS = {"http": 80, "https": 443}
_READ_BYTES = 65_536


class Answers(Protocol):
    """What the commands need of a Backend: not `explain`, and of `generate` not Start and End."""

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification: ...
    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps: ...
    def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]: ...
    async def models(self) -> list[ModelInfo]: ...
    async def aclose(self) -> None: ...


class HttpClient:
    """Asks the server at a URL, whose path, if it has one, comes before the API's. Raises AttndErrors."""

    def __init__(self, url: str, *, api_key: str = "") -> None:
        """Raises ConfigError for what is no http or https URL."""
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
        except (KeyError, ValueError):
            self._host = ""
        if not self._host:
            raise ConfigError(f"--url={url!r} is not valid: expected http://HOST:PORT or https://HOST:PORT")
        self._url = url
        self._prefix = parts.path.rstrip("/")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._idle: list[_Connection] = []
        self._headers = f"host: {parts.netloc.rpartition('@')[2]}\r\ncontent-type: application/json\r\n{key}"

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        told = await self._json("POST", "/v1/classify", _given(request), call)
        return self._known(_CLASSIFICATION, told)

    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps:
        told = await self._json("POST", "/v1/attention", _given(request) | {"encoding": "base64"}, call)
        maps = [one | {"weights": base64.b64decode(one["weights"])} for one in told.get("maps", ())]
        return self._known(_MAPS, {"target_tokens": None} | told | {"maps": maps})

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        """A stream of tokens if the call wants them, which costs both sides more than whole texts."""
        if not call.wants_tokens:
            told = await self._json("POST", "/v1/generate", _given(request), call)
            for output in self._known(_OUTPUTS, told.get("outputs")):
                yield output
            return
        async with self._asking("POST", "/v1/generate", _given(request) | {"stream": True}, call) as reply:
            async for line in reply.lines():
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    told = orjson.loads(line.removeprefix(b"data: "))
                    if "error" in told:
                        raise AttndError(told["error"]["message"])
                    if "index" in told:
                        yield _event(told)
        raise Unavailable(f"{self._url} ended the stream before its end")

    async def models(self) -> list[ModelInfo]:
        told = await self._json("GET", "/v1/models")
        listed = told.get("data", ())
        return [ModelInfo(facts["id"], facts.get("task", ""), facts.get("created", 0), facts) for facts in listed]

    async def aclose(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()

    def _known(self, shape: TypeAdapter[T], told: Any) -> T:
        try:
            return shape.validate_python(told)
        except ValidationError as error:
            raise AttndError(f"{self._url} answers as no server of this version does: {error}") from None

    async def _json(self, method: str, path: str, body: dict[str, Any] | None = None, call: Call | None = None) -> Any:
        async with self._asking(method, path, body, call) as reply:
            text = await reply.whole()
        try:
            return orjson.loads(text)
        except ValueError:
            raise AttndError(f"{self._url}{path} does not answer with JSON; is it attnd?") from None

    @asynccontextmanager
    async def _asking(
        self, method: str, path: str, body: dict[str, Any] | None, call: Call | None
    ) -> AsyncIterator["_Reply"]:
        """The reply, once its status is known to be good. Leaving it before its end closes the connection, which
        abandons the work; else the next request has it.
        """
        reader, writer = connection = await self._connection()
        reply = _Reply(reader)
        try:
            writer.write(self._message(method, path, body, call))
            await reply.begin()
            if reply.status != 200:
                raise _error_of(reply, await reply.whole())
            yield reply
        except (OSError, EOFError, httptools.HttpParserError) as error:
            raise Unavailable(f"{self._url} broke off its reply: {error}") from None
        finally:
            if reply.leaves_open:
                self._idle.append(connection)
            else:
                writer.close()

    async def _connection(self) -> _Connection:
        """One that has answered and that the server has not closed since, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                return await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"{self._url} cannot be reached: {error or 'no answer'}") from None

    def _message(self, method: str, path: str, body: dict[str, Any] | None, call: Call | None) -> bytes:
        data = b"" if body is None else orjson.dumps(body)
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}content-length: {len(data)}\r\n"
        if call is not None:
            head += f"x-request-timeout-ms: {max(1, int((call.deadline - time.monotonic()) * 1000))}\r\n"
        return f"{head}\r\n".encode() + data


class _Reply:
    """A reply as it comes in. Raises EOFError when it ends too soon."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: deque[bytes] = deque()
        self._has_begun = self._is_whole = False
        self.leaves_open = False  # whether it is whole and another may follow it
        self._headers: dict[bytes, bytes] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._has_begun = True

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self._is_whole = True
        self.leaves_open = self._parser.should_keep_alive()

    @property
    def status(self) -> int:
        return self._parser.get_status_code()

    @property
    def retry_after_s(self) -> float:
        """The seconds after which to come back; attnd says them in thousandths, too. 1 where there is no number."""
        for name, seconds in ((b"retry-after-ms", 0.001), (b"retry-after", 1.0)):
            if (value := self._headers.get(name, b"")).isdigit():
                return int(value) * seconds
        return 1.0

    async def begin(self) -> None:
        """Wait for the status."""
        while not self._has_begun:
            await self._receive()

    async def whole(self) -> bytes:
        while not self._is_whole:
            await self._receive()
        return b"".join(self._pieces)

    async def lines(self) -> AsyncIterator[bytes]:
        rest = b""
        while self._pieces or not self._is_whole:
            if not self._pieces:
                await self._receive()
                continue
            *lines, rest = (rest + self._pieces.popleft()).split(b"\n")
            for line in lines:
                yield line

    async def _receive(self) -> None:
        data = await self._reader.read(_READ_BYTES)
        if not data:
            raise EOFError("it is not whole")
        self._parser.feed_data(data)


def _given(request: Any) -> dict[str, Any]:
    """The fields of `request` that are not as they are by default."""
    values = {one.name: getattr(request, one.name) for one in fields(request)}
    return {one.name: values[one.name] for one in fields(request) if values[one.name] not in (one.default, {})}


def _event(told: dict[str, Any]) -> Token | Finish:
    if "finish_reason" in told:
        return Finish(told["index"], told["finish_reason"], told["text"], told["stop"], score=told["score"])
    return Token(told["index"], told["token"]["id"], told["text"])


def _error_of(reply: _Reply, body: bytes) -> AttndError:
    """What the server says is wrong, or its status when it says nothing that attnd would."""
    try:
        message = orjson.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answers with status {reply.status}"
    if reply.status == 429:
        return Overloaded(message, retry_after_s=reply.retry_after_s)
    return _ERRORS.get(reply.status, AttndError)(message)
