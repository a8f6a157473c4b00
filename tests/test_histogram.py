"""Our histogram against prometheus_client's own: the same samples from the same observations."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from service.histogram import Histogram

LABELS = ("route", "model")
BOUNDS = (0.001, 0.25, 1, 2.5)
VALUES = (0.0, 0.0005, 0.001, 0.0010001, 0.25, 0.5, 1.0, 1, 2.5, 2.50001, 1e9)


def text_of(ours: Histogram) -> str:
    registry = CollectorRegistry()
    registry.register(ours)
    return generate_latest(registry).decode()


def text_of_theirs(bounds: Sequence[float], observed: Sequence[tuple[tuple[str, str], float]]) -> str:
    registry = CollectorRegistry()
    theirs = prometheus_client.Histogram("seconds", "Seconds.", LABELS, buckets=bounds, registry=registry)
    for labels, value in observed:
        theirs.labels(*labels).observe(value)
    lines = generate_latest(registry).decode().splitlines(keepends=True)
    return "".join(line for line in lines if "seconds_created" not in line)


@pytest.mark.parametrize("bounds", [BOUNDS, (0, *BOUNDS), (1e-5, 16384, 1e16)])
def test_the_text_is_that_of_prometheus_clients_own(bounds: Sequence[float]) -> None:
    observed = [((f"/{at % 2}", 'a"b\\'), value) for at, value in enumerate(VALUES)]
    ours = Histogram("seconds", "Seconds.", LABELS, bounds)
    for labels, value in observed:
        ours.labels(*labels).observe(value)
    assert text_of(ours) == text_of_theirs(bounds, observed)


def test_many_at_once_are_counted_as_one_by_one() -> None:
    together, singly = (Histogram("seconds", "Seconds.", (), BOUNDS).labels() for _ in range(2))
    together.observe_all(VALUES)
    for value in VALUES:
        singly.observe(value)
    assert together.read() == singly.read()


def test_without_an_observation_there_is_the_name_alone() -> None:
    assert text_of(Histogram("seconds", "Seconds.", LABELS, BOUNDS)) == text_of_theirs(BOUNDS, [])


class Slow(float):
    """Lets other threads run in the middle of being added."""

    def __radd__(self, other: float) -> float:
        time.sleep(0.0001)
        return other + float(self)


def test_nothing_is_lost_between_threads() -> None:
    series = Histogram("seconds", "Seconds.", (), BOUNDS).labels()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(series.observe, [Slow(0.5)] * 200))
        list(threads.map(series.observe_all, [[Slow(0.5)] * 10] * 20))
    assert series.read() == ([0, 0, 400, 400, 400], 200.0)


def test_labels_are_as_many_as_were_declared() -> None:
    with pytest.raises(AssertionError):
        Histogram("seconds", "Seconds.", LABELS, BOUNDS).labels("/r")
