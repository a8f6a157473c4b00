"""MPNet checkpoints (Song et al. 2020; safetensors + config.json) into Classifier: BERT with a relative position bias.

Used for the teacher of the sentiment recipe. MPNet numbers positions from 2 (its padding id is 1): the first two rows
are left out here.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.importers.bert import ACTIVATIONS, fresh
from model.importers.weights import Values, load_strictly, read_safetensors
from model.transformer import Classifier
from service.worker.weights.checkpoint import check_variant, rename

FIRST_POSITION = 2
NAMES = (
    (r"embeddings\.word_embeddings\.", "body.stack.embedding.token."),
    (r"embeddings\.position_embeddings\.", "body.stack.embedding.position."),
    (r"embeddings\.LayerNorm\.", "body.stack.embedding.norm."),
    (r"encoder\.relative_attention_bias\.", "body.relative.bias."),
    (r"encoder\.layer\.(\d+)\.attention\.attn\.q\.", r"body.stack.blocks.\1.attention.query."),
    (r"encoder\.layer\.(\d+)\.attention\.attn\.k\.", r"body.stack.blocks.\1.attention.key."),
    (r"encoder\.layer\.(\d+)\.attention\.attn\.v\.", r"body.stack.blocks.\1.attention.value."),
    (r"encoder\.layer\.(\d+)\.attention\.attn\.o\.", r"body.stack.blocks.\1.attention.output."),
    (r"encoder\.layer\.(\d+)\.attention\.LayerNorm\.", r"body.stack.blocks.\1.attention_norm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"body.stack.blocks.\1.feed_forward.up."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"body.stack.blocks.\1.feed_forward.down."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"body.stack.blocks.\1.feed_forward_norm."),
    (r"pooler\.dense\.", "pooler."),
)


def mpnet_config(values: dict[str, Any], labels: tuple[str, ...]) -> ModelConfig:
    """transformers' MPNetConfig, as in config.json, with our labels; ValueError for a variant that we do not carry."""
    check_variant(values, {"model_type": ("mpnet",), "hidden_act": tuple(ACTIVATIONS)})
    return ModelConfig(
        kind="encoder",
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_heads=values["num_attention_heads"],
        num_layers=values["num_hidden_layers"],
        feed_forward=values["intermediate_size"],
        max_length=values["max_position_embeddings"] - FIRST_POSITION,
        norm_eps=values["layer_norm_eps"],
        activation=ACTIVATIONS[values["hidden_act"]],  # type: ignore[arg-type]
        relative_buckets=values["relative_attention_num_buckets"],
        dropout=values["hidden_dropout_prob"],
        attention_dropout=values["attention_probs_dropout_prob"],
        pad_id=values["pad_token_id"],
        num_labels=len(labels),
        labels=labels,
    )


def mpnet_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name.removeprefix("mpnet."): tensor for name, tensor in tensors.items() if "position_ids" not in name}
    state = {rename(name, NAMES): tensor for name, tensor in kept.items()}
    position = "body.stack.embedding.position.weight"
    return {name: tensor[FIRST_POSITION:].clone() if name == position else tensor for name, tensor in state.items()}


def load_mpnet(
    directory: Path, *, labels: tuple[str, ...], dropout: float | None = None
) -> tuple[ModelConfig, Classifier]:
    """Builds a Classifier with a fresh head from config.json and model.safetensors; raises ValueError as load_bert."""
    config = mpnet_config(Values(directory / "config.json"), labels)
    if dropout is not None:
        config = replace(config, dropout=dropout, attention_dropout=dropout)
    model = Classifier(config)
    state = fresh(model, "head") | mpnet_state(read_safetensors(directory))
    load_strictly(model, state, directory)
    return config, model
