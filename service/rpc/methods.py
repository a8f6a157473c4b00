"""What a gRPC method is, whatever carries it: messages as bytes in, messages as bytes out, errors raised.

A transport reads the circumstances of a call into a `Context`, hands each message over as its bytes, or as the error
that kept it from being read, and turns the `AttndError` that a method raises into a status.
"""

import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

from service.errors import AttndError

REQUEST_ID = "x-request-id"

# A message's bytes, or why there are none: it is over the limit.
Received = bytes | AttndError

_REQUEST_ID_FORM = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Context:
    """The circumstances of one call.

    `metadata` has lower-case keys; of several values the last counts. `deadline` is a `time.monotonic()` instant in
    seconds, None where the caller set none. `begun` is when the call's headers were here.
    """

    path: str
    metadata: Mapping[str, str]
    request_id: str
    begun: float
    deadline: float | None


def request_id_of(metadata: Mapping[str, str]) -> str:
    """The caller's request id where it is a fit one, else a new one."""
    given = metadata.get(REQUEST_ID, "")
    return given if _REQUEST_ID_FORM.fullmatch(given) else os.urandom(16).hex()


@dataclass(frozen=True, slots=True)
class Unary:
    """One message in, one out."""

    answer: Callable[[Received, Context], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Streaming:
    """Any number of messages in, any number out; closing the returned generator abandons the work.

    The iterator of received messages raises `Unavailable` once the server drains.
    """

    answers: Callable[[AsyncIterator[Received], Context], AsyncGenerator[bytes, None]]


@dataclass(frozen=True, slots=True)
class ServerStreaming:
    """One message in, any number out; closing the returned generator abandons the work."""

    answers: Callable[[Received, Context], AsyncGenerator[bytes, None]]


# Full method path ("/package.Service/Method") -> method.
Methods = Mapping[str, Unary | Streaming | ServerStreaming]
