"""BERT-family checkpoints (safetensors + config.json) into Classifier; owns the table of names, changes no value.

Reads what transformers' BertModel, BertForSequenceClassification and sentence-transformers save. Weights that
classification has no use for (the masked-language head, position ids) are named in UNUSED; any other leftover, or any
gap, is an error.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.importers.weights import Values, load_strictly, read_safetensors
from model.transformer import Classifier
from service.worker.weights.checkpoint import check_variant, rename

UNUSED = re.compile(r"(cls\.|.*position_ids$)")
NAMES = (
    (r"embeddings\.word_embeddings\.", "body.stack.embedding.token."),
    (r"embeddings\.position_embeddings\.", "body.stack.embedding.position."),
    (r"embeddings\.token_type_embeddings\.", "body.stack.embedding.segment."),
    (r"embeddings\.LayerNorm\.", "body.stack.embedding.norm."),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.", r"body.stack.blocks.\1.attention.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"body.stack.blocks.\1.attention.output."),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.", r"body.stack.blocks.\1.attention_norm."),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.", r"body.stack.blocks.\1.feed_forward.up."),
    (r"encoder\.layer\.(\d+)\.output\.dense\.", r"body.stack.blocks.\1.feed_forward.down."),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.", r"body.stack.blocks.\1.feed_forward_norm."),
    (r"pooler\.dense\.", "pooler."),
    (r"classifier\.", "head."),
)
ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh"}
VARIANTS: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": tuple(ACTIVATIONS),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}


def bert_config(values: dict[str, Any], labels: tuple[str, ...]) -> ModelConfig:
    """transformers' BertConfig, as in config.json, with our labels; ValueError for a variant that we do not carry."""
    check_variant(values, VARIANTS)
    return ModelConfig(
        kind="encoder",
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_heads=values["num_attention_heads"],
        num_layers=values["num_hidden_layers"],
        feed_forward=values["intermediate_size"],
        max_length=values["max_position_embeddings"],
        num_types=values["type_vocab_size"],
        norm_eps=values["layer_norm_eps"],
        activation=ACTIVATIONS[values["hidden_act"]],  # type: ignore[arg-type]
        dropout=values["hidden_dropout_prob"],
        attention_dropout=values["attention_probs_dropout_prob"],
        pad_id=values.get("pad_token_id") or 0,
        num_labels=len(labels),
        labels=labels,
    )


def bert_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors under our names; the masked-language head and the position ids are left out."""
    kept = {name: tensor for name, tensor in tensors.items() if not UNUSED.match(name)}
    return {rename(bare(name), NAMES): tensor for name, tensor in kept.items()}


def bare(name: str) -> str:
    """Without the prefix of task models, and with the norm's names of today for those of TensorFlow's days."""
    return name.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias")


def fresh(model: Classifier, *names: str) -> dict[str, Tensor]:
    """New weights for linear layers that a checkpoint may lack: normal, 0.02, from torch's global generator."""
    state: dict[str, Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        torch.nn.init.normal_(layer.weight, std=0.02)
        torch.nn.init.zeros_(layer.bias)
        state |= {f"{name}.{kind}": value for kind, value in layer.state_dict().items()}
    return state


def load_bert(
    directory: Path, *, labels: tuple[str, ...], dropout: float | None = None
) -> tuple[ModelConfig, Classifier]:
    """Builds a Classifier from config.json and model.safetensors.

    The head, and the pooler, are taken from the checkpoint if they are there and drawn anew otherwise. Raises
    ValueError on missing or unexpected weights or keys, and for a variant of BERT that we do not carry.
    """
    config = bert_config(Values(directory / "config.json"), labels)
    if dropout is not None:
        config = replace(config, dropout=dropout, attention_dropout=dropout)
    model = Classifier(config)
    state = fresh(model, "pooler", "head") | bert_state(read_safetensors(directory))
    load_strictly(model, state, directory)
    return config, model
