"""What the same graph does with no server at all: a bare loop over the sentences, tokenization included.

Runs as a process (`python -m tests.bench.ceiling MODE < plan.json`), because its threads must be gone before anything
else is measured. Sentences are sorted by length, so a batch holds almost no padding: better than any server, which
has only what is waiting, can do. Knows nothing of servers.
"""

import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from .peers.bare import BareModel

BATCH_TOKENS = (128, 192, 256, 384, 512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Shape:
    """How a bare loop uses the machine: batches of up to `batch_tokens`, `lanes` at once, `threads` threads in each."""

    batch_tokens: int
    lanes: int
    threads: int
    spin: bool


@dataclass(frozen=True, slots=True)
class Plan:
    bundle: str
    sentences: tuple[str, ...]
    seconds: float
    shape: Shape


def shapes(cores: int) -> list[Shape]:
    """Every batch size, with all cores inside one run and with one core for each of several runs."""
    layouts = {(1, cores), (cores, 1)}
    return [
        Shape(batch_tokens=tokens, lanes=lanes, threads=threads, spin=threads > 1)
        for tokens in BATCH_TOKENS
        for lanes, threads in sorted(layouts)
    ]


def batches_of(encoded: Sequence[Sequence[int]], batch_tokens: int) -> list[list[Sequence[int]]]:
    """Batches of up to `batch_tokens` tokens (or one sequence), longest first, so that parallel lanes end together."""
    batches: list[list[Sequence[int]]] = []
    room = 0
    for tokens in sorted(encoded, key=len, reverse=True):
        if len(tokens) > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(tokens)
        room -= len(tokens)
    return batches


def one_pass(model: BareModel, sentences: Sequence[str], shape: Shape) -> None:
    """Tokenize all sentences and run all of them."""
    batches = batches_of(model.encode(sentences), shape.batch_tokens)
    ticket = count()

    def lane() -> None:
        while (index := next(ticket)) < len(batches):
            model.logits(batches[index])

    helpers = [threading.Thread(target=lane) for _ in range(shape.lanes - 1)]
    for thread in helpers:
        thread.start()
    lane()
    for thread in helpers:
        thread.join()


def loop_rate(plan: Plan) -> float:
    """Sentences a second over whole passes that fill the time, after one to warm up."""
    model = BareModel(Path(plan.bundle), threads=plan.shape.threads, spin=plan.shape.spin)
    one_pass(model, plan.sentences, plan.shape)
    begin, passes = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begin) < plan.seconds:
        one_pass(model, plan.sentences, plan.shape)
        passes += 1
    return passes * len(plan.sentences) / elapsed


def single_runs(plan: Plan) -> dict[str, float]:
    """Seconds of one sentence after another: the bare session run, and with its tokenization."""
    model = BareModel(Path(plan.bundle), threads=plan.shape.threads, spin=plan.shape.spin)
    encoded = model.encode(plan.sentences)
    runs: list[float] = []
    _fill(plan.seconds, lambda at: runs.append(_seconds(lambda: model.logits([encoded[at % len(encoded)]]))))
    whole: list[float] = []
    texts = plan.sentences
    _fill(plan.seconds, lambda at: whole.append(_seconds(lambda: model.classify([texts[at % len(texts)]]))))
    return {
        "run_mean": statistics.fmean(runs),
        "run_p50": statistics.median(runs),
        "whole_mean": statistics.fmean(whole),
    }


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _fill(seconds: float, step: Callable[[int], None]) -> None:
    end = time.perf_counter() + seconds
    for at in count():
        if time.perf_counter() >= end:
            return
        step(at)


def labels_of(plan: Plan) -> list[str]:
    """The bare loop's label of every sentence, each run alone."""
    model = BareModel(Path(plan.bundle), threads=1, spin=False)
    return [str(model.classify([text])[0]["label"]) for text in plan.sentences]


def plan_from(described: dict[str, object]) -> Plan:
    shape, sentences = described["shape"], described["sentences"]
    assert isinstance(shape, dict)
    assert isinstance(sentences, list)
    return Plan(**{**described, "shape": Shape(**shape), "sentences": tuple(sentences)})  # type: ignore[arg-type]


def plan_json(plan: Plan) -> str:
    return json.dumps(asdict(plan))


def main() -> None:
    modes: dict[str, Callable[[Plan], object]] = {"rate": loop_rate, "single": single_runs, "labels": labels_of}
    print(json.dumps(modes[sys.argv[1]](plan_from(json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
