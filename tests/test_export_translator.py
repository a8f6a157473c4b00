"""model.export_translator: a checkpoint's bundle says what it is, is the same again, and is kept only if it passes."""

import os
from pathlib import Path

import pytest

from model import export_translator, translator_samples, verify_translator
from model.export_translator import export_verified, options
from model.pairs import Pair
from model.subwords import END_ID, START_ID
from model.train import save_checkpoint
from service.worker.bundle import load_bundle
from tests.tiny_translator import CONFIG, LIMITS, SENTENCES, seeded_translator, subwords, tiny_translation_bundle

SETS = {"tiny": [Pair("A dog.", "Ein Hund."), Pair("Where is the garden?", "Wo ist der Garten?")]}
TRAINING = [Pair(source, target) for source in SENTENCES for target in SENTENCES]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"NUM_NEW": 8, "NUM_SLOTS": 5, **LIMITS}.items():
        monkeypatch.setattr(verify_translator, name, value)
    monkeypatch.setattr(translator_samples, "NUM_SAMPLES", 128)
    subwords().save(str(tmp_path / "subwords.json"))
    told = {"recipe": "tests"}
    out = tmp_path / "checkpoint"
    save_checkpoint(out, CONFIG, seeded_translator(), tokenizer=tmp_path / "subwords.json", provenance=told)
    return out


def exported(checkpoint: Path, out: Path) -> bool:
    return export_verified(
        checkpoint, out, options(checkpoint, id=out.name, licence="MIT"), training=TRAINING, sets=SETS
    )


def test_a_bundle_that_passes_is_put_in_place_with_its_figures(checkpoint: Path, tmp_path: Path) -> None:
    assert exported(checkpoint, tmp_path / "bundle")
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert (manifest.id, manifest.task, manifest.precision, manifest.licence) == (
        "bundle",
        "translation",
        "int8",
        "MIT",
    )
    assert list(manifest.graphs) == ["attention", "decode", "encode"]
    assert manifest.generation is not None
    assert (manifest.generation.bos_id, manifest.generation.end_ids) == (START_ID, (END_ID,))
    assert manifest.limits.max_tokens == CONFIG.max_length
    assert manifest.provenance["recipe"] == "tests"
    assert manifest.verification["float32"]["passed"]
    assert manifest.verification["int8"]["passed"]
    assert manifest.quality["bleu"]["tiny"]["sentences"] == 2


def test_a_bundle_that_fails_leaves_nothing_and_takes_nothing_away(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_translator, "MAX_BLEU_LOSS", -100.0)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").touch()
    before = set(tmp_path.iterdir())
    assert not exported(checkpoint, tmp_path / "bundle")
    assert set(tmp_path.iterdir()) == before
    assert (tmp_path / "bundle" / "old").exists()


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (tiny_translation_bundle(tmp_path / name) for name in ("one", "other"))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {
        path.name: path.read_bytes() for path in other.iterdir()
    }


def test_no_file_s_time_is_in_a_manifest(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    before = options(checkpoint, id="one", licence="MIT")
    os.utime(weights, (1, 1))
    assert options(checkpoint, id="one", licence="MIT") == before
    assert options(checkpoint, id="one", licence="MIT", created=7).created == 7


def test_the_command_reads_a_checkpoint_without_data(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "zoo" / "translation"
    assert export_translator.main([str(checkpoint), "--out", str(out)]) == 0
    assert load_bundle(out).manifest.id == "translation"
