"""The command line and the composition root: the one place that knows which parts make up a process.

`serve` is gateway and gRPC over the models in this process, `worker` gRPC over them, `gateway` HTTP over workers;
the commands of service/cli ask a model, here or at a server.
"""

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from service.address import address_text
from service.backend import Backend
from service.cli.flags import HELP as ASK_HELP
from service.cli.flags import add_ask_flags
from service.config import Settings, add_flags, load_settings
from service.domain import Call
from service.errors import AttndError, ConfigError, InvalidRequest
from service.logs import RequestLog, configure_logging
from service.metrics import Metrics
from service.observed import Observed

if TYPE_CHECKING:
    from service.cli.commands import Plan
    from service.worker.local import LocalBackend

GIL_SWITCH_SECONDS = 0.0005  # engine threads hand back results while the event loop is busy; the default is 5 ms
GC_OBJECTS = 10_000  # new ones until cycles are looked for; the default, 700, is what a few requests are made of

_COMMON = ("host", "request_timeout", "drain_timeout", "max_body_bytes", "api_key")
_LOGS = ("latency_buckets", "token_buckets", "vllm_metrics", "log_level", "log_requests")
_WORK = (
    "models",
    "provider",
    "provider_fallback",
    "threads",
    "cache",
    "max_batch_tokens",
    "max_queue",
    "max_inputs",
    "max_attention_bytes",
    "max_batch",
    "max_queue_outputs",
    "kv_cache_bytes",
    "prefix_cache",
)
_FLAGS = {
    "serve": ("http_port", "grpc_port", *_COMMON, *_WORK, *_LOGS),
    "worker": ("grpc_port", "metrics_port", *_COMMON, *_WORK, *_LOGS),
    "gateway": ("worker", "http_port", *_COMMON, *_LOGS),
    "pull": ("cache",),
    "models": ("models", "cache"),
    **dict.fromkeys(ASK_HELP, ("api_key", "request_timeout", "threads", "cache")),
}
_HELP = {
    "serve": "HTTP and gRPC over the models, in one process",
    "worker": "gRPC over the models, for gateways in other processes",
    "gateway": "HTTP over workers: --worker HOST:PORT[,HOST:PORT...]",
    "pull": "make a model ready ahead of its first start, and print where it is",
    "models": "check the bundles and print what is known about each, as JSON",
    **ASK_HELP,
}


