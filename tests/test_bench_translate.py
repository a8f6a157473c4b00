"""The translation bench: its settings and bodies, the peers' batching, its report, a run that fails."""

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from bench import translate, translation_contenders
from bench.figures import Latency, Sample
from bench.generate import Fleet
from bench.loads import LoadFailed
from bench.report import verdict_lines
from bench.servers import Server, free_port
from bench.translate import Measuring, agreement, contenders_of, options
from bench.translation_contenders import Bare, Contender, Search, Setting, attnd, run_offline, settings_of
from bench.translation_report import TranslationRounds, full, notes, ratios, summary, table, verdicts

# --- who takes part


def test_a_peer_is_tried_in_batches_and_one_at_a_time_with_a_worker_on_all_cores_or_one_on_each() -> None:
    alone = settings_of("ctranslate2", 4, 1)
    assert alone == [Setting(1, 1, 4), Setting(1, 4, 1)]
    many = settings_of("ctranslate2", 4, 16)
    assert {(one.rows, one.workers) for one in many if one} == {(n, w) for n in (4, 8, 16) for w in (1, 4)}
    assert all(one and one.workers == 1 for one in settings_of("transformers", 4, 16))
    assert len(settings_of("ctranslate2", 1, 1)) == 1


def test_attnd_is_one_process_for_every_load() -> None:
    ours = attnd(Path("some/where"), ("--threads=2",))
    greedy, beam = ours.server_for("greedy", None), ours.server_for("beam", None)
    assert (greedy.name, greedy.port, greedy.command) == (beam.name, beam.port, beam.command)
    assert {"--models=some/where", "--threads=2", f"--http-port={greedy.port}"} <= set(greedy.command)
    assert greedy.body_of("x") == {"prompt": "x", "max_tokens": 128, "temperature": 0, "num_beams": 1}
    assert beam.body_of("x")["num_beams"] == 4
    assert greedy.label_of({"outputs": [{"text": "y"}]}) == "y"


def test_peers_get_the_weights_that_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(translate, "write_weights", lambda bundle, out: asked.append(bundle))
    monkeypatch.setattr(translation_contenders, "python_of", lambda name, cache: Path("python"))
    found, missing = contenders_of(options(("--bundle", "some/where")), tmp_path)
    assert ([one.name for one in found], missing) == (["attnd", "ctranslate2", "transformers"], {})
    assert asked == [Path("some/where")]
    for contender in found[1:]:
        served = contender.server_for("greedy", Setting(8, 1, 2)).command
        assert {str(tmp_path / "weights"), "serve"} <= set(served)
        assert {str(tmp_path / "weights"), "offline"} <= set(contender.offline[0])
    contenders_of(options(("--only", "attnd,bare")), tmp_path)
    assert len(asked) == 1


def test_only_a_translation_s_bundle_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[argparse.Namespace] = []
    monkeypatch.setattr(translate, "run", lambda given, scratch: ran.append(given))
    monkeypatch.setattr(sys, "argv", ["bench", "--bundle", str(tmp_path), "--cache", str(tmp_path / "cache")])
    with pytest.raises(SystemExit, match=r"no .*manifest\.json"):
        translate.main()
    (tmp_path / "manifest.json").write_text('{"task": "classification"}')
    with pytest.raises(SystemExit, match="for classification, not for translation"):
        translate.main()
    (tmp_path / "manifest.json").write_text('{"task": "translation"}')
    translate.main()
    assert [given.bundle for given in ran] == [tmp_path]


def test_run_with_nobody_in_it_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(name: str, cache: Path) -> Path:
        raise OSError("no index")

    monkeypatch.setattr(translate, "write_weights", lambda bundle, out: None)
    monkeypatch.setattr(translation_contenders, "python_of", unavailable)
    with pytest.raises(SystemExit, match="nobody"):
        translate.run(options(("--only", "ctranslate2")), tmp_path)


# --- the peers' batching


