"""The whole transformer on one page: attention, block, Encoder, Decoder, EncoderDecoder, heads, a naive generate().

One set of modules carries the original encoder-decoder (Vaswani et al. 2017), BERT (Devlin et al. 2019), GPT-2 (Radford
et al. 2019) and Llama (Touvron et al. 2023); `ModelConfig` says which. This is the reference that the exported graphs
and the serving engine are checked against, so it prefers clarity; it knows nothing of data, training or files.

Shapes: B batch, T positions of the queries, S positions of the keys, H heads, G key/value heads, D head width, W model
width, V vocabulary. Masks are boolean, True means "may attend", or numbers to add to the scores; they broadcast to (B,
H, T, S).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig

Rotation = tuple[Tensor, Tensor]  # cos and sin, each (B or 1, T, D)


class KeyValue(NamedTuple):
    """Keys and values of one attention, each (B, G, S, D)."""

    key: Tensor
    value: Tensor

    def append(self, new: "KeyValue") -> "KeyValue":
        return KeyValue(torch.cat((self.key, new.key), dim=2), torch.cat((self.value, new.value), dim=2))


class LayerCache(NamedTuple):
    """What one decoder block remembers: its own past, and the memory's keys and values, computed once."""

    own: KeyValue
    cross: KeyValue | None


Cache = list[LayerCache]  # one entry a block


def padding_mask(mask: Tensor) -> Tensor:
    """(B, S) with non-zero for real tokens -> (B, 1, 1, S) boolean."""
    return mask.bool()[:, None, None, :]


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """(T, S), True where the key is not later than the query; the queries are the last keys (Vaswani et al., 3.2.3)."""
    queries = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    return torch.arange(num_keys, device=device)[None, :] <= queries


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one & other


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: nn.Module
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v written out (Vaswani et al. 2017, equation 1): the output and the weights.

    F.scaled_dot_product_attention computes the same without keeping the weights: that is the fast path, this one
    explains.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1)
    return dropout(weights) @ v, weights


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014) that draws one random byte an element, not one float.

    On a CPU nn.Dropout spends more time on random numbers than a small block spends on its matrices: one 64-bit draw
    here serves eight elements. The price is that the rate is a multiple of 1/256; the scale uses that very rate, so
    that the expectation stays exact.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.threshold = round(rate * 256)  # bytes below it are dropped
        self.scale = 256 / (256 - self.threshold)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.threshold:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.threshold
        return x * (kept.to(x.dtype) * self.scale)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rms":
        return RMSNorm(config.width, config.norm_eps)
    return nn.LayerNorm(config.width, eps=config.norm_eps)


