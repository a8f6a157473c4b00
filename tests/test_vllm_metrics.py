"""vLLM's names: there when asked for, with its labels and bounds, and equal to what ours say."""

import pytest
from prometheus_client import Metric
from test_metrics import BUCKETS, ours, scrape, used, value

from service.config import Settings
from service.domain import GenerateTiming, Timing
from service.metrics import Metrics
from service.roles import make_metrics

OWN = {"model_name": "m", "engine": "0"}
NAMES = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:request_success",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
}
# As their documentation lists them, as text, and so typed a second time.
BOUNDS = {
    "vllm:time_to_first_token_seconds": ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 "
    "2560",
    "vllm:inter_token_latency_seconds": ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80",
    "vllm:e2e_request_latency_seconds": ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680",
    "vllm:request_queue_time_seconds": ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680",
}


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(BUCKETS, {"version": "0"}, vllm_names=True)


def theirs(metrics: Metrics) -> dict[str, Metric]:
    return {name: family for name, family in scrape(metrics).items() if name.startswith("vllm:")}


def end(metrics: Metrics, route: str, outcome: str, seconds: float, *, model: str = "m") -> None:
    metrics.observe_request(route, model, outcome, Timing(seconds / 4, 0.0, 0.0, seconds))
    timing = GenerateTiming(seconds / 4, 0.0, seconds / 4, seconds / 2, seconds / 2, seconds)
    metrics.observe_generation(route, model, outcome, timing, 3)


def test_they_are_there_only_when_asked_for(metrics: Metrics) -> None:
    assert theirs(used(Metrics(BUCKETS, {}))) == {}
    assert set(theirs(used(metrics))) == NAMES


@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_setting_asks_for_them(is_wanted: bool) -> None:
    metrics = used(make_metrics(Settings(vllm_metrics=is_wanted)))
    assert bool(theirs(metrics)) == is_wanted


def test_ours_stay_what_they_are(metrics: Metrics) -> None:
    assert set(ours(scrape(used(metrics)))) == set(ours(scrape(used(Metrics(BUCKETS, {})))))


def test_every_sample_has_their_labels_and_every_name_a_help(metrics: Metrics) -> None:
    for family in theirs(used(metrics)).values():
        assert family.documentation
        for sample in family.samples:
            assert OWN.items() <= sample.labels.items()


def test_what_a_gateway_balances_by_is_there_before_any_request(metrics: Metrics) -> None:
    metrics.set_load("m", waiting=lambda: 3, running=lambda: 2)
    metrics.set_kv("m", lambda: (320, 1280), block_tokens=64)
    families = theirs(metrics)
    assert value(metrics, "vllm:num_requests_waiting", **OWN) == 3
    assert value(metrics, "vllm:num_requests_running", **OWN) == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", **OWN) == 0.25
    assert value(metrics, "vllm:cache_config_info", block_size="64", num_gpu_blocks="20", **OWN) == 1
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"):
        assert families[f"vllm:{name}"].type == "gauge"
    assert value(metrics, "vllm:generation_tokens_total", **OWN) == 0


def test_a_process_without_an_engine_has_no_queue_and_no_cache(metrics: Metrics) -> None:
    end(metrics, "/a", "ok", 1.0)
    families = theirs(metrics)
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"):
        assert families[f"vllm:{name}"].samples == []
    assert value(metrics, "vllm:e2e_request_latency_seconds_count", **OWN) == 1


def test_models_that_only_classify_are_left_out(metrics: Metrics) -> None:
    metrics.queue_depth.labels("classifier").set_function(lambda: 9)
    metrics.observe_request("/v1/classify", "classifier", "ok", Timing(0, 0, 0, 1))
    metrics.observe_request("/v1/generate", "", "invalid", Timing(0, 0, 0, 1))
    end(metrics, "/a", "invalid", 1.0, model="")
    assert [sample for family in theirs(metrics).values() for sample in family.samples] == []


def test_histograms_sum_over_routes_and_hold_what_ended_well(metrics: Metrics) -> None:
    end(metrics, "/a", "ok", 2.0)
    end(metrics, "/b", "ok", 4.0)
    end(metrics, "/b", "ok", 8.0, model="n")
    for outcome in ("cancelled", "deadline", "overloaded", "invalid", "error"):
        end(metrics, "/b", outcome, 64.0)
    for name, total in (
        ("time_to_first_token_seconds", 3.0),
        ("e2e_request_latency_seconds", 6.0),
        ("request_queue_time_seconds", 1.5),
        ("request_prefill_time_seconds", 1.5),
        ("request_decode_time_seconds", 3.0),
    ):
        assert value(metrics, f"vllm:{name}_sum", **OWN) == total
        assert value(metrics, f"vllm:{name}_count", **OWN) == 2
        assert value(metrics, f"vllm:{name}_bucket", le="+Inf", **OWN) == 2
    assert value(metrics, "vllm:e2e_request_latency_seconds_bucket", le="2.0", **OWN) == 1
    assert value(metrics, "vllm:e2e_request_latency_seconds_bucket", le="5.0", **OWN) == 2
    assert value(metrics, "vllm:e2e_request_latency_seconds_sum", model_name="n", engine="0") == 8


def test_all_gaps_count(metrics: Metrics) -> None:
    end(metrics, "/a", "cancelled", 1.0)
    metrics.token_gap.labels("m").observe(0.02)
    metrics.token_gap.labels("m").observe(0.5)
    assert value(metrics, "vllm:inter_token_latency_seconds_sum", **OWN) == 0.52
    assert value(metrics, "vllm:inter_token_latency_seconds_bucket", le="0.025", **OWN) == 1


@pytest.mark.parametrize("name", BOUNDS)
def test_their_bounds_are_among_ours(metrics: Metrics, name: str) -> None:
    family = theirs(used(with_ok(metrics)))[name]
    bounds = [float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")]
    assert {float(bound) for bound in BOUNDS[name].split()} <= set(bounds)
    assert bounds == sorted(set(bounds))


def with_ok(metrics: Metrics) -> Metrics:
    end(metrics, "/r", "ok", 1.0)
    return metrics


def test_counters_are_ours(metrics: Metrics) -> None:
    end(metrics, "/a", "ok", 1.0)
    metrics.observe_prompt("/a", "m", 10)
    metrics.observe_prompt("/b", "m", 7)
    metrics.generated_tokens("m").inc(5)
    metrics.observe_prefix("m", queried=17, hit=8)
    assert value(metrics, "vllm:prompt_tokens_total", **OWN) == 17
    assert value(metrics, "vllm:generation_tokens_total", **OWN) == 5
    assert value(metrics, "vllm:prefix_cache_queries_total", **OWN) == 17
    assert value(metrics, "vllm:prefix_cache_hits_total", **OWN) == 8


def test_ends_are_counted_by_reason(metrics: Metrics) -> None:
    for outcome in ("ok", "cancelled", "deadline", "error", "error", "error", "invalid", "overloaded"):
        end(metrics, "/a", outcome, 1.0)
    for reason in ("stop", "stop", "length"):
        metrics.finished_outputs("m", reason).inc()
    counts = {
        reason: value(metrics, "vllm:request_success_total", finished_reason=reason, **OWN)
        for reason in ("stop", "length", "abort", "error")
    }
    assert counts == {"stop": 2, "length": 1, "abort": 2, "error": 3}
