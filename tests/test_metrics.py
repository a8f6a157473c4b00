"""What is declared, and what a worker's hooks count, read back off the exposition as a scraper would."""

import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from service.config import Settings
from service.domain import GenerateTiming, Timing
from service.metrics import TOKEN_SECONDS, Metrics

BUCKETS = (0.001, 0.01, 0.1, 1.0)

# Every metric of ours, its type and its labels.
DECLARED = {
    "attnd_build": ("info", {"python", "version"}),
    "attnd_requests_in_flight": ("gauge", {"route"}),
    "attnd_request_seconds": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_queue_seconds": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_tokenize_seconds": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_compute_seconds": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_first_token_seconds": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_prefill_seconds": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_decode_seconds": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_completion_tokens": ("histogram", {"route", "model", "outcome"}),
    "attnd_request_prompt_tokens": ("histogram", {"route", "model"}),
    "attnd_request_cached_tokens": ("histogram", {"route", "model"}),
    "attnd_inter_token_seconds": ("histogram", {"model"}),
    "attnd_generated_tokens": ("counter", {"model"}),
    "attnd_finished_outputs": ("counter", {"model", "finish_reason"}),
    "attnd_cancelled_generations": ("counter", {"model"}),
    "attnd_attention_maps": ("counter", {"model", "reduce"}),
    "attnd_attention_bytes": ("counter", {"model", "reduce"}),
    "attnd_attention_seconds": ("histogram", {"model", "reduce"}),
    "attnd_queue_inputs": ("gauge", {"model"}),
    "attnd_batch_size": ("histogram", {"model"}),
    "attnd_batch_padded_tokens": ("histogram", {"model"}),
    "attnd_batch_seconds": ("histogram", {"model"}),
    "attnd_padded_tokens": ("counter", {"model"}),
    "attnd_real_tokens": ("counter", {"model"}),
    "attnd_running_sequences": ("gauge", {"model"}),
    "attnd_kv_cache_used_tokens": ("gauge", {"model"}),
    "attnd_kv_cache_capacity_tokens": ("gauge", {"model"}),
    "attnd_kv_cache_block_tokens": ("gauge", {"model"}),
    "attnd_step_rows": ("histogram", {"model"}),
    "attnd_step_seconds": ("histogram", {"model", "phase"}),
    "attnd_step_tokens": ("counter", {"model", "phase"}),
    "attnd_prefix_cache_queried_tokens": ("counter", {"model"}),
    "attnd_prefix_cache_hit_tokens": ("counter", {"model"}),
    "attnd_release_seconds": ("histogram", {"model"}),
}
UNITS = {
    "seconds", "tokens",  # measured
    "size", "rows", "inputs", "sequences", "outputs", "generations", "flight", "maps",  # counted
    "bytes",
    "build",
}  # fmt: skip


