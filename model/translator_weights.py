"""Weights of an encoder-decoder -> the one file that its graphs read, in one order.

Owns the names in the file and what is folded into the weights; how a matrix becomes integers is `quantize`'s, how the
table does is `service.worker.weights.packing`'s.

A matrix of integers wants inputs of like sizes, so each of its inputs is first multiplied by a number of its own, its
`smooth`. That costs nothing: whatever makes the inputs is multiplied beforehand. It is a norm, or the matrix before,
whose outputs come here through weighted sums or rectified, which leaves such a factor what it is.

A matrix of integers has one scale. The operators prepare those of single outputs anew in every run, which took 8 % of a
step of 16 rows, 29 % of one alone (onnxruntime 1.31). Without them 98.8 % of greedy tokens are the checkpoint's, not
99.2 %; BLEU stays within 0.3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from model.config import ModelConfig
from model.export_decoder import tensors_of
from model.quantize import quantize_layer
from model.transformer import EncoderDecoder, sinusoids
from model.translator_graph import num_decoder_layers
from model.translator_samples import Samples, Seen, see
from service.worker.weights.packing import Floats, Piece, Tensors, table

WEIGHTS_FILE = "translate.data"
EMBEDDING = "encoder.stack.embedding.token.weight"


class Matrix:
    """Linear layers that read the same input, side by side: K inputs, N outputs."""

    def __init__(
        self, tensors: Tensors, seen: Seen | None, *layers: str, factors: Floats | None = None, has_bias: bool = True
    ) -> None:
        """In integers if `seen` tells what the first of the layers reads. `factors` (N) multiply the outputs."""
        by = np.float32(1) if factors is None else factors
        self.weight = np.concatenate([tensors(f"{layer}.weight") for layer in layers]).T * by
        self.bias = np.concatenate([tensors(f"{layer}.bias") for layer in layers]) * by if has_bias else None
        self.int8 = None
        if seen is not None:
            self.int8 = quantize_layer(torch.from_numpy(self.weight.copy()), seen[layers[0]], one_scale=True)

    @property
    def smooth(self) -> Floats:
        """(K), what the inputs must have been multiplied with."""
        return np.ones(len(self.weight), np.float32) if self.int8 is None else self.int8.smooth.numpy()

    def pieces(self, name: str) -> Iterator[Piece]:
        if self.int8 is None:
            yield f"{name}.weight", self.weight
        else:
            yield f"{name}.codes", self.int8.weight.numpy().astype(np.int8)
            yield f"{name}.scale", self.int8.weight_scale.numpy()
            yield f"{name}.step", np.array(self.int8.scale, np.float32)
            yield f"{name}.middle", np.array(self.int8.zero_point, np.uint8)
        if self.bias is not None:
            yield f"{name}.bias", self.bias


@dataclass(frozen=True)
class Packing:
    """The pieces of one model. `tensors` and `seen` go by the names of model.transformer's EncoderDecoder."""

    tensors: Tensors
    seen: Seen | None

    def matrix(self, *layers: str, factors: Floats | None = None, has_bias: bool = True) -> Matrix:
        return Matrix(self.tensors, self.seen, *layers, factors=factors, has_bias=has_bias)

    def norm(self, name: str, layer: str, factors: Floats) -> Iterator[Piece]:
        for part in ("weight", "bias"):
            yield f"{name}.{part}", self.tensors(f"{layer}.{part}") * factors

    def block(self, name: str, layer: str) -> Iterator[Piece]:
        """Attention to what is read itself, and the feed-forward."""
        output, down = self.matrix(f"{layer}.attention.output"), self.matrix(f"{layer}.feed_forward.down")
        up = self.matrix(f"{layer}.feed_forward.up", factors=down.smooth)
        factors = np.concatenate((np.ones(2 * len(output.smooth), np.float32), output.smooth))
        qkv = self.matrix(*(f"{layer}.attention.{part}" for part in ("query", "key", "value")), factors=factors)
        yield from self.norm(f"{name}.attention_norm", f"{layer}.attention_norm", qkv.smooth)
        yield from qkv.pieces(f"{name}.qkv")
        yield from output.pieces(f"{name}.output")
        yield from self.norm(f"{name}.feed_forward_norm", f"{layer}.feed_forward_norm", up.smooth)
        yield from up.pieces(f"{name}.up")
        yield from down.pieces(f"{name}.down")

    def memory(self, layers: list[str]) -> Iterator[Piece]:
        """All decoder layers' attention to the memory, whose keys and values are one matrix, and the memory's norm."""
        outputs = [self.matrix(f"{layer}.cross.output") for layer in layers]
        keys = np.ones(len(outputs[0].smooth), np.float32)
        parts = [f"{layer}.cross.{part}" for layer in layers for part in ("key", "value")]
        matrix = self.matrix(*parts, factors=np.concatenate([each for one in outputs for each in (keys, one.smooth)]))
        yield from self.norm("encoder.norm", "encoder.stack.norm", matrix.smooth)
        yield from matrix.pieces("memory")
        for at, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
            name, query = f"decoder.{at}.cross", self.matrix(f"{layer}.cross.query")
            yield from self.norm(f"{name}.attention_norm", f"{layer}.cross_norm", query.smooth)
            yield from query.pieces(f"{name}.query")
            yield from output.pieces(f"{name}.output")

    def head(self, num_written: int) -> Iterator[Piece]:
        """Of the first tokens only: the others are never written."""
        head = Matrix(lambda name: self.tensors(name)[:num_written], self.seen, "head", has_bias=False)
        yield from self.norm("decoder.norm", "decoder.stack.norm", head.smooth)
        yield from head.pieces("logits")


def translator_pieces(
    config: ModelConfig, model: EncoderDecoder, samples: Samples | None, num_written: int
) -> Iterator[list[Piece]]:
    """Everything, a part at a time; in integers if there are samples of what the model reads and writes.

    The table holds embeddings that are scaled already.
    """
    tensors, seen = tensors_of(model), None if samples is None else see(model, samples)
    embeddings = table(tensors(EMBEDDING) * np.float32(config.width**0.5), "float32" if seen is None else "blocks8")
    yield [*embeddings, ("positions", sinusoids(config.max_length, config.width).numpy())]
    pack = Packing(tensors, seen)
    for layer in range(config.num_layers):
        yield list(pack.block(f"encoder.{layer}", f"encoder.stack.blocks.{layer}"))
    layers = [f"decoder.stack.blocks.{layer}" for layer in range(num_decoder_layers(config))]
    yield list(pack.memory(layers))
    for layer, name in enumerate(layers):
        yield list(pack.block(f"decoder.{layer}", name))
    yield list(pack.head(num_written))