async def test_a_peer_batches_what_has_come_and_a_batch_that_fails_fails_alone(monkeypatch) -> None:
    pytest.importorskip("uvicorn")
    from bench.peers.translating import Wanted, _work

    batches: list[list[str]] = []

    def translate(texts: list[str], num_beams: int) -> list[str]:
        batches.append(list(texts))
        if "bad" in texts:
            raise ValueError("no")
        return [text.upper() * num_beams for text in texts]

    waiting: asyncio.Queue[Any] = asyncio.Queue()
    replies = []
    for text in ("a", "b", "c", "bad", "d"):
        replies.append(asyncio.get_running_loop().create_future())
        waiting.put_nowait((Wanted(text=text, num_beams=2), replies[-1]))
    task = asyncio.create_task(_work(waiting, translate, 3))
    done = await asyncio.gather(*replies, return_exceptions=True)
    task.cancel()
    assert batches == [["a", "b", "c"], ["bad", "d"]]
    assert done[:3] == ["AA", "BB", "CC"]
    assert [type(one) for one in done[3:]] == [RuntimeError, RuntimeError]


# --- the report


def sample(rate: float, **faults: int) -> Sample:
    return Sample(rate, Latency(0.01, 0.02, 0.03, 0.04, 0.05), 100, faults, 0.1)


def measured() -> TranslationRounds:
    rounds = TranslationRounds(tokens={"attnd greedy": 15.0, "ctranslate2 greedy": 20.0, "bare greedy": 10.0})
    for turn, speed in enumerate((1.0, 2.0)):  # the machine is twice as fast in the second round
        rounds.add("attnd greedy c16", turn, sample(300 * speed))
        rounds.add("ctranslate2 greedy c16", turn, sample(150 * speed))
        rounds.add("attnd greedy c1", turn, sample(45 * speed))
        rounds.add("ctranslate2 greedy c1", turn, sample(50 * speed))
        rounds.add("bare greedy offline", turn, sample(400 * speed))
    return rounds


def test_ratios_are_of_sentences_a_second_round_by_round() -> None:
    rounds = measured()
    found = {one.target.name: one for one in verdicts(rounds)}
    met = {name: (one.ratio.median, one.is_met) for name, one in found.items() if one.ratio}
    assert met == {
        "c16, greedy: sentences a second / ctranslate2": (2.0, True),
        "c1, greedy: sentences a second / ctranslate2": (0.9, False),
    }
    assert len(found) == 6
    rounds.add("attnd beam offline", 0, sample(90))
    rounds.add("bare beam offline", 0, sample(100))
    beside = {name: one.median for name, one in ratios(rounds).items()}
    assert beside == {"greedy c16 / bare loops": 0.75, "beam offline / bare loops": 0.9}
    del rounds.samples["ctranslate2 greedy c16"]
    assert rounds.ratio("attnd greedy c16", "ctranslate2 greedy c16") is None


def test_report_shows_every_point_who_agrees_and_who_failed() -> None:
    rounds = measured()
    rounds.agreement["bare greedy"] = 0.975
    rounds.failures["transformers"] = "out of cheese"
    rounds.add("ctranslate2 beam c1", 0, sample(5, gone=3))
    shown = table(rounds)
    assert all(point in shown for point in rounds.samples)
    assert "attnd greedy c16 450.0 (300.0-600.0) 6750 20.0 40.0 0" in " ".join(shown.split())
    assert "bare greedy offline 600.0 (400.0-800.0) 6000 " in " ".join(shown.split())
    assert "97.5%" in notes(rounds)
    assert notes(rounds).splitlines()[-2:] == [
        "transformers failed and was left out: out of cheese",
        "ctranslate2 beam c1: 3 x gone",
    ]
    assert "NOT MET" in verdict_lines(verdicts(rounds))
    last_line = json.loads(json.dumps(summary(rounds, {"bench": "translate"}), allow_nan=False))
    assert last_line["points"]["attnd greedy c1"]["sentences_per_s"] == 67.5
    greedy = {point: found["tokens_per_s"] for point, found in last_line["points"].items() if "c16" in point}
    assert greedy == {"attnd greedy c16": 6750, "ctranslate2 greedy c16": 4500}
    assert last_line["points"]["bare greedy offline"]["tokens_per_s"] == 6000
    assert (last_line["errors"], last_line["faults"]) == (3, {"ctranslate2 beam c1": {"gone": 3}})
    assert json.loads(json.dumps(full(rounds, {})))["rounds"]["attnd greedy c1"]["1"]["rate"] == 90