def used(metrics: Metrics) -> Metrics:
    """`metrics` after one of everything."""
    metrics.in_flight_of("/r").inc()
    metrics.observe_prompt("/r", "m", 1)
    metrics.observe_request("/r", "m", "ok", Timing(0.1, 0.2, 0.3, 0.4))
    metrics.observe_generation("/r", "m", "cancelled", GenerateTiming(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 7)
    metrics.observe_maps("m", "mean", 6, 4096, 0.25)
    metrics.cached_tokens.labels("/r", "m").observe(64)
    metrics.token_gap.labels("m").observe(0.002)
    metrics.generated_tokens("m").inc()
    metrics.finished_outputs("m", "stop").inc()
    metrics.set_load("m", waiting=lambda: 3, running=lambda: 2)
    metrics.set_kv("m", lambda: (640, 1280), block_tokens=64)
    metrics.observe_step("m", rows=2, prefill_tokens=64, prefill_seconds=0.5, decode_seconds=0.25)
    metrics.observe_prefix("m", queried=100, hit=64)
    metrics.observe_released("m", 0.005)
    for batch in (metrics.batch_size, metrics.batch_tokens, metrics.batch_seconds):
        batch.labels("m").observe(1)
    metrics.padded_tokens.labels("m").inc()
    metrics.real_tokens.labels("m").inc()
    return metrics


def scrape(metrics: Metrics) -> dict[str, Metric]:
    """The families of the exposition text that `/metrics` answers with, by name."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(body.decode())}


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def fresh(**options: Any) -> Metrics:
    return Metrics(BUCKETS, {"version": "0"}, **options)


def ours(families: dict[str, Metric]) -> dict[str, Metric]:
    return {
        name.removesuffix("_info"): family
        for name, family in families.items()
        if name.startswith("attnd_") and not name.endswith("_created")
    }


def test_everything_declared_is_in_the_table_with_its_type_and_labels() -> None:
    found = {}
    for family in used(fresh()).registry.collect():
        if family.name.startswith("attnd_"):
            labels = {label for sample in family.samples for label in sample.labels} - {"le"}
            found[family.name] = (family.type, labels)
    assert found == DECLARED


def test_the_exposition_text_can_be_parsed_and_has_all_of_it() -> None:
    assert set(ours(scrape(used(fresh())))) == set(DECLARED)


def test_names_are_base_units_and_helps_are_sentences() -> None:
    families = ours(scrape(fresh()))
    assert set(families) == set(DECLARED)  # helps are there from the first scrape on
    for name, family in families.items():
        assert re.fullmatch("attnd(_[a-z]+)+", name)
        assert name.rpartition("_")[2] in UNITS, name
        assert re.fullmatch(r"[A-Z].{20,}\.", family.documentation), name
    helps = [family.documentation for family in families.values()]
    assert len(set(helps)) == len(helps)


def test_a_step_is_counted_by_phase() -> None:
    metrics = fresh()
    metrics.observe_step("m", rows=3, prefill_tokens=64, prefill_seconds=0.5, decode_seconds=0.25)
    metrics.observe_step("m", rows=5, prefill_tokens=0, prefill_seconds=0.0, decode_seconds=0.5)
    metrics.observe_step("m", rows=0, prefill_tokens=10, prefill_seconds=0.125, decode_seconds=0.0)
    metrics.observe_step("m", rows=0, prefill_tokens=0, prefill_seconds=0.0, decode_seconds=0.0)
    assert (value(metrics, "attnd_step_rows_sum", model="m"), value(metrics, "attnd_step_rows_count", model="m")) == (
        8,
        2,
    )
    for phase, tokens, seconds, steps in (("prefill", 74, 0.625, 2), ("decode", 8, 0.75, 2)):
        labels = {"model": "m", "phase": phase}
        assert value(metrics, "attnd_step_tokens_total", **labels) == tokens
        assert value(metrics, "attnd_step_seconds_sum", **labels) == seconds
        assert value(metrics, "attnd_step_seconds_count", **labels) == steps


def test_load_and_cache_are_asked_for_at_every_scrape() -> None:
    metrics = fresh()
    state = {"waiting": 1, "running": 2, "used": 64}
    metrics.set_load("m", waiting=lambda: state["waiting"], running=lambda: state["running"])
    metrics.set_kv("m", lambda: (state["used"], 4096), block_tokens=32)
    names = ("queue_inputs", "running_sequences", "kv_cache_used_tokens")
    assert [value(metrics, f"attnd_{name}", model="m") for name in names] == [1, 2, 64]
    state.update(waiting=5, running=6, used=128)
    assert [value(metrics, f"attnd_{name}", model="m") for name in names] == [5, 6, 128]
    assert value(metrics, "attnd_kv_cache_capacity_tokens", model="m") == 4096
    assert value(metrics, "attnd_kv_cache_block_tokens", model="m") == 32


def test_prefix_hits_add_up() -> None:
    metrics = fresh()
    metrics.observe_prefix("m", queried=100, hit=64)
    metrics.observe_prefix("m", queried=50, hit=0)
    assert value(metrics, "attnd_prefix_cache_queried_tokens_total", model="m") == 150
    assert value(metrics, "attnd_prefix_cache_hit_tokens_total", model="m") == 64


def test_releases_are_timed() -> None:
    metrics = fresh()
    metrics.observe_released("m", 0.25)
    metrics.observe_released("m", 0.5)
    assert value(metrics, "attnd_release_seconds_sum", model="m") == 0.75
    assert value(metrics, "attnd_release_seconds_count", model="m") == 2


def test_a_generation_without_a_first_token_counts_with_the_time_it_took() -> None:
    metrics = fresh()
    metrics.observe_generation("/r", "m", "deadline", GenerateTiming(0.1, 0.2, 0.0, 0.0, 0.0, 0.5), 0)
    labels = {"route": "/r", "model": "m", "outcome": "deadline"}
    assert value(metrics, "attnd_request_first_token_seconds_sum", **labels) == 0.5
    assert value(metrics, "attnd_request_completion_tokens_bucket", le="0.0", **labels) == 1


@pytest.mark.parametrize("outcome", ["ok", "invalid", "overloaded", "deadline", "error"])
def test_only_what_was_cancelled_is_counted_as_cancelled(outcome: str) -> None:
    metrics = fresh()
    metrics.observe_generation("/r", "m", outcome, GenerateTiming(0, 0, 0, 0, 0, 1), 0)
    assert value(metrics, "attnd_cancelled_generations_total", model="m") is None


def bounds(metrics: Metrics, name: str) -> list[float]:
    family = next(family for family in metrics.registry.collect() if family.name == name)
    return [float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")]


def test_the_bounds_are_those_that_were_asked_for() -> None:
    metrics = used(fresh(token_buckets=(0.5, 2.0)))
    for name in ("attnd_request_seconds", "attnd_request_first_token_seconds", "attnd_release_seconds"):
        assert bounds(metrics, name) == [*BUCKETS, float("inf")]
    assert bounds(metrics, "attnd_inter_token_seconds") == [0.5, 2.0, float("inf")]


def test_gaps_of_half_a_millisecond_can_be_told_apart_by_default() -> None:
    assert Settings().token_buckets == TOKEN_SECONDS
    assert min(TOKEN_SECONDS) == 0.0005
    assert list(TOKEN_SECONDS) == sorted(TOKEN_SECONDS)


@pytest.mark.parametrize(
    "count",
    [
        lambda metrics: metrics.token_gap.labels("m"),
        lambda metrics: metrics.finished_outputs("m", "stop"),
        lambda metrics: metrics.in_flight_of("/r"),
    ],
)
def test_a_child_is_looked_up_once(count: Callable[[Metrics], Any]) -> None:
    metrics = fresh()
    assert count(metrics) is count(metrics)


def test_children_with_other_labels_are_others() -> None:
    metrics = fresh()
    assert metrics.finished_outputs("m", "stop") is not metrics.finished_outputs("m", "length")
    assert metrics.token_gap.labels("m") is not metrics.token_gap.labels("n")


def test_two_processes_worth_of_metrics_do_not_meet() -> None:
    first, second = fresh(), fresh()
    first.generated_tokens("m").inc()
    assert value(second, "attnd_generated_tokens_total", model="m") is None


@pytest.mark.skipif(sys.platform != "linux", reason="they are read from /proc")
def test_the_process_itself_is_measured() -> None:
    families = scrape(fresh())
    measured = {"process_resident_memory_bytes", "process_virtual_memory_bytes", "process_cpu_seconds"}
    measured |= {"process_open_fds", "process_max_fds", "process_start_time_seconds"}
    assert measured <= set(families)
    assert families["process_resident_memory_bytes"].samples[0].value > 1e6
    assert "python_gc_collections" in families
