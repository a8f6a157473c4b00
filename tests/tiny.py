"""A tiny seeded classifier, its checkpoint and bundles, and ways to break a bundle whose checksums stay right."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from model.config import ModelConfig
from model.data import Row
from model.export import Options, export
from model.train import save_checkpoint
from model.transformer import Classifier
from service.worker.bundle import MANIFEST, Manifest, file_spec

LABELS = ("NEGATIVE", "POSITIVE")
CONFIG = ModelConfig(
    kind="encoder",
    vocab_size=50,
    width=32,
    num_heads=4,
    num_layers=2,
    feed_forward=64,
    max_length=24,
    num_types=2,
    num_labels=2,
    labels=LABELS,
)
GRAPH_FILE = "classify.onnx"


def seeded_classifier(config: ModelConfig = CONFIG) -> Classifier:
    torch.manual_seed(0)
    return Classifier(config).eval()


def save_tokenizer(path: Path, vocab_size: int = CONFIG.vocab_size) -> None:
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2} | {f"w{index}": index for index in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(path))


def save_tiny_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_tokenizer(directory / "source.json")
    save_checkpoint(
        directory,
        CONFIG,
        seeded_classifier(),
        tokenizer=directory / "source.json",
        provenance={"recipe": "tests", "created": 1_700_000_000},
    )
    return directory


def random_ids(num_sequences: int, *, longest: int = CONFIG.max_length, seed: int = 0) -> list[list[int]]:
    """Sequences of 1 to `longest` tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_sequences,), generator=draw).tolist()
    return [torch.randint(0, CONFIG.vocab_size, (length,), generator=draw).tolist() for length in lengths]


def confident_rows(num_rows: int, *, seed: int) -> list[Row]:
    """Labelled texts on which the seeded classifier is sure of itself, so that rounding flips no label."""
    inside = [[3 + index % 47 for index in ids] for ids in random_ids(8 * num_rows, longest=20, seed=seed)]
    with torch.no_grad():
        logits = torch.cat([seeded_classifier()(torch.tensor([[1, *ids, 2]])) for ids in inside])
    surest = (logits[:, 1] - logits[:, 0]).abs().argsort(descending=True)
    chosen = surest[:num_rows].tolist()
    return [Row(" ".join(f"w{index}" for index in inside[at]), int(logits[at].argmax())) for at in chosen]


def export_tiny(checkpoint: Path, out: Path, precision: str) -> Path:
    calibration = random_ids(64, seed=1) if precision == "int8" else ()
    export(checkpoint, out, Options(id="tiny", precision=precision, calibration=calibration))
    return out


def change_manifest(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((directory / MANIFEST).read_text())
    change(values)
    (directory / MANIFEST).write_text(json.dumps(values))


def change_graph(directory: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Edits the graph and signs it anew, so that only what the graph computes can give the change away."""
    path = directory / GRAPH_FILE
    graph = onnx.load(path)
    change(graph)
    onnx.save(graph, path)
    manifest = Manifest.from_json((directory / MANIFEST).read_text(), MANIFEST)
    (directory / MANIFEST).write_text(replace(manifest, files=manifest.files | {GRAPH_FILE: file_spec(path)}).to_json())
