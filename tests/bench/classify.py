"""`python -m tests.bench.classify`: attnd beside a bare ONNX Runtime loop and other servers, in one interleaved run.

The order of a run: texts and right labels, the peers' environments, their tuning, the bare loop's best shape; then
rounds in which every contender is measured once, forwards and backwards by turns, so that whatever the machine does
meanwhile hits all alike. The bare loop runs right before and right after each point that is compared with it, for the
machine's speed drifts. Ratios are taken round by round. All on the same cores, the load generator included.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from .ceiling import Plan, Shape, plan_json, shapes
from .contenders import PEER_NAMES, attnd, candidates, peer_server
from .environments import python_of, version_of
from .faults import fault_lines, outcry
from .generate import names_of, numbers
from .loads import has_wrk, module_command
from .machine import machine, say
from .measurement import Bench, bodies_file, measure, points_of, wrong_replies
from .report import Rounds, full, summary, table, verdict_lines, verdicts
from .sentences import own_sentences, read_sentences
from .servers import Running, Server, awake, running, scratch_folder
from .tuning import Tried, best_of, tuned

NAMES = ("attnd", *PEER_NAMES)
_SEARCH_SECONDS = 1.5
_PACKAGES = {"litserve": "litserve", "bentoml": "bentoml", "pipeline": "transformers"}


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.classify", description=__doc__)
    add = parser.add_argument
    add("--bundle", type=Path, default=Path("model/zoo/sentiment"), help="bundle to serve (default %(default)s)")
    add("--data", type=Path, help="sentences: text, or SST-2's dev.tsv [BENCH_DATA] (default: made-up reviews)")
    add("--only", type=names_of(NAMES), default=NAMES, help=f"servers, of {','.join(NAMES)} (default: all)")
    add("--concurrency", type=numbers, default=(1, 8, 32), help="requests at once (default: 1,8,32)")
    add("--seconds", type=float, default=5.0, help="seconds a point is measured in a round (default %(default)s)")
    add("--rounds", type=int, default=5, help="rounds (default %(default)s)")
    add("--cache", type=Path, default=Path.home() / ".cache" / "attnd-bench", help="the peers' environments")
    add("--tune", action="store_true", help="search the peers' settings again instead of using remembered ones")
    add("--grpc-connections", type=int, default=4, help="connections that gRPC calls share (default %(default)s)")
    add("--serve-args", default="", help="further flags for attnd, separated by spaces")
    add("--out", type=Path, help="file for the full results, as JSON")
    return parser.parse_args(arguments)


def bare(mode: str, plan: Plan) -> Any:
    """One of `ceiling`'s modes in a process of its own."""
    command, directory = module_command("ceiling")
    finished = subprocess.run(
        [*command, mode], cwd=directory, input=plan_json(plan), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(finished.stdout.splitlines()[-1])


def best_shape(bundle: Path, sentences: tuple[str, ...], cores: int) -> Shape:
    """The bare loop's fastest shape on this machine."""
    rates: dict[Shape, float] = {}
    for shape in shapes(cores):
        rates[shape] = bare("rate", Plan(str(bundle), sentences, _SEARCH_SECONDS, shape))
        say(f"  bare loop, {shape}: {rates[shape]:.0f}/s")
    return max(rates, key=lambda shape: rates[shape])


Bares = Mapping[str, Callable[[], float]]  # by the name of the point that it is measured beside


def bares_of(plan: Plan) -> Bares:
    """What each point of attnd's is compared with that needs no server: see Rounds.beside."""
    alone = replace(plan, seconds=plan.seconds / 2, shape=Shape(batch_tokens=1, lanes=1, threads=1, spin=False))
    loop = partial(bare, "rate", plan)
    loaded: dict[str, Callable[[], float]] = {f"attnd {wire} c32": loop for wire in ("rest", "grpc", "stream")}
    return loaded | {"attnd rest c1": lambda: bare("single", alone)["run_mean"]}


def measure_contender(bench: Bench, process: Running, bodies: Path, rounds: Rounds, turn: int, bares: Bares) -> None:
    """Every point of one server, between two checks of its replies. It is suspended while `bares` run."""
    with awake(process):
        rounds.wrong_replies += wrong_replies(bench, process, 2 * turn)
        capacity: dict[str, float] = {}
        for point in points_of(process.server, bench.concurrencies):
            run_bare = bares.get(point.name)
            beside = [] if run_bare is None else [suspended(process, run_bare)]
            sample = measure(bench, point, process.server, bodies, capacity.get(point.wire, 0.0), turn)
            beside += [] if run_bare is None else [suspended(process, run_bare)]
            capacity[point.wire] = max(capacity.get(point.wire, 0.0), sample.rate)
            rounds.add(point.name, sample, beside)
            say(f"  {point.name:24} {sample.rate:7.0f}/s{outcry(sample)}")
        rounds.wrong_replies += wrong_replies(bench, process, 2 * turn + 1)


def suspended(process: Running, work: Callable[[], float]) -> float:
    process.suspend()
    try:
        return work()
    finally:
        process.resume()


def run_rounds(bench: Bench, servers: Sequence[Server], plan: Plan, num_rounds: int) -> Rounds:
    """All servers up, one awake at a time."""
    rounds, bares = Rounds(), bares_of(plan)
    with ExitStack() as stack:
        processes: list[tuple[Running, Path]] = []
        for server in servers:
            process = stack.enter_context(running(server, bench.scratch))
            process.suspend()
            processes.append((process, bodies_file(bench, server, json.dumps)))
        for turn in range(num_rounds):
            say(f"round {turn + 1} of {num_rounds}")
            for process, bodies in processes if turn % 2 == 0 else reversed(processes):
                measure_contender(bench, process, bodies, rounds, turn, bares)
    return rounds


def tune_peers(names: Sequence[str], given: argparse.Namespace, bench: Bench) -> dict[str, list[Tried]]:
    cores = len(os.sched_getaffinity(0))
    found: dict[str, list[Tried]] = {}
    for name in names:
        python_of(name, given.cache)
        template = peer_server(name, given.bundle, given.cache, candidates(name, cores)[0])
        bodies = bodies_file(bench, template, json.dumps)
        found[name] = tuned(name, given.bundle, given.cache, bodies, cores=cores, again=given.tune)
        say(f"{name}: best of {len(found[name])} settings: {best_of(found[name]).tuning}")
    return found


def facts_of(given: argparse.Namespace, plan: Plan, tuning: dict[str, list[Tried]]) -> dict[str, Any]:
    """What the figures depend on, so that a results file can be read on its own."""
    manifest = json.loads((given.bundle / "manifest.json").read_text(encoding="utf-8"))
    peers = {
        name: {
            "version": version_of(python_of(name, given.cache), _PACKAGES[name]),
            "tuning": best_of(tried).tuning.as_dict(),
            "tried": [{"tuning": one.tuning.as_dict(), "rate": round(one.rate, 1)} for one in tried],
        }
        for name, tried in tuning.items()
    }
    return {
        "bench": "classify",
        "machine": machine(),
        "bundle": {key: manifest.get(key) for key in ("id", "precision")},
        "onnxruntime": version_of(Path(sys.executable), "onnxruntime"),
        "bare_loop": asdict(plan.shape),
        "sentences": len(plan.sentences),
        "seconds": given.seconds,
        "num_rounds": given.rounds,
        "peers": peers,
    }


def texts_of(given: argparse.Namespace) -> tuple[str, ...]:
    named = given.data or os.environ.get("BENCH_DATA")
    return read_sentences(Path(named)) if named else own_sentences()


def run(given: argparse.Namespace, scratch: Path) -> None:
    sentences = texts_of(given)
    names = [name for name in PEER_NAMES if name in given.only]
    cores = len(os.sched_getaffinity(0))
    any_shape = Shape(batch_tokens=1, lanes=1, threads=1, spin=False)
    labels = bare("labels", Plan(str(given.bundle), sentences, 0.0, any_shape))
    bench = Bench(sentences, tuple(labels), scratch, given.seconds, given.concurrency, given.grpc_connections)
    tuning = tune_peers(names, given, bench)
    shape = best_shape(given.bundle, sentences, cores)
    plan = Plan(str(given.bundle), sentences, given.seconds, shape)
    servers = [attnd(given.bundle, tuple(given.serve_args.split()))] if "attnd" in given.only else []
    servers += [peer_server(name, given.bundle, given.cache, best_of(tuning[name]).tuning) for name in names]
    rounds = run_rounds(bench, servers, plan, given.rounds)
    facts = facts_of(given, plan, tuning)
    print(table(rounds), verdict_lines(verdicts(rounds)), "\n".join(fault_lines(rounds.faults)), sep="\n\n")
    if given.out:
        given.out.write_text(json.dumps(full(rounds, facts), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary(rounds, {key: value for key, value in facts.items() if key != "peers"})))
    if rounds.errors or rounds.wrong_replies:
        raise SystemExit(f"{rounds.errors} failed requests, {rounds.wrong_replies} wrong replies")


def main() -> None:
    given = options(sys.argv[1:])
    given.bundle, given.cache = given.bundle.resolve(), given.cache.expanduser().resolve()
    if not has_wrk():
        raise SystemExit("wrk is not installed (a package of that name is in most distributions)")
    if not (given.bundle / "manifest.json").is_file():
        raise SystemExit(f"no bundle at {given.bundle}")
    given.cache.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        run(given, scratch)


if __name__ == "__main__":
    main()
