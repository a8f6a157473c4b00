"""grpc.reflection.v1 and v1alpha: clients that were not given the .proto files ask for them here.

The two versions have the same messages on the wire; what they answer is looked up by the grpcio-reflection package.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection_pb2 as pb
from grpc_reflection.v1alpha.reflection import aio  # type: ignore[attr-defined]

from service.errors import AttndError, InvalidRequest
from service.rpc.methods import Context, Methods, Received, Streaming

SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


class Reflection:
    def __init__(self, services: Sequence[str]) -> None:
        self._lookup: Any = aio.ReflectionServicer(services)  # type: ignore[attr-defined]

    def methods(self) -> Methods:
        return {f"/{service}/ServerReflectionInfo": Streaming(self.info) for service in SERVICES}

    async def info(self, received: AsyncIterator[Received], context: Context) -> AsyncGenerator[bytes, None]:
        async for response in self._lookup.ServerReflectionInfo(_parsed(received), context):
            yield response.SerializeToString()


async def _parsed(received: AsyncIterator[Received]) -> AsyncIterator[pb.ServerReflectionRequest]:
    async for message in received:
        if isinstance(message, AttndError):
            raise message
        try:
            yield pb.ServerReflectionRequest.FromString(message)
        except DecodeError:
            raise InvalidRequest("the message is not a valid ServerReflectionRequest") from None
