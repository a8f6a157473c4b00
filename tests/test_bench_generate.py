"""The generation bench: who takes part and with what commands, its report, and a run in which somebody fails."""

import argparse
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from bench.figures import Latency
from bench.generate import Fleet, Measuring, contenders_of, options
from bench.generation_contenders import SAMPLED, Contender, Room, attnd, llama_server
from bench.generation_loads import GenerationLoad, loads_of, stream_load
from bench.generation_report import GenerationRounds, full, notes, summary, table, verdicts
from bench.report import verdict_lines
from bench.servers import Server, free_port
from bench.streams import StreamSample, stream_sample_from

# --- who takes part


def flags_of(command: tuple[str, ...]) -> dict[str, str]:
    """Each flag with what follows it."""
    return {flag: after for flag, after in zip(command, (*command[1:], ""), strict=True) if flag.startswith("-")}


def test_llama_server_gets_a_slot_for_each_stream_and_our_threads() -> None:
    peer = llama_server(Path("/bin/llama-server"), Path("/w.gguf"), 3, ("--poll", "0"))
    server = peer.server_for(Room(streams=16, tokens=512))
    assert server.command[0] == "/bin/llama-server"
    flags = flags_of(tuple(server.command))
    wanted = {"--model": "/w.gguf", "--threads": "3", "--threads-batch": "3", "--parallel": "16", "--poll": "0"}
    assert wanted.items() <= flags.items()
    assert flags["--ctx-size"] == str(16 * 512)
    assert flags["--port"] == str(server.port)
    assert {"--cont-batching", "--no-cache-prompt", "--no-kv-unified"} <= set(flags)
    # Asked for the same room again it is the same process, for another room another one.
    again, other = peer.server_for(Room(16, 512)), peer.server_for(Room(1, 512))
    assert (again.name, again.port) == (server.name, server.port)
    assert other.name != server.name
    assert other.port != server.port


def test_attnd_is_one_process_for_every_load() -> None:
    ours = attnd("some/where/chat", ("--threads=2",))
    server = ours.server_for(Room(1, 512))
    assert server is ours.server_for(Room(32, 512))
    assert server.command[:4] == (sys.executable, "-m", "service", "serve")
    assert {"--models=some/where/chat", "--threads=2", f"--http-port={server.port}"} <= set(server.command)
    assert ours.template(is_sampled=False)["model"] == "chat"


def test_contenders_are_asked_for_the_same() -> None:
    ours, peer = attnd("chat"), llama_server(Path("l"), Path("g"), 1)
    for is_sampled in (False, True):
        bodies = [contender.template(is_sampled=is_sampled) for contender in (ours, peer)]
        shared = ("temperature", "stream", "stream_options", "ignore_eos", *(SAMPLED if is_sampled else ()))
        assert all(bodies[0][name] == bodies[1][name] for name in shared)
        assert bodies[1]["cache_prompt"] is False
    whole = Contender("whole", ours.server_for, streams=False)
    assert "stream" not in whole.template(is_sampled=False)


def given(*arguments: str) -> argparse.Namespace:
    return options(arguments)


def test_peer_without_its_path_is_left_out_and_says_which_flag(tmp_path: Path) -> None:
    found, missing = contenders_of(given("--only", "attnd,llama-server,genai", "--gguf", str(tmp_path / "none")))
    assert [contender.name for contender in found] == ["attnd"]
    assert "--llama-server" in missing["llama-server"]
    assert "none" in missing["genai"]


def test_options_refuse_a_contender_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        given("--only", "attnd,vllm")
    assert "unknown: vllm" in capsys.readouterr().err
    assert given("--concurrency", "1,16").concurrency == (1, 16)


# --- loads


def test_loads_are_those_that_were_asked_for() -> None:
    every = loads_of(("streams", "prefill", "mixed"), (1, 16), ("greedy", "sampled"))
    assert [load.name for load in every] == ["greedy c1", "sampled c1", "greedy c16", "sampled c16", "prefill", "mixed"]
    assert [load.name for load in loads_of(("mixed",), (1,), ("greedy",))] == ["mixed"]


def test_prefill_is_one_token_after_512_and_mixed_has_long_prompts_arriving() -> None:
    ours = attnd("chat")
    server = ours.server_for(Room(1, 1))
    prefill, mixed = (
        stream_load(load, ours, server, corpus=None, seed=7, seconds=1.0)
        for load in loads_of(("prefill", "mixed"), (), ())
    )
    assert (prefill.prompts.lengths, prefill.prompts.unit, prefill.num_tokens) == ((512,), "ids", 1)
    assert prefill.prompts.seed == 7
    assert mixed.arrivals is not None
    assert mixed.arrivals.prompts.lengths == (1500,)
    assert mixed.seconds >= mixed.arrivals.period_s
    assert (prefill.arrivals, mixed.concurrency, mixed.num_tokens) == (None, 8, 64)


def test_server_that_does_not_stream_has_no_gaps_to_measure() -> None:
    whole = Contender("whole", attnd("chat").server_for, streams=False)
    assert [load.fits(whole) for load in (GenerationLoad("streams", 1), GenerationLoad("mixed", 8))] == [True, False]


# --- report


def sample(
    rate: float, *, first: float = 0.1, gap: tuple[float, float] = (0.01, 0.02), errors: int = 0
) -> StreamSample:
    return StreamSample(
        tokens_per_s=rate,
        first=Latency(first, first, first, first * 2, first * 2),
        gap=Latency(gap[0], gap[0], gap[0], gap[1], gap[1]),
        prefill_per_s=rate,
        prompt_tokens=80.0,
        streams=9,
        faults={"wrong number of tokens: 63 instead of 64": errors} if errors else {},
        client_cpu=0.01,
    )


