"""`python -m tests.bench.translate`: attnd's translations beside CTranslate2's and transformers', on the same weights.

CTranslate2 runs in int8, transformers in fp32; both get the bundle's weights, and a server that batches without a
timer, in the setting that is fastest here for the load in question. In every round each load is measured on one
contender after the other, forwards and backwards by turns, so that whatever the machine does meanwhile hits all alike.
Ratios are of sentences a second, taken round by round. All on the same cores, the load generator included.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

from tokenizers import Tokenizer

from .environments import version_of
from .faults import outcry
from .figures import Latency, Sample
from .generate import Fleet, names_of, numbers
from .generator import Load
from .loads import LoadFailed, run_generator
from .machine import machine, say
from .report import verdict_lines
from .sentences import own_sentences, read_sentences
from .servers import Server, ServerFailed, awake, running, scratch_folder
from .translation_contenders import (
    BEAMS,
    NAMES,
    PEERS_NAMED,
    Bare,
    Contender,
    Search,
    Setting,
    attnd,
    peer,
    run_offline,
)
from .translation_report import SEARCHES, TranslationRounds, full, notes, summary, table, verdicts
from .translation_weights import write_weights

ROOT = Path(__file__).parents[2]
_FAILURES = (ServerFailed, LoadFailed, CalledProcessError, OSError, ValueError)

Offline = Callable[[Mapping[str, Any]], dict[str, Any]]  # see run_offline


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.translate", description=__doc__)
    add = parser.add_argument
    add("--bundle", type=Path, default=ROOT / "model/zoo/translation", help="(default %(default)s)")
    add("--data", type=Path, help="sentences, one a line, for example test_2016_flickr.en (default: made-up reviews)")
    add("--count", type=int, help="how many of them, from the first (default: all)")
    add("--only", type=names_of(NAMES), default=NAMES, help=f"contenders, of {','.join(NAMES)} (default: all)")
    add("--search", type=names_of(SEARCHES), default=SEARCHES, help="(default: greedy,beam)")
    add("--concurrency", type=numbers, default=(1, 16), help="requests at once (default: 1,16)")
    add("--seconds", type=float, default=5.0, help="seconds a load is measured in a round (default %(default)s)")
    add("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    add("--cache", type=Path, default=Path.home() / ".cache" / "attnd-bench", help="the peers' environments")
    add("--serve-args", default="", help="further flags for attnd, separated by spaces")
    add("--out", type=Path, help="file for the full results, as JSON")
    return parser.parse_args(arguments)


class Measuring:
    """One run: who takes part, and what was found so far."""

    def __init__(self, given: argparse.Namespace, sentences: Sequence[str], fleet: Fleet) -> None:
        self.rounds = TranslationRounds()
        self.settings: dict[str, Setting | None] = {}  # the fastest, by contender and load
        self._given, self._sentences, self._fleet = given, sentences, fleet
        self._texts: dict[str, Sequence[str]] = {}  # of a pass, by contender and search
        self._tokenizer = Tokenizer.from_file(str(given.bundle / "tokenizer.json"))

    def tune(self, contender: Contender, scratch: Path) -> None:
        """Finds the contender's fastest setting for each load, searching greedily."""
        for concurrency in self._given.concurrency:
            settings, rates = contender.settings(concurrency), {}
            for setting in settings if len(settings) > 1 else ():
                with running(contender.server_for("greedy", setting), scratch) as process:
                    rates[setting] = self._load(process.server, concurrency, 0, self._given.seconds).rate
                say(f"  {contender.name} c{concurrency}, {setting}: {rates[setting]:.1f}/s")
            self.settings[f"{contender.name} c{concurrency}"] = max(settings, key=lambda one: rates.get(one, 0.0))

    def tune_bare(self, bare: Bare) -> None:
        """Finds how many sources at once are fastest in a bare loop, for each search."""
        for search in self._given.search:
            rates = {}
            try:
                for setting in bare.settings(search):
                    rates[setting] = bare.run(self._plan(search), setting)["rate"]
                    say(f"  bare {search}, {setting}: {rates[setting]:.1f}/s")
            except _FAILURES as error:
                self.fail("bare", error)
                return
            self.settings[f"bare {search}"] = max(rates, key=rates.__getitem__)

    def measure_round(self, turn: int, contenders: Sequence[Contender], bare: Bare | None) -> None:
        ordered = contenders if turn % 2 == 0 else contenders[::-1]
        for search in self._given.search:
            for contender in ordered:
                self._measure_offline(contender.name, partial(run_offline, contender.offline), search, turn)
            if bare and (setting := self.settings.get(f"bare {search}")):
                self._measure_offline("bare", partial(bare.run, setting=setting), search, turn)
            for concurrency in self._given.concurrency:
                for contender in ordered:
                    self._measure(contender, search, concurrency, turn)

    def _plan(self, search: Search) -> dict[str, Any]:
        return {"sentences": self._sentences, "num_beams": BEAMS[search], "seconds": self._given.seconds}

    def _measure_offline(self, name: str, run: Offline, search: Search, turn: int) -> None:
        if name in self.rounds.failures:
            return
        try:
            found = run(self._plan(search))
        except _FAILURES as error:
            self.fail(name, error)
            return
        self._add(f"{name} {search} offline", turn, Sample(found["rate"], Latency(0, 0, 0, 0, 0), 0, {}, 0.0))
        self._read(f"{name} {search}", found["texts"])

    def _measure(self, contender: Contender, search: Search, concurrency: int, turn: int) -> None:
        if contender.name in self.rounds.failures:
            return
        try:
            server = contender.server_for(search, self.settings[f"{contender.name} c{concurrency}"])
            with awake(self._fleet.get(server)):
                sample = self._load(server, concurrency, turn, self._given.seconds)
        except _FAILURES as error:
            self.fail(contender.name, error)
            return
        self._add(f"{contender.name} {search} c{concurrency}", turn, sample)

    def _load(self, server: Server, concurrency: int, turn: int, seconds: float) -> Sample:
        """Each round begins elsewhere among the sentences."""
        first = turn * len(self._sentences) // 7
        ordered = [*self._sentences[first:], *self._sentences[:first]]
        bodies = tuple(json.dumps(server.body_of(text)) for text in ordered)
        load = Load("http", "127.0.0.1", server.port, server.path, bodies, concurrency, concurrency, seconds)
        return run_generator(load)

    def _add(self, point: str, turn: int, sample: Sample) -> None:
        self.rounds.add(point, turn, sample)
        say(f"  {point:28} {sample.rate:8.1f} sentences/s{outcry(sample)}")

    def _read(self, name: str, texts: Sequence[str]) -> None:
        """Counts the tokens of a pass, and how much of it is as attnd has it."""
        self._texts[name] = texts
        encoded = self._tokenizer.encode_batch(list(texts))
        self.rounds.tokens[name] = sum(len(one.ids) for one in encoded) / len(encoded)
        ours = self._texts.get(f"attnd {name.rpartition(' ')[2]}")
        if ours is not None and ours is not texts:
            self.rounds.agreement[name] = agreement(texts, ours)

    def fail(self, name: str, error: Exception) -> None:
        self.rounds.failures[name] = str(error)
        say(f"  {name} FAILED and is left out from here on: {error}")


