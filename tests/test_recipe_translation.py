"""The translation recipe from its first stage to its last, on a tiny stand-in corpus."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from model.curve import read_metrics
from model.recipes import translation, translation_corpora
from model.subwords import load_subwords
from model.train import load_checkpoint
from model.transformer import EncoderDecoder
from model.translate import translate

SMALL = {"vocab_size": 330, "width": 16, "num_heads": 2, "num_layers": 1, "num_decoder_layers": 1, "feed_forward": 16}
SHORT = {"epochs": 1, "batch_size": 150, "last_update": 2, "evaluate_every": 1, "save_every": 1}
NOUNS = {"man": "Mann", "dog": "Hund", "child": "Kind", "girl": "Mädchen", "boy": "Junge"}
VERBS = {"plays": "spielt", "sleeps": "schläft", "runs": "läuft", "sings": "singt", "waits": "wartet"}


def pairs(ending: str) -> list[tuple[str, str]]:
    return [(f"The {n} {v}{ending}", f"{NOUNS[n]} {VERBS[v]}{ending}") for n in NOUNS for v in VERBS]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    data = tmp_path / "data"
    (data / "multi30k").mkdir(parents=True)
    (data / "tatoeba").mkdir()
    for name in ("train", "val", "test_2016_flickr"):
        for at, language in enumerate(("en", "de")):
            lines = [pair[at] for pair in pairs(f" {name[1]}.")]
            (data / "multi30k" / f"{name}.{language}").write_text("\n".join(lines) + "\n")
            lowered = [line.lower().replace(".", " .") for line in lines]
            (data / "multi30k" / f"{name}.lc.norm.tok.{language}").write_text("\n".join(lowered) + "\n")
    (data / "tatoeba" / "train.tsv").write_text("\n".join("\t".join(pair) for pair in pairs("!")) + "\n")
    plans = [
        replace(
            plan,
            model=replace(plan.model, **SMALL),
            stages=tuple(replace(stage, train=replace(stage.train, **SHORT)) for stage in plan.stages),
            num_variants=2,
        )
        for plan in translation.PLANS
    ]
    monkeypatch.setattr(translation, "PLANS", tuple(plans))
    monkeypatch.setattr(translation_corpora, "NUM_HELD", 3)
    return ["translation", "--data", str(data), "--out", str(tmp_path / "run")]


def test_all_stages_run_and_a_second_call_does_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    translation.main()
    captions, everyday = tmp_path / "run" / "captions", tmp_path / "run" / "everyday"
    config, model = load_checkpoint(everyday, EncoderDecoder)
    assert config.num_decoder_layers == 1
    assert isinstance(translate(model, load_subwords(everyday / "tokenizer.json"), ["The dog sings!"])[0], str)
    facts = {folder.name: json.loads((folder / "train.json").read_text()) for folder in (captions, everyday)}
    tested = {name: {key: sorted(scores) for key, scores in told["test"].items()} for name, told in facts.items()}
    assert tested == {
        "captions": {"test_2016_flickr": ["bleu", "chrf"]},
        "everyday": {
            name: ["bleu", "chrf", "lower_case_tokens_bleu"] for name in ("everyday_test", "test_2016_flickr")
        },
    }
    assert "tok:none" in facts["captions"]["test"]["test_2016_flickr"]["bleu"]["signature"]
    lines = read_metrics(tmp_path / "run" / "everyday-plain" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert {"captions_bleu", "everyday_bleu"} <= lines[0].keys()
    written = (everyday / "model.safetensors").stat().st_mtime_ns
    translation.main()
    assert (everyday / "model.safetensors").stat().st_mtime_ns == written


def test_a_stage_goes_on_from_the_one_before(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments, "--plan", "captions"])
    translation.main()
    folders = [tmp_path / "run" / f"captions-{stage}" for stage in ("plain", "descent-1")]
    (plain, before), (descent, after) = (load_checkpoint(folder, EncoderDecoder) for folder in folders)
    assert (plain.dropout, descent.dropout) == (0.3, 0.2)
    furthest = max((new - old).abs().max() for new, old in zip(after.parameters(), before.parameters(), strict=True))
    assert furthest < 0.02  # two updates; from another seed it would be a whole embedding


def run_stages(arguments: list[str], *stages: str) -> None:
    for stage in stages:
        sys.argv[:] = [*arguments, "--plan", "captions", "--stage", stage]
        translation.main()


def test_other_data_are_refused(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    run_stages(arguments, "captions-subwords", "captions-plain")
    path = tmp_path / "data" / "multi30k" / "train.lc.norm.tok.en"
    path.write_text(path.read_text().replace("dog", "cat"))
    for stage in ("captions-subwords", "captions-plain", "captions-descent-1"):
        with pytest.raises(ValueError, match=r"captions-(subwords|plain) is not of these data; give another --out"):
            run_stages(arguments, stage)
    shutil.rmtree(tmp_path / "run" / "captions-subwords")
    run_stages(arguments, "captions-subwords")
    for stage in ("captions-plain", "captions-descent-1"):
        with pytest.raises(ValueError, match="captions-plain is not of these data"):
            run_stages(arguments, stage)


def test_a_stage_whose_turn_has_not_come_names_the_one_before(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(ValueError, match=r"made_of\.json is missing; run --stage captions-subwords first"):
        run_stages(arguments, "captions-plain")
    with pytest.raises(ValueError, match=r"train\.json is missing; run --stage captions-plain first"):
        run_stages(arguments, "captions-subwords", "captions-descent-1")
    with pytest.raises(ValueError, match=r"train\.json is missing; run --stage captions-descent-4 first"):
        run_stages(arguments, "captions")


def test_too_few_sentences_to_hold_out_are_named(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation_corpora, "NUM_HELD", 13)
    with pytest.raises(ValueError, match=r"train\.tsv: 25 different sources are too few to hold out 26"):
        translation_corpora.everyday_corpus(Path(arguments[2]))


def test_nothing_that_is_held_out_is_trained_on(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = translation_corpora.everyday_corpus(Path(arguments[2]))
    held = {pair.source for sets in (corpus.validation, corpus.test) for pairs in sets.values() for pair in pairs}
    assert len(held) == 25 + 25 + 3 + 3
    assert not held & {pair.source for pair in corpus.training}
    assert len(corpus.training) == 4 * 25 + 25 - 6