def measured() -> GenerationRounds:
    rounds = GenerationRounds()
    for turn in (0, 1):
        half = 2 if turn else 1  # the machine ran at half speed in the second round
        for who, rates in {"attnd": (100, 400, 600), "llama-server": (100, 125, 200)}.items():
            for load, rate in zip(("greedy c1", "greedy c16", "prefill"), rates, strict=True):
                rounds.add(f"{who} {load}", turn, sample(rate / half, first=0.1 * half if who == "attnd" else half))
        rounds.add("attnd mixed", turn, sample(100 / half, gap=(0.01, 0.04)))
        rounds.add_bare("bare greedy c16", turn, 420 / half)
    return rounds


def medians(rounds: GenerationRounds) -> dict[str, float]:
    return {one.target.name: round(one.ratio.median, 3) for one in verdicts(rounds) if one.ratio}


def test_verdicts_pair_each_round_with_itself() -> None:
    assert medians(measured()) == {
        "one stream, greedy / llama-server": 1.0,
        "16 streams, greedy / llama-server": 3.2,
        "first token p50, 16 streams, greedy / llama-server": 0.1,
        "16 streams, greedy / bare loop": 0.952,
        "prefill of 512 tokens / llama-server": 3.0,
        "long prompts arriving: gap p99 / p50": 4.0,
    }
    met = {one.target.name: one.is_met for one in verdicts(measured())}
    assert met["long prompts arriving: gap p99 / p50"] is False
    assert met["16 streams, sampled / bare loop"] is None
    assert [name for name, is_met in met.items() if is_met] == list(medians(measured()))[:-1]


def test_round_in_which_one_side_failed_is_not_compared_and_our_nothing_is() -> None:
    rounds = measured()
    del rounds.samples["llama-server greedy c16"][0]
    rounds.samples["attnd greedy c1"][0] = rounds.samples["attnd greedy c1"][1] = sample(0.0, first=0.0)
    found = medians(rounds)
    assert found["16 streams, greedy / llama-server"] == 3.2
    assert found["one stream, greedy / llama-server"] == 0.0
    rounds.samples["attnd greedy c16"] = {1: sample(0.0, first=0.0)}  # no time to first token is not a short one
    assert "first token p50, 16 streams, greedy / llama-server" not in medians(rounds)


def test_report_shows_every_point_and_who_failed() -> None:
    rounds = measured()
    rounds.add("attnd greedy c8", 0, sample(200, errors=2))
    rounds.failures["genai"] = "out of cheese"
    shown = table(rounds)
    assert all(point in shown for point in (*rounds.samples, *rounds.bare))
    assert "300.0 (200-400)" in " ".join(shown.split())
    assert notes(rounds).splitlines() == [
        "genai failed and was left out: out of cheese",
        "attnd greedy c8: 2 x wrong number of tokens: 63 instead of 64",
    ]
    assert summary(rounds, {})["faults"] == {"attnd greedy c8": {"wrong number of tokens: 63 instead of 64": 2}}
    assert [line for line in verdict_lines(verdicts(rounds)).splitlines() if line.endswith("NOT MET")]


def test_results_are_json_with_every_round() -> None:
    rounds = measured()
    last_line = json.loads(json.dumps(summary(rounds, {"bench": "generate"}), allow_nan=False))
    assert (last_line["bench"], last_line["errors"], last_line["bare"]) == ("generate", 0, {"bare greedy c16": 315.0})
    assert last_line["points"]["attnd prefill"]["prefill_per_s"] == 450.0
    everything = json.loads(json.dumps(full(rounds, {})))
    again = stream_sample_from(everything["rounds"]["samples"]["attnd mixed"]["0"])
    assert again == rounds.samples["attnd mixed"][0]


# --- a run

FAKE = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        usage = {"prompt_tokens": 5, "completion_tokens": asked["max_tokens"]}
        reply = json.dumps({"choices": [{"text": "ab", "finish_reason": "length"}], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)
    protocol_version = "HTTP/1.1"
    log_message = lambda *_: None

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def fake_contender(name: str, code: str) -> Contender:
    port = free_port()

    def label(reply: Mapping[str, Any]) -> str:
        return str(reply["choices"][0]["text"])

    command = (sys.executable, "-c", code, str(port))
    server = Server(name, command, port, "/", lambda text: {"prompt": text, "max_tokens": 1}, label)
    return Contender(name, lambda _: server, streams=False)


def test_contender_that_fails_is_reported_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    asked = given("--seconds", "0.2", "--only", "bare", "--model", str(tmp_path))
    broken, whole = fake_contender("broken", "raise SystemExit('out of cheese')"), fake_contender("whole", FAKE)
    with ExitStack() as stack:
        measuring = Measuring(asked, [broken, whole], Fleet(stack, tmp_path))
        for turn in (0, 1):
            measuring.measure_round(turn, loads_of(("streams", "mixed"), (1,), ("greedy",)))
    rounds = measuring.rounds
    assert "out of cheese" in rounds.failures["broken"]
    assert str(tmp_path) in rounds.failures["bare"]  # no bundle there
    assert list(rounds.samples) == ["whole greedy c1"]
    assert set(rounds.samples["whole greedy c1"]) == {0, 1}
    assert rounds.errors == 0
    assert all(one.tokens_per_s > 0 for one in rounds.samples["whole greedy c1"].values())
