"""The composition root: the one place that knows which parts make up a server's process, in what order they end.

`serve` is gateway and gRPC over the models in this process, `worker` gRPC over them, `gateway` HTTP over workers.
"""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol

from service.address import address_text
from service.backend import Backend
from service.config import Settings
from service.errors import AttndError
from service.logs import RequestLog
from service.metrics import Metrics
from service.observed import Observed

if TYPE_CHECKING:
    from service.worker.local import LocalBackend

# What each role imports is imported by that role: a gateway carries no ONNX Runtime, a worker no web framework.

LOOK_S = 1.0  # between two looks of a gateway at its workers

_log = logging.getLogger("attnd")


class Edge(Protocol):
    """What callers ask, or probes and scrapers."""

    async def drain(self) -> None:
        """Take no new work and say so; returns once what was accepted is answered, or the drain timeout is over."""
        ...

    async def stop(self) -> None:
        """Answer nothing any more."""
        ...


def package_version() -> str:
    try:
        return version("attnd")
    except PackageNotFoundError:
        return "unknown"


def make_metrics(settings: Settings, runtime: Mapping[str, str] | None = None) -> Metrics:
    """The metrics of a process with these settings. `runtime` is what its models run on; a gateway has none."""
    return Metrics(
        settings.latency_buckets,
        {"version": package_version(), **(runtime or {})},
        token_buckets=settings.token_buckets,
        vllm_names=settings.vllm_metrics,
    )


def _observed(backend: Backend, metrics: Metrics, settings: Settings) -> Observed:
    is_logged = settings.log_requests and settings.log_level in ("debug", "info")
    return Observed(backend, metrics, log=RequestLog().write if is_logged else None)


async def _start_http(backend: Observed, metrics: Metrics, settings: Settings) -> Edge:
    from service.gateway.app import create_app
    from service.gateway.server import HttpServer

    server = HttpServer(create_app(backend, metrics, settings), settings)
    port = await server.start()
    _log.info("HTTP on http://%s", address_text(settings.host, port))
    return server


async def _start_rpc(backend: Observed, settings: Settings) -> Edge:
    from service.rpc.server import RpcServer

    server = RpcServer(backend, settings)
    port = await server.start()
    _log.info("gRPC on %s", address_text(settings.host, port))
    return server


async def _start_status(backend: Observed, metrics: Metrics, settings: Settings) -> Edge:
    from service.status import StatusServer

    server = StatusServer(backend, metrics, host=settings.host, port=settings.metrics_port)
    _log.info("health and metrics on http://%s", address_text(settings.host, server.start()))
    return server


def _runtime() -> Mapping[str, str]:
    from service.worker.session import runtime_facts

    return runtime_facts()


def _local_backend(settings: Settings, metrics: Metrics) -> "LocalBackend":
    from service.worker.load import load_models
    from service.worker.local import LocalBackend

    return LocalBackend(lambda: load_models(settings, metrics), drain_timeout_s=settings.drain_timeout)


async def _serve(settings: Settings) -> None:
    metrics = make_metrics(settings, _runtime())
    local = _local_backend(settings, metrics)
    backend = _observed(local, metrics, settings)
    front = await _start_http(backend, metrics, settings)
    await _run(backend, front, await _start_rpc(backend, settings), local.start)


async def _worker(settings: Settings) -> None:
    metrics = make_metrics(settings, _runtime())
    local = _local_backend(settings, metrics)
    backend = _observed(local, metrics, settings)
    front = await _start_status(backend, metrics, settings)
    await _run(backend, front, await _start_rpc(backend, settings), local.start)


async def _gateway(settings: Settings) -> None:
    from service.rpc.client import RemoteBackend

    metrics = make_metrics(settings)
    backend = _observed(RemoteBackend(settings.worker, settings), metrics, settings)
    front = await _start_http(backend, metrics, settings)
    looking = asyncio.create_task(_look(backend))
    try:
        await _run(backend, front, None, None)
    finally:
        looking.cancel()


async def _look(backend: Observed) -> None:
    """Ask for the models again and again, so that workers that hang or come back and what they serve are known before
    a request is, to the metrics' labels too.
    """
    while True:
        with suppress(AttndError):
            await backend.models()
        await asyncio.sleep(LOOK_S)


async def _run(backend: Observed, front: Edge, rpc: Edge | None, load: Callable[[], Awaitable[None]] | None) -> None:
    """Load, serve until a signal, then drain. The `front` is what probes and scrapers ask."""
    stopped = asyncio.ensure_future(_signal())
    loading = None if load is None else asyncio.ensure_future(load())
    try:
        if loading is not None:
            await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                _log.info("ready: %s", ", ".join(model.id for model in await backend.models()))
        gc.collect()
        gc.freeze()  # to look through all that stays would hold up every thread for some 50 ms, every few seconds
        await stopped
        _log.info("draining")
    finally:
        stopped.cancel()
        await _drain(backend, [front] if rpc is None else [rpc, front])
        if loading is not None and not loading.done():
            os._exit(0)  # a thread that loads cannot be stopped, and one within ONNX Runtime aborts an orderly end


async def _drain(backend: Observed, edges: Sequence[Edge]) -> None:
    """The edges finish what they accepted before the backend closes, and tell the callers of what it could not finish.

    The front goes last: whoever probes for life would end a process that still answers what it accepted.
    """
    await asyncio.gather(*(edge.drain() for edge in edges))
    await backend.aclose()
    for edge in edges:
        await edge.stop()


async def _signal() -> None:
    """Return on the first SIGTERM or SIGINT; a second one ends the process at once, whatever its threads are at."""
    loop, seen = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, seen.set)
    await seen.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, lambda number, _: os._exit(128 + number))


ROLES: dict[str, Callable[[Settings], Coroutine[None, None, None]]] = {
    "serve": _serve,
    "worker": _worker,
    "gateway": _gateway,
}
