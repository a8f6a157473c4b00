"""The serving form of a classifier: the same weights, computed over packed rows. What export traces.

The reference (model.transformer) computes on padded rectangles. Here the tokens of a whole batch stand in one row after
the other, so that matrices never see padding; only attention goes through a rectangle and back (the inputs are those of
service.worker.classification.engine.pack). Queries, keys and values come from one matrix, which holds the 1/sqrt(D)
too.

Shapes: N tokens of all sequences, B sequences, L length of the rectangle, H heads, D head width, W model width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.transformer import Attention, Block, Classifier, Encoder, pool_real
from service.worker.classification.engine import LOGITS, attention_output

INPUT_AXES = {
    "input_ids": ("tokens",),
    "token_type_ids": ("tokens",),
    "position_ids": ("tokens",),
    "sequence_ids": ("tokens",),
    "slots": ("batch", "length"),
    "watched": ("watched",),
}


def output_axes(config: ModelConfig) -> dict[str, tuple[str | int, ...]]:
    """What the graph gives: logits, and of the watched sequences each layer's softmax weights.

    Watched sequences are an input because a graph's outputs live until its run ends, whether they are fetched or not:
    all weights of a long text took a third of its time in fresh memory. Of none, they are nothing. Their rows and
    columns of padding mean nothing.
    """
    weights = ("watched", config.num_heads, "length", "length")
    return {LOGITS: ("batch", config.num_labels)} | {
        attention_output(layer): weights for layer in range(config.num_layers)
    }


def rows_of(table: Tensor, indices: Tensor) -> Tensor:
    """table[indices] for whole rows of a matrix; exported as one Gather."""
    return F.embedding(indices, table)


class PackedAttention(nn.Module):
    """Self-attention from packed rows to packed rows."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.num_heads, self.head_width = attention.num_heads, attention.head_width
        scale = 1 / math.sqrt(self.head_width)
        parts = [(attention.query, scale), (attention.key, 1.0), (attention.value, 1.0)]
        width = attention.query.in_features
        self.qkv = nn.Linear(width, 3 * width)
        self.qkv.weight.data = torch.cat([layer.weight.data * by for layer, by in parts])
        self.qkv.bias.data = torch.cat([layer.bias.data * by for layer, by in parts])
        self.output = attention.output

    def forward(self, x: Tensor, there: Tensor, back: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The output (N, W) and the weights (B, H, L, L).

        x (N, W); there (B, H, L) and back (N, H) as in `routes`; hidden (B, 1, 1, L) is added to the scores.
        """
        heads = self.qkv(x).view(-1, self.head_width)  # (N * 3 * H, D): a token's queries, then keys, then values
        q = rows_of(heads, there)  # (B, H, L, D)
        k = rows_of(heads, there + self.num_heads)
        v = rows_of(heads, there + 2 * self.num_heads)
        weights = (q @ k.transpose(-2, -1) + hidden).softmax(dim=-1)  # (B, H, L, L)
        mixed = (weights @ v).view(-1, self.head_width)  # (B * H * L, D)
        return self.output(rows_of(mixed, back).flatten(1)), weights

    def routes(self, position_ids: Tensor, sequence_ids: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of `heads` for each position of the rectangle (padding takes row 0), of `mixed` for each token."""
        head = torch.arange(self.num_heads)
        there = slots.clamp(min=0)[:, None, :] * (3 * self.num_heads) + head[None, :, None]
        back = (sequence_ids[:, None] * self.num_heads + head) * slots.size(1) + position_ids[:, None]
        return there, back


class PackedBlock(nn.Module):
    """A block of the reference, with its attention in packed form and without dropout."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.is_pre = block.is_pre
        self.attention, self.attention_norm = PackedAttention(block.attention), block.attention_norm
        self.feed_forward, self.feed_forward_norm = block.feed_forward, block.feed_forward_norm

    def forward(self, x: Tensor, there: Tensor, back: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = self.attention(self.attention_norm(x) if self.is_pre else x, there, back, hidden)
        if self.is_pre:
            x = x + mixed
            return x + self.feed_forward(self.feed_forward_norm(x)), weights
        x = self.attention_norm(x + mixed)
        return self.feed_forward_norm(x + self.feed_forward(x)), weights


class PackedClassifier(nn.Module):
    """Raises ValueError for a kind of model that has no packed form (yet)."""

    def __init__(self, config: ModelConfig, classifier: Classifier) -> None:
        super().__init__()
        check_supported(config)
        assert isinstance(classifier.body, Encoder)
        self.outputs = tuple(output_axes(config))
        stack = classifier.body.stack
        self.embedding, self.norm = stack.embedding, stack.norm
        self.blocks = nn.ModuleList(PackedBlock(block) for block in stack.blocks)
        self.pooling, self.pooler, self.head = classifier.pooling, classifier.pooler, classifier.head

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        sequence_ids: Tensor,
        slots: Tensor,
        watched: Tensor,
    ) -> tuple[Tensor, ...]:
        """slots (B, L), watched (K,), the others (N,) -> logits (B, labels), weights of each layer (K, H, L, L)."""
        x = self.embedding(input_ids, position_ids, token_type_ids)  # (N, W)
        there, back = self.blocks[0].attention.routes(position_ids, sequence_ids, slots)
        hidden = torch.where(slots < 0, -math.inf, 0.0)[:, None, None, :]
        trace: list[Tensor] = []
        for block in self.blocks:
            x, weights = block(x, there, back, hidden)
            trace.append(weights.index_select(0, watched))
        pooled = self.pool(x if self.norm is None else self.norm(x), slots)  # (B, W)
        return self.head(pooled if self.pooler is None else torch.tanh(self.pooler(pooled))), *trace

    def pool(self, x: Tensor, slots: Tensor) -> Tensor:
        if self.pooling == "first":
            return rows_of(x, slots[:, 0])
        return pool_real(rows_of(x, slots.clamp(min=0)), slots >= 0, is_last=self.pooling == "last")


def check_supported(config: ModelConfig) -> None:
    problems = {
        "kind": config.kind != "encoder",
        "positions": config.positions == "rotary",
        "relative_buckets": config.relative_buckets > 0,
        "num_kv_heads": config.kv_heads != config.num_heads,
        "has_bias": not config.has_bias,
        "num_layers": config.num_layers < 1,
        "num_labels": config.num_labels < 1,
    }
    for name, is_unsupported in problems.items():
        if is_unsupported:
            raise ValueError(f"{name} {getattr(config, name)!r} has no packed form, and only that is exported")
