"""What an error looks like over HTTP: its status, its headers, and its body in either dialect.

One table from the error tree to status codes; nothing else in the gateway chooses one for an `AttndError`.
"""

import math
import re
from dataclasses import dataclass, replace

import orjson

from service.errors import (
    AttndError,
    BundleError,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    TooLarge,
    Unauthenticated,
    Unavailable,
    Unsupported,
)

Headers = list[tuple[bytes, bytes]]

STATUS: dict[type[AttndError], int] = {
    AttndError: 500,
    InvalidRequest: 422,
    TooLarge: 413,
    NotFound: 404,
    Unauthenticated: 401,
    Unsupported: 501,
    Overloaded: 429,
    DeadlineExceeded: 504,
    Cancelled: 499,
    Unavailable: 503,
    EngineFailed: 500,
    BundleError: 500,
    ConfigError: 500,
}

# OpenAI's clients know these; its servers have no others for what callers do wrong.
_OPENAI_STATUS = {422: 400, 501: 400}
_OPENAI_CODES = {"overloaded": (429, "slow_down"), "too_many_tokens": (400, "context_length_exceeded")}
_SHOULD_RETRY = {429: b"true", 503: b"true", 504: b"false"}  # its clients would try a 504 again, to no avail

_OPENAI = re.compile(r"/v1/(chat/)?completions").fullmatch
_HUGGINGFACE = re.compile(r"/|/info|/health|/models/.*", re.DOTALL).fullmatch

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}


@dataclass(frozen=True)
class ErrorDetail:
    """`code` is for programs and never changes, `param` names the offending field."""

    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True)
class ErrorBody:
    """The body of every error of the native API."""

    error: ErrorDetail


@dataclass(frozen=True)
class HuggingFaceErrorBody:
    """The body of an error in Hugging Face's dialect; `estimated_time` is the seconds after which to come back."""

    error: str
    error_type: str
    estimated_time: float | None = None


@dataclass(frozen=True)
class Failure:
    """An error as HTTP says it, before a dialect gives it its body. `retry_after_s` is when to come back, if ever."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def type(self) -> str:
        """OpenAI's name for the kind of error, which its clients look at."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")


def failure_of(error: AttndError) -> Failure:
    """`error` with the status that the table gives its class."""
    status = STATUS[type(error)]
    retry_after_s = error.retry_after_s if isinstance(error, (Overloaded, Unavailable)) else None
    headers = ((b"www-authenticate", b"Bearer"),) if status == 401 else ()
    return Failure(status, error.message, error.code, error.param, retry_after_s, headers)


def crash_failure(request_id: str) -> Failure:
    """For what is not an AttndError: callers are told where to look, not what was there."""
    return Failure(500, f"internal error; the log has more under {request_id}", "internal_error")


def failure_of_any(error: Exception, request_id: str) -> Failure:
    return failure_of(error) if isinstance(error, AttndError) else crash_failure(request_id)


def in_dialect(failure: Failure, path: str) -> Failure:
    """`failure` with the status, code and headers of the dialect that is spoken at `path`."""
    if not _OPENAI(path):
        return failure
    status = _OPENAI_STATUS.get(failure.status, failure.status)
    status, code = _OPENAI_CODES.get(failure.code, (status, failure.code))
    should_retry = _SHOULD_RETRY.get(status)
    headers = failure.headers if should_retry is None else (*failure.headers, (b"x-should-retry", should_retry))
    return replace(failure, status=status, code=code, headers=headers)


def body_of(failure: Failure, path: str) -> bytes:
    """The body of `failure` in the dialect that is spoken at `path`."""
    return huggingface_body(failure) if _HUGGINGFACE(path) else native_body(failure)


def native_body(failure: Failure) -> bytes:
    return orjson.dumps(ErrorBody(ErrorDetail(failure.message, failure.type, failure.param, failure.code)))


def huggingface_body(failure: Failure) -> bytes:
    return orjson.dumps(HuggingFaceErrorBody(failure.message, failure.code, failure.retry_after_s))


def headers_of(failure: Failure, body: bytes) -> Headers:
    """Retry-After takes whole seconds; retry-after-ms is finer and read first by the OpenAI clients."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *failure.headers]
    if failure.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % math.ceil(failure.retry_after_s)))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(failure.retry_after_s * 1000)))
    return headers
