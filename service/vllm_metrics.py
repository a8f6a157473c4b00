"""What generations are measured by, under vLLM's names too: for dashboards, and for gateways that balance by them.

Nothing is counted here. Each scrape reads our own metrics and writes them down a second time, summed over routes, with
the labels `model_name` and `engine` ("0"). Source of names, labels and bounds: vLLM's docs/design/metrics.md and
vllm/v1/metrics/loggers.py; a Kubernetes inference gateway reads num_requests_waiting, num_requests_running,
kv_cache_usage_perc and cache_config_info. As in vLLM, the histograms of whole requests hold those that ended well.
"""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

_LABELS = ("model_name", "engine")
_ENGINE = "0"

_FIRST_TOKEN_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BOUNDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BOUNDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip

# Their name: (ours, their bounds, what it is).
_HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": (
        "attnd_request_first_token_seconds",
        _FIRST_TOKEN_BOUNDS,
        "Seconds from a request's arrival to its first token.",
    ),
    "vllm:inter_token_latency_seconds": (
        "attnd_inter_token_seconds",
        _TOKEN_BOUNDS,
        "Seconds between two consecutive tokens of one output.",
    ),
    "vllm:e2e_request_latency_seconds": (
        "attnd_request_seconds",
        _REQUEST_BOUNDS,
        "Seconds from a request's arrival to its end.",
    ),
    "vllm:request_queue_time_seconds": (
        "attnd_request_queue_seconds",
        _REQUEST_BOUNDS,
        "Seconds a request waited for the engine.",
    ),
    "vllm:request_prefill_time_seconds": (
        "attnd_request_prefill_seconds",
        _REQUEST_BOUNDS,
        "Seconds from the engine's start on a request's prompt to its first token.",
    ),
    "vllm:request_decode_time_seconds": (
        "attnd_request_decode_seconds",
        _REQUEST_BOUNDS,
        "Seconds from a request's first token to its last.",
    ),
}
# Their name: (our sample, what it is).
_COUNTERS = {
    "vllm:prompt_tokens": ("attnd_request_prompt_tokens_sum", "Prompt tokens read."),
    "vllm:generation_tokens": ("attnd_generated_tokens_total", "Tokens written."),
    "vllm:prefix_cache_queries": (
        "attnd_prefix_cache_queried_tokens_total",
        "Prompt tokens looked up in the prefix cache.",
    ),
    "vllm:prefix_cache_hits": ("attnd_prefix_cache_hit_tokens_total", "Prompt tokens that the prefix cache had."),
}
_GAUGES = {
    "vllm:num_requests_waiting": ("attnd_queue_inputs", "Outputs that wait for a slot."),
    "vllm:num_requests_running": ("attnd_running_sequences", "Outputs being written."),
}
_ENDED = "attnd_request_first_token_seconds_count"  # every generation is in it once
_OUTCOMES = {"cancelled": "abort", "deadline": "abort", "error": "error"}  # ours: their finished_reason

_Samples = dict[str, list[Sample]]


def with_vllm_bounds(name: str, bounds: Sequence[float]) -> tuple[float, ...]:
    """The bounds of our histogram `name`, and vLLM's too if it has that histogram."""
    theirs = [bound for ours, wanted, _ in _HISTOGRAMS.values() if ours == name for bound in wanted]
    return tuple(sorted({*bounds, *theirs}))


class VllmMetrics(Collector):
    """A collector for prometheus_client, which reads `ours` whenever it is collected."""

    def __init__(self, ours: Iterable[Collector]) -> None:
        self._ours = tuple(ours)

    def collect(self) -> Iterator[Metric]:
        samples = self._read()
        generating = samples.get("attnd_running_sequences", []) + samples.get(_ENDED, [])
        models = sorted({sample.labels["model"] for sample in generating} - {""})
        yield from _gauges(samples, models)
        yield from _cache(samples, models)
        yield from _counters(samples, models)
        yield _finished(samples, models)
        for name, (ours, _, text) in _HISTOGRAMS.items():
            yield _histogram(name, text, samples, ours, models)

    def _read(self) -> _Samples:
        found: _Samples = {}
        for metric in self._ours:
            for family in metric.collect():
                for sample in family.samples:
                    found.setdefault(sample.name, []).append(sample)
        return found


