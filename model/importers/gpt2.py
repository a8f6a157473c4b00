"""GPT-2-family checkpoints (safetensors + config.json) into LanguageModel; owns the names and two changes of layout.

Reads what transformers' GPT2LMHeadModel and GPT2Model save. Their linear layers are stored as (in, out) and are
transposed here; queries, keys and values are one matrix there and three here.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.importers.bert import ACTIVATIONS
from model.importers.weights import Values, load_strictly, read_safetensors, tie_head
from model.transformer import LanguageModel
from service.worker.weights.checkpoint import HEAD, TOKEN, check_variant, rename

UNUSED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)$")  # the causal mask, kept as a buffer by older versions
FUSED = re.compile(r"(.*\.attention\.)qkv(\..*)")
NAMES = (
    (r"wte\.", "decoder.stack.embedding.token."),
    (r"wpe\.", "decoder.stack.embedding.position."),
    (r"h\.(\d+)\.ln_1\.", r"decoder.stack.blocks.\1.attention_norm."),
    (r"h\.(\d+)\.attn\.c_attn\.", r"decoder.stack.blocks.\1.attention.qkv."),
    (r"h\.(\d+)\.attn\.c_proj\.", r"decoder.stack.blocks.\1.attention.output."),
    (r"h\.(\d+)\.ln_2\.", r"decoder.stack.blocks.\1.feed_forward_norm."),
    (r"h\.(\d+)\.mlp\.c_fc\.", r"decoder.stack.blocks.\1.feed_forward.up."),
    (r"h\.(\d+)\.mlp\.c_proj\.", r"decoder.stack.blocks.\1.feed_forward.down."),
    (r"ln_f\.", "decoder.stack.norm."),
    (r"lm_head\.", "head."),
)
VARIANTS: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": tuple(ACTIVATIONS),
    "scale_attn_weights": (True, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
}


def gpt2_config(values: dict[str, Any]) -> ModelConfig:
    """transformers' GPT2Config, as in config.json; raises ValueError for a variant that we do not carry."""
    check_variant(values, VARIANTS)
    return ModelConfig(
        kind="decoder",
        vocab_size=values["vocab_size"],
        width=values["n_embd"],
        num_heads=values["n_head"],
        num_layers=values["n_layer"],
        feed_forward=values.get("n_inner") or 4 * values["n_embd"],
        max_length=values["n_positions"],
        norm_order="pre",
        norm_eps=values["layer_norm_epsilon"],
        activation=ACTIVATIONS[values["activation_function"]],  # type: ignore[arg-type]
        has_embedding_norm=False,
        tie_embeddings=values.get("tie_word_embeddings", True),
        dropout=values["resid_pdrop"],
        attention_dropout=values["attn_pdrop"],
        pad_id=values.get("pad_token_id") or 0,
    )


def unfused(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor in GPT-2's layout -> ours: a block's matrices transposed, queries, keys and values apart."""
    value = tensor.t().contiguous() if ".blocks." in name and tensor.ndim == 2 else tensor  # (out, in)
    if not (match := FUSED.match(name)):
        return {name: value}
    parts = value.chunk(3, dim=0)
    return {match.expand(rf"\1{part}\2"): value for part, value in zip(("query", "key", "value"), parts, strict=True)}


def gpt2_state(tensors: dict[str, Tensor], *, is_tied: bool) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names and in our layout, in float32."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("transformer.")
        if not UNUSED.match(bare):
            state |= unfused(rename(bare, NAMES), tensor.float())
    if is_tied:
        tie_head(state, head=HEAD, token=TOKEN)
    return state


def load_gpt2(directory: Path) -> tuple[ModelConfig, LanguageModel]:
    """Builds a LanguageModel from a directory with config.json and model.safetensors, whole or sharded.

    Raises ValueError on an unsupported variant, a missing key, and missing, unexpected or misshapen weights.
    """
    config = gpt2_config(Values(directory / "config.json"))
    model = LanguageModel(config)
    state = gpt2_state(read_safetensors(directory), is_tied=config.tie_embeddings)
    load_strictly(model, state, directory)
    return config, model
