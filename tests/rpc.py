"""The gRPC port over real sockets, asked by gRPC's own client."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fakes import FakeBackend
from google.rpc.status_pb2 import Status

from service.config import Settings
from service.metrics import Metrics
from service.observed import Log, Observed
from service.rpc.pb.attnd.v1 import inference_pb2 as pb
from service.rpc.server import RpcServer

SERVICE = "attnd.v1.Inference"
LIMIT = 4096  # bytes of a message


class Running:
    """A started server, its metrics, and one channel to it."""

    def __init__(self, server: RpcServer, metrics: Metrics, port: int) -> None:
        self.server, self.metrics, self.port = server, metrics, port
        self.channel: Any = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    def classify(self, *texts: str, **options: Any) -> Any:
        return self.send(pb.ClassifyRequest(inputs=[pb.TextInput(text=text) for text in texts]), **options)

    def send(self, message: Any, **options: Any) -> Any:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        method = self.channel.unary_unary(f"/{SERVICE}/Classify", None, pb.ClassifyResponse.FromString)
        return method(data, timeout=options.pop("timeout", 10), **options)

    def generate(self, message: Any, **options: Any) -> Any:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        method = self.channel.unary_stream(f"/{SERVICE}/Generate", None, pb.GenerateResponse.FromString)
        return method(data, timeout=options.pop("timeout", 10), **options)

    def stream(self, messages: AsyncIterator[Any] | None = None, **options: Any) -> Any:
        method = self.channel.stream_stream(
            f"/{SERVICE}/ClassifyStream",
            lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            pb.ClassifyStreamResponse.FromString,
        )
        return method(messages, timeout=options.pop("timeout", 10), **options)

    def count(self, route: str, outcome: str) -> float:
        """How many requests ended like this, for all models."""
        samples = [sample for metric in self.metrics.registry.collect() for sample in metric.samples]
        wanted = {"route": f"/{SERVICE}/{route}", "outcome": outcome}
        return sum(
            sample.value
            for sample in samples
            if sample.name == "attnd_request_seconds_count" and wanted.items() <= sample.labels.items()
        )


Start = Callable[..., Awaitable[Running]]  # settings -> a server with them


@asynccontextmanager
async def starting(backend: FakeBackend) -> AsyncIterator[Start]:
    """What starts servers over `backend`; all of them end with the block."""
    started: list[Running] = []

    async def start(log: Log | None = None, **settings: Any) -> Running:
        chosen = Settings(**{"grpc_port": 0, "max_body_bytes": LIMIT, "drain_timeout": 0.2} | settings)
        metrics = Metrics(chosen.latency_buckets, {})
        server = RpcServer(Observed(backend, metrics, log=log), chosen)
        started.append(Running(server, metrics, await server.start()))
        return started[-1]

    yield start
    backend.release()
    for running in started:
        await running.channel.close()
        await running.server.stop()


async def failure_of(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def details_of(failure: grpc.aio.AioRpcError) -> Status:
    return Status.FromString(dict(failure.trailing_metadata() or ())["grpc-status-details-bin"])
