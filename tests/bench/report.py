"""Turns a run's samples into the table, the verdicts and the JSON. Measures nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from .faults import by_point
from .figures import Ratio, Sample, Target, Verdict, ratio_of

TARGETS = (
    Target("REST at concurrency 32 / bare loop", "at least", 0.85),
    Target("gRPC unary at concurrency 32 / bare loop", "at least", 0.80),
    Target("ClassifyStream at concurrency 32 / bare loop", "at least", 0.90),
    Target("REST at concurrency 32 / transformers pipeline", "at least", 8.0),
    Target("REST at concurrency 32 / best batching peer", "at least", 1.5),
    Target("REST p99 / p50 under Poisson load", "at most", 3.0),
    Target("REST at concurrency 1 / bare session run (seconds)", "at most", 1.5),
)


@dataclass
class Rounds:
    """What a run has measured so far, a value a round: grows while the run goes on.

    `beside` has what was measured without a server right before and right after a point, in the mean: beside
    concurrency 32 the bare loop's sentences a second, beside concurrency 1 the seconds of one bare session run.
    """

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    beside: dict[str, list[float]] = field(default_factory=dict)
    wrong_replies: int = 0

    def add(self, point: str, sample: Sample, beside: Sequence[float] = ()) -> None:
        self.samples.setdefault(point, []).append(sample)
        if beside:
            self.beside.setdefault(point, []).append(fmean(beside))

    def rates(self, point: str) -> list[float]:
        return [sample.rate for sample in self.samples.get(point, [])]

    @property
    def errors(self) -> int:
        return sum(sample.errors for samples in self.samples.values() for sample in samples)

    @property
    def faults(self) -> dict[str, dict[str, int]]:
        """Why requests failed, by point."""
        return by_point(self.samples)


def verdicts(rounds: Rounds) -> list[Verdict]:
    """Every target with its measured ratio, in the order of TARGETS; None where this run left one side out."""
    rest = rounds.rates("attnd rest c32")
    batching = [rates for peer in ("litserve", "bentoml") if (rates := rounds.rates(f"{peer} rest c32"))]
    best_peer = [max(rates) for rates in zip(*batching, strict=True)]
    poisson = [sample.latency for sample in rounds.samples.get("attnd rest poisson", [])]
    alone = [sample.latency.mean for sample in rounds.samples.get("attnd rest c1", [])]
    loaded = [f"attnd {wire} c32" for wire in ("rest", "grpc", "stream")]
    pairs = (
        *((rounds.rates(point), rounds.beside.get(point, ())) for point in loaded),
        (rest, rounds.rates("pipeline rest c32")),
        (rest, best_peer),
        ([latency.p99 for latency in poisson], [latency.p50 for latency in poisson]),
        (alone, rounds.beside.get("attnd rest c1", ())),
    )
    return [Verdict(target, _ratio(*pair)) for target, pair in zip(TARGETS, pairs, strict=True)]


def _ratio(top: Sequence[float], bottom: Sequence[float]) -> Ratio | None:
    """None where a side was left out of the run, or answered nothing in some round."""
    return ratio_of(top, bottom) if top and bottom and min(bottom) > 0 else None


def table(rounds: Rounds) -> str:
    """Medians over the rounds, one line a point; the rate's range beside it. Milliseconds."""
    lines = [
        f"{'point':24} {'req/s':>7} {'(min-max)':>15} {'p50':>8} {'p90':>8} {'p99':>8} {'errors':>6} {'client':>7}"
    ]
    for point, samples in rounds.samples.items():
        lines.append(_row(point, samples))
        if found := rounds.beside.get(point):
            lines.append(_bare_row(found))
    return "\n".join(lines)


def _bare_row(beside: Sequence[float]) -> str:
    """Rates, or milliseconds where they are seconds."""
    is_rate = median(beside) >= 1
    low, middle, high = (value if is_rate else value * 1000 for value in (min(beside), median(beside), max(beside)))
    if is_rate:
        return f"{'  bare loop':24} {middle:7.0f} {f'({low:.0f}-{high:.0f})':>15}"
    return f"{'  bare session run':24} {'':7} {f'({low:.2f}-{high:.2f})':>15} {middle:8.2f} (mean)"


def _row(point: str, samples: Sequence[Sample]) -> str:
    rates = [sample.rate for sample in samples]
    spread = f"({min(rates):.0f}-{max(rates):.0f})"
    waits = " ".join(
        f"{median(getattr(sample.latency, name) for sample in samples) * 1000:8.2f}" for name in ("p50", "p90", "p99")
    )
    errors = sum(sample.errors for sample in samples)
    client = median(sample.client_cpu for sample in samples)
    return f"{point:24} {median(rates):7.0f} {spread:>15} {waits} {errors:6} {client:6.1%}"


def verdict_lines(found: Sequence[Verdict]) -> str:
    """Each target with what was measured (median of the rounds' ratios, and their range) and whether it is met."""
    said = {True: "met", False: "NOT MET", None: "not measured"}
    return "\n".join(
        f"{verdict.target.name:52} {verdict.ratio or '-'!s:>22}   "
        f"{verdict.target.sense} {verdict.target.limit:<5g} {said[verdict.is_met]}"
        for verdict in found
    )


def summary(rounds: Rounds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the last line holds: medians, verdicts, errors, and the facts of the run."""
    medians = {
        point: {
            "rate": round(median(sample.rate for sample in samples), 1),
            "p50_ms": round(median(sample.latency.p50 for sample in samples) * 1000, 3),
            "p99_ms": round(median(sample.latency.p99 for sample in samples) * 1000, 3),
        }
        for point, samples in rounds.samples.items()
    }
    return {
        **facts,
        "points": medians,
        "beside": {point: round(median(found), 5) for point, found in rounds.beside.items()},
        "verdicts": [verdict.as_dict() for verdict in verdicts(rounds)],
        "errors": rounds.errors,
        "faults": rounds.faults,
        "wrong_replies": rounds.wrong_replies,
    }


def full(rounds: Rounds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary and every round's samples, for the results file."""
    samples = {point: [sample.as_dict() for sample in found] for point, found in rounds.samples.items()}
    return {
        **summary(rounds, facts),
        "rounds": {"beside": rounds.beside, "samples": samples},
    }
