"""Bundles that are served in this process, and reached in three ways: directly, over HTTP and over gRPC."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import wire

from service.config import Settings
from service.domain import AttentionMap, Call
from service.gateway.app import create_app
from service.gateway.server import HttpServer
from service.metrics import Metrics
from service.observed import Observed
from service.rpc.client import RemoteBackend
from service.rpc.server import RpcServer
from service.worker.load import load_models
from service.worker.local import LocalBackend


class Running:
    """What is served."""

    def __init__(self, local: LocalBackend, remote: RemoteBackend, metrics: Metrics, http_port: int) -> None:
        self.local, self.remote, self.metrics, self.http_port = local, remote, metrics, http_port

    async def ask(self, **body: Any) -> wire.Reply:
        return await wire.ask(self.http_port, "POST", "/v1/attention", json.dumps(body).encode())

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def explain(self, **body: Any) -> wire.Reply:
        return await wire.ask(self.http_port, "POST", "/v1/explain", json.dumps(body).encode())


@asynccontextmanager
async def serving(*bundles: Path, **options: Any) -> AsyncIterator[Running]:
    settings = Settings(models=tuple(map(str, bundles)), http_port=0, grpc_port=0, drain_timeout=5.0, **options)
    metrics = Metrics(settings.latency_buckets, {})
    local = LocalBackend(lambda: load_models(settings, metrics), drain_timeout_s=5.0)
    await local.start()
    observed = Observed(local, metrics)
    await observed.models()
    rpc, http = RpcServer(observed, settings), HttpServer(create_app(observed, metrics, settings), settings)
    remote = RemoteBackend((f"127.0.0.1:{await rpc.start()}",), settings)
    try:
        yield Running(local, remote, metrics, await http.start())
    finally:
        await remote.aclose()
        await http.stop()
        await rpc.stop()
        await local.aclose()


def call(seconds: float = 30.0) -> Call:
    return Call("id", "test", time.monotonic() + seconds)


def array_of(one: AttentionMap) -> np.ndarray:
    return np.frombuffer(one.weights, "<f4").reshape(one.shape)
