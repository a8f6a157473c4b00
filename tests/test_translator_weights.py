"""model.translator_weights: what is folded into the weights, and where the memory's layers stand."""

import math

import numpy as np
import torch

from model.export_decoder import tensors_of
from model.transformer import sinusoids
from model.translator_weights import translator_pieces
from tests.tiny_translator import CONFIG, seeded_translator


def pieces(kind: str) -> dict[str, np.ndarray]:
    parts = translator_pieces(tensors_of(seeded_translator()), CONFIG, kind)  # type: ignore[arg-type]
    return {name: value for part in parts for name, value in part}


@torch.no_grad()
def test_the_table_is_scaled_and_the_last_norm_takes_it_back() -> None:
    model, found, scale = seeded_translator(), pieces("float32"), math.sqrt(CONFIG.width)
    table, norm = model.head.weight.numpy(), model.decoder.stack.norm
    np.testing.assert_allclose(found["embedding.weight"], table * scale, rtol=1e-6)
    np.testing.assert_allclose(found["decoder.norm.weight"], norm.weight.numpy() / scale, rtol=1e-6)
    np.testing.assert_allclose(found["decoder.norm.bias"], norm.bias.numpy() / scale, rtol=1e-6)
    np.testing.assert_array_equal(found["positions"], sinusoids(CONFIG.max_length, CONFIG.width).numpy())


@torch.no_grad()
def test_the_memory_of_all_layers_is_one_matrix() -> None:
    """key.0, value.0, key.1, value.1, each as many columns as the model is wide."""
    blocks, found = seeded_translator().decoder.stack.blocks, pieces("float32")
    layers = [layer for block in blocks for layer in (block.cross.key, block.cross.value)]
    for at, layer in enumerate(layers):
        columns = slice(at * CONFIG.width, (at + 1) * CONFIG.width)
        np.testing.assert_array_equal(found["memory.weight"][:, columns], layer.weight.numpy().T)
        np.testing.assert_array_equal(found["memory.bias"][columns], layer.bias.numpy())


def test_in_int8_the_head_is_the_table() -> None:
    found = pieces("blocks8")
    assert found["embedding.codes"].shape == (CONFIG.vocab_size, CONFIG.width)
    assert not [name for name in found if name.startswith("head") or name.endswith("up.weight")]