def package_version() -> str:
    try:
        return version("attnd")
    except PackageNotFoundError:
        return "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="attnd",
        description="Serve transformers from ONNX over REST and gRPC, and ask them.",
        epilog="Every flag can be given as a variable, ATTND_ and its name in capitals; the flag wins.",
    )
    parser.add_argument("--version", action="version", version=f"attnd {package_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, flags in _FLAGS.items():
        command = commands.add_parser(name, help=_HELP[name], description=_HELP[name], allow_abbrev=False)
        add_flags(command, flags)
        if name == "pull":
            command.add_argument(
                "model", help="a shipped model's id, a GGUF file, a directory with safetensors, OWNER/NAME"
            )
        elif name in ASK_HELP:
            add_ask_flags(command, name)
    return parser


# What each command imports is imported by that command: a gateway carries no ONNX Runtime, a worker no web framework.

Stop = Callable[[], Awaitable[None]]

_log = logging.getLogger("attnd")


def make_metrics(settings: Settings) -> Metrics:
    """The metrics of a process with these settings."""
    return Metrics(
        settings.latency_buckets,
        {"version": package_version()},
        token_buckets=settings.token_buckets,
        vllm_names=settings.vllm_metrics,
    )


def _observed(backend: Backend, metrics: Metrics, settings: Settings) -> Observed:
    is_logged = settings.log_requests and settings.log_level in ("debug", "info")
    return Observed(backend, metrics, log=RequestLog().write if is_logged else None)


async def _start_http(backend: Observed, metrics: Metrics, settings: Settings) -> Stop:
    from service.gateway.app import create_app
    from service.gateway.server import HttpServer

    server = HttpServer(create_app(backend, metrics, settings), settings, port=settings.http_port)
    port = await server.start()
    _log.info("HTTP on http://%s", address_text(settings.host, port))
    return server.stop


async def _start_rpc(backend: Observed, settings: Settings) -> Stop:
    from service.rpc.server import RpcServer

    server = RpcServer(backend, settings)
    port = await server.start()
    _log.info("gRPC on %s", address_text(settings.host, port))
    return server.stop


async def _start_status(backend: Observed, metrics: Metrics, settings: Settings) -> Stop:
    from service.status import StatusServer

    server = StatusServer(backend, metrics, host=settings.host, port=settings.metrics_port)
    _log.info("health and metrics on http://%s", address_text(settings.host, server.start()))
    return server.stop


def _local_backend(settings: Settings, metrics: Metrics) -> "LocalBackend":
    from service.worker.load import load_models
    from service.worker.local import LocalBackend

    return LocalBackend(lambda: load_models(settings, metrics), drain_timeout_s=settings.drain_timeout)


async def _serve(settings: Settings) -> None:
    metrics = make_metrics(settings)
    local = _local_backend(settings, metrics)
    backend = _observed(local, metrics, settings)
    edges = [await _start_http(backend, metrics, settings), await _start_rpc(backend, settings)]
    await _run(backend, edges, local.start)


async def _worker(settings: Settings) -> None:
    metrics = make_metrics(settings)
    local = _local_backend(settings, metrics)
    backend = _observed(local, metrics, settings)
    edges = [await _start_status(backend, metrics, settings), await _start_rpc(backend, settings)]
    await _run(backend, edges, local.start)


async def _gateway(settings: Settings) -> None:
    from service.rpc.client import RemoteBackend

    metrics = make_metrics(settings)
    backend = _observed(RemoteBackend(settings.worker, settings), metrics, settings)
    await _run(backend, [await _start_http(backend, metrics, settings)], None)


async def _run(backend: Observed, edges: Sequence[Stop], load: Callable[[], Awaitable[None]] | None) -> None:
    """Load, serve until a signal, then drain: the edges finish what they accepted before the backend closes."""
    stopped = asyncio.ensure_future(_signal())
    try:
        if load is not None:
            loading = asyncio.ensure_future(load())
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
        await asyncio.gather(*(stop() for stop in edges))
        await backend.aclose()


async def _signal() -> None:
    """Return on the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop, seen = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, seen.set)
    await seen.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)


def _models(settings: Settings) -> None:
    """Print every bundle's facts, once it has been checked."""
    from service.worker.load import load_bundles

    found = [{"id": bundle.manifest.id, **bundle.manifest.facts()} for bundle in load_bundles(settings)]
    print(json.dumps(found, indent=2))


def _pull(model: str, settings: Settings) -> None:
    """Print the directory, which --models takes."""
    from service.worker.load import pull_model

    print(pull_model(model, settings))


_SERVERS: dict[str, Callable[[Settings], Coroutine[None, None, None]]] = {
    "serve": _serve,
    "worker": _worker,
    "gateway": _gateway,
}


def _ask(command: str, options: dict[str, Any], settings: Settings) -> None:
    """Ask a model of a server or of this process, and print what it says."""
    from service.cli.commands import plan

    url = options.pop("url")
    model = None if url else options.pop("model", None)
    configure_logging("warning")
    asyncio.run(_answer(plan(command, options), url, model, settings))


async def _answer(asked: "Plan", url: str | None, model: str | None, settings: Settings) -> None:
    from service.cli.client import Answers, HttpClient

    backend: Answers
    if url:
        backend = HttpClient(url, api_key=settings.api_key)
    else:
        from service.cli.local import open_local

        backend = await open_local(settings, model, asked.tasks)
    call = Call(uuid4().hex, "command line", time.monotonic() + settings.request_timeout)
    async with aclosing(backend):
        await asked.run(backend, call)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit status: 0, 2 for a wrong setting or request, 1 for what cannot be served."""
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    flags = {name: options.pop(name) for name in list(options) if hasattr(Settings, name)}
    try:
        settings = load_settings(flags, os.environ)
        configure_logging(settings.log_level)
        # Read when onnxruntime is imported, which by itself leaves a device id and usage events in the home directory.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        if command == "models":
            _models(settings)
        elif command == "pull":
            _pull(options["model"], settings)
        elif command in ASK_HELP:
            _ask(command, options, settings)
        else:
            sys.setswitchinterval(GIL_SWITCH_SECONDS)
            gc.set_threshold(GC_OBJECTS)
            _event_loop()(_SERVERS[command](settings))
    except BrokenPipeError:  # whoever read our output has had enough; what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (AttndError, OSError) as error:
        print(f"attnd: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, InvalidRequest)) else 1
    return 0


def _event_loop() -> Callable[[Coroutine[None, None, None]], None]:
    """uvloop's runner where there is one; it does the same with half the processor time."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    return uvloop.run


if __name__ == "__main__":
    sys.exit(main())
