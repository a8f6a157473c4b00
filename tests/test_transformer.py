"""Each piece of model.transformer against torch.nn, F.scaled_dot_product_attention or transformers, with copied
weights.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from model.config import ModelConfig
from model.transformer import (
    Attention,
    Block,
    Classifier,
    Decoder,
    Dropout,
    Encoder,
    EncoderDecoder,
    LanguageModel,
    RMSNorm,
    causal_mask,
    generate,
    padding_mask,
    scaled_dot_product_attention,
    sinusoids,
)

TINY = ModelConfig(
    kind="encoder", vocab_size=50, width=32, num_heads=4, num_layers=2, feed_forward=64, max_length=24, norm_eps=1e-5
)
LLAMA = replace(
    TINY,
    kind="decoder",
    num_kv_heads=2,
    norm="rms",
    norm_order="pre",
    positions="rotary",
    activation="swiglu",
    has_bias=False,
    has_embedding_norm=False,
)
GPT2 = replace(TINY, kind="decoder", norm_order="pre", activation="gelu-tanh", has_embedding_norm=False)
ORIGINAL = replace(
    TINY,
    kind="encoder-decoder",
    positions="sinusoidal",
    activation="relu",
    has_embedding_norm=False,
    scale_embeddings=True,
)
STYLES = {"bert": TINY, "llama": LLAMA, "gpt2": GPT2, "original": ORIGINAL}
DECODERS = {"llama": LLAMA, "gpt2": GPT2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random_ids(batch: int, length: int, vocab_size: int = TINY.vocab_size) -> Tensor:
    return torch.randint(1, vocab_size, (batch, length))


def assert_close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)


def copy_attention(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    query, key, value = theirs.in_proj_weight.chunk(3)
    query_bias, key_bias, value_bias = theirs.in_proj_bias.chunk(3)
    for layer, weight, bias in (
        (ours.query, query, query_bias),
        (ours.key, key, key_bias),
        (ours.value, value, value_bias),
        (ours.output, theirs.out_proj.weight, theirs.out_proj.bias),
    ):
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})


def copy_block(ours: Block, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    copy_attention(ours.attention, theirs.self_attn)
    ours.attention_norm.load_state_dict(theirs.norm1.state_dict())
    last = theirs.norm2
    if isinstance(theirs, nn.TransformerDecoderLayer):
        assert ours.cross is not None
        assert ours.cross_norm is not None
        copy_attention(ours.cross, theirs.multihead_attn)
        ours.cross_norm.load_state_dict(theirs.norm2.state_dict())
        last = theirs.norm3
    ours.feed_forward.up.load_state_dict(theirs.linear1.state_dict())
    ours.feed_forward.down.load_state_dict(theirs.linear2.state_dict())
    ours.feed_forward_norm.load_state_dict(last.state_dict())


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_mask", [False, True])
def test_written_out_attention_is_torch_attention(has_mask: bool) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
    mask = causal_mask(5, 7) if has_mask else None
    ours, weights = scaled_dot_product_attention(q, k, v, mask, Dropout(0.0))
    assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert_close(weights.sum(-1), torch.ones(2, 4, 5))


def test_additive_mask_is_torch_additive_mask() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8) for _ in range(3))
    bias = torch.randn(1, 4, 5, 5)
    ours, _ = scaled_dot_product_attention(q, k, v, bias, Dropout(0.0))
    assert_close(ours, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


@pytest.mark.parametrize("is_cross", [False, True])
def test_attention_is_multihead_attention(is_cross: bool) -> None:
    theirs = nn.MultiheadAttention(TINY.width, TINY.num_heads, batch_first=True).eval()
    ours = Attention(TINY).eval()
    copy_attention(ours, theirs)
    x = torch.randn(3, 6, TINY.width)
    memory = torch.randn(3, 9, TINY.width) if is_cross else x
    real = torch.ones(3, memory.size(1))
    real[1, 4:] = 0
    expected, weights = theirs(
        x, memory, memory, key_padding_mask=~real.bool(), need_weights=True, average_attn_weights=False
    )
    trace: list[Tensor] = []
    assert_close(ours(x, ours.project(memory), mask=padding_mask(real)), expected)
    assert_close(ours(x, ours.project(memory), mask=padding_mask(real), trace=trace), expected)
    assert_close(trace[0], weights)


def test_grouped_heads_are_repeated_heads() -> None:
    grouped = Attention(replace(TINY, num_kv_heads=2)).eval()
    full = Attention(TINY).eval()
    state = grouped.state_dict()
    for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
        heads = state[name].unflatten(0, (2, TINY.head_width))
        state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 5, TINY.width)
    assert_close(grouped(x, grouped.project(x)), full(x, full.project(x)))


def test_causal_mask_lets_queries_be_the_last_of_the_keys() -> None:
    assert causal_mask(2, 4).tolist() == [[True, True, True, False], [True, True, True, True]]


# --- positions, norms, dropout -----------------------------------------------------------------------------------


def test_sinusoids_are_the_formula() -> None:
    table = sinusoids(10, 6)
    for position, column in ((0, 0), (3, 2), (9, 4)):
        angle = position / 10_000 ** (column / 6)
        assert table[position, column].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[position, column + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_rms_norm_is_torch_rms_norm() -> None:
    ours, theirs = RMSNorm(16, 1e-5), nn.RMSNorm(16, eps=1e-5)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(16))
        theirs.weight.copy_(ours.weight)
    x = torch.randn(4, 16)
    assert_close(ours(x), theirs(x))


def test_dropout_drops_the_rate_and_keeps_the_mean() -> None:
    dropout = Dropout(0.1).train()
    x = torch.ones(1000, 333)
    y = dropout(x)
    assert (y == 0).float().mean().item() == pytest.approx(0.1, abs=3e-3)
    assert y.mean().item() == pytest.approx(1.0, abs=3e-3)
    assert torch.equal(dropout.eval()(x), x)


def test_dropout_follows_the_seed() -> None:
    dropout = Dropout(0.5).train()
    torch.manual_seed(3)
    first = dropout(torch.ones(40))
    torch.manual_seed(3)
    assert torch.equal(first, dropout(torch.ones(40)))


# --- encoder and decoder against torch.nn -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_blocks_are_torch_encoder_layers(order: str, activation: str) -> None:
    config = replace(TINY, norm_order=order, activation=activation, positions="sinusoidal", has_embedding_norm=False)
    layer = nn.TransformerEncoderLayer(
        TINY.width, TINY.num_heads, 64, 0.0, activation, batch_first=True, norm_first=order == "pre"
    )
    theirs = nn.TransformerEncoder(
        layer, 2, norm=nn.LayerNorm(TINY.width) if order == "pre" else None, enable_nested_tensor=False
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Encoder(config).eval()
    for block, other in zip(ours.stack.blocks, theirs.layers, strict=True):
        copy_block(block, other)
    if ours.stack.norm is not None:
        ours.stack.norm.load_state_dict(theirs.norm.state_dict())
    ids, real = random_ids(3, 7), torch.ones(3, 7)
    real[2, 4:] = 0
    x, _ = ours.stack.embed(ids, torch.arange(7)[None])
    expected = theirs(x, src_key_padding_mask=~real.bool())
    assert_close(ours(ids, real)[real.bool()], expected[real.bool()], atol=1e-4)


@pytest.mark.parametrize("order", ["pre", "post"])
def test_decoder_is_torch_decoder(order: str) -> None:
    config = replace(ORIGINAL, norm_order=order)
    layer = nn.TransformerDecoderLayer(
        TINY.width, TINY.num_heads, 64, 0.0, "relu", batch_first=True, norm_first=order == "pre"
    )
    theirs = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(TINY.width) if order == "pre" else None).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Decoder(config, has_cross=True).eval()
    for block, other in zip(ours.stack.blocks, theirs.layers, strict=True):
        copy_block(block, other)
    if ours.stack.norm is not None:
        ours.stack.norm.load_state_dict(theirs.norm.state_dict())
    ids, memory, real = random_ids(2, 6), torch.randn(2, 9, TINY.width), torch.ones(2, 9)
    real[0, 5:] = 0
    x, _ = ours.stack.embed(ids, torch.arange(6)[None])
    expected = theirs(x, memory, tgt_mask=~causal_mask(6, 6), memory_key_padding_mask=~real.bool())
    hidden, _ = ours(ids, memory=memory, memory_mask=real)
    assert_close(hidden, expected, atol=1e-4)


# --- language models against transformers ------------------------------------------------------------------------

LLAMA_NAMES = (
    ("model.embed_tokens.", "decoder.stack.embedding.token."),
    ("model.layers.", "decoder.stack.blocks."),
    ("model.norm.", "decoder.stack.norm."),
    ("lm_head.", "head."),
    ("self_attn.q_proj", "attention.query"),
    ("self_attn.k_proj", "attention.key"),
    ("self_attn.v_proj", "attention.value"),
    ("self_attn.o_proj", "attention.output"),
    ("mlp.gate_proj", "feed_forward.gate"),
    ("mlp.up_proj", "feed_forward.up"),
    ("mlp.down_proj", "feed_forward.down"),
    ("post_attention_layernorm", "feed_forward_norm"),
    ("input_layernorm", "attention_norm"),
)


def renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in names:
        name = name.replace(theirs, ours)
    return name


def test_language_model_is_llama() -> None:
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            max_position_embeddings=24,
        )
    ).eval()
    ours = LanguageModel(LLAMA).eval()
    ours.load_state_dict({renamed(name, LLAMA_NAMES): value for name, value in theirs.state_dict().items()})
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert_close(ours(ids)[0], theirs(ids).logits)


def gpt2_state(theirs: GPT2LMHeadModel) -> dict[str, Tensor]:
    """GPT-2 keeps its matrices transposed, and query, key and value as one."""
    names = (
        ("transformer.wte.", "decoder.stack.embedding.token."),
        ("transformer.wpe.", "decoder.stack.embedding.position."),
        ("transformer.h.", "decoder.stack.blocks."),
        ("transformer.ln_f.", "decoder.stack.norm."),
        ("lm_head.", "head."),
        ("ln_1", "attention_norm"),
        ("ln_2", "feed_forward_norm"),
        ("attn.c_proj", "attention.output"),
        ("mlp.c_fc", "feed_forward.up"),
        ("mlp.c_proj", "feed_forward.down"),
    )
    state = {}
    for name, value in theirs.state_dict().items():
        turned = value.T if ".c_" in name and value.ndim == 2 else value
        if "c_attn" in name:
            for part, piece in zip(("query", "key", "value"), turned.chunk(3), strict=True):
                state[renamed(name, names).replace("attn.c_attn", f"attention.{part}")] = piece
        else:
            state[renamed(name, names)] = turned
    return state


def test_language_model_is_gpt2() -> None:
    config = GPT2Config(vocab_size=50, n_positions=24, n_embd=32, n_layer=2, n_head=4, n_inner=64)
    theirs = GPT2LMHeadModel(config).eval()
    ours = LanguageModel(GPT2).eval()
    ours.load_state_dict(gpt2_state(theirs))
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert_close(ours(ids)[0], theirs(ids).logits)


# --- what must hold for every style ------------------------------------------------------------------------------


@pytest.mark.parametrize("style", DECODERS)
def test_the_future_does_not_change_the_past(style: str) -> None:
    model = LanguageModel(DECODERS[style]).eval()
    ids = random_ids(2, 8)
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 7) % 50
    assert_close(model(ids)[0][:, :5], model(other)[0][:, :5], atol=1e-6)
    assert not torch.allclose(model(ids)[0][:, 5:], model(other)[0][:, 5:])


@pytest.mark.parametrize("style", STYLES)
def test_padding_does_not_change_the_encoder(style: str) -> None:
    model = Encoder(STYLES[style]).eval()
    ids = random_ids(1, 6)
    padded = torch.cat((ids, torch.zeros(1, 5, dtype=torch.long)), dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 5])
    assert_close(model(padded, mask)[:, :6], model(ids))


@pytest.mark.parametrize("style", DECODERS)
def test_cached_is_uncached(style: str) -> None:
    model = LanguageModel(DECODERS[style]).eval()
    ids = random_ids(2, 9)
    whole, _ = model(ids)
    logits, cache = model(ids[:, :4])
    pieces = [logits]
    for at in range(4, 9):
        logits, cache = model(ids[:, at : at + 1], past=cache)
        pieces.append(logits)
    assert_close(torch.cat(pieces, dim=1), whole)


def test_left_padded_rows_with_their_own_positions_are_unpadded_rows() -> None:
    model = LanguageModel(LLAMA).eval()
    ids = random_ids(1, 5)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 5])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # a padding row sees nothing at all and is not defined; only the real ones count
    assert_close(model(padded, mask=mask, positions=positions)[0][:, 3:], model(ids)[0])


def test_cached_decoding_with_memory_is_uncached() -> None:
    model = EncoderDecoder(ORIGINAL).eval()
    source, target, real = random_ids(2, 7), random_ids(2, 6), torch.ones(2, 7)
    real[1, 3:] = 0
    whole = model(source, target, real)
    memory = model.encode(source, real)
    logits, cache = model.decode(target[:, :2], memory, real)
    pieces = [logits]
    for at in range(2, 6):
        # the memory is not projected again: its keys and values are in the cache
        logits, cache = model.decode(target[:, at : at + 1], torch.full_like(memory, math.nan), real, past=cache)
        pieces.append(logits)
    assert_close(torch.cat(pieces, dim=1), whole)


@pytest.mark.parametrize("style", STYLES)
def test_explicit_attention_is_the_fast_path(style: str) -> None:
    model = Encoder(STYLES[style]).eval()
    ids, mask = random_ids(2, 7), torch.ones(2, 7)
    mask[0, 4:] = 0
    trace: list[Tensor] = []
    assert_close(model(ids, mask, trace=trace), model(ids, mask))
    assert [weights.shape for weights in trace] == [(2, 4, 7, 7)] * 2
    for weights in trace:
        assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert weights[0, :, :, 4:].abs().max() == 0


def test_cross_attention_can_be_traced() -> None:
    model = EncoderDecoder(ORIGINAL).eval()
    source, target = random_ids(2, 7), random_ids(2, 5)
    own: list[Tensor] = []
    cross: list[Tensor] = []
    logits, _ = model.decode(target, model.encode(source), trace=own, cross_trace=cross)
    assert_close(logits, model(source, target))
    assert [weights.shape for weights in cross] == [(2, 4, 5, 7)] * 2
    assert all(weights.triu(1).abs().max() == 0 for weights in own)


def test_relative_bias_falls_with_buckets_and_is_added_to_every_layer() -> None:
    plain = Encoder(TINY).eval()
    biased = Encoder(replace(TINY, relative_buckets=8)).eval()
    biased.load_state_dict(plain.state_dict(), strict=False)
    assert biased.relative is not None
    buckets = biased.relative.buckets(6)
    assert buckets[3].tolist() == [2, 2, 1, 0, 5, 6]
    ids = random_ids(2, 6)
    with torch.no_grad():
        biased.relative.bias.weight.zero_()
        assert_close(biased(ids), plain(ids))
        biased.relative.bias.weight.normal_()
    trace: list[Tensor] = []
    assert_close(biased(ids, torch.ones(2, 6), trace=trace), biased(ids))
    assert not torch.allclose(biased(ids), plain(ids))


# --- heads, tying, generation ------------------------------------------------------------------------------------


def test_tied_weights_are_one_tensor_and_untied_are_not() -> None:
    tied = EncoderDecoder(ORIGINAL)
    assert tied.head.weight is tied.encoder.stack.embedding.token.weight
    assert tied.head.weight is tied.decoder.stack.embedding.token.weight
    untied = LanguageModel(replace(GPT2, tie_embeddings=False))
    assert untied.head.weight is not untied.decoder.stack.embedding.token.weight


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
@pytest.mark.parametrize("style", ["bert", "llama"])
def test_classification_ignores_padding(style: str, pooling: str) -> None:
    model = Classifier(replace(STYLES[style], num_labels=3, pooling=pooling)).eval()
    ids = random_ids(1, 6)
    padded = torch.cat((ids, torch.zeros(1, 4, dtype=torch.long)), dim=1)
    logits = model(padded, torch.tensor([[1] * 6 + [0] * 4]))
    assert logits.shape == (1, 3)
    assert_close(logits, model(ids))


@pytest.mark.parametrize("style", DECODERS)
def test_generation_with_cache_is_generation_without(style: str) -> None:
    model = LanguageModel(DECODERS[style]).eval()
    ids = random_ids(2, 4)
    cached = generate(model, ids, max_new=8)
    assert cached.shape == (2, 12)
    assert torch.equal(cached, generate(model, ids, max_new=8, use_cache=False))
    assert torch.equal(cached[:, 4:5], model(ids)[0][:, -1:].argmax(-1))


def test_translation_with_cache_is_translation_without_and_stops() -> None:
    model = EncoderDecoder(ORIGINAL).eval()
    source, start = random_ids(2, 5), torch.ones(2, 1, dtype=torch.long)
    cached = generate(model, start, max_new=6, source=source)
    assert torch.equal(cached, generate(model, start, max_new=6, source=source, use_cache=False))
    end = int(cached[0, 1])
    stopped = generate(model, start, max_new=6, end_id=end, source=source)
    assert (stopped[0, 1:] == end).all()


@pytest.mark.parametrize("style", STYLES)
def test_config_survives_json(style: str) -> None:
    config = replace(STYLES[style], num_labels=2, labels=("no", "yes"))
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "width 32 is not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"num_labels": 2, "labels": ("one",)}, "1 labels named, num_labels is 2"),
        ({"kind": "foo"}, "kind is 'foo', known are 'encoder', 'decoder', 'encoder-decoder'"),
        ({"norm": "layre"}, "norm is 'layre', known are 'layer', 'rms'"),
        ({"norm_order": "Pre"}, "norm_order is 'Pre'"),
        ({"positions": "alibi"}, "positions is 'alibi'"),
        ({"activation": "silu"}, "activation is 'silu'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"num_heads": 0}, "num_heads is 0, at least 1 is needed"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0, it must be at least 0 and below 1"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
    ],
)
def test_config_refuses_what_cannot_be_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_config_refuses_unknown_keys() -> None:
    with pytest.raises(ValueError, match="unknown keys in model config: colour"):
        ModelConfig.from_json(TINY.to_json().replace('"kind"', '"colour": 1, "kind"'))
