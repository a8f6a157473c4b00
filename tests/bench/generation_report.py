"""Turns a generation run's samples into the table, the verdicts and the JSON. Measures nothing."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .faults import by_point, fault_lines
from .figures import Ratio, Target, Verdict, ratio_of
from .streams import StreamSample

PEER = "llama-server"

Figure = Callable[[StreamSample], float]

FIGURES: Mapping[str, Figure] = {
    "tokens_per_s": lambda sample: sample.tokens_per_s,
    "first_p50_ms": lambda sample: sample.first.p50 * 1000,
    "first_p99_ms": lambda sample: sample.first.p99 * 1000,
    "gap_p50_ms": lambda sample: sample.gap.p50 * 1000,
    "gap_p99_ms": lambda sample: sample.gap.p99 * 1000,
    "gap_worst_ms": lambda sample: sample.gap.worst * 1000,
    "prefill_per_s": lambda sample: sample.prefill_per_s,
    "prompt_tokens": lambda sample: sample.prompt_tokens,
}


@dataclass
class GenerationRounds:
    """What a run has measured so far: grows while the run goes on.

    `samples` are a point's by round, so that those of one round are compared though others failed; `bare` the bare
    loop's tokens a second likewise. `failures`: why a contender was left out from then on.
    """

    samples: dict[str, dict[int, StreamSample]] = field(default_factory=dict)
    bare: dict[str, dict[int, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, point: str, turn: int, sample: StreamSample) -> None:
        self.samples.setdefault(point, {})[turn] = sample

    def add_bare(self, point: str, turn: int, rate: float) -> None:
        self.bare.setdefault(point, {})[turn] = rate

    def values(self, point: str, figure: str) -> dict[int, float]:
        """By round, without rounds in which nothing could be timed; empty for a point that was not measured."""
        found = {turn: FIGURES[figure](sample) for turn, sample in self.samples.get(point, {}).items()}
        return {turn: value for turn, value in found.items() if value > 0 or not figure.endswith("_ms")}

    @property
    def errors(self) -> int:
        return sum(sample.errors for by_turn in self.samples.values() for sample in by_turn.values())

    @property
    def faults(self) -> dict[str, dict[str, int]]:
        """Why streams were not as asked for, by point."""
        return by_point({point: by_turn.values() for point, by_turn in self.samples.items()})


def verdicts(rounds: GenerationRounds) -> list[Verdict]:
    """Every target with its measured ratio; None where this run left one side out."""

    def beside_peer(name: str, load: str, figure: str, target: tuple[str, float]) -> Verdict:
        ours, peer = (rounds.values(f"{who} {load}", figure) for who in ("attnd", PEER))
        return _verdict(f"{name} / {PEER}", target, ours, peer)

    found: list[Verdict] = []
    for kind in ("greedy", "sampled"):
        found.append(beside_peer(f"one stream, {kind}", f"{kind} c1", "tokens_per_s", ("at least", 1.0)))
        found.append(beside_peer(f"16 streams, {kind}", f"{kind} c16", "tokens_per_s", ("at least", 2.5)))
        name = f"first token p50, 16 streams, {kind}"
        found.append(beside_peer(name, f"{kind} c16", "first_p50_ms", ("at most", 0.5)))
        ours, bare = rounds.values(f"attnd {kind} c16", "tokens_per_s"), rounds.bare.get(f"bare {kind} c16", {})
        found.append(_verdict(f"16 streams, {kind} / bare loop", ("at least", 0.9), ours, bare))
    found.append(beside_peer("prefill of 512 tokens", "prefill", "prefill_per_s", ("at least", 3.0)))
    gaps = (rounds.values("attnd mixed", figure) for figure in ("gap_p99_ms", "gap_p50_ms"))
    found.append(_verdict("long prompts arriving: gap p99 / p50", ("at most", 3.0), *gaps))
    return found


def _verdict(name: str, target: tuple[str, float], top: Mapping[int, float], bottom: Mapping[int, float]) -> Verdict:
    sense, limit = target
    return Verdict(Target(name, sense, limit), _ratio(top, bottom))  # type: ignore[arg-type]


def _ratio(top: Mapping[int, float], bottom: Mapping[int, float]) -> Ratio | None:
    """Over the rounds in which both were measured, and there was something to compare with; None when there is none."""
    turns = [turn for turn in sorted(top) if bottom.get(turn, 0.0) > 0]
    return ratio_of([top[turn] for turn in turns], [bottom[turn] for turn in turns]) if turns else None


def table(rounds: GenerationRounds) -> str:
    """Medians over the rounds, one line a point; the range of tokens a second beside it. Milliseconds."""
    lines = [
        f"{'point':24} {'tok/s':>7} {'(min-max)':>15} {'first p50':>10} {'p99':>8} {'gap p50':>8} {'p99':>8}"
        f" {'worst':>8} {'prefill/s':>9} {'prompt':>6} {'errors':>6} {'client':>6}"
    ]
    for point, by_turn in rounds.bare.items():
        lines.append(f"{point:24} {_spread(list(by_turn.values()))}")
    lines += [_row(point, list(by_turn.values())) for point, by_turn in rounds.samples.items()]
    return "\n".join(lines)


def _row(point: str, samples: Sequence[StreamSample]) -> str:
    first50, first99, gap50, gap99, worst = (_median(samples, name) for name in list(FIGURES)[1:6])
    prefill = f"{_median(samples, 'prefill_per_s'):9.0f}" if point.endswith("prefill") else f"{'':9}"
    errors, client = sum(sample.errors for sample in samples), statistics.median(one.client_cpu for one in samples)
    return (
        f"{point:24} {_spread([sample.tokens_per_s for sample in samples])} {first50:10.1f} {first99:8.1f}"
        f" {gap50:8.2f} {gap99:8.2f} {worst:8.1f} {prefill} {_median(samples, 'prompt_tokens'):6.0f} {errors:6}"
        f" {client:6.1%}"
    )


def _spread(rates: Sequence[float]) -> str:
    span = f"({min(rates):.0f}-{max(rates):.0f})"
    return f"{statistics.median(rates):7.1f} {span:>15}"


def _median(samples: Sequence[StreamSample], figure: str) -> float:
    return statistics.median(FIGURES[figure](sample) for sample in samples)


def notes(rounds: GenerationRounds) -> str:
    """Who failed, and what streams that were not as asked had wrong."""
    failed = [f"{name} failed and was left out: {why}" for name, why in rounds.failures.items()]
    return "\n".join([*failed, *fault_lines(rounds.faults)])


def summary(rounds: GenerationRounds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the last line holds: medians, verdicts, failures, and the facts of the run."""
    points = {
        point: {name: round(_median(list(by_turn.values()), name), 3) for name in FIGURES}
        for point, by_turn in rounds.samples.items()
    }
    return {
        **facts,
        "bare": {point: round(statistics.median(rates.values()), 1) for point, rates in rounds.bare.items()},
        "points": points,
        "verdicts": [verdict.as_dict() for verdict in verdicts(rounds)],
        "errors": rounds.errors,
        "faults": rounds.faults,
        "failures": rounds.failures,
    }


def full(rounds: GenerationRounds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary and every round's samples, for the results file."""
    samples = {
        point: {str(turn): sample.as_dict() for turn, sample in by_turn.items()}
        for point, by_turn in rounds.samples.items()
    }
    bare = {point: {str(turn): rate for turn, rate in by_turn.items()} for point, by_turn in rounds.bare.items()}
    return {**summary(rounds, facts), "rounds": {"bare": bare, "samples": samples}}
