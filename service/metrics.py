"""Every metric, declared once. When to count is not decided here: `Observed` does for requests, the worker for batches.

Names follow Prometheus' conventions (base units, `_total` for counters). `outcome` is ok, invalid, overloaded,
deadline, cancelled or error, and every request is in every request histogram whatever its outcome.
"""

import platform
from collections.abc import Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from service.domain import Timing

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PROMPT_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)

Metric = TypeVar("Metric", Gauge, Histogram)

_REQUEST = ("route", "model", "outcome")
_STAGES = {
    "attnd_request_seconds": "Seconds from a request's arrival to its end.",
    "attnd_request_queue_seconds": "Seconds a request's tokens waited for the engine.",
    "attnd_request_tokenize_seconds": "Seconds spent turning a request's texts into tokens.",
    "attnd_request_compute_seconds": "Seconds from a request's first batch to the end of its last.",
}


class Metrics:
    """The metrics of one process, in a registry of their own. `latency_buckets` are upper bounds in seconds."""

    def __init__(self, latency_buckets: Sequence[float], build: Mapping[str, str]) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        Info("attnd_build", "Versions this process is made of.", registry=registry).info(
            {"python": platform.python_version(), **build}
        )
        self._stages = [
            Histogram(name, text, _REQUEST, buckets=latency_buckets, registry=registry)
            for name, text in _STAGES.items()
        ]
        # Looking a child up by its labels costs as much as observing; these keep those that every request needs.
        self._stages_of: dict[tuple[str, str, str], list[Histogram]] = {}
        self._in_flight_of: dict[tuple[str, ...], Gauge] = {}
        self._prompt_tokens_of: dict[tuple[str, ...], Histogram] = {}
        self.prompt_tokens = Histogram(
            "attnd_request_prompt_tokens",
            "Tokens the model read for a request.",
            ("route", "model"),
            buckets=PROMPT_TOKENS,
            registry=registry,
        )
        self.in_flight = Gauge("attnd_requests_in_flight", "Requests being served.", ("route",), registry=registry)
        self.queue_depth = Gauge(
            "attnd_queue_inputs", "Inputs accepted and not yet in a batch.", ("model",), registry=registry
        )
        self.batch_size = Histogram(
            "attnd_batch_size", "Inputs in a batch.", ("model",), buckets=BATCH_SIZES, registry=registry
        )
        self.batch_tokens = Histogram(
            "attnd_batch_padded_tokens",
            "Tokens in a batch, padding included.",
            ("model",),
            buckets=BATCH_TOKENS,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "attnd_batch_seconds",
            "Seconds the engine ran a batch.",
            ("model",),
            buckets=latency_buckets,
            registry=registry,
        )
        self.padded_tokens = Counter(
            "attnd_padded_tokens", "Tokens computed, padding included.", ("model",), registry=registry
        )
        self.real_tokens = Counter(
            "attnd_real_tokens", "Tokens computed, padding not counted.", ("model",), registry=registry
        )

    def in_flight_of(self, route: str) -> Gauge:
        """The gauge of requests being served by `route`."""
        return _child(self.in_flight, self._in_flight_of, (route,))

    def observe_prompt(self, route: str, model: str, num_tokens: int) -> None:
        _child(self.prompt_tokens, self._prompt_tokens_of, (route, model)).observe(num_tokens)

    def observe_request(self, route: str, model: str, outcome: str, timing: Timing) -> None:
        """Count one ended request; all stages, whatever the outcome."""
        key = (route, model, outcome)
        stages = self._stages_of.get(key)
        if stages is None:
            stages = self._stages_of[key] = [stage.labels(*key) for stage in self._stages]
        total, queue, tokenize, compute = stages
        total.observe(timing.total_seconds)
        queue.observe(timing.queue_seconds)
        tokenize.observe(timing.tokenize_seconds)
        compute.observe(timing.compute_seconds)

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


def _child(metric: Metric, kept: dict[tuple[str, ...], Metric], labels: tuple[str, ...]) -> Metric:
    found = kept.get(labels)
    if found is None:
        found = kept[labels] = metric.labels(*labels)
    return found
