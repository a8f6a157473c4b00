"""The exception tree <-> gRPC status codes, with google.rpc details: the one table of this edge.

A status carries ErrorInfo (reason = the error's code, metadata.param = the offending field), BadRequest for a bad
field and RetryInfo for an error that passes, so that `error_from` gives a client the very error the server raised.
"""

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
_CLASS = {status: cls for cls, status in _STATUS.items()} | {StatusCode.INTERNAL: EngineFailed}


def status_of(error: AttndError) -> StatusCode:
    return _STATUS[type(error)]


def retry_after_s(error: AttndError) -> float:
    """Seconds after which a retry makes sense; 0 when it does not."""
    return error.retry_after_s if isinstance(error, Overloaded | Unavailable) else 0.0


def rich_status(error: AttndError) -> bytes:
    """The google.rpc.Status of `error`, the value of the trailer `grpc-status-details-bin`."""
    details: list[Message] = [ErrorInfo(reason=error.code, domain=DOMAIN, metadata={"param": error.param or ""})]
    if isinstance(error, InvalidRequest) and error.param:
        details.append(
            BadRequest(field_violations=[BadRequest.FieldViolation(field=error.param, description=error.message)])
        )
    if isinstance(error, Overloaded | Unavailable):
        delay = Duration()
        delay.FromNanoseconds(round(error.retry_after_s * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=status_of(error).value[0], message=error.message)
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
    ours = info.domain == DOMAIN
    cls = _CLASS.get(status, EngineFailed)
    if cls is Cancelled and not ours:  # what gRPC itself makes of a call that reaches a server as it shuts down
        cls, message = Unavailable, "the server is shutting down"
    code = info.reason if ours else None
    param = info.metadata["param"] or None if ours else None
    if issubclass(cls, Overloaded | Unavailable):
        return cls(message, param=param, code=code, retry_after_s=1.0 if delay is None else delay)
    return cls(message, param=param, code=code)