def _of(samples: _Samples, name: str, model: str, **labels: str) -> list[Sample]:
    wanted = {"model": model, **labels}.items()
    return [sample for sample in samples.get(name, []) if wanted <= sample.labels.items()]


def _sum(samples: _Samples, name: str, model: str, **labels: str) -> float:
    return sum(sample.value for sample in _of(samples, name, model, **labels))


def _gauges(samples: _Samples, models: Sequence[str]) -> Iterator[Metric]:
    for name, (ours, text) in _GAUGES.items():
        family = GaugeMetricFamily(name, text, labels=_LABELS)
        for model in models:
            if found := _of(samples, ours, model):
                family.add_metric((model, _ENGINE), found[0].value)
        yield family


def _cache(samples: _Samples, models: Sequence[str]) -> Iterator[Metric]:
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the K/V cache in use, from 0 to 1.", labels=_LABELS)
    config = GaugeMetricFamily(
        "vllm:cache_config_info",
        "Sizes of the K/V cache: tokens a block, and blocks.",
        labels=(*_LABELS, "block_size", "num_gpu_blocks"),
    )
    for model in models:
        if not _of(samples, "attnd_kv_cache_capacity_tokens", model):
            continue  # a gateway has no cache
        capacity = _sum(samples, "attnd_kv_cache_capacity_tokens", model)
        block = _sum(samples, "attnd_kv_cache_block_tokens", model)
        used = _sum(samples, "attnd_kv_cache_used_tokens", model)
        usage.add_metric((model, _ENGINE), used / capacity if capacity else 0.0)
        config.add_metric((model, _ENGINE, f"{block:.0f}", f"{capacity // block:.0f}"), 1.0)
    yield usage
    yield config


def _counters(samples: _Samples, models: Sequence[str]) -> Iterator[Metric]:
    for name, (ours, text) in _COUNTERS.items():
        family = CounterMetricFamily(name, text, labels=_LABELS)
        for model in models:
            family.add_metric((model, _ENGINE), _sum(samples, ours, model))
        yield family


def _finished(samples: _Samples, models: Sequence[str]) -> Metric:
    family = CounterMetricFamily(
        "vllm:request_success",
        "Outputs that ended by themselves (stop) or at their limit (length), and requests that did not (abort, error).",
        labels=(*_LABELS, "finished_reason"),
    )
    for model in models:
        reasons = {"stop": 0.0, "length": 0.0, "abort": 0.0, "error": 0.0}
        for sample in _of(samples, "attnd_finished_outputs_total", model):
            reason = sample.labels["finish_reason"]
            reasons[reason] = reasons.get(reason, 0.0) + sample.value
        for outcome, reason in _OUTCOMES.items():
            reasons[reason] += _sum(samples, _ENDED, model, outcome=outcome)
        for reason, value in reasons.items():
            family.add_metric((model, _ENGINE, reason), value)
    return family


def _histogram(name: str, text: str, samples: _Samples, ours: str, models: Sequence[str]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=_LABELS)
    for model in models:
        buckets: dict[str, float] = {}
        for sample in samples.get(f"{ours}_bucket", []):
            if _is_counted(sample, model):
                bound = sample.labels["le"]
                buckets[bound] = buckets.get(bound, 0.0) + sample.value
        if buckets:
            total = sum(sample.value for sample in samples[f"{ours}_sum"] if _is_counted(sample, model))
            family.add_metric((model, _ENGINE), list(buckets.items()), total)
    return family


def _is_counted(sample: Sample, model: str) -> bool:
    return sample.labels["model"] == model and sample.labels.get("outcome", "ok") == "ok"
