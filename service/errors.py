"""Every error the service can end a request or a start-up with.

    AttndError
    |-- InvalidRequest     the request is malformed or out of range
    |-- TooLarge           a size limit is exceeded: bytes, inputs, tokens
    |-- NotFound           no such model, or none that can do the task
    |-- Unauthenticated    the API key is missing or wrong
    |-- Unsupported        the model exists but cannot do this
    |-- Overloaded         the queue is full; carries when to come back
    |-- DeadlineExceeded   the caller's time is up
    |-- Cancelled          the caller has gone
    |-- Unavailable        loading, draining, or the worker cannot be reached
    |-- EngineFailed       our fault
    |-- BundleError        a bundle cannot be served (start-up)
    `-- ConfigError        a setting is wrong (start-up)

Each edge (gateway, rpc) has one table from these classes to its own status codes; tests check that both are total.
Messages are for people and state the limit and the value; `code` is for programs and never changes.
"""


class AttndError(Exception):
    """Root of the tree. `param` names the offending request field, `code` is a stable machine-readable reason."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidRequest(AttndError):
    code = "invalid_request"


class TooLarge(AttndError):
    code = "too_large"


class NotFound(AttndError):
    code = "model_not_found"


class Unauthenticated(AttndError):
    code = "invalid_api_key"


class Unsupported(AttndError):
    code = "unsupported"


class Overloaded(AttndError):
    """The queue is full. `retry_after_s` is the seconds after which a retry is likely to be admitted."""

    code = "overloaded"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(AttndError):
    code = "deadline_exceeded"


class Cancelled(AttndError):
    code = "cancelled"


class Unavailable(AttndError):
    """Not able to serve now. `retry_after_s` is the seconds after which a retry makes sense."""

    code = "unavailable"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s


class EngineFailed(AttndError):
    code = "engine_failed"


class BundleError(AttndError):
    code = "bundle_error"


class ConfigError(AttndError):
    code = "config_error"


# What fails again until it is asked or set otherwise; the rest may pass, or is not the caller's to mend.
CALLERS_FAULT: tuple[type[AttndError], ...] = (
    InvalidRequest,
    TooLarge,
    NotFound,
    Unauthenticated,
    Unsupported,
    ConfigError,
)
