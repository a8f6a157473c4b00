"""The GPT-2 importer against transformers' GPT2LMHeadModel: same weights, same logits, and no silent approximation."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from model.importers.gpt2 import gpt2_config, load_gpt2
from model.transformer import generate

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89], [1, 1, 2, 3, 5, 8, 13]])


def tiny_gpt2(**changes: object) -> GPT2LMHeadModel:
    torch.manual_seed(7)
    sizes = {
        "vocab_size": 97,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        "layer_norm_epsilon": 1e-3,  # so large that a wrong one shows
        "initializer_range": 0.3,  # so wide that every branch matters
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()
    for vector in (weight for weight in model.parameters() if weight.ndim == 1):  # biases and norms
        torch.nn.init.uniform_(vector, 0.5, 1.5)
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_inner": 40}, {"activation_function": "relu"}, {"activation_function": "gelu"}],
    ids=["usual", "narrow", "relu", "exact gelu"],
)
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    theirs = tiny_gpt2(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_gpt2(tmp_path)[1].eval()
    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_reads_checkpoints_of_the_bare_body_with_their_stored_masks(tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.transformer.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("transformer.") for name in state)
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    save_file(state | masks, tmp_path / "model.safetensors")
    ours = load_gpt2(tmp_path)[1].eval()
    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-4, rtol=0)


def test_greedy_generation_is_that_of_transformers(tmp_path: Path) -> None:
    theirs = tiny_gpt2()
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(IDS[:1], max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(generate(load_gpt2(tmp_path)[1].eval(), IDS[:1], max_new=20), expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "gptj"),
        ("activation_function", "silu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_refuses_variants_that_compute_something_else(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        gpt2_config(tiny_gpt2().config.to_dict() | {key: value})


def test_a_missing_weight_is_an_error_that_names_it(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["transformer.h.1.attn.c_attn.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing weights .*blocks\.1\.attention\.key\.bias"):
        load_gpt2(tmp_path)
