"""Turns a translation run's samples into the table, the verdicts and the JSON. Measures nothing."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .faults import by_point, fault_lines
from .figures import Ratio, Sample, Target, Verdict, ratio_of

SEARCHES = ("greedy", "beam")
TARGETS = {  # loads at which attnd's sentences a second are compared with a peer's
    ("c16", "ctranslate2"): 1.5,
    ("c1", "ctranslate2"): 1.0,
    ("c16", "transformers"): 5.0,
}
BESIDE = (("offline", "ctranslate2"), ("offline", "transformers"), ("c1", "transformers"))  # no target


@dataclass
class TranslationRounds:
    """What a run has measured so far: grows while the run goes on.

    `samples` are a point's by round, a point being "contender search load"; a load is c1, c16 or offline, whose sample
    has a rate only. `tokens` are those of a translation, the end included, by contender and search. `agreement`: the
    share of sentences that a contender translates to the character as attnd does. `failures`: why one was left out.
    """

    samples: dict[str, dict[int, Sample]] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, point: str, turn: int, sample: Sample) -> None:
        self.samples.setdefault(point, {})[turn] = sample

    def ratio(self, top: str, bottom: str) -> Ratio | None:
        """Of sentences a second, over the rounds in which both were measured; None when there is none."""
        ours, theirs = self.samples.get(top, {}), self.samples.get(bottom, {})
        turns = [turn for turn in sorted(ours) if turn in theirs and theirs[turn].rate > 0]
        return ratio_of([ours[turn].rate for turn in turns], [theirs[turn].rate for turn in turns]) if turns else None

    @property
    def errors(self) -> int:
        return sum(sample.errors for by_turn in self.samples.values() for sample in by_turn.values())

    @property
    def faults(self) -> dict[str, dict[str, int]]:
        """Why requests failed, by point."""
        return by_point({point: by_turn.values() for point, by_turn in self.samples.items()})


def verdicts(rounds: TranslationRounds) -> list[Verdict]:
    """Every target with its measured ratio; None where this run left one side out."""
    return [
        Verdict(
            Target(f"{load}, {search}: sentences a second / {peer}", "at least", limit),
            rounds.ratio(f"attnd {search} {load}", f"{peer} {search} {load}"),
        )
        for search in SEARCHES
        for (load, peer), limit in TARGETS.items()
    ]


def ratios(rounds: TranslationRounds) -> dict[str, Ratio]:
    """What else was compared."""
    pairs = {
        f"{search} {load} / {peer}": (f"attnd {search} {load}", f"{peer} {search} {load}")
        for search in SEARCHES
        for load, peer in BESIDE
    }
    pairs |= {
        f"{search} {load} / bare loops": (f"attnd {search} {load}", f"bare {search} offline")
        for search in SEARCHES
        for load in ("c16", "offline")
    }
    return {name: found for name, pair in pairs.items() if (found := rounds.ratio(*pair)) is not None}


def table(rounds: TranslationRounds) -> str:
    """Medians over the rounds, one line a point; the range of sentences a second beside it. Milliseconds."""
    lines = [f"{'point':28} {'sent/s':>8} {'(min-max)':>17} {'tok/s':>8} {'p50':>8} {'p99':>8} {'errors':>6}"]
    for point, by_turn in rounds.samples.items():
        about = _medians(rounds, point)
        rates = [sample.rate for sample in by_turn.values()]
        span = f"({min(rates):.1f}-{max(rates):.1f})"
        errors = sum(sample.errors for sample in by_turn.values())
        lines.append(
            f"{point:28} {about['sentences_per_s']:8.1f} {span:>17} {about['tokens_per_s']:8.0f}"
            f" {about['p50_ms']:8.1f} {about['p99_ms']:8.1f} {errors:6}"
        )
    return "\n".join(lines)


def notes(rounds: TranslationRounds) -> str:
    """Ratios without a target, who translates alike, who failed, and why requests did."""
    lines = [f"{name:52} {ratio!s:>22}" for name, ratio in ratios(rounds).items()]
    lines += [f"{name}: {share:.1%} of the sentences as attnd has them" for name, share in rounds.agreement.items()]
    lines += [f"{name} failed and was left out: {why}" for name, why in rounds.failures.items()]
    return "\n".join([*lines, *fault_lines(rounds.faults)])


def _medians(rounds: TranslationRounds, point: str) -> dict[str, float]:
    """Tokens a second are sentences a second by the mean tokens of that contender's translations."""
    samples = list(rounds.samples[point].values())
    rate = statistics.median(sample.rate for sample in samples)
    return {
        "sentences_per_s": round(rate, 2),
        "tokens_per_s": round(rate * rounds.tokens.get(point.rpartition(" ")[0], 0.0), 1),
        "p50_ms": round(statistics.median(sample.latency.p50 for sample in samples) * 1000, 2),
        "p99_ms": round(statistics.median(sample.latency.p99 for sample in samples) * 1000, 2),
    }


def summary(rounds: TranslationRounds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the last line holds: medians, verdicts, failures, and the facts of the run."""
    return {
        **facts,
        "points": {point: _medians(rounds, point) for point in rounds.samples},
        "verdicts": [verdict.as_dict() for verdict in verdicts(rounds)],
        "ratios": {name: asdict(ratio) for name, ratio in ratios(rounds).items()},
        "tokens_a_sentence": {name: round(tokens, 2) for name, tokens in rounds.tokens.items()},
        "agreement": {name: round(share, 4) for name, share in rounds.agreement.items()},
        "errors": rounds.errors,
        "faults": rounds.faults,
        "failures": rounds.failures,
    }


def full(rounds: TranslationRounds, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The summary and every round's samples, for the results file."""
    samples = {
        point: {str(turn): sample.as_dict() for turn, sample in by_turn.items()}
        for point, by_turn in rounds.samples.items()
    }
    return {**summary(rounds, facts), "rounds": samples}
