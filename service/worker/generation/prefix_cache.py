"""Which blocks of prompts have their K/V kept: bookkeeping only, the K/V themselves lie in the engine's pool.

A block stands for CHUNK tokens and for everything before them, so that blocks form a tree: two prompts share a node
when they are equal up to its end. Keys are the tokens themselves; nothing rests on a hash being unique. What has
gone longest without use is evicted first, but never a block that others continue or that somebody is continuing now.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

CHUNK = 64  # tokens in a block; every prompt is cut here, counted from its start

Tokens = tuple[int, ...]


def whole_chunks(ids: Sequence[int]) -> tuple[Tokens, ...]:
    """The pieces of a prompt that can be kept: all but what is left over at its end."""
    return tuple(tuple(ids[start : start + CHUNK]) for start in range(0, len(ids) - CHUNK + 1, CHUNK))


@dataclass(slots=True, eq=False)
class Block:
    """A node of the tree. `index` is its place in the engine's pool, -1 for the root, which holds no tokens."""

    index: int
    tokens: Tokens
    parent: "Block | None"
    children: "dict[Tokens, Block]" = field(default_factory=dict)
    num_users: int = 0  # prompts that are being prefilled behind it


class PrefixCache:
    """Up to `num_blocks` blocks; with 0 there is no cache."""

    def __init__(self, num_blocks: int) -> None:
        self.root = Block(-1, (), None)
        self._free = list(range(num_blocks - 1, -1, -1))
        self._by_age: OrderedDict[Block, None] = OrderedDict()  # the longest unused first

    @property
    def num_used(self) -> int:
        return len(self._by_age)

    def find(self, chunks: Sequence[Tokens]) -> list[Block]:
        """The blocks for the longest known beginning of `chunks`. Their age does not change."""
        found: list[Block] = []
        block: Block | None = self.root
        for tokens in chunks:
            block = block.children.get(tokens) if block is not None else None
            if block is None:
                break
            found.append(block)
        return found

    def use(self, blocks: Sequence[Block]) -> None:
        """Count what `find` found as used now."""
        for block in reversed(blocks):  # a parent is younger than its children, so that the eldest is mostly a leaf
            self._by_age.move_to_end(block)

    def hold(self, block: Block) -> None:
        """Keep `block` until `release`: a prompt is being computed behind it."""
        block.num_users += 1

    def release(self, block: Block) -> None:
        block.num_users -= 1

    def insert(self, parent: Block, tokens: Tokens) -> tuple[Block | None, bool]:
        """The block for `tokens` behind `parent`, and whether it is new, so that its K/V must be saved.

        None when there is no room: every block is in use or has others behind it.
        """
        if (known := parent.children.get(tokens)) is not None:
            return known, False
        if (index := self._take()) is None:
            return None, False
        block = parent.children[tokens] = Block(index, tokens, parent)
        self._by_age[block] = None
        return block, True

    def remove(self, block: Block) -> None:
        """Forget a block, which nobody continues, and free its place."""
        assert block.parent is not None
        assert not block.children
        del block.parent.children[block.tokens]
        del self._by_age[block]
        self._free.append(block.index)

    def _take(self) -> int | None:
        if not self._free:
            eldest = next((one for one in self._by_age if not one.children and not one.num_users), None)
            if eldest is None:
                return None
            self.remove(eldest)
        return self._free.pop()
