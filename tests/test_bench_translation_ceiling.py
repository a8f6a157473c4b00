"""Our own translations without a server: the backend's and the bare loops' are the reference's, on all cores."""

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

import pytest
from bench.translation_contenders import Bare, Setting

SHOUT = """
import json, sys
print(json.dumps({"rate": 8.0, "texts": [text.upper() for text in json.load(sys.stdin)["sentences"]]}))
"""


@pytest.mark.parametrize("num_beams", [1, 4])
def test_bare_loop_and_backend_translate_as_the_reference_does(tmp_path: Path, num_beams: int) -> None:
    pytest.importorskip("torch")
    from bench.translation_offline import OfflinePlan, whole_passes
    from tiny_translator import SENTENCES, seeded_translator, subwords, tiny_translation_bundle

    from model.data import pad
    from model.search import beam_search
    from model.subwords import PAD_ID
    from model.translate import until_end

    bundle, tokenizer = tiny_translation_bundle(tmp_path / "tiny", precision="float32"), subwords()
    plan = OfflinePlan(tuple(SENTENCES[:4]) * 5, num_beams=num_beams, seconds=0.0)
    sources = pad([one.ids for one in tokenizer.encode_batch(list(plan.sentences))], PAD_ID)
    most = [64] * len(plan.sentences)  # the bundle's limit
    found = beam_search(seeded_translator(), *sources, num_beams=num_beams, max_new=most)
    wanted = tokenizer.decode_batch([until_end(best.ids) for best, *_ in found])
    bare = Bare(bundle, cores=2).run(asdict(plan), Setting(3, 2, 1))
    whole = asyncio.run(whole_passes(bundle, plan))
    assert bare["texts"] == wanted
    assert whole["texts"] == wanted
    assert min(bare["rate"], whole["rate"]) > 0


def test_bare_loops_share_the_sentences_and_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bare, "command", lambda self, setting: ((sys.executable, "-c", SHOUT), Path.cwd()))
    plan = {"sentences": ["a", "b", "c", "d", "e"], "num_beams": 1, "seconds": 0}
    bare = Bare(Path("some/where"), cores=3)
    assert bare.run(plan, Setting(16, 3, 1)) == {"rate": 24.0, "texts": ["A", "B", "C", "D", "E"]}
    assert bare.run({**plan, "sentences": ["a"]}, Setting(16, 3, 1)) == {"rate": 8.0, "texts": ["A"]}


def test_bare_loop_has_as_many_rows_with_beams_as_without() -> None:
    bare = Bare(Path("some/where"), cores=3)
    assert {(one.workers, one.threads) for one in bare.settings("beam")} == {(3, 1)}
    assert [one.rows for one in bare.settings("greedy")] == [4 * one.rows for one in bare.settings("beam")]


@pytest.mark.parametrize("num_beams", [1, 4])
async def test_offline_the_queue_is_never_asked_for_more_than_it_takes(num_beams: int) -> None:
    from bench.translation_offline import OfflinePlan, translate_all

    from service.config import Settings
    from service.domain import Call, Event, Finish, GenerateRequest

    waiting = most = 0

    class Shouts:
        async def generate(self, request: GenerateRequest, call: Call) -> AsyncIterator[Event]:
            nonlocal waiting, most
            num_outputs = len(request.prompt) * request.num_beams
            waiting += num_outputs
            most = max(most, waiting)
            await asyncio.sleep(0)
            for place, text in enumerate(request.prompt):
                yield Finish(place, "stop", text=str(text).upper())
            waiting -= num_outputs

    plan = OfflinePlan(tuple(f"text {at}" for at in range(500)), num_beams, seconds=0.0)
    assert await translate_all(Shouts(), plan) == [text.upper() for text in plan.sentences]
    assert 16 * num_beams < most <= Settings().max_queue_outputs
