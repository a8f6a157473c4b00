"""WorkerChannel: one worker's gRPC channel, and what its gateway knows of it.

Which worker is asked, and when another is, client.py decides. What gRPC itself says of a failure names addresses and
is for the log, not for callers.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import grpc

from service.domain import AttentionMaps, Call, Classification, Event, Explanation, ModelInfo
from service.errors import AttndError, DeadlineExceeded, Unavailable
from service.rpc.codec import attend, classify, generate, models
from service.rpc.errors import DETAILS_KEY, error_from
from service.rpc.inference import ATTENTION, CLASSIFY, EXPLAIN, GENERATE, LIST_MODELS
from service.rpc.methods import REQUEST_ID

LOOK_TIMEOUT_S = 2.0  # a worker that takes longer to say what it serves is down
DOWN_S = 5.0  # longer than from one of a gateway's looks to the end of the next, so that a hung worker stays down

_OPTIONS = (
    # The gateway has already bounded what it accepts, and what a worker answers is as long as it is.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A worker that hangs fails its calls after 25 s: it is pinged after 20 s without a word, and has 5 s to answer.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # the one that the core goes by, its default is 60 s
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Names with several addresses (a headless service) are spread over all of them.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    ("grpc.enable_retries", 0),
)

_END: Any = vars(grpc.aio)["EOF"]  # missing from its type stubs

_log = logging.getLogger("attnd.rpc")


class WorkerChannel:
    """One worker's channel, how busy it is, whether it is down, and the models it last said it serves.

    `num_open` counts the inputs and outputs of open requests. `models` are None until it has told them.
    """

    def __init__(self, address: str, api_key: str) -> None:
        self._address = address
        self.num_open = 0
        self.models: list[ModelInfo] | None = None
        self._down_until = 0.0
        self._look: asyncio.Task[Unavailable | None] | None = None
        self._authorization = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        channel: Any = grpc.aio.insecure_channel(address, options=_OPTIONS)  # its type stubs insist on serializers
        self._channel = channel
        self._classify = channel.unary_unary(CLASSIFY)
        self._attention = channel.unary_stream(ATTENTION)
        self._explain = channel.unary_unary(EXPLAIN)
        self._generate = channel.unary_stream(GENERATE)
        self._list_models = channel.unary_unary(LIST_MODELS)

    @property
    def is_down(self) -> bool:
        """Whether it failed a moment ago and has not answered since."""
        return self._down_until > time.monotonic()

    def serves(self, model_id: str) -> bool:
        return any(model.id == model_id for model in self.models or ())

    async def classify(self, message: bytes, call: Call, num_inputs: int) -> Classification:
        return classify.parse_classification(await self._reply(self._classify, message, call, num_inputs))

    async def explain(self, message: bytes, call: Call) -> Explanation:
        return attend.parse_explanation(await self._reply(self._explain, message, call, 1))

    async def attention(self, message: bytes, call: Call) -> AttentionMaps:
        async with aclosing(self._replies(self._attention, message, call, 1)) as replies:
            return attend.parse_maps([reply async for reply in replies])

    async def generate(self, message: bytes, call: Call, num_outputs: int) -> AsyncGenerator[Event, None]:
        async with aclosing(self._replies(self._generate, message, call, num_outputs)) as replies:
            async for reply in replies:
                for event in generate.parse_events(reply):
                    yield event

    def look(self) -> "asyncio.Task[Unavailable | None]":
        """Ask what it serves, together with whoever does so already. The task tells why it does not answer."""
        if self._look is None or self._look.done():
            self._look = asyncio.create_task(self._looked())
        return self._look

    async def _looked(self) -> Unavailable | None:
        begun = time.monotonic()
        try:
            reply = await self._list_models(b"", timeout=LOOK_TIMEOUT_S, metadata=self._authorization)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as failure:
            error = self._error_of(failure, begun)
            if isinstance(error, Unavailable):
                return error
            self._goes_down(f"asked what it serves: {error.message}")
            return Unavailable("a worker does not say what it serves")
        self.models = models.parse_models(reply)
        self._answers()
        return None

    async def aclose(self) -> None:
        if self._look is not None:
            self._look.cancel()
        await self._channel.close()

    async def _reply(self, method: Any, message: bytes, call: Call, weight: int) -> bytes:
        with self._open(call, weight):
            reply: bytes = await method(message, timeout=time_left(call), metadata=self._metadata(call))
            self._answers()
            return reply

    async def _replies(self, method: Any, message: bytes, call: Call, weight: int) -> AsyncGenerator[bytes, None]:
        with self._open(call, weight):
            stream = method(message, timeout=time_left(call), metadata=self._metadata(call))
            try:
                # One message at a time: gRPC's flow control slows down a worker whose messages nobody takes.
                while (reply := await stream.read()) is not _END:
                    self._answers()
                    yield reply
            finally:
                stream.cancel()

    @contextmanager
    def _open(self, call: Call, weight: int) -> Iterator[None]:
        """Around a call: it counts as open, and what gRPC raises becomes an error of ours."""
        self.num_open += weight
        try:
            yield
        except (grpc.aio.AioRpcError, grpc.aio.UsageError) as failure:
            raise self._error_of(failure, call.progress.begun) from None
        finally:
            self.num_open -= weight

    def _metadata(self, call: Call) -> tuple[tuple[str, str], ...]:
        return ((REQUEST_ID, call.request_id), *self._authorization)

    def _error_of(self, failure: grpc.aio.AioRpcError | grpc.aio.UsageError, begun: float) -> AttndError:
        """The error that the worker raised, or what it means that gRPC ended a call that began at `begun`."""
        if isinstance(failure, grpc.aio.UsageError):  # the channel is closed
            return Unavailable("the server is draining", code="draining")
        details, said = _details_of(failure), failure.details() or ""
        error = error_from(failure.code(), said, details)
        if failure.code() is grpc.StatusCode.UNAUTHENTICATED:  # the gateway's key, not the caller's
            error, said = Unavailable("a worker refuses the gateway's API key"), "it refuses this gateway's API key"
        if isinstance(error, Unavailable):
            self._goes_down(said)
        elif isinstance(error, DeadlineExceeded) and not details:
            return DeadlineExceeded(f"the deadline passed after {time.monotonic() - begun:.3f} s")
        elif not details:
            _log.error("worker %s: %s: %s", self._address, failure.code().name, said)
        return error

    def _goes_down(self, reason: str) -> None:
        if not self.is_down:
            _log.warning("worker %s is down: %s", self._address, reason)
        self._down_until = time.monotonic() + DOWN_S

    def _answers(self) -> None:
        if self._down_until:
            _log.info("worker %s answers again", self._address)
            self._down_until = 0.0


def time_left(call: Call) -> float:
    """Seconds until the deadline. Raises DeadlineExceeded."""
    timeout_s = call.deadline - time.monotonic()
    if timeout_s <= 0:
        raise DeadlineExceeded("the deadline passed before a worker could be asked")
    return timeout_s


def _details_of(failure: grpc.aio.AioRpcError) -> bytes:
    metadata: Any = failure.trailing_metadata() or ()
    return next((value for key, value in metadata if key == DETAILS_KEY), b"")
