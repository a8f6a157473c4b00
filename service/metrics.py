"""Every metric, declared once. When to count is not decided here: `Observed` does for requests, the worker for steps.

Names follow Prometheus' conventions (base units, `_total` for counters). `outcome` is ok, invalid, overloaded,
deadline, cancelled or error, and every request to a model is in the request histograms whatever its outcome. No label
ever takes a value that callers make up. What may be called per token or per step costs a few microseconds: it looks no
label up.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Info
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service.domain import GenerateTiming, Timing
from service.histogram import Histogram
from service.vllm_metrics import VllmMetrics, with_vllm_bounds

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
PROMPT_TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)
COMPLETION_TOKENS = (0, 1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

Metric = TypeVar("Metric", Counter, Gauge)
Declared = TypeVar("Declared", bound=Collector)

_REQUEST = ("route", "model", "outcome")
_STAGES = {
    "attnd_request_seconds": "Seconds from a request's arrival to its end.",
    "attnd_request_queue_seconds": "Seconds a request's tokens waited for the engine.",
    "attnd_request_tokenize_seconds": "Seconds spent turning a request's texts into tokens.",
    "attnd_request_compute_seconds": "Seconds from the engine's start on a request until it was done with it.",
}
_GENERATION_STAGES = {
    "attnd_request_first_token_seconds": "Seconds from a generation's arrival to its first token, or to its end if "
    "that came before.",
    "attnd_request_prefill_seconds": "Seconds from the engine's start on a generation's prompt to its first token.",
    "attnd_request_decode_seconds": "Seconds from a generation's first token to its last.",
}


class Kept(Generic[Metric]):
    """A metric's children. Looking one up by its labels costs more than counting; here it is one dictionary's get."""

    def __init__(self, metric: Metric) -> None:
        self._metric: Metric = metric
        self._children: dict[tuple[str, ...], Metric] = {}

    def __call__(self, *labels: str) -> Metric:
        found = self._children.get(labels)
        if found is None:
            found = self._children[labels] = self._metric.labels(*labels)
        return found


class Metrics:
    """The metrics of one process, in a registry of their own.

    `latency_buckets` and `token_buckets` (gaps between tokens, engine steps) are upper bounds in seconds. With
    `vllm_names` what generations are measured by is there a second time, as vLLM calls it.
    """

    def __init__(
        self,
        latency_buckets: Sequence[float],
        build: Mapping[str, str],
        *,
        token_buckets: Sequence[float] = TOKEN_SECONDS,
        vllm_names: bool = False,
    ) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        Info("attnd_build", "Versions this process is made of.", registry=self.registry).info(
            {"python": platform.python_version(), **build}
        )
        self._latency_buckets = tuple(latency_buckets)
        self._token_buckets = tuple(token_buckets)
        self._has_vllm_bounds = vllm_names
        self._declared: list[Collector] = []
        self._declare_requests()
        self._declare_batches()
        self._declare_generations()
        self._declare_engine()
        if vllm_names:
            self.registry.register(VllmMetrics(self._declared))

    def _declare_requests(self) -> None:
        self._stages = [self._seconds(name, text, _REQUEST) for name, text in _STAGES.items()]
        self.prompt_tokens = self._histogram(
            "attnd_request_prompt_tokens", "Tokens the model read for a request.", ("route", "model"), PROMPT_TOKENS
        )
        self.in_flight_of = Kept(
            self._gauge("attnd_requests_in_flight", "Requests begun and not yet ended.", ("route",))
        )
        labels = ("model", "reduce")
        self._maps = (
            Kept(self._counter("attnd_attention_maps", "Attention maps that were told.", labels)),
            Kept(self._counter("attnd_attention_bytes", "Bytes of attention maps, as float32.", labels)),
            self._seconds("attnd_attention_seconds", "Seconds from asking for maps to the last of them.", labels),
        )

    def _declare_batches(self) -> None:
        self.queue_depth = self._gauge(
            "attnd_queue_inputs",
            "Inputs accepted that wait for the engine: texts to classify, and outputs without a slot.",
        )
        self.batch_size = self._histogram(
            "attnd_batch_size", "Texts that one batch classified.", ("model",), BATCH_SIZES
        )
        self.batch_tokens = self._histogram(
            "attnd_batch_padded_tokens",
            "Tokens of one batch of texts to classify, padding included.",
            ("model",),
            BATCH_TOKENS,
        )
        self.batch_seconds = self._seconds(
            "attnd_batch_seconds", "Seconds the engine took for one batch of texts to classify.", ("model",)
        )
        self.padded_tokens = self._counter(
            "attnd_padded_tokens", "Tokens computed to classify texts, padding included."
        )
        self.real_tokens = self._counter("attnd_real_tokens", "Tokens computed to classify texts, padding not counted.")

    def _declare_generations(self) -> None:
        self._generation_stages = [self._seconds(name, text, _REQUEST) for name, text in _GENERATION_STAGES.items()]
        self._completion_tokens = self._histogram(
            "attnd_request_completion_tokens",
            "Tokens written for a generation, all of its outputs together.",
            _REQUEST,
            COMPLETION_TOKENS,
        )
        self.cached_tokens = self._histogram(
            "attnd_request_cached_tokens",
            "Tokens of a generation's prompts that were not computed but taken from the prefix cache.",
            ("route", "model"),
            (0, *PROMPT_TOKENS),
        )
        self.token_gap = self._histogram(
            "attnd_inter_token_seconds",
            "Seconds between two consecutive tokens of one output, whatever became of it later.",
            ("model",),
            self._token_buckets,
        )
        self.generated_tokens = Kept(
            self._counter(
                "attnd_generated_tokens",
                "Tokens written, counted as they are told: one by one, or at the end of whole texts.",
            )
        )
        self.finished_outputs = Kept(
            self._counter(
                "attnd_finished_outputs",
                "Outputs written to their end: stop (the model or a stop string ended it) or length (its limit did).",
                ("model", "finish_reason"),
            )
        )
        self.cancellations = Kept(
            self._counter("attnd_cancelled_generations", "Generations whose client left before their end.")
        )

    def _declare_engine(self) -> None:
        self._running = self._gauge("attnd_running_sequences", "Outputs being written: those that hold a slot.")
        self._kv_used = self._gauge(
            "attnd_kv_cache_used_tokens", "Tokens whose keys and values are held for outputs being written."
        )
        self._kv_capacity = self._gauge(
            "attnd_kv_cache_capacity_tokens", "Tokens whose keys and values there is room for."
        )
        self._kv_block = self._gauge("attnd_kv_cache_block_tokens", "Tokens that are cached and reused as one block.")
        self._step_rows = self._histogram(
            "attnd_step_rows", "Outputs that one engine step continued.", ("model",), BATCH_SIZES
        )
        self._step_seconds = self._histogram(
            "attnd_step_seconds",
            "Seconds of one engine step spent on prompts (phase prefill) and on writing (phase decode).",
            ("model", "phase"),
            self._token_buckets,
        )
        self._step_tokens = Kept(
            self._counter(
                "attnd_step_tokens", "Tokens the engine computed, of prompts and of outputs.", ("model", "phase")
            )
        )
        self._prefix_queried = Kept(
            self._counter("attnd_prefix_cache_queried_tokens", "Prompt tokens looked up in the prefix cache.")
        )
        self._prefix_hit = Kept(
            self._counter("attnd_prefix_cache_hit_tokens", "Prompt tokens that the prefix cache had.")
        )
        self._released = self._seconds(
            "attnd_release_seconds", "Seconds from a client's leaving until its slots were free.", ("model",)
        )

    # --- called where requests cross the seam

    def observe_prompt(self, route: str, model: str, num_tokens: int) -> None:
        self.prompt_tokens.labels(route, model).observe(num_tokens)

    def observe_request(self, route: str, model: str, outcome: str, timing: Timing | GenerateTiming) -> None:
        """Count one ended request; all stages, whatever the outcome."""
        total, queue, tokenize, compute = self._stages
        total.labels(route, model, outcome).observe(timing.total_seconds)
        queue.labels(route, model, outcome).observe(timing.queue_seconds)
        tokenize.labels(route, model, outcome).observe(timing.tokenize_seconds)
        compute.labels(route, model, outcome).observe(timing.compute_seconds)

    def observe_maps(self, model: str, reduce: str, num_maps: int, num_bytes: int, seconds: float) -> None:
        """Count the maps of one request that was answered."""
        total, size, duration = self._maps
        total(model, reduce).inc(num_maps)
        size(model, reduce).inc(num_bytes)
        duration.labels(model, reduce).observe(seconds)

    def observe_generation(
        self, route: str, model: str, outcome: str, timing: GenerateTiming, num_completion_tokens: int
    ) -> None:
        """Count what only generations have of one that ended; all of it, whatever the outcome."""
        first_token, prefill, decode = self._generation_stages
        first_token.labels(route, model, outcome).observe(timing.first_token_seconds or timing.total_seconds)
        prefill.labels(route, model, outcome).observe(timing.prefill_seconds)
        decode.labels(route, model, outcome).observe(timing.decode_seconds)
        self._completion_tokens.labels(route, model, outcome).observe(num_completion_tokens)
        if outcome == "cancelled":
            self.cancellations(model).inc()

    # --- called by a worker, from whatever thread its engine runs in

    def set_load(self, model: str, *, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Say how to find out how many outputs of `model` wait for a slot and how many have one."""
        self.queue_depth.labels(model).set_function(waiting)
        self._running.labels(model).set_function(running)

    def set_kv(self, model: str, usage: Callable[[], tuple[int, int]], *, block_tokens: int) -> None:
        """Say how to find out how many tokens the K/V slots of `model` hold, and how many they have room for.

        What the prefix cache merely keeps does not count as held: gateways balance by this.
        """
        self._kv_used.labels(model).set_function(lambda: usage()[0])
        self._kv_capacity.labels(model).set_function(lambda: usage()[1])
        self._kv_block.labels(model).set(block_tokens)

    def observe_step(
        self, model: str, *, rows: int, prefill_tokens: int, prefill_seconds: float, decode_seconds: float
    ) -> None:
        """Count one engine step, which continued `rows` outputs by a token and computed `prefill_tokens` of prompts."""
        if rows:
            self._step_rows.labels(model).observe(rows)
            self._step_seconds.labels(model, "decode").observe(decode_seconds)
            self._step_tokens(model, "decode").inc(rows)
        if prefill_tokens:
            self._step_seconds.labels(model, "prefill").observe(prefill_seconds)
            self._step_tokens(model, "prefill").inc(prefill_tokens)

    def observe_prefix(self, model: str, *, queried: int, hit: int) -> None:
        """Count one prompt of `queried` tokens, of which the prefix cache had `hit`."""
        self._prefix_queried(model).inc(queried)
        self._prefix_hit(model).inc(hit)

    def observe_released(self, model: str, seconds: float) -> None:
        """Count a slot that was free `seconds` after its client had left."""
        self._released.labels(model).observe(seconds)

    # --- called by whoever answers a scrape

    def render(self) -> tuple[bytes, str]:
        """The exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    # ---

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ("model",)) -> Gauge:
        return self._declare(Gauge(name, text, labels, registry=self.registry))

    def _counter(self, name: str, text: str, labels: Sequence[str] = ("model",)) -> Counter:
        return self._declare(Counter(name, text, labels, registry=self.registry))

    def _seconds(self, name: str, text: str, labels: Sequence[str]) -> Histogram:
        return self._histogram(name, text, labels, self._latency_buckets)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        chosen = with_vllm_bounds(name, buckets) if self._has_vllm_bounds else buckets
        histogram = Histogram(name, text, labels, chosen)
        self.registry.register(histogram)
        return self._declare(histogram)

    def _declare(self, metric: Declared) -> Declared:
        self._declared.append(metric)
        return metric
