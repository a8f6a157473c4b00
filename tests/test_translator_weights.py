"""model.translator_weights: what is folded into the weights, and where the memory's layers stand."""

import math

import numpy as np
import pytest
import torch

from model.transformer import sinusoids
from model.translator_samples import Samples
from model.translator_weights import translator_pieces
from tests.tiny_translator import CONFIG, SAMPLES, seeded_translator


def pieces(samples: Samples | None, num_written: int = CONFIG.vocab_size) -> dict[str, np.ndarray]:
    parts = translator_pieces(CONFIG, seeded_translator(), samples, num_written)
    return dict(piece for part in parts for piece in part)


@pytest.fixture(scope="module")
def exact() -> dict[str, np.ndarray]:
    return pieces(None)


@pytest.fixture(scope="module")
def int8() -> dict[str, np.ndarray]:
    return pieces(SAMPLES)


@torch.no_grad()
def test_the_table_is_scaled_and_the_head_is_not(exact: dict[str, np.ndarray]) -> None:
    table = seeded_translator().head.weight.numpy()
    np.testing.assert_allclose(exact["embedding.weight"], table * math.sqrt(CONFIG.width), rtol=1e-6)
    np.testing.assert_array_equal(exact["logits.weight"], table.T)
    np.testing.assert_array_equal(exact["positions"], sinusoids(CONFIG.max_length, CONFIG.width).numpy())


def test_the_head_has_only_what_is_written(exact: dict[str, np.ndarray], int8: dict[str, np.ndarray]) -> None:
    for samples, whole in ((None, exact), (SAMPLES, int8)):
        cut = pieces(samples, 270)
        assert {name for name, value in cut.items() if value.shape != whole[name].shape} <= {
            "logits.weight",
            "logits.codes",
        }
    np.testing.assert_array_equal(pieces(None, 270)["logits.weight"], exact["logits.weight"][:, :270])


@torch.no_grad()
def test_the_memory_of_all_layers_is_one_matrix(exact: dict[str, np.ndarray]) -> None:
    """key.0, value.0, key.1, value.1, each as many columns as the model is wide."""
    blocks = seeded_translator().decoder.stack.blocks
    layers = [layer for block in blocks for layer in (block.cross.key, block.cross.value)]
    for at, layer in enumerate(layers):
        columns = slice(at * CONFIG.width, (at + 1) * CONFIG.width)
        np.testing.assert_array_equal(exact["memory.weight"][:, columns], layer.weight.numpy().T)
        np.testing.assert_array_equal(exact["memory.bias"][columns], layer.bias.numpy())


def kept(int8: dict[str, np.ndarray], exact: dict[str, np.ndarray], name: str) -> np.ndarray:
    """(N), what a matrix's outputs, or a norm's, are multiplied with."""
    return int8[f"{name}.bias"] / exact[f"{name}.bias"]


@pytest.mark.parametrize(
    ("before", "name", "columns"),
    [
        ("encoder.1.attention_norm", "encoder.1.qkv", slice(None)),
        ("encoder.1.qkv", "encoder.1.output", slice(2 * CONFIG.width, None)),
        ("encoder.1.feed_forward_norm", "encoder.1.up", slice(None)),
        ("encoder.1.up", "encoder.1.down", slice(None)),
        ("encoder.norm", "memory", slice(None)),
        ("decoder.1.cross.attention_norm", "decoder.1.cross.query", slice(None)),
        ("memory", "decoder.0.cross.output", slice(CONFIG.width, 2 * CONFIG.width)),
        ("memory", "decoder.1.cross.output", slice(3 * CONFIG.width, None)),
        ("decoder.norm", "logits", slice(None)),
    ],
)
def test_what_makes_a_matrix_s_inputs_multiplies_them_as_the_matrix_expects(
    exact: dict[str, np.ndarray], int8: dict[str, np.ndarray], before: str, name: str, columns: slice
) -> None:
    weight = exact[f"{name}.weight"] * (kept(int8, exact, name) if f"{name}.bias" in exact else 1)
    inputs = kept(int8, exact, before)[columns]
    assert inputs.max() > 1.5 * inputs.min()
    found = int8[f"{name}.codes"] * int8[f"{name}.scale"] * inputs[:, None]
    assert np.corrcoef(found.ravel(), weight.ravel())[0, 1] > 0.998


def test_codes_have_seven_bits_and_one_scale_and_rectified_inputs_none_below_zero(int8: dict[str, np.ndarray]) -> None:
    """What processors without VNNI can sum, what costs no run a product, what is rectified and rounded in one."""
    codes = [value for name, value in int8.items() if name.endswith(".codes") and name != "embedding.codes"]
    assert len(codes) == 4 * CONFIG.num_layers + 6 * CONFIG.num_decoder_layers + 2
    assert {value.dtype.name for value in codes} == {"int8"}
    assert max(int(np.abs(value.astype(int)).max()) for value in codes) == 63
    assert {value.size for name, value in int8.items() if name.endswith(".scale")} == {1}
    assert {int(value) for name, value in int8.items() if name.endswith(".down.middle")} == {0}


def test_in_int8_the_table_is_the_only_one_in_blocks(int8: dict[str, np.ndarray]) -> None:
    assert int8["embedding.codes"].shape == (CONFIG.vocab_size, CONFIG.width)
    assert not [name for name in int8 if name.endswith("weight") and "norm" not in name]
