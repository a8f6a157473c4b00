"""The command line: what a server consists of is roles.py's, what asks a model, here or at a server, is cli/'s."""

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from service.cli.flags import HELP as ASK_HELP
from service.cli.flags import SETTINGS as ASK_SETTINGS
from service.cli.flags import add_ask_flags
from service.config import Settings, add_flags, load_settings
from service.errors import CALLERS_FAULT, AttndError
from service.logs import configure_logging
from service.roles import ROLES, package_version

if TYPE_CHECKING:
    from service.cli.commands import Plan

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
        add_flags(command, flags, ASK_SETTINGS if name in ASK_HELP else None)
        if name == "pull":
            command.add_argument(
                "model", help="a shipped model's id, a GGUF file, a directory with safetensors, OWNER/NAME"
            )
        elif name in ASK_HELP:
            add_ask_flags(command, name)
    return parser


def _models(settings: Settings) -> None:
    """Print every bundle's facts, once it has been checked."""
    from service.worker.load import load_bundles

    found = [{"id": bundle.manifest.id, **bundle.manifest.facts()} for bundle in load_bundles(settings)]
    print(json.dumps(found, indent=2))


def _pull(model: str, settings: Settings) -> None:
    """Print the directory, which --models takes."""
    from service.worker.load import pull_model

    print(pull_model(model, settings))


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
    async with aclosing(backend):
        await asked.run(backend, settings.request_timeout)


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
            _event_loop()(ROLES[command](settings))
    except BrokenPipeError:  # whoever read our output has had enough; what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (AttndError, OSError) as error:
        print(f"attnd: {error}", file=sys.stderr)
        return 2 if isinstance(error, CALLERS_FAULT) else 1
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
