"""bench.translation_weights: what a bundle's graphs compute with, as weights of the PyTorch model again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench.translation_weights import write_weights
from safetensors.torch import load_file

from model.transformer import EncoderDecoder
from service.worker.bundle import load_bundle
from service.worker.generation.translator import TranslatorEngine
from tests.tiny_translator import CONFIG, seeded_translator, tiny_translation_bundle

NUM_WRITTEN = 250
SOURCE, TARGET = [7, 50, 120, 299, 2], [1, 9, 33, 240]


def rebuilt(folder: Path) -> EncoderDecoder:
    """The module with the weights of a folder; its head has the written tokens only."""
    model = EncoderDecoder(replace(CONFIG, tie_embeddings=False)).eval()
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
    assert {one.name for one in (tmp_path / "weights").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    found, wanted = logits(rebuilt(tmp_path / "weights")), logits(seeded_translator())[:, :NUM_WRITTEN]
    worst = float((found - wanted).abs().max() / wanted.abs().max())
    assert worst < (1e-5 if precision == "float32" else 0.1)
    assert precision == "float32" or worst > 1e-4  # the integers, not what they were made of


def test_weights_of_integers_compute_what_their_graphs_compute(tmp_path: Path) -> None:
    bundle = tiny_translation_bundle(tmp_path / "bundle", num_written=NUM_WRITTEN)
    write_weights(bundle, tmp_path / "weights")
    engine = TranslatorEngine(load_bundle(bundle), num_slots=1, threads=1)
    served = engine.prefill(0, SOURCE, 0, keep="last")[0]
    found = logits(rebuilt(tmp_path / "weights"))[0].numpy()
    assert np.abs(found - served).max() / np.abs(served).max() < 0.1
