"""The exception tree <-> gRPC status codes, with google.rpc details: the one table of this edge.

A status carries ErrorInfo (reason = the error's code, metadata.param = the offending field), BadRequest for a bad
field and RetryInfo for an error that passes, so that `error_from` gives a client the very error the server raised.
Fields are called what the proto calls them on the way, and what the domain does at both ends.
"""

from collections.abc import Mapping

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

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

DOMAIN = "attnd"
DETAILS_KEY = "grpc-status-details-bin"

_STATUS: dict[type[AttndError], StatusCode] = {
    InvalidRequest: StatusCode.INVALID_ARGUMENT,
    TooLarge: StatusCode.OUT_OF_RANGE,
    NotFound: StatusCode.NOT_FOUND,
    Unauthenticated: StatusCode.UNAUTHENTICATED,
    Unsupported: StatusCode.UNIMPLEMENTED,
    Overloaded: StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: StatusCode.DEADLINE_EXCEEDED,
    Cancelled: StatusCode.CANCELLED,
    Unavailable: StatusCode.UNAVAILABLE,
    EngineFailed: StatusCode.INTERNAL,
    # These end a start-up and never a request; the table is total all the same.
    BundleError: StatusCode.INTERNAL,
    ConfigError: StatusCode.INTERNAL,
    AttndError: StatusCode.INTERNAL,
}
_PROTO_NAMES = {"input": "inputs", "prompt": "prompts"}  # all others are the same
_DOMAIN_NAMES = {proto: name for name, proto in _PROTO_NAMES.items()}
_CLASS = {status: cls for cls, status in _STATUS.items()} | {StatusCode.INTERNAL: EngineFailed}
# What it means where gRPC itself ends a call; its own words name addresses, and are for the log.
_OF_GRPC: dict[StatusCode, tuple[type[AttndError], str]] = {
    StatusCode.UNAVAILABLE: (Unavailable, "a worker cannot be reached"),
    StatusCode.CANCELLED: (Unavailable, "the server is shutting down"),  # it came to a server that does
    StatusCode.DEADLINE_EXCEEDED: (DeadlineExceeded, "the deadline passed"),
    StatusCode.RESOURCE_EXHAUSTED: (TooLarge, "the message is larger than a worker takes"),  # trying again is no help
    StatusCode.UNIMPLEMENTED: (Unsupported, "a worker has no such method"),
}


def status_of(error: AttndError) -> StatusCode:
    return _STATUS[type(error)]


def retry_after_s(error: AttndError) -> float:
    """Seconds after which a retry makes sense; 0 when it does not."""
    return error.retry_after_s if isinstance(error, Overloaded | Unavailable) else 0.0


def told(error: AttndError) -> tuple[str, str | None]:
    """The message and the field of `error`, as the proto calls it."""
    return _renamed(error.message, error.param, _PROTO_NAMES)


def _renamed(message: str, param: str | None, names: Mapping[str, str]) -> tuple[str, str | None]:
    """A message has a field's name in front, or with a place, as in "sentence 2 of prompt.0 has"; else it is a word."""
    field, dot, place = (param or "").partition(".")
    if param is None or field not in names:
        return message, param
    name = names[field] + dot + place
    is_named = bool(dot) or message.startswith(f"{param}:")
    return message.replace(param, name, 1) if is_named else message, name


def rich_status(error: AttndError) -> bytes:
    """The google.rpc.Status of `error`, the value of the trailer `grpc-status-details-bin`."""
    message, param = told(error)
    details: list[Message] = [ErrorInfo(reason=error.code, domain=DOMAIN, metadata={"param": param or ""})]
    if isinstance(error, InvalidRequest) and param:
        details.append(BadRequest(field_violations=[BadRequest.FieldViolation(field=param, description=message)]))
    if isinstance(error, Overloaded | Unavailable):
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=status_of(error).value[0], message=message)
    for detail in details:
        status.details.add().Pack(detail)
    return bytes(status.SerializeToString())


def _unpack(details: list[AnyMessage]) -> tuple[ErrorInfo, float | None]:
    info, delay = ErrorInfo(), None
    for detail in details:
        if detail.Is(RetryInfo.DESCRIPTOR):
            retry = RetryInfo()
            detail.Unpack(retry)
            delay = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Is(ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
    return info, delay


def error_from(status: StatusCode, message: str, details: bytes = b"") -> AttndError:
    """The error behind a failed call. A status that no error of ours has means that the far side is broken."""
    try:
        info, delay = _unpack(list(Status.FromString(details).details))
    except DecodeError:
        info, delay = ErrorInfo(), None
    if info.domain != DOMAIN:
        cls, message = _OF_GRPC.get(status, (EngineFailed, "a worker has failed"))
        return cls(message)
    cls = _CLASS.get(status, EngineFailed)
    message, param = _renamed(message, info.metadata["param"] or None, _DOMAIN_NAMES)
    if issubclass(cls, Overloaded | Unavailable):
        return cls(message, param=param, code=info.reason, retry_after_s=1.0 if delay is None else delay)
    return cls(message, param=param, code=info.reason)
