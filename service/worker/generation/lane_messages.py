"""What a lane's process and the server's say to each other, and how: msgpack in frames, over a pair of sockets.

Both ends are the same version of this program, so that nothing here is checked beyond its types. Jobs are numbers here.
"""

from collections.abc import Iterator

import msgspec

from service.domain import Finish, GenerateRequest, PromptTokens, Token
from service.worker.generation.report import Ended, StepFacts

HEAD = 4  # bytes that say how many come after them


class Load(msgspec.Struct, tag="load", array_like=True, frozen=True):
    """To the process, first: the model, and how many rows its steps may have."""

    directory: str
    max_rows: int
    provider: str
    fallback: bool
    log_level: str


class Add(msgspec.Struct, tag="add", array_like=True, frozen=True):
    """To the process: outputs to write. `prompts` are (index, ids), and whole; `plans` are (place in `prompts`, index,
    seed, max_tokens).
    """

    job: int
    num_places: int
    wants_tokens: bool
    is_told_late: bool
    request: GenerateRequest
    prompts: list[tuple[int, list[int]]]
    plans: list[tuple[int, int, int, int]]


class Close(msgspec.Struct, tag="close", array_like=True, frozen=True):
    """To the process: see Job.closed_at."""

    job: int
    closed_at: float | None


class Closed(msgspec.Struct, tag="closed", array_like=True, frozen=True):
    """To the server: the lane has heard it, and its slots are free before the next step."""

    job: int


class Ready(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """To the server: the model is loaded, and this process is the lane's."""

    pid: int


class Refused(msgspec.Struct, tag="refused", array_like=True, frozen=True):
    """To the server: the model cannot be loaded. `error` is BundleError or ConfigError."""

    error: str
    message: str
    param: str | None


class OfToken(msgspec.Struct, tag=0, array_like=True, frozen=True):
    job: int
    event: Token


class OfFinish(msgspec.Struct, tag=1, array_like=True, frozen=True):
    job: int
    event: Finish


class OfPrompt(msgspec.Struct, tag=2, array_like=True, frozen=True):
    job: int
    event: PromptTokens


class Marks(msgspec.Struct, array_like=True, frozen=True):
    """See Progress; `gaps` are those that came since the last marks."""

    job: int
    started: float | None
    prefilled: float | None
    first_token: float | None
    gaps: list[float | None]


class Told(msgspec.Struct, tag="told", array_like=True, frozen=True):
    """To the server: a Report, and how many tokens have K/V in use."""

    events: list[OfToken | OfFinish | OfPrompt]
    ended: list[tuple[int, Ended]]
    failed: list[tuple[int, int]]
    steps: list[StepFacts]
    released: list[float]
    marks: list[Marks]
    num_kept_tokens: int


ToProcess = Load | Add | Close
ToServer = Ready | Refused | Closed | Told

decode_to_process = msgspec.msgpack.Decoder(ToProcess).decode
decode_to_server = msgspec.msgpack.Decoder(ToServer).decode
_encode = msgspec.msgpack.Encoder().encode


def framed(message: ToProcess | ToServer) -> bytes:
    body = _encode(message)
    return len(body).to_bytes(HEAD, "little") + body


class Frames:
    """Bytes as they come -> the bodies of whole frames."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        rest = self._rest
        rest += data
        while len(rest) >= HEAD and len(rest) >= (end := HEAD + int.from_bytes(rest[:HEAD], "little")):
            body = bytes(rest[HEAD:end])
            del rest[:end]
            yield body
