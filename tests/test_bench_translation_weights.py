"""bench.translation_weights: what a bundle's graphs compute with, as weights of the PyTorch model again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.translation_weights import table_of, write_weights
from safetensors.torch import load_file

from model.config import ModelConfig
from model.transformer import EncoderDecoder
from service.worker.bundle import load_bundle
from service.worker.generation.translator import TranslatorEngine
from service.worker.weights import packing
from service.worker.weights.packing import BLOCK
from tests.tiny_translator import CONFIG, seeded_translator, tiny_translation_bundle

NUM_WRITTEN = 250
SOURCE, TARGET = [7, 50, 120, 299, 2], [1, 9, 33, 240]


def rebuilt(folder: Path) -> EncoderDecoder:
    """The module that a folder is of; its head has the written tokens only."""
    model = EncoderDecoder(replace(ModelConfig.load(folder / "config.json"), tie_embeddings=False)).eval()
    model.head = torch.nn.Linear(CONFIG.width, NUM_WRITTEN, bias=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["decoder.stack.embedding.token.weight"] = tensors["encoder.stack.embedding.token.weight"]
    model.load_state_dict(tensors)
    return model


@torch.inference_mode()
def logits(model: EncoderDecoder) -> torch.Tensor:
    return model(torch.tensor([SOURCE]), torch.tensor([TARGET]))[0]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_of_a_bundle_are_those_that_it_was_made_of(precision: str, tmp_path: Path) -> None:
    bundle = tiny_translation_bundle(tmp_path / "bundle", precision=precision, num_written=NUM_WRITTEN)
    write_weights(bundle, tmp_path / "weights")
    assert ModelConfig.load(tmp_path / "weights/config.json") == CONFIG
    assert (tmp_path / "weights/tokenizer.json").read_bytes() == (bundle / "tokenizer.json").read_bytes()
    found, wanted = logits(rebuilt(tmp_path / "weights")), logits(seeded_translator())[:, :NUM_WRITTEN]
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    assert worst < (1e-5 if precision == "float32" else 0.1)


def test_a_table_of_integers_is_that_of_the_model_but_for_rounding(tmp_path: Path) -> None:
    """Nothing is folded into it. Its rows are two blocks long."""
    table = torch.randn(CONFIG.vocab_size, 2 * BLOCK, generator=torch.Generator().manual_seed(1))
    pieces = dict(packing.table(table.numpy(), "blocks8"))
    found = torch.from_numpy(table_of(pieces))
    steps = torch.from_numpy(pieces["embedding.scales"]).repeat_interleave(BLOCK, dim=1)
    assert ((found - table).abs() <= steps * 0.501).all()


def test_weights_of_integers_are_what_their_graphs_compute_with(tmp_path: Path) -> None:
    """They come closer to it than those that were rounded."""
    bundle = tiny_translation_bundle(tmp_path / "bundle", num_written=NUM_WRITTEN)
    write_weights(bundle, tmp_path / "weights")
    engine = TranslatorEngine(load_bundle(bundle), num_slots=1, threads=1)
    served = engine.prefill(0, SOURCE, 0, keep="last")[0]

    def distance(model: EncoderDecoder) -> float:
        return float(np.abs(logits(model)[0, :NUM_WRITTEN].numpy() - served).max() / np.abs(served).max())

    assert distance(rebuilt(tmp_path / "weights")) < min(0.03, distance(seeded_translator()))
