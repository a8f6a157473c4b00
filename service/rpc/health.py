"""grpc.health.v1.Health: whether each service, and the whole server (""), can serve now.

Readiness is the backend's `models()`; a draining server is NOT_SERVING before it refuses anything.
"""

import asyncio
from collections.abc import AsyncGenerator

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb

from service.errors import AttndError, InvalidRequest, NotFound
from service.observed import Observed
from service.rpc.methods import Context, Methods, Received, ServerStreaming, Unary

SERVICE = "grpc.health.v1.Health"

_SERVING = int(pb.HealthCheckResponse.SERVING)
_NOT_SERVING = int(pb.HealthCheckResponse.NOT_SERVING)
_SERVICE_UNKNOWN = int(pb.HealthCheckResponse.SERVICE_UNKNOWN)

_POLL_S = 0.5  # between two looks at the backend while somebody watches


class Health:
    """`services` are the names that have a status, all the same one."""

    def __init__(self, backend: Observed, services: frozenset[str]) -> None:
        self._backend = backend
        self._services = services | {""}
        self._draining = asyncio.Event()

    def methods(self) -> Methods:
        return {
            f"/{SERVICE}/Check": Unary(self.check),
            f"/{SERVICE}/List": Unary(self.list),
            f"/{SERVICE}/Watch": ServerStreaming(self.watch),
        }

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    def drain(self) -> None:
        """Say NOT_SERVING from now on, to those who watch too, and end their calls."""
        self._draining.set()

    async def check(self, received: Received, context: Context) -> bytes:
        """Raises NotFound for a service that is not here."""
        service = _service(received)
        if service not in self._services:
            raise NotFound(f"no service {service!r} here", code="service_not_found")
        return _response(await self._status())

    async def list(self, received: Received, context: Context) -> bytes:
        response = pb.HealthCheckResponse(status=await self._status())
        return bytes(pb.HealthListResponse(statuses=dict.fromkeys(self._services, response)).SerializeToString())

    async def watch(self, received: Received, context: Context) -> AsyncGenerator[bytes, None]:
        """The status now and after every change; SERVICE_UNKNOWN, and no end, for a service that is not here."""
        service = _service(received)
        last = None
        while True:
            ends = self._draining.is_set()
            status = await self._status() if service in self._services else _SERVICE_UNKNOWN
            if status != last:
                yield _response(status)
                last = status
            if ends:
                return
            await self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._draining.wait(), _POLL_S)
        except TimeoutError:
            return

    async def _status(self) -> int:
        if self._draining.is_set():
            return _NOT_SERVING
        try:
            await self._backend.models()
        except AttndError:
            return _NOT_SERVING
        return _SERVING


def _service(received: Received) -> str:
    if isinstance(received, AttndError):
        raise received
    try:
        return str(pb.HealthCheckRequest.FromString(received).service)
    except DecodeError:
        raise InvalidRequest("the message is not a valid grpc.health.v1.HealthCheckRequest") from None


def _response(status: int) -> bytes:
    return bytes(pb.HealthCheckResponse(status=status).SerializeToString())