def agreement(some: Sequence[str], others: Sequence[str]) -> float:
    """The share of texts that are the same to the character."""
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(others)


def contenders_of(given: argparse.Namespace, scratch: Path) -> tuple[list[Contender], dict[str, str]]:
    """Those that are wanted and can be had, and why the others cannot. attnd is the first."""
    cores = len(os.sched_getaffinity(0))
    found = [attnd(given.bundle, given.serve_args.split())] if "attnd" in given.only else []
    wanted = [name for name in PEERS_NAMED if name in given.only]
    if wanted:
        write_weights(given.bundle, scratch / "weights")
    missing: dict[str, str] = {}
    for name in wanted:
        try:
            found.append(peer(name, scratch / "weights", given.cache, cores=cores))
        except _FAILURES as error:
            missing[name] = str(error)
            say(f"{name} is left out: {error}")
    return found, missing


def facts_of(given: argparse.Namespace, measuring: Measuring, missing: Mapping[str, str], num: int) -> dict[str, Any]:
    """What the figures depend on, so that a results file can be read on its own."""
    manifest = json.loads((given.bundle / "manifest.json").read_text(encoding="utf-8"))
    return {
        "bench": "translate",
        "machine": machine(),
        "bundle": {key: manifest.get(key) for key in ("id", "precision")},
        "onnxruntime": version_of(Path(sys.executable), "onnxruntime"),
        "settings": {name: str(one) for name, one in measuring.settings.items() if one is not None},
        "left_out": missing,
        "sentences": num,
        "seconds": given.seconds,
        "num_rounds": given.rounds,
    }


def run(given: argparse.Namespace, scratch: Path) -> None:
    sentences = (read_sentences(given.data) if given.data else own_sentences())[: given.count]
    contenders, missing = contenders_of(given, scratch)
    bare = Bare(given.bundle, len(os.sched_getaffinity(0))) if "bare" in given.only else None
    if not (contenders or bare):
        raise SystemExit("nobody is left to be measured")
    with ExitStack() as stack:
        measuring = Measuring(given, sentences, Fleet(stack, scratch))
        for contender in contenders:
            try:
                measuring.tune(contender, scratch)
            except _FAILURES as error:
                measuring.fail(contender.name, error)
        if bare:
            measuring.tune_bare(bare)
        for turn in range(given.rounds):
            say(f"round {turn + 1} of {given.rounds}")
            measuring.measure_round(turn, contenders, bare)
    rounds = measuring.rounds
    facts = facts_of(given, measuring, missing, len(sentences))
    print(table(rounds), verdict_lines(verdicts(rounds)), notes(rounds), sep="\n\n")
    if given.out:
        given.out.write_text(json.dumps(full(rounds, facts), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rounds, facts)))
    if rounds.errors or rounds.failures:
        raise SystemExit(f"{rounds.errors} requests failed, {len(rounds.failures)} contenders failed")


def main() -> None:
    given = options(sys.argv[1:])
    given.cache = given.cache.expanduser().resolve()
    given.bundle = given.bundle.resolve()
    manifest = given.bundle / "manifest.json"
    if not manifest.is_file():
        raise SystemExit(f"there is no {manifest}")
    if (task := json.loads(manifest.read_text(encoding="utf-8")).get("task")) != "translation":
        raise SystemExit(f"{given.bundle} is for {task}, not for translation")
    given.cache.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        run(given, scratch)


if __name__ == "__main__":
    main()