def test_agreement_is_to_the_character() -> None:
    assert agreement(["a", "b ", "c", "d"], ["a", "b", "c", "D"]) == 0.5


# --- a run

SERVE = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        reply = json.dumps({"text": asked["text"].upper()}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""
OFFLINE = """
import json, sys
texts = json.load(sys.stdin)["sentences"]
print(json.dumps({"rate": 8.0, "texts": [text.upper() for text in texts]}))
"""


def fake_contender(name: str, serve: str, offline: str = OFFLINE) -> Contender:
    port = free_port()

    def server_for(search: Search, _: Setting | None) -> Server:
        command = (sys.executable, "-c", serve, str(port))
        return Server(name, command, port, "/", lambda text: {"text": text}, lambda reply: str(reply["text"]))

    return Contender(name, server_for, ((sys.executable, "-c", offline), Path.cwd()))


def given(tmp_path: Path, *arguments: str) -> argparse.Namespace:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"A": 0, "FINE": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return options(("--bundle", str(tmp_path), "--seconds", "0.2", "--concurrency", "1", *arguments))


def test_contender_that_fails_is_reported_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    contenders = [
        fake_contender("attnd", SERVE),
        fake_contender("broken", "raise SystemExit('out of cheese')"),
        fake_contender("mute", SERVE, "raise SystemExit('out of bread')"),
    ]
    with ExitStack() as stack:
        measuring = Measuring(given(tmp_path), ["a fine film", "so"], Fleet(stack, tmp_path))
        for contender in contenders:
            measuring.tune(contender, tmp_path)
        for turn in (0, 1):
            measuring.measure_round(turn, contenders, None)
    rounds = measuring.rounds
    assert "out of cheese" in rounds.failures["broken"]
    assert "out of bread" in rounds.failures["mute"]
    wanted = {f"attnd {search} {load}" for search in ("greedy", "beam") for load in ("c1", "offline")}
    assert wanted < set(rounds.samples)
    assert all(set(rounds.samples[point]) == {0, 1} for point in wanted)
    assert rounds.errors == 0
    assert rounds.samples["attnd beam c1"][0].rate > 0
    assert rounds.tokens["attnd greedy"] == 2
    assert rounds.agreement["broken greedy"] == 1


class FakeBare(Bare):
    """Fastest in the middle of what is tried; `broken` with beams."""

    def run(self, plan: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
        if plan["num_beams"] > 1 and self.bundle.name == "broken":
            raise LoadFailed("out of cheese")
        rows = [one.rows for one in self.settings("beam" if plan["num_beams"] > 1 else "greedy")]
        rate = 100.0 * plan["num_beams"] - abs(setting.rows - rows[1])
        return {"rate": rate, "texts": [text.upper() for text in plan["sentences"]]}


def test_bare_loops_are_measured_with_both_searches_each_in_its_fastest_setting(tmp_path: Path) -> None:
    with ExitStack() as stack:
        measuring = Measuring(given(tmp_path), ["a fine film", "so"], Fleet(stack, tmp_path))
        bare = FakeBare(tmp_path / "fine", cores=2)
        measuring.tune_bare(bare)
        measuring.measure_round(0, [], bare)
    best = {search: bare.settings(search)[1] for search in ("greedy", "beam")}
    assert measuring.settings == {f"bare {search}": setting for search, setting in best.items()}
    rates = {point: by_turn[0].rate for point, by_turn in measuring.rounds.samples.items()}
    assert rates == {"bare greedy offline": 100, "bare beam offline": 400}
    assert measuring.rounds.tokens == {"bare greedy": 2, "bare beam": 2}


def test_bare_loop_that_fails_is_reported_and_not_measured(tmp_path: Path) -> None:
    with ExitStack() as stack:
        measuring = Measuring(given(tmp_path), ["a"], Fleet(stack, tmp_path))
        bare = FakeBare(tmp_path / "broken", cores=2)
        measuring.tune_bare(bare)
        measuring.measure_round(0, [], bare)
    assert measuring.rounds.failures == {"bare": "out of cheese"}
    assert measuring.rounds.samples == {}


def test_offline_command_gets_its_plan() -> None:
    assert run_offline(fake_contender("x", SERVE).offline, {"sentences": ["a"]})["texts"] == ["A"]
