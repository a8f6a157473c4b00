"""Llama-family checkpoints (safetensors + config.json) into LanguageModel; owns the table of names, changes no value.

Reads what transformers' LlamaForCausalLM saves, in one file or several. Mistral without a sliding window has the same
tensors and is read too. Variants that would compute something else (scaled rotary positions, biases, heads of another
width) are refused, not approximated.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.importers.weights import check_variant, load_strictly, read_safetensors, rename, tie_head
from model.transformer import LanguageModel

HEAD, TOKEN = "head.weight", "decoder.stack.embedding.token.weight"
UNUSED = re.compile(r".*rotary_emb\.inv_freq$")  # old checkpoints store what the config already says
NAMES = (
    (r"model\.embed_tokens\.", "decoder.stack.embedding.token."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"decoder.stack.blocks.\1.attention_norm."),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.", r"decoder.stack.blocks.\1.attention.query."),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.", r"decoder.stack.blocks.\1.attention.key."),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.", r"decoder.stack.blocks.\1.attention.value."),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.", r"decoder.stack.blocks.\1.attention.output."),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.", r"decoder.stack.blocks.\1.feed_forward_norm."),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"decoder.stack.blocks.\1.feed_forward.\2."),
    (r"model\.norm\.", "decoder.stack.norm."),
    (r"lm_head\.", "head."),
)


def rope_theta(values: dict[str, Any]) -> float:
    """The base of the rotary angles, from either generation of config.json; raises ValueError for scaled positions."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary positions of type {kind!r} are not supported, only 'default'")
    return float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))


def known_variants(values: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What each key of config.json that changes the arithmetic may say."""
    return {
        "model_type": ("llama", "mistral"),
        "hidden_act": ("silu",),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "sliding_window": (None,),
        "head_dim": (values["hidden_size"] // values["num_attention_heads"], None),
    }


def llama_config(values: dict[str, Any]) -> ModelConfig:
    """transformers' LlamaConfig, as in config.json; raises ValueError for a variant that we do not carry."""
    check_variant(values, known_variants(values))
    return ModelConfig(
        kind="decoder",
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values.get("num_key_value_heads"),
        num_layers=values["num_hidden_layers"],
        feed_forward=values["intermediate_size"],
        max_length=values["max_position_embeddings"],
        norm="rms",
        norm_order="pre",
        norm_eps=values["rms_norm_eps"],
        positions="rotary",
        rope_theta=rope_theta(values),
        activation="swiglu",
        has_bias=False,
        has_embedding_norm=False,
        tie_embeddings=values.get("tie_word_embeddings", False),
        pad_id=values.get("pad_token_id") or 0,
    )


def llama_state(tensors: dict[str, Tensor], *, is_tied: bool) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names, in float32."""
    state = {rename(name, NAMES): tensor.float() for name, tensor in tensors.items() if not UNUSED.match(name)}
    if is_tied:
        tie_head(state, head=HEAD, token=TOKEN)
    return state


def load_llama(directory: Path) -> tuple[ModelConfig, LanguageModel]:
    """Builds a LanguageModel from a directory with config.json and model.safetensors, whole or sharded.

    Raises ValueError on an unsupported variant and on missing, unexpected or misshapen weights.
    """
    config = llama_config(json.loads((directory / "config.json").read_text()))
    model = LanguageModel(config)
    state = llama_state(read_safetensors(directory), is_tied=config.tie_embeddings)
    load_strictly(model, state, directory)
    return config, model
