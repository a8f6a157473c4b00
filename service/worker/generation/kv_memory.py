"""Memory for keys and values: a slot for each sequence that is under way, a pool of blocks for prefixes to use again.

Owns the layout and the copies; who lives in which slot or block is decided elsewhere. Memory is reserved at once and
costs nothing until it is written: a slot that held 100 tokens at most has taken the pages of 100 tokens.
"""

import mmap
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import BundleError, ConfigError
from service.worker.bundle import GraphSpec

BLOCK = 64  # tokens in a block of the pool, and in a piece of prefill
PARTS = ("key", "value")
CROSS = "cross_"  # begins the names of those that a translation's source leaves behind


@dataclass(frozen=True)
class KvShape:
    """What one token leaves behind in every layer: keys and values of `num_heads` heads of `width` numbers."""

    num_layers: int
    num_heads: int
    width: int

    @property
    def bytes_per_token(self) -> int:
        return len(PARTS) * self.num_layers * self.num_heads * self.width * np.dtype(np.float32).itemsize

    @property
    def names(self) -> list[str]:
        """Of the tensors, in the order of the memory: key.0, value.0, key.1, ..."""
        return [f"{part}.{layer}" for layer in range(self.num_layers) for part in PARTS]


def read_shape(graph: GraphSpec, kind: str = "") -> KvShape:
    """The shape that a graph's past_* inputs of a `kind` have. Raises BundleError if none or not all alike."""
    prefixes = tuple(f"past_{kind}{part}." for part in PARTS)
    axes = {tensor.name: tensor.axes for tensor in graph.inputs if tensor.name.startswith(prefixes)}
    num_heads, width = next((found[1::2] for found in axes.values() if len(found) == 4), (None, None))
    if not isinstance(num_heads, int) or not isinstance(width, int) or len(set(axes.values())) != 1:
        raise BundleError(f"{graph.file} has no inputs {prefixes[0]}* of one shape (B, heads, S, width), but {axes}")
    shape = KvShape(len(axes) // len(PARTS), num_heads, width)
    if {f"past_{kind}{name}" for name in shape.names} != axes.keys():
        raise BundleError(f"{graph.file} must have {prefixes[0]}i and {prefixes[1]}i of every layer, not {list(axes)}")
    return shape


class KvMemory:
    """`slots`: (2 * layers, slots, heads, max_tokens, width), keys and values of a layer side by side."""

    def __init__(self, shape: KvShape, *, num_slots: int, max_tokens: int, num_blocks: int) -> None:
        """Raises ConfigError if the system refuses to reserve that much."""
        parts = len(shape.names)
        self.slots = reserve((parts, num_slots, shape.num_heads, max_tokens, shape.width))
        self._blocks = reserve((num_blocks, parts, shape.num_heads, BLOCK, shape.width))

    def move(self, source: int, target: int, start: int, end: int) -> None:
        self.slots[:, target, :, start:end] = self.slots[:, source, :, start:end]

    def save(self, slot: int, start: int, block: int) -> None:
        self._blocks[block] = self.slots[:, slot, :, start : start + BLOCK]

    def restore(self, block: int, slot: int, start: int) -> None:
        self.slots[:, slot, :, start : start + BLOCK] = self._blocks[block]


def reserve(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Zeros whose pages come into being when they are first written. Raises ConfigError."""
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(np.float32).itemsize
    try:
        memory = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(f"{num_bytes} bytes for keys and values cannot be reserved: {error}") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # The first token of a slot touches every head of every layer, far apart: of huge pages that is the whole slot.
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32, num_bytes // 4).reshape(shape)