def sinusoids(length: int, width: int) -> Tensor:
    """(length, width): sine in the even columns, cosine in the odd ones (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2).float() * (-math.log(10_000.0) / width))
    angles = torch.arange(length).float()[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :width]


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): columns (i, i + D/2), paired as in Llama, turn with the position."""

    frequencies: Tensor

    def __init__(self, head_width: int, theta: float) -> None:
        super().__init__()
        self.register_buffer(
            "frequencies", theta ** (-torch.arange(0, head_width, 2).float() / head_width), persistent=False
        )

    def forward(self, positions: Tensor) -> Rotation:
        angles = positions[..., None].float() * self.frequencies  # (B or 1, T, D/2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Turns each pair of columns of (B, H, T, D) by its angle."""
    if rotation is None:
        return x
    cos, sin = (part[:, None].to(x.dtype) for part in rotation)  # (B or 1, 1, T, D)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class RelativeBias(nn.Module):
    """A learned number a head for each bucket of distance, added to the scores of every layer, as T5 and MPNet have it.

    Raffel et al. 2020, section 2.1: half of the buckets of each direction are exact, the rest grow logarithmically up
    to 128.
    """

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int = 128) -> None:
        super().__init__()
        self.one_way, self.max_distance = num_buckets // 2, max_distance
        self.bias = nn.Embedding(num_buckets, num_heads)

    def buckets(self, length: int) -> Tensor:
        """(T, T): the bucket of each pair of query and key."""
        positions = torch.arange(length, device=self.bias.weight.device)
        offset = positions[None, :] - positions[:, None]
        distance, exact = offset.abs(), self.one_way // 2
        growth = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (self.one_way - exact)).long()).clamp(max=self.one_way - 1)
        return torch.where(distance < exact, distance, far) + (offset > 0).long() * self.one_way

    def forward(self, length: int) -> Tensor:
        """(1, H, T, T)."""
        return self.bias(self.buckets(length)).permute(2, 0, 1)[None]


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) for self and cross, with optional grouped KV heads
    (Ainslie et al. 2023).

    `project` makes keys and values from what is attended to (the input itself, or the encoder's memory), once; calling
    the module asks them the queries of x. A cache is therefore nothing but a kept KeyValue.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_width = config.num_heads, config.kv_heads, config.head_width
        kv_width = config.kv_heads * config.head_width
        self.query = nn.Linear(config.width, config.width, bias=config.has_bias)
        self.key = nn.Linear(config.width, kv_width, bias=config.has_bias)
        self.value = nn.Linear(config.width, kv_width, bias=config.has_bias)
        self.output = nn.Linear(config.width, config.width, bias=config.has_bias)
        self.dropout = Dropout(config.attention_dropout)

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, H * D) -> (B, H, T, D)."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def project(self, memory: Tensor, rotation: Rotation | None = None) -> KeyValue:
        return KeyValue(rotate(self.heads(self.key(memory)), rotation), self.heads(self.value(memory)))

    def shared(self, x: Tensor) -> Tensor:
        """(B, G, S, D) -> (B, H, S, D): each key/value head serves H / G query heads."""
        return x if self.kv_heads == self.num_heads else x.repeat_interleave(self.num_heads // self.kv_heads, dim=1)

    def forward(
        self,
        x: Tensor,  # (B, T, W)
        memory: KeyValue,
        *,
        mask: Tensor | None = None,
        rotation: Rotation | None = None,
        trace: list[Tensor] | None = None,
    ) -> Tensor:
        """Returns (B, T, W); a `trace` takes the explicit path and is given the weights (B, H, T, S)."""
        q, k, v = rotate(self.heads(self.query(x)), rotation), self.shared(memory.key), self.shared(memory.value)
        if trace is None and not (self.training and self.dropout.threshold):
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            mixed, weights = scaled_dot_product_attention(q, k, v, mask, self.dropout)
            if trace is not None:
                trace.append(weights)
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Position-wise network: ReLU (Vaswani et al. 2017), GELU (Hendrycks and Gimpel 2016) or SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up = nn.Linear(config.width, config.feed_forward, bias=config.has_bias)
        self.gate = (
            nn.Linear(config.width, config.feed_forward, bias=config.has_bias) if self.activation == "swiglu" else None
        )
        self.down = nn.Linear(config.feed_forward, config.width, bias=config.has_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        if self.activation == "relu":
            return self.down(F.relu(self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.activation == "gelu-tanh" else "none"))


class Block(nn.Module):
    """Self-attention, cross-attention if any, feed-forward: residual branches, normed before (pre) or after (post)."""

    def __init__(self, config: ModelConfig, *, has_cross: bool = False) -> None:
        super().__init__()
        self.is_pre = config.norm_order == "pre"
        self.attention, self.attention_norm = Attention(config), make_norm(config)
        self.cross = Attention(config) if has_cross else None
        self.cross_norm = make_norm(config) if has_cross else None
        self.feed_forward, self.feed_forward_norm = FeedForward(config), make_norm(config)
        self.dropout = Dropout(config.dropout)

    def before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.is_pre else x

    def after(self, norm: nn.Module, x: Tensor, branch: Tensor) -> Tensor:
        x = x + self.dropout(branch)
        return x if self.is_pre else norm(x)

    def forward(
        self,
        x: Tensor,  # (B, T, W)
        *,
        mask: Tensor | None = None,
        memory: Tensor | None = None,  # (B, S, W), the encoder's output
        memory_mask: Tensor | None = None,
        rotation: Rotation | None = None,
        past: LayerCache | None = None,
        trace: list[Tensor] | None = None,
        cross_trace: list[Tensor] | None = None,
    ) -> tuple[Tensor, LayerCache]:
        h = self.before(self.attention_norm, x)
        own, cross = self.attention.project(h, rotation), None
        own = past.own.append(own) if past is not None else own
        x = self.after(self.attention_norm, x, self.attention(h, own, mask=mask, rotation=rotation, trace=trace))
        if self.cross is not None and self.cross_norm is not None:
            h = self.before(self.cross_norm, x)
            cross = self.remembered(memory, past)
            x = self.after(self.cross_norm, x, self.cross(h, cross, mask=memory_mask, trace=cross_trace))
        h = self.before(self.feed_forward_norm, x)
        return self.after(self.feed_forward_norm, x, self.feed_forward(h)), LayerCache(own, cross)

    def remembered(self, memory: Tensor | None, past: LayerCache | None) -> KeyValue:
        """Keys and values of the memory: from the cache, or projected on the first step."""
        if past is not None and past.cross is not None:
            return past.cross
        assert self.cross is not None
        assert memory is not None
        return self.cross.project(memory)


class Embedding(nn.Module):
    """Tokens plus absolute positions plus segment types; normed and dropped out."""

    sinusoid: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(config.width) if config.scale_embeddings else 1.0
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Embedding(config.max_length, config.width) if config.positions == "learned" else None
        self.segment = nn.Embedding(config.num_types, config.width) if config.num_types else None
        self.is_sinusoidal = config.positions == "sinusoidal"
        if self.is_sinusoidal:
            self.register_buffer("sinusoid", sinusoids(config.max_length, config.width), persistent=False)
        self.norm = make_norm(config) if config.has_embedding_norm else None
        self.dropout = Dropout(config.dropout)

    def forward(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> Tensor:
        """ids and types (B, T), positions (B or 1, T) -> (B, T, W)."""
        x = self.token(ids) * self.scale if self.scale != 1.0 else self.token(ids)
        if self.position is not None:
            x = x + self.position(positions)
        if self.is_sinusoidal:
            x = x + self.sinusoid[positions]
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(ids) if types is None else types)
        return self.dropout(x if self.norm is None else self.norm(x))


class Stack(nn.Module):
    """Embedding, blocks, and the final norm that pre-norm needs: what Encoder and Decoder have in common."""

    def __init__(self, config: ModelConfig, num_layers: int, *, has_cross: bool = False) -> None:
        super().__init__()
        self.embedding = Embedding(config)
        self.rotary = Rotary(config.head_width, config.rope_theta) if config.positions == "rotary" else None
        self.blocks = nn.ModuleList(Block(config, has_cross=has_cross) for _ in range(num_layers))
        self.norm = make_norm(config) if config.norm_order == "pre" else None

    def embed(self, ids: Tensor, positions: Tensor, types: Tensor | None = None) -> tuple[Tensor, Rotation | None]:
        return self.embedding(ids, positions, types), None if self.rotary is None else self.rotary(positions)

    def finish(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)


class Encoder(nn.Module):
    """Every position sees every real position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stack = Stack(config, config.num_layers)
        self.relative = RelativeBias(config.relative_buckets, config.num_heads) if config.relative_buckets else None

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None, trace: list[Tensor] | None = None
    ) -> Tensor:
        """ids, mask (non-zero: real; None: all real) and types (B, T) -> (B, T, W); `trace` gets one entry a block."""
        x, rotation = self.stack.embed(ids, torch.arange(ids.size(1), device=ids.device)[None], types)
        visible = None if mask is None else padding_mask(mask)
        if self.relative is not None:
            bias = self.relative(ids.size(1))
            visible = bias if visible is None else bias.masked_fill(~visible, -math.inf)
        for block in self.stack.blocks:
            x, _ = block(x, mask=visible, rotation=rotation, trace=trace)
        return self.stack.finish(x)


class Decoder(nn.Module):
    """Every position sees itself, what came before, and the encoder's memory if there is one."""

    def __init__(self, config: ModelConfig, *, has_cross: bool = False) -> None:
        super().__init__()
        self.stack = Stack(config, config.num_decoder_layers or config.num_layers, has_cross=has_cross)

    def forward(
        self,
        ids: Tensor,  # (B, T), the tokens after those in `past`
        *,
        mask: Tensor | None = None,  # (B, S), non-zero for real tokens, past ones included
        positions: Tensor | None = None,  # (B or 1, T); None: count on from `past`
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,  # (B, memory length)
        past: Cache | None = None,
        trace: list[Tensor] | None = None,
        cross_trace: list[Tensor] | None = None,
    ) -> tuple[Tensor, Cache]:
        """Returns hidden states (B, T, W) and the cache with which the next tokens can be asked alone."""
        num_past = 0 if past is None else past[0].own.key.size(2)
        num_keys = num_past + ids.size(1)
        if positions is None:
            positions = torch.arange(num_past, num_keys, device=ids.device)[None]
        x, rotation = self.stack.embed(ids, positions)
        visible = both(causal_mask(ids.size(1), num_keys, ids.device), None if mask is None else padding_mask(mask))
        memory_visible = None if memory_mask is None else padding_mask(memory_mask)
        cache: Cache = []
        for layer, block in enumerate(self.stack.blocks):
            x, kept = block(
                x,
                mask=visible,
                memory=memory,
                memory_mask=memory_visible,
                rotation=rotation,
                past=None if past is None else past[layer],
                trace=trace,
                cross_trace=cross_trace,
            )
            cache.append(kept)
        return self.stack.finish(x), cache


class Classifier(nn.Module):
    """Encoder or decoder, one position (or the mean) to speak for all, BERT's tanh pooler, a linear layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pooling = config.pooling
        self.body: Encoder | Decoder = Encoder(config) if config.kind == "encoder" else Decoder(config)
        self.pooler = nn.Linear(config.width, config.width) if config.has_pooler else None
        self.dropout = Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.num_labels)

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None, trace: list[Tensor] | None = None
    ) -> Tensor:
        """ids, mask and types (B, T) -> logits (B, labels)."""
        if isinstance(self.body, Encoder):
            x = self.body(ids, mask, types, trace)
        else:
            x, _ = self.body(ids, mask=mask, trace=trace)
        return self.head(self.dropout(self.pool(x, mask)))

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, T, W) -> (B, W)."""
        pooled = x[:, 0] if self.pooling == "first" else pool_real(x, mask, is_last=self.pooling == "last")
        return pooled if self.pooler is None else torch.tanh(self.pooler(pooled))


def pool_real(x: Tensor, mask: Tensor | None, *, is_last: bool) -> Tensor:
    """The last real position, or the mean of the real ones, of right-padded (B, T, W)."""
    if mask is None:
        return x[:, -1] if is_last else x.mean(dim=1)
    counts = mask.bool().sum(dim=1, keepdim=True)  # (B, 1)
    if is_last:
        return x.take_along_dim(counts[..., None] - 1, dim=1).squeeze(1)
    return (x * mask.bool()[..., None]).sum(dim=1) / counts


class LanguageModel(nn.Module):
    """Decoder and a head over the vocabulary, which shares the token embedding if tied (Press and Wolf 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.decoder.stack.embedding.token.weight

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        past: Cache | None = None,
        trace: list[Tensor] | None = None,
    ) -> tuple[Tensor, Cache]:
        """ids (B, T) -> logits (B, T, V) and the cache; see Decoder."""
        x, cache = self.decoder(ids, mask=mask, positions=positions, past=past, trace=trace)
        return self.head(x), cache


class EncoderDecoder(nn.Module):
    """The original transformer; tied, both embeddings and the head are one matrix (Vaswani et al. 2017, 3.4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, has_cross=True)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.decoder.stack.embedding.token.weight = self.encoder.stack.embedding.token.weight
            self.head.weight = self.encoder.stack.embedding.token.weight

    def encode(self, source: Tensor, source_mask: Tensor | None = None, trace: list[Tensor] | None = None) -> Tensor:
        return self.encoder(source, source_mask, trace=trace)

    def decode(
        self,
        ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        past: Cache | None = None,
        trace: list[Tensor] | None = None,
        cross_trace: list[Tensor] | None = None,
    ) -> tuple[Tensor, Cache]:
        """ids (B, T) -> logits (B, T, V) and the cache; with `past` the memory's keys and values come from there."""
        x, cache = self.decoder(
            ids, mask=mask, memory=memory, memory_mask=memory_mask, past=past, trace=trace, cross_trace=cross_trace
        )
        return self.head(x), cache

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Tensor | None = None, target_mask: Tensor | None = None
    ) -> Tensor:
        """Teacher forcing: source (B, S), target (B, T) -> logits (B, T, V)."""
        return self.decode(target, self.encode(source, source_mask), source_mask, mask=target_mask)[0]


@torch.no_grad()
def generate(
    model: LanguageModel | EncoderDecoder,
    ids: Tensor,  # (B, T), prompts of one length; for an encoder-decoder the start token
    *,
    max_new: int,
    end_id: int | None = None,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Greedy, one token a step; rows that reached `end_id` repeat it. Returns (B, T + new). The engine's reference."""
    memory = model.encode(source, source_mask) if isinstance(model, EncoderDecoder) and source is not None else None
    past: Cache | None = None
    is_done = torch.zeros(ids.size(0), dtype=torch.bool, device=ids.device)
    for _ in range(max_new):
        step = ids if past is None else ids[:, -1:]
        if isinstance(model, EncoderDecoder):
            assert memory is not None, "an encoder-decoder needs a source"
            logits, cache = model.decode(step, memory, source_mask, past=past)
        else:
            logits, cache = model(step, past=past)
        new = logits[:, -1].argmax(dim=-1)
        new = new.masked_fill(is_done, end_id) if end_id is not None else new
        ids = torch.cat((ids, new[:, None]), dim=1)
        is_done = is_done | (new == end_id) if end_id is not None else is_done
        past = cache if use_cache else None
        if is_done.all():
            break
    return ids
