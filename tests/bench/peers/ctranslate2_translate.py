"""CTranslate2 in int8 on our own weights; see `translating` for how it is called."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2 import Translator
from ctranslate2.specs import TransformerSpec, common_spec
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from translating import MOST_TOKENS, Layout, Translate, main

Tensors = dict[str, NDArray[np.float32]]


class Weights:
    """Tensors under a prefix, given to the parts of a specification."""

    def __init__(self, tensors: Tensors, prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def of(self, name: str) -> "Weights":
        return Weights(self._tensors, f"{self._prefix}{name}.")

    def linear(self, spec: common_spec.LinearSpec, *names: str) -> None:
        """Several layers are one in CTranslate2: their outputs side by side."""
        spec.weight = np.concatenate([self._tensors[f"{self._prefix}{name}.weight"] for name in names])
        spec.bias = np.concatenate([self._tensors[f"{self._prefix}{name}.bias"] for name in names])

    def norm(self, spec: common_spec.LayerNormSpec, name: str) -> None:
        spec.gamma = self._tensors[f"{self._prefix}{name}.weight"]
        spec.beta = self._tensors[f"{self._prefix}{name}.bias"]


def specification(folder: Path) -> TransformerSpec:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    num_decoder_layers = config["num_decoder_layers"] or config["num_layers"]
    spec = TransformerSpec.from_config(
        (config["num_layers"], num_decoder_layers),
        config["num_heads"],
        pre_norm=True,
        activation=common_spec.Activation.RELU,
    )
    table, head = tensors["encoder.stack.embedding.token.weight"], tensors["head.weight"]
    for stack, name in ((spec.encoder, "encoder.stack"), (spec.decoder, "decoder.stack")):
        weights = Weights(tensors).of(name)
        weights.norm(stack.layer_norm, "norm")
        stack.scale_embeddings = True
        stack.position_encodings.encodings = sinusoids(config["max_length"], config["width"])
        for at, layer in enumerate(stack.layer):
            fill_layer(layer, weights.of(f"blocks.{at}"))
    spec.encoder.embeddings[0].weight = table
    spec.decoder.embeddings.weight, spec.decoder.projection.weight = table[: len(head)], head
    name_tokens(spec, Tokenizer.from_file(str(folder / "tokenizer.json")), len(head))
    spec.config.layer_norm_epsilon = config["norm_eps"]
    return spec


def fill_layer(layer: Any, weights: Weights) -> None:
    weights.norm(layer.self_attention.layer_norm, "attention_norm")
    inside = weights.of("attention")
    inside.linear(layer.self_attention.linear[0], "query", "key", "value")
    inside.linear(layer.self_attention.linear[1], "output")
    if hasattr(layer, "attention"):
        weights.norm(layer.attention.layer_norm, "cross_norm")
        across = weights.of("cross")
        across.linear(layer.attention.linear[0], "query")
        across.linear(layer.attention.linear[1], "key", "value")
        across.linear(layer.attention.linear[2], "output")
    weights.norm(layer.ffn.layer_norm, "feed_forward_norm")
    weights.linear(layer.ffn.linear_0, "feed_forward.up")
    weights.linear(layer.ffn.linear_1, "feed_forward.down")


def sinusoids(length: int, width: int) -> NDArray[np.float32]:
    """Sine in the even columns, cosine in the odd ones, as the model was trained."""
    angles = np.arange(length)[:, None] * np.exp(np.arange(0, width, 2) * (-np.log(10_000.0) / width))
    return np.stack((np.sin(angles), np.cos(angles)), axis=-1).reshape(length, width).astype(np.float32)


def name_tokens(spec: TransformerSpec, tokenizer: Tokenizer, num_written: int) -> None:
    """Only the first `num_written` tokens have logits."""
    names = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names[:num_written])
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = names[:3]  # the first is padding: never met
    spec.config.decoder_start_token = names[1]
    spec.config.add_source_eos = False  # the tokenizer adds it


def load(folder: Path, layout: Layout) -> Translate:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as converted:
        spec = specification(folder)
        spec.validate()
        spec.save(converted)
        translator = Translator(
            converted,
            compute_type="int8",
            inter_threads=layout.workers,
            intra_threads=layout.threads,
        )

    def translate(texts: Sequence[str], num_beams: int) -> list[str]:
        sources = [encoding.tokens for encoding in tokenizer.encode_batch(list(texts))]
        found = translator.translate_batch(
            sources, beam_size=num_beams, max_batch_size=layout.rows, max_decoding_length=MOST_TOKENS
        )
        ids = [[tokenizer.token_to_id(token) for token in one.hypotheses[0]] for one in found]
        return list(tokenizer.decode_batch(ids))

    return translate


if __name__ == "__main__":
    main(load)
