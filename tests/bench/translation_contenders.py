"""Who translates beside whom: how attnd and each peer is started, on the same weights, with a server and without."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .contenders import PEERS, ROOT, serve_command
from .environments import python_of
from .loads import LoadFailed, module_command
from .servers import Server, free_port

MOST_TOKENS = 128  # of a translation; the same for every contender
PEERS_NAMED = ("ctranslate2", "transformers")
NAMES = ("attnd", *PEERS_NAMED, "bare")
BEAMS: Mapping[str, int] = {"greedy": 1, "beam": 4}
_BARE_ROWS = (8, 16, 32, 64)  # of a step of a bare loop; a lane's have 32 at most
_ENVIRONMENTS = {"ctranslate2": "ctranslate2", "transformers": "pipeline"}

Search = Literal["greedy", "beam"]


@dataclass(frozen=True, slots=True)
class Setting:
    """A peer's own knobs: batches of up to `rows`, `workers` of them at once, `threads` for each."""

    rows: int
    workers: int
    threads: int

    def __str__(self) -> str:
        return f"batches of {self.rows}, {self.workers} worker(s) x {self.threads} thread(s)"


@dataclass(frozen=True)
class Contender:
    """`server_for` gives the server of a search and a setting; `offline` is the command that reads a plan on stdin, and
    where it is run. `settings`: those to try for so many requests at once; only peers have any.
    """

    name: str
    server_for: Callable[[Search, Setting | None], Server]
    offline: tuple[Sequence[str], Path]
    settings: Callable[[int], Sequence[Setting | None]] = lambda _: (None,)


def _layouts(name: str, cores: int, rows: int) -> list[Setting]:
    """A worker on all cores or one on each, the latter last; of torch's model, which works for one at a time, one."""
    found = [Setting(rows, 1, cores), Setting(rows, cores, 1)]
    return found[:1] if name == "transformers" or cores == 1 else found


def settings_of(name: str, cores: int, concurrency: int) -> list[Setting | None]:
    """What is tried for a peer before it is measured under so many requests at once."""
    sizes = [size for size in (1, 4, 8, 16) if size <= concurrency and (size > 1 or concurrency == 1)]
    return [setting for rows in sizes for setting in _layouts(name, cores, rows)]


def attnd(bundle: Path, arguments: Sequence[str] = ()) -> Contender:
    """The service as shipped, one process for every load; its own defaults unless `arguments` say otherwise."""
    port, grpc_port = free_port(), free_port()
    command = serve_command(str(bundle), port, grpc_port, tuple(arguments))

    def server_for(search: Search, _: Setting | None) -> Server:
        about = {"max_tokens": MOST_TOKENS, "temperature": 0, "num_beams": BEAMS[search]}
        return Server(
            name="attnd",
            command=command,
            port=port,
            grpc_port=grpc_port,
            path="/v1/generate",
            body_of=lambda text: {"prompt": text, **about},
            label_of=lambda reply: str(reply["outputs"][0]["text"]),
            directory=ROOT,
        )

    return Contender("attnd", server_for, _module("translation_offline", bundle))


def peer(name: str, weights: Path, cache: Path, *, cores: int) -> Contender:
    """CTranslate2 in int8 or transformers in fp32, on a folder of weights. Raises CalledProcessError."""
    python, script = str(python_of(_ENVIRONMENTS[name], cache)), str(PEERS / f"{name}_translate.py")
    ports: dict[Setting | None, int] = {}

    def command(setting: Setting, *mode: str) -> tuple[str, ...]:
        knobs = map(str, (setting.rows, setting.workers, setting.threads))
        return (python, script, str(weights), *mode, *knobs)

    def server_for(search: Search, setting: Setting | None) -> Server:
        assert setting is not None
        port = ports.setdefault(setting, free_port())
        return Server(
            name=f"{name}-{port}",
            command=command(setting, "serve", str(port)),
            port=port,
            path="/translate",
            body_of=lambda text: {"text": text, "num_beams": BEAMS[search]},
            label_of=lambda reply: str(reply["text"]),
        )

    return Contender(
        name,
        server_for,
        (command(_layouts(name, cores, 32)[-1], "offline"), ROOT),
        partial(settings_of, name, cores),
    )


@dataclass(frozen=True)
class Bare:
    """Our engine with neither scheduler nor server: a loop on each core, as many as the service has lanes."""

    bundle: Path
    cores: int

    def settings(self, search: Search) -> list[Setting]:
        """To try: so many sources at once in each loop, which has a row for each of their beams."""
        return [Setting(rows // BEAMS[search], self.cores, 1) for rows in _BARE_ROWS]

    def run(self, plan: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
        """See run_offline; of all loops together, each in a process of its own and with its share of the sentences.

        They are started together and do as much before they count, so that they count at the same time but for
        fractions of a second.
        """
        sentences = plan["sentences"]
        num_loops = min(setting.workers, len(sentences))
        shares = [{**plan, "sentences": sentences[at::num_loops]} for at in range(num_loops)]
        with ThreadPoolExecutor(num_loops) as pool:
            found = list(pool.map(partial(run_offline, self.command(setting)), shares))
        texts = [""] * len(sentences)
        for at, one in enumerate(found):
            texts[at::num_loops] = one["texts"]
        return {"rate": sum(one["rate"] for one in found), "texts": texts}

    def command(self, setting: Setting) -> tuple[Sequence[str], Path]:
        """Of one loop."""
        return _module("translation_ceiling", self.bundle, str(setting.rows))


def _module(name: str, bundle: Path, *arguments: str) -> tuple[Sequence[str], Path]:
    command, directory = module_command(name)
    return [*command, str(bundle), *arguments], directory


def run_offline(command: tuple[Sequence[str], Path], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Sentences a second and the translations of one pass. Raises LoadFailed."""
    arguments, directory = command
    finished = subprocess.run(
        arguments,
        cwd=directory,
        input=json.dumps(plan),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise LoadFailed(f"{arguments[1]} failed: {finished.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found
