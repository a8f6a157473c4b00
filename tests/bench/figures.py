"""The arithmetic of a benchmark: percentiles, arrival times, ratios of paired rounds, targets.

Pure functions of numbers. Knows no server, no clock and no file.
"""

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .faults import Faults


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of values in rising order; `share` is in (0, 1]. Raises ValueError when empty."""
    if not ordered:
        raise ValueError("no values to take a percentile of")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    return ordered[math.ceil(share * len(ordered)) - 1]


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from sending (closed loop) or from the scheduled arrival (open loop) to the whole reply."""

    mean: float
    p50: float
    p90: float
    p99: float
    worst: float


def latency_of(seconds: Sequence[float]) -> Latency:
    """Summary of unordered latencies; all zero when there are none, so that a run of nothing but errors has a row."""
    if not seconds:
        return Latency(mean=0.0, p50=0.0, p90=0.0, p99=0.0, worst=0.0)
    ordered = sorted(seconds)
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Latency(mean=statistics.fmean(ordered), p50=p50, p90=p90, p99=p99, worst=ordered[-1])


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: answered requests a second, their latencies, and what the load generator itself used.

    `faults`: how many requests failed, by why. `client_cpu` is the generator's CPU seconds for each second of wall
    clock (1.0 = one whole core).
    """

    rate: float
    latency: Latency
    requests: int
    faults: Faults
    client_cpu: float

    @property
    def errors(self) -> int:
        return sum(self.faults.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sample_from(found: Mapping[str, Any]) -> Sample:
    """The inverse of `Sample.as_dict`, for samples that another process printed."""
    return Sample(**{**found, "latency": Latency(**found["latency"])})


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrival times in [0, seconds), rising; gaps are exponential with mean 1 / rate. A seed is a schedule."""
    draw = random.Random(seed)
    times: list[float] = []
    at = draw.expovariate(rate)
    while at < seconds:
        times.append(at)
        at += draw.expovariate(rate)
    return times


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio measured once a round: the median, and the range that the rounds spanned."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Numerator over denominator round by round.

    The two of a round were measured within seconds of each other, so what slows the whole machine for a while
    cancels in their ratio, as it would not in a ratio of averages. Raises ValueError when rounds do not pair up, or
    when a denominator is not positive: a contender that answered nothing has not been measured, so not beaten either.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"rounds do not pair up: {len(numerators)} and {len(denominators)}")
    if min(denominators) <= 0:
        raise ValueError(f"nothing to compare with: a round measured {min(denominators):g}")
    ratios = [top / bottom for top, bottom in zip(numerators, denominators, strict=True)]
    return Ratio(median=statistics.median(ratios), low=min(ratios), high=max(ratios))


@dataclass(frozen=True, slots=True)
class Target:
    """What a ratio has to reach."""

    name: str
    sense: Literal["at least", "at most"]
    limit: float

    def is_met(self, ratio: Ratio) -> bool:
        return ratio.median >= self.limit if self.sense == "at least" else ratio.median <= self.limit


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target beside the ratio that was measured; None when this run did not measure it."""

    target: Target
    ratio: Ratio | None

    @property
    def is_met(self) -> bool | None:
        return None if self.ratio is None else self.target.is_met(self.ratio)

    def as_dict(self) -> dict[str, Any]:
        ratio = None if self.ratio is None else asdict(self.ratio)
        return {"target": asdict(self.target), "ratio": ratio, "met": self.is_met}
