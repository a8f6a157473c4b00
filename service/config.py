"""Settings, from flags and ATTND_* variables; a flag wins over its variable.

A name that is not a setting, or a value that does not parse, is a `ConfigError` that names it. `Settings` is also the
documentation: the command line's help texts are the field descriptions below.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from service.domain import MAX_INPUTS
from service.errors import ConfigError

PREFIX = "ATTND_"

_ADDRESS = re.compile(r"(?:[\w.-]+|\[[0-9A-Fa-f:.%\w]+\]):([0-9]{1,5})")


def _checked_address(text: str) -> str:
    """Strict, since gRPC is not: it takes a port modulo 65536, and the beginning of a URL for a name."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 1 <= int(found[1]) <= 65_535:
        raise ValueError(f"an address is HOST:PORT, its port 1 to 65535 and IPv6 in brackets, got {text!r}")
    return text


Host = Annotated[str, Field(min_length=1)]  # an empty one would be every interface
Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Address = Annotated[str, AfterValidator(_checked_address)]
Bounds = tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]  # the last, infinity, is always there


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Settings:
    """Everything that can be set. Each field is the flag --field-name and the variable ATTND_FIELD_NAME."""

    host: Annotated[Host, "address to listen on"] = "127.0.0.1"
    http_port: Annotated[Port, "HTTP port (0: any free one)"] = 8000
    grpc_port: Annotated[Port, "gRPC port (0: any free one)"] = 50051
    metrics_port: Annotated[Port, "HTTP port for a worker's metrics and health (0: any free one)"] = 9090
    models: Annotated[tuple[str, ...], "bundle directories or ids of shipped models (default: all shipped)"] = ()
    worker: Annotated[tuple[Address, ...], "worker addresses HOST:PORT that a gateway asks"] = ()
    provider: Annotated[Literal["cpu", "cuda"], "ONNX Runtime execution provider"] = "cpu"
    provider_fallback: Annotated[bool, "use the CPU when the wanted provider is not there, instead of failing"] = False
    threads: Annotated[int, Field(ge=0), "compute threads (0: what affinity and cgroup quota give)"] = 0
    max_batch_tokens: Annotated[Positive, "padded tokens in one batch, at the most; more leave the cache"] = 384
    max_queue: Annotated[Positive, "inputs that may wait for the engine before requests are refused"] = 2048
    max_inputs: Annotated[int, Field(ge=1, le=MAX_INPUTS), "inputs in one request, at the most"] = 1024
    max_attention_bytes: Annotated[Positive, "bytes of the attention maps of one request, as float32"] = 16_777_216
    max_batch: Annotated[
        int,
        Field(ge=0, le=256),
        "outputs written in one step, at the most (0: 16, or 32 translations by each thread)",
    ] = 0
    max_queue_outputs: Annotated[Positive, "outputs that may wait to be written before requests are refused"] = 256
    kv_cache_bytes: Annotated[
        int, Field(ge=0), "memory for keys and values of each model that writes (0: 2 GiB, or half of what is there)"
    ] = 0
    prefix_cache: Annotated[
        bool, "keep what was computed for the beginnings of prompts, for the next that share it"
    ] = True
    cache: Annotated[str, "directory where models are kept that do not come with attnd (none: the user's cache)"] = ""
    max_body_bytes: Annotated[Positive, "bytes of one request, at the most"] = 2_097_152
    request_timeout: Annotated[Seconds, "seconds after which a request fails, if the caller sets no less"] = 600.0
    drain_timeout: Annotated[Seconds, "seconds to finish accepted requests on SIGTERM"] = 20.0
    latency_buckets: Annotated[
        Bounds,
        "upper bounds of the latency histograms, in seconds",
    ] = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
    token_buckets: Annotated[
        Bounds,
        "upper bounds of the histograms of gaps between tokens and of engine steps, in seconds",
    ] = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
    vllm_metrics: Annotated[bool, "write what generations are measured by under vLLM's names, too"] = False
    api_key: Annotated[str, "key that callers must send as a bearer token (none: no key is asked for)"] = ""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], "least severe log lines to write"] = "info"
    log_requests: Annotated[bool, "write one log line a request"] = True

    def __post_init__(self) -> None:
        for name in ("latency_buckets", "token_buckets"):
            bounds = getattr(self, name)
            if list(bounds) != sorted(set(bounds)):
                raise ValueError(f"{name} must rise")
        if self.max_inputs > self.max_queue:
            raise ValueError(f"max_inputs ({self.max_inputs}) must not be over max_queue ({self.max_queue})")


_TYPES = get_type_hints(Settings, include_extras=True)
_NAMES = tuple(field.name for field in fields(Settings))


def _is_tuple(name: str) -> bool:
    return get_origin(get_args(_TYPES[name])[0]) is tuple


def describe(name: str) -> str:
    """The help text of one setting."""
    return next(str(part) for part in get_args(_TYPES[name]) if isinstance(part, str))


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str], about: Mapping[str, str] | None = None) -> None:
    """Add one flag for each named setting; none has a default, so that only given flags are seen.

    `about`: help texts by name, where a command uses a setting in another way than a server.
    """
    for name in names:
        default = getattr(Settings, name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            metavar=name.upper(),
            default=argparse.SUPPRESS,
            help=f"{(about or {}).get(name) or describe(name)}; default {shown or 'none'} [{PREFIX}{name.upper()}]",
        )


def _parse(name: str, text: str, source: str) -> Any:
    raw: Any = tuple(part.strip() for part in text.split(",") if part.strip()) if _is_tuple(name) else text.strip()
    try:
        return TypeAdapter(_TYPES[name]).validate_python(raw)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        shown = "..." if name == "api_key" else text
        raise ConfigError(f"{source}={shown!r} is not valid: {reason[:1].lower()}{reason[1:]}", param=name) from None


def load_settings(flags: Mapping[str, str], environ: Mapping[str, str]) -> Settings:
    """Settings from given flags (by field name) over ATTND_* variables over defaults.

    Raises ConfigError for an unknown ATTND_* variable and for any value that does not parse.
    """
    values: dict[str, Any] = {}
    for key in sorted(environ):
        if not key.startswith(PREFIX):
            continue
        name = key.removeprefix(PREFIX).lower()
        if name not in _NAMES or key != PREFIX + name.upper():
            known = ", ".join(PREFIX + known.upper() for known in _NAMES)
            raise ConfigError(f"{key} is not a setting; known are {known}", param=key)
        values[name] = _parse(name, environ[key], key)
    for name, text in flags.items():
        values[name] = _parse(name, text, "--" + name.replace("_", "-"))
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
