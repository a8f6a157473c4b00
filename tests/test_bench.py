"""The bench's arithmetic and its report."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
from bench.ceiling import Shape, batches_of, shapes
from bench.classify import options
from bench.contenders import Tuning, attnd, candidates
from bench.faults import counted, fault_lines, outcry
from bench.figures import (
    Latency,
    Ratio,
    Sample,
    Target,
    Verdict,
    arrivals,
    latency_of,
    percentile,
    ratio_of,
    sample_from,
)
from bench.measurement import points_of
from bench.report import TARGETS, Rounds, full, summary, table, verdict_lines, verdicts
from bench.sentences import own_sentences, read_sentences
from bench.servers import ServerFailed
from bench.tuning import Tried, best_of

# --- arithmetic


@pytest.mark.parametrize(
    ("share", "value"), [(0.01, 1), (0.5, 50), (0.501, 51), (0.9, 90), (0.99, 99), (0.991, 100), (1.0, 100)]
)
def test_percentile_is_nearest_rank(share: float, value: int) -> None:
    assert percentile(range(1, 101), share) == value


def test_percentile_of_one_value_is_that_value() -> None:
    assert percentile([7.0], 0.01) == percentile([7.0], 1.0) == 7.0


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.01)])
def test_percentile_refuses_what_has_none(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match=r"values|share"):
        percentile(values, share)


def test_latency_sorts_and_averages() -> None:
    assert latency_of([0.3, 0.1, 0.2]) == Latency(mean=pytest.approx(0.2), p50=0.2, p90=0.3, p99=0.3, worst=0.3)
    assert latency_of([]).p99 == 0.0


def test_arrivals_are_poisson() -> None:
    times = arrivals(rate=200.0, seconds=100.0, seed=1)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 100.0
    assert len(times) == pytest.approx(20_000, rel=0.03)
    # Exponential gaps: the standard deviation equals the mean, and 1/e of the gaps are longer than it.
    assert statistics.stdev(gaps) == pytest.approx(1 / 200, rel=0.05)
    assert sum(gap > 1 / 200 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)


def test_arrivals_repeat_by_seed() -> None:
    assert arrivals(50.0, 2.0, seed=3) == arrivals(50.0, 2.0, seed=3) != arrivals(50.0, 2.0, seed=4)


def test_ratio_pairs_rounds() -> None:
    # The machine ran at half speed in the second round; round by round the ratio is the same all the same.
    assert ratio_of([80.0, 40.0, 90.0], [100.0, 50.0, 100.0]) == Ratio(median=0.8, low=0.8, high=0.9)


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], []), ([1.0], [1.0, 2.0]), ([1.0, 1.0], [1.0, 0.0])])
def test_ratio_refuses_rounds_that_do_not_compare(top: list[float], bottom: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pair|nothing"):
        ratio_of(top, bottom)


@pytest.mark.parametrize(
    ("sense", "median", "met"),
    [("at least", 0.85, True), ("at least", 0.84, False), ("at most", 1.5, True), ("at most", 1.51, False)],
)
def test_target_is_judged_by_the_median(sense: str, median: float, met: bool) -> None:
    target = Target("x", sense, 0.85 if sense == "at least" else 1.5)  # type: ignore[arg-type]
    assert Verdict(target, Ratio(median, low=0.0, high=9.0)).is_met is met


def test_target_without_measurement_is_neither_met_nor_missed() -> None:
    assert Verdict(TARGETS[0], None).as_dict()["met"] is None


# --- report


def sample(rate: float, *, p50: float = 0.01, p99: float = 0.02, mean: float = 0.01, **faults: int) -> Sample:
    return Sample(rate, Latency(mean, p50, p50, p99, p99), requests=int(rate), faults=faults, client_cpu=0.05)


def measured() -> Rounds:
    rounds = Rounds()
    beside = {f"attnd {wire} c32": [900.0, 1100.0] for wire in ("rest", "grpc", "stream")} | {"attnd rest c1": [0.002]}
    rates = {
        "attnd rest c1": 300.0,
        "attnd rest c32": 900.0,
        "attnd rest poisson": 600.0,
        "attnd grpc c32": 700.0,
        "attnd stream c32": 950.0,
        "pipeline rest c32": 100.0,
        "litserve rest c32": 400.0,
        "bentoml rest c32": 500.0,
    }
    for _ in range(2):
        for point, rate in rates.items():
            rounds.add(point, sample(rate, p50=0.01, p99=0.025, mean=0.0025), beside.get(point, ()))
    return rounds


def test_verdicts_take_each_target_from_its_points() -> None:
    found = verdicts(measured())
    assert [verdict.target for verdict in found] == list(TARGETS)
    medians = [verdict.ratio.median for verdict in found if verdict.ratio]
    assert medians == pytest.approx([0.9, 0.7, 0.95, 9.0, 1.8, 2.5, 1.25])
    assert [verdict.is_met for verdict in found] == [True, False, True, True, True, True, True]


def test_verdicts_of_a_run_without_peers_leave_them_open() -> None:
    rounds = measured()
    for peer in ("pipeline", "litserve", "bentoml"):
        del rounds.samples[f"{peer} rest c32"]
    assert [verdict.is_met for verdict in verdicts(rounds)] == [True, False, True, None, None, True, True]


def test_peer_that_answered_nothing_is_not_beaten() -> None:
    rounds = measured()
    for peer in ("litserve", "bentoml"):
        rounds.samples[f"{peer} rest c32"][1] = sample(0.0)
    best_peer = verdicts(rounds)[4]
    assert best_peer.is_met is None
    assert json.loads(json.dumps(summary(rounds, {}), allow_nan=False))["verdicts"][4]["ratio"] is None


def test_report_shows_every_point_and_verdict() -> None:
    rounds = measured()
    rounds.add("attnd rest c8", sample(500.0, gone=3))
    shown = table(rounds)
    assert all(point in shown for point in rounds.samples)
    assert (shown.count("bare loop"), shown.count("bare session run")) == (3, 1)
    assert "900 (900-900)" in " ".join(shown.split())
    lines = verdict_lines(verdicts(rounds)).splitlines()
    assert [line.endswith("NOT MET") for line in lines] == [False, True, False, False, False, False, False]
    assert "0.70 (0.70-0.70)" in lines[1]


def test_results_are_json_with_every_round() -> None:
    rounds = measured()
    rounds.add("attnd rest c8", sample(500.0, gone=3))
    last_line = json.loads(json.dumps(summary(rounds, {"bench": "classify"})))
    assert last_line["bench"] == "classify"
    assert (last_line["errors"], last_line["faults"]) == (3, {"attnd rest c8": {"gone": 3}})
    assert last_line["points"]["attnd rest c32"]["rate"] == 900.0
    everything = json.loads(json.dumps(full(rounds, {})))
    assert everything["rounds"]["beside"]["attnd rest c32"] == [1000.0, 1000.0]
    assert sample_from(everything["rounds"]["samples"]["attnd rest c8"][0]) == sample(500.0, gone=3)


# --- why requests failed


def test_faults_are_counted_by_kind_and_told_as_they_first_came() -> None:
    found = counted(["no reply in 20 s", "status 429: 3 wait", "status 503: loading", "status 429: 4 wait"])
    assert list(found.items()) == [("status 429: 3 wait", 2), ("no reply in 20 s", 1), ("status 503: loading", 1)]


def test_faults_of_all_rounds_are_told_together() -> None:
    rounds = Rounds()
    for faults in ({"status 429: 3 wait": 2}, {}, {"gone": 1, "status 429: 7 wait": 5}):
        rounds.add("attnd rest c8", sample(500.0, **faults))
        rounds.add("attnd rest c1", sample(500.0))
    assert rounds.faults == {"attnd rest c8": {"status 429: 3 wait": 7, "gone": 1}}
    assert rounds.errors == 8
    assert fault_lines(rounds.faults) == ["attnd rest c8: 7 x status 429: 3 wait", "attnd rest c8: 1 x gone"]
    assert outcry(sample(1.0)) == ""
    assert outcry(sample(1.0, gone=2)) == "  2 ERRORS: gone"


# --- who is measured under what


def test_run_can_be_cut_to_some_servers_and_loads(capsys: pytest.CaptureFixture[str]) -> None:
    server = attnd(Path("some/where"))
    short = options(("--only", "attnd,litserve", "--concurrency", "32"))
    assert short.only == ("attnd", "litserve")
    points = points_of(server, short.concurrency)
    assert [point.name for point in points if point.wire == "http"] == ["attnd rest c32", "attnd rest poisson"]
    assert len(points) == 6
    with pytest.raises(SystemExit):
        options(("--only", "triton"))
    assert "unknown: triton" in capsys.readouterr().err


# --- texts, shapes, settings


def test_sentences_are_read_from_a_table_and_from_plain_text(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("label\tsentence\n1\ta joy .\n0\tdull , and long .\n")
    (tmp_path / "plain.txt").write_text("a joy .\n\n dull , and long .\n")
    assert read_sentences(tmp_path / "dev.tsv") == ("a joy .", "dull , and long .")
    assert read_sentences(tmp_path / "plain.txt") == ("a joy .", "dull , and long .")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="no sentences"):
        read_sentences(tmp_path / "empty.txt")


def test_own_sentences_repeat_and_have_the_lengths_of_reviews() -> None:
    texts = own_sentences()
    lengths = [len(text.split()) for text in texts]
    assert texts == own_sentences()
    assert len(set(texts)) > 700
    assert statistics.fmean(lengths) == pytest.approx(19.5, abs=2)
    assert max(lengths) <= 48


def test_bare_loop_batches_hold_everything_sorted_by_length() -> None:
    encoded = [[0] * length for length in (3, 9, 1, 7, 5)]
    batches = batches_of(encoded, 8)
    assert [[len(tokens) for tokens in batch] for batch in batches] == [[9], [7], [5, 3], [1]]


def test_bare_loop_searches_both_ways_to_use_the_cores() -> None:
    layouts = {(shape.lanes, shape.threads) for shape in shapes(4)}
    assert layouts == {(1, 4), (4, 1)}
    assert len({shape.batch_tokens for shape in shapes(4)}) >= 4
    assert {(shape.lanes, shape.threads) for shape in shapes(1)} == {(1, 1)}
    assert all(isinstance(shape, Shape) for shape in shapes(2))


def test_peers_are_tried_with_and_without_batching_and_the_fastest_wins() -> None:
    tried = [Tried(tuning, rate=float(at)) for at, tuning in enumerate(candidates("litserve", 2))]
    assert {one.tuning.batch for one in tried} > {1, 16}
    assert best_of(tried) == tried[-1]
    with pytest.raises(ServerFailed, match="no candidate"):
        best_of([Tried(Tuning(1, 0.0, 1, 1), rate=0.0)])
