"""RemoteBackend: a Backend whose answers come from workers over gRPC.

Each worker has a channel of its own, so that a request can be sent where its model is, to the worker with the fewest
open requests, and again to another when a worker cannot be reached: a classification may run twice without harm.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Any

import grpc

from service.config import Settings
from service.domain import Call, Classification, ClassifyRequest, ModelInfo
from service.errors import AttndError, ConfigError, DeadlineExceeded, NotFound, Unavailable
from service.rpc import codec
from service.rpc.errors import DETAILS_KEY, error_from
from service.rpc.inference import CLASSIFY, LIST_MODELS
from service.rpc.methods import REQUEST_ID

MODELS_TIMEOUT_S = 2.0  # a worker that takes longer to say what it serves is not ready

_OPTIONS = (
    # The gateway has already bounded what it accepts, and what a worker answers is as long as it is.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Names with several addresses (a headless service) are spread over all of them.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    ("grpc.enable_retries", 0),
)


class RemoteBackend:
    """`addresses` are HOST:PORT of the workers, at least one."""

    def __init__(self, addresses: Sequence[str], settings: Settings) -> None:
        if not addresses:
            raise ConfigError("worker: a gateway needs the address of one at least", param="worker")
        self._workers = [_Worker(address, settings.api_key) for address in addresses]
        self._turns = itertools.count()

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        message = codec.encode_request(request).SerializeToString()
        failures: list[AttndError] = []
        for worker in self._in_order():
            try:
                return await worker.classify(message, call)
            except Unavailable as error:
                failures.insert(0, error)  # the model may be on this one, so this says more than a NotFound
            except NotFound as error:
                failures.append(error)
        raise failures[0]

    async def models(self) -> list[ModelInfo]:
        """What the reachable workers serve together; Unavailable when there is none."""
        answers = await asyncio.gather(*(worker.models() for worker in self._workers), return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(failures) == len(answers):
            raise failures[0]
        found = {model.id: model for answer in answers if not isinstance(answer, BaseException) for model in answer}
        return [found[key] for key in sorted(found)]

    async def aclose(self) -> None:
        await asyncio.gather(*(worker.aclose() for worker in self._workers))

    def _in_order(self) -> list["_Worker"]:
        """The workers to try: reachable before unreachable, then the least busy, then in turn."""
        first = next(self._turns) % len(self._workers)
        rotated = self._workers[first:] + self._workers[:first]
        now = time.monotonic()
        return sorted(rotated, key=lambda worker: (worker.down_until > now, worker.num_open))


class _Worker:
    """One worker's channel, how busy it is, and until when it is not worth trying first."""

    def __init__(self, address: str, api_key: str) -> None:
        self.address = address
        self.num_open = 0
        self.down_until = 0.0
        self._authorization = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        channel: Any = grpc.aio.insecure_channel(address, options=_OPTIONS)  # its type stubs insist on serializers
        self._channel = channel
        self._classify = channel.unary_unary(CLASSIFY)
        self._list_models = channel.unary_unary(LIST_MODELS)

    async def classify(self, message: bytes, call: Call) -> Classification:
        timeout_s = call.deadline - time.monotonic()
        if timeout_s <= 0:
            raise DeadlineExceeded("the deadline passed before a worker could be asked")
        metadata = ((REQUEST_ID, call.request_id), *self._authorization)
        self.num_open += 1
        try:
            reply = await self._ask(self._classify, message, timeout_s, metadata)
        finally:
            self.num_open -= 1
        return codec.parse_classification(reply)

    async def models(self) -> list[ModelInfo]:
        try:
            return codec.parse_models(await self._ask(self._list_models, b"", MODELS_TIMEOUT_S, self._authorization))
        except DeadlineExceeded:
            raise Unavailable(f"worker {self.address} does not answer") from None

    async def aclose(self) -> None:
        await self._channel.close()

    async def _ask(self, method: Any, message: bytes, timeout_s: float, metadata: tuple[tuple[str, str], ...]) -> bytes:
        try:
            reply: bytes = await method(message, timeout=timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as failure:
            error = error_from(failure.code(), failure.details() or "", _details_of(failure))
            if isinstance(error, Unavailable):
                self.down_until = time.monotonic() + error.retry_after_s
            raise error from None
        except grpc.aio.UsageError:
            raise Unavailable("the server is draining", code="draining") from None
        self.down_until = 0.0
        return reply


def _details_of(failure: grpc.aio.AioRpcError) -> bytes:
    metadata: Any = failure.trailing_metadata() or ()
    return next((value for key, value in metadata if key == DETAILS_KEY), b"")
