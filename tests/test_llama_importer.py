"""The Llama importer against transformers' LlamaForCausalLM: same weights, same logits, and no silent approximation."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from model.importers.llama import llama_config, load_llama
from model.transformer import generate

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89], [1, 1, 2, 3, 5, 8, 13]])


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(7)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-3,  # so large that a wrong one shows
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # so wide that every branch matters
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    for norm in (weight for name, weight in model.named_parameters() if "norm" in name):
        torch.nn.init.uniform_(norm, 0.5, 1.5)
    return model


@torch.no_grad()
def assert_same_logits(theirs: LlamaForCausalLM, directory: Path) -> None:
    ours = load_llama(directory)[1].eval()
    torch.testing.assert_close(ours(IDS)[0], theirs(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_those_of_transformers(tmp_path: Path, is_tied: bool, kv_heads: int) -> None:
    theirs = tiny_llama(tie_word_embeddings=is_tied, num_key_value_heads=kv_heads)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(theirs, tmp_path)


def test_reads_sharded_checkpoints(tmp_path: Path) -> None:
    theirs = tiny_llama()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_logits(theirs, tmp_path)


def test_a_shard_without_its_tensor_is_an_error(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00004.safetensors"
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match=r"no file holds: model\.layers\.9"):
        load_llama(tmp_path)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    theirs = tiny_llama()
    for weight in theirs.parameters():
        weight.data = weight.data.bfloat16().float()
    deepcopy(theirs).bfloat16().save_pretrained(tmp_path)  # a copy: the cast rounds the rotary frequencies too
    assert {weight.dtype for weight in load_llama(tmp_path)[1].parameters()} == {torch.float32}
    assert_same_logits(theirs, tmp_path)


def test_greedy_generation_is_that_of_transformers(tmp_path: Path) -> None:
    theirs = tiny_llama()
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(IDS[:1], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(load_llama(tmp_path)[1].eval(), IDS[:1], max_new=20), expected)


def test_reads_the_older_form_of_the_rotary_settings() -> None:
    values = tiny_llama().config.to_dict()
    values |= {"rope_theta": values.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    assert llama_config(values).rope_theta == 500.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "qwen2"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 16),
        ("head_dim", 16),
    ],
)
def test_refuses_variants_that_compute_something_else(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        llama_config(tiny_llama().config.to_dict() | {key: value})


def test_refuses_scaled_rotary_positions() -> None:
    scaled = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0}}
    with pytest.raises(ValueError, match="llama3"):
        llama_config(tiny_llama().config.to_dict() | scaled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.norm.weight"), r"missing weights \['decoder\.stack\.norm"),
        (lambda state: state.pop("model.embed_tokens.weight"), r"missing weights \['decoder\.stack\.embedding"),
        (lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}), r"unexpected weights"),
        (lambda state: state.update({"model.surprise": torch.zeros(1)}), r"unexpected weight .*model\.surprise"),
        (lambda state: state.update({"model.norm.weight": torch.ones(31)}), r"misshapen weights .*norm"),
        (lambda state: state.update({"lm_head.weight": torch.ones(97, 32)}), r"ties the embeddings"),
    ],
    ids=["missing", "no embedding", "one layer more", "unknown", "misshapen", "another head"],
)
def test_is_strict_about_weights(tmp_path: Path, change: object, message: str) -> None:
    tiny_llama().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)  # type: ignore[operator]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_llama(tmp_path)
