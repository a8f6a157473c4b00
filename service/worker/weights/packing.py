"""Float weights of a decoder -> what its graph reads: integer codes and scales, in one file, in one order.

Owns how a matrix becomes integers, how smoothing scales fold into the weights around it, and the order of the file.
Every number comes from elementwise operations that IEEE 754 defines to the bit, so the same weights give the same bytes
on any machine, and a manifest can pin them. Knows nothing of where weights come from. Serves `bind` (weights bound on
first start, without torch) and `model.export_decoder` alike.

A matrix is one of three kinds, each of which gives a row the same bits whatever rows stand beside it:
- "float32";
- "blocks8", for MatMulNBits: a scale for every 32 inputs of a row. (Longer blocks would sum in an order that depends on
  the number of rows.) Q8_0's own codes come back exactly.
- "rows8", for MatMulIntegerToFloat: a scale a row. With VNNI twice as fast as blocks8 at 16 rows, less accurate.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Kind = Literal["float32", "blocks8", "rows8"]
Piece = tuple[str, Array]  # a name in the graph, and what stands there
Tensors = Callable[[str], Floats]  # a weight in float32 by its name in model.transformer's LanguageModel

BLOCK = 32  # inputs that share a scale
ALIGNMENT = 64  # bytes; of every piece, for the processor's widest loads
HEAD, EMBEDDING = "head.weight", "decoder.stack.embedding.token.weight"


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """The kind of each matrix of a decoder. In some layers a few activations are so large that `down` needs blocks."""

    qkv: Kind = "rows8"
    output: Kind = "rows8"
    gate_up: Kind = "rows8"
    down: Kind = "rows8"
    blocks_of_down: frozenset[int] = frozenset()  # the layers whose down is in blocks all the same
    head: Kind = "blocks8"
    embedding: Kind = "blocks8"  # rows8 is not for tables

    def down_of(self, layer: int) -> Kind:
        return "blocks8" if layer in self.blocks_of_down else self.down


INT8 = Kinds(blocks_of_down=frozenset({0, 1, 2, 3, 9, 28, 29}))  # what is shipped; how it was chosen is in model/LOG.md
FLOAT32 = Kinds(qkv="float32", output="float32", gate_up="float32", down="float32", head="float32", embedding="float32")
PRECISIONS: Mapping[str, Kinds] = {"int8": INT8, "float32": FLOAT32}


class Smoothing(NamedTuple):
    """Scales that move magnitude from activations into the weights that read them (Xiao et al. 2022), a layer."""

    qkv: Floats  # (W), as are the inputs of the matrix
    gate_up: Floats  # (W)
    down: Floats  # (F)


def read_smoothing(values: Floats, *, width: int, feed_forward: int) -> list[Smoothing]:
    """The layers of a file of float32 in the order of Smoothing's fields. Raises ValueError for another size."""
    size = 2 * width + feed_forward
    if values.size % size or not np.isfinite(values).all() or (values <= 0).any():
        raise ValueError(f"{values.size} smoothing scales are not positive numbers in layers of {size}")
    return [Smoothing(*np.split(layer, [width, 2 * width])) for layer in values.reshape(-1, size)]


def blocks8(weight: Floats) -> tuple[Array, Floats]:
    """(N, K) -> codes around 128 (N, K / 32, 32) and scales (N, K / 32)."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    scales = np.abs(blocks).max(-1) / np.float32(127)
    scales[scales == 0] = 1
    return (np.rint(blocks / scales[..., None]) + 128).astype(np.uint8), scales


def rows8(weight: Floats) -> tuple[Array, Floats]:
    """(N, K) -> codes (K, N) and scales (N)."""
    scales = np.abs(weight).max(1) / np.float32(127)
    scales[scales == 0] = 1
    return np.rint(weight / scales[:, None]).astype(np.int8).T, scales


def matrix(name: str, weight: Floats, kind: Kind) -> Iterator[Piece]:
    """The pieces of one matrix (N, K)."""
    if kind == "float32":
        yield f"{name}.weight", weight.T
        return
    codes, scales = blocks8(weight) if kind == "blocks8" else rows8(weight)
    yield f"{name}.codes", codes
    yield f"{name}.scales", scales


def layer_pieces(layer: int, tensors: Tensors, kinds: Kinds, smoothing: Smoothing | None) -> Iterator[Piece]:
    """All of one block. A scale divides what makes an activation and multiplies what reads it: the sum is the same."""

    def weight(name: str) -> Floats:
        return tensors(f"decoder.stack.blocks.{layer}.{name}.weight")

    def stacked(*names: str) -> Floats:
        return np.concatenate([weight(name) for name in names])

    qkv = stacked("attention.query", "attention.key", "attention.value")
    attention_norm, feed_forward_norm = weight("attention_norm"), weight("feed_forward_norm")
    gate, up, down = (weight(f"feed_forward.{name}") for name in ("gate", "up", "down"))
    if smoothing is not None:
        attention_norm, qkv = attention_norm / smoothing.qkv, qkv * smoothing.qkv
        feed_forward_norm = feed_forward_norm / smoothing.gate_up
        gate, up = gate * smoothing.gate_up, up * smoothing.gate_up
        up, down = up / smoothing.down[:, None], down * smoothing.down
    yield f"attention_norm.{layer}.weight", attention_norm
    yield from matrix(f"qkv.{layer}", qkv, kinds.qkv)
    yield from matrix(f"output.{layer}", weight("attention.output"), kinds.output)
    yield f"feed_forward_norm.{layer}.weight", feed_forward_norm
    yield from matrix(f"gate_up.{layer}", np.concatenate((gate, up)), kinds.gate_up)
    yield from matrix(f"down.{layer}", down, kinds.down_of(layer))


def table(weight: Floats, kind: Kind) -> Iterator[Piece]:
    """The embedding (V, W), which is read by rows."""
    if kind == "float32":
        yield "embedding.weight", weight
        return
    codes, scales = blocks8(weight)
    yield "embedding.codes", codes.reshape(weight.shape)
    yield "embedding.scales", scales


def shares_table(kinds: Kinds, *, is_tied: bool) -> bool:
    """Whether the head reads the embedding's own bytes."""
    return is_tied and kinds.head == kinds.embedding == "blocks8"


def decoder_pieces(
    tensors: Tensors, *, num_layers: int, is_tied: bool, kinds: Kinds, smoothing: list[Smoothing] | None = None
) -> Iterator[list[Piece]]:
    """Everything, a part at a time: the table and the head, each block, the last norm."""
    pieces = list(table(tensors(EMBEDDING), kinds.embedding))
    if not shares_table(kinds, is_tied=is_tied):
        pieces += matrix("head", tensors(EMBEDDING if is_tied else HEAD), kinds.head)
    yield pieces
    for layer in range(num_layers):
        yield list(layer_pieces(layer, tensors, kinds, None if smoothing is None else smoothing[layer]))
    yield [("norm.weight", tensors("decoder.stack.norm.weight"))]


class Place(NamedTuple):
    """Where a piece stands in the file; `offset` and `length` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def write_pieces(path: Path, parts: Iterable[list[Piece]]) -> dict[str, Place]:
    """Writes every piece to a new file, little-endian and aligned; says where each stands."""
    places: dict[str, Place] = {}
    with path.open("xb") as file:
        for name, value in (piece for part in parts for piece in part):
            data = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
            file.write(bytes(-file.tell() % ALIGNMENT))
            places[name] = Place(value.dtype.name, value.shape, file.tell(), data.nbytes)
            file.write(data.data)
    return places
