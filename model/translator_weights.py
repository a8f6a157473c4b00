"""Weights of an encoder-decoder -> the one file that its graphs read, in one order.

Owns the names in the file and what is folded into the weights; how a matrix becomes integers is
`service.worker.weights.packing`'s.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from model.config import ModelConfig
from model.transformer import sinusoids
from model.translator_graph import Kind, num_decoder_layers
from service.worker.weights.packing import Floats, Piece, Tensors, matrix, table

WEIGHTS_FILE = "translate.data"
KINDS: Mapping[str, Kind] = {"int8": "blocks8", "float32": "float32"}  # of all matrices, by the bundle's precision
EMBEDDING = "encoder.stack.embedding.token.weight"


def translator_pieces(tensors: Tensors, config: ModelConfig, kind: Kind) -> Iterator[list[Piece]]:
    """Everything, a part at a time. `tensors` has the names of model.transformer's EncoderDecoder.

    The table holds embeddings that are scaled already. It is the head, too: the last norm takes the scale back.
    """
    scale = np.float32(config.width**0.5)
    embedding = tensors(EMBEDDING) * scale
    yield [*table(embedding, kind), ("positions", sinusoids(config.max_length, config.width).numpy())]
    if kind == "float32":
        yield [("head.weight", embedding.T)]
    pack = Packing(tensors, kind)
    for layer in range(config.num_layers):
        yield list(pack.block(f"encoder.{layer}", f"encoder.stack.blocks.{layer}"))
    yield list(pack.norm("encoder.norm", "encoder.stack.norm"))
    layers = [f"decoder.stack.blocks.{layer}" for layer in range(num_decoder_layers(config))]
    yield list(pack.linear("memory", *(f"{name}.cross.{part}" for name in layers for part in ("key", "value"))))
    for layer, name in enumerate(layers):
        yield list(pack.block(f"decoder.{layer}", name))
        yield list(pack.cross(f"decoder.{layer}.cross", name))
    yield list(pack.norm("decoder.norm", "decoder.stack.norm", scale=float(scale)))


class Packing:
    """The pieces of one model, by their names in the file and in the model."""

    def __init__(self, tensors: Tensors, kind: Kind) -> None:
        self.tensors, self.kind = tensors, kind

    def linear(self, name: str, *layers: str) -> Iterator[Piece]:
        """Layers that read the same input, side by side."""
        weight, bias = (self.stacked(layers, part) for part in ("weight", "bias"))
        yield from matrix(name, weight, self.kind)
        yield f"{name}.bias", bias

    def stacked(self, layers: tuple[str, ...], part: str) -> Floats:
        return np.concatenate([self.tensors(f"{layer}.{part}") for layer in layers])

    def norm(self, name: str, layer: str, *, scale: float = 1) -> Iterator[Piece]:
        for part in ("weight", "bias"):
            yield f"{name}.{part}", self.tensors(f"{layer}.{part}") / np.float32(scale)

    def block(self, name: str, layer: str) -> Iterator[Piece]:
        yield from self.norm(f"{name}.attention_norm", f"{layer}.attention_norm")
        yield from self.linear(f"{name}.qkv", *(f"{layer}.attention.{part}" for part in ("query", "key", "value")))
        yield from self.linear(f"{name}.output", f"{layer}.attention.output")
        yield from self.norm(f"{name}.feed_forward_norm", f"{layer}.feed_forward_norm")
        yield from self.linear(f"{name}.up", f"{layer}.feed_forward.up")
        yield from self.linear(f"{name}.down", f"{layer}.feed_forward.down")

    def cross(self, name: str, layer: str) -> Iterator[Piece]:
        yield from self.norm(f"{name}.attention_norm", f"{layer}.cross_norm")
        yield from self.linear(f"{name}.query", f"{layer}.cross.query")
        yield from self.linear(f"{name}.output", f"{layer}.cross.output")
