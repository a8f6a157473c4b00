"""GGUF files of the Llama family into LanguageModel and tokenizer; owns GGUF's names, row order and vocabulary layout.

A GGUF file holds everything in one: sizes, quantised weights, vocabulary, chat template. Every quantisation that the
`gguf` package can undo is undone: the module has float32 weights, and what precision serves it is the export's choice.
Two things differ from safetensors files: names, and the rows of query and key matrices, whose rotary pairs are
(2i, 2i + 1) there and (i, i + D/2) here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from model.config import ModelConfig
from model.importers.weights import check_variant, load_strictly, rename, tie_head
from model.transformer import LanguageModel

HEAD, TOKEN = "head.weight", "decoder.stack.embedding.token.weight"
ROPE_FACTORS = "rope_freqs.weight"  # present when rotary positions are scaled (Llama 3.1 and later)
NAMES = (
    (r"token_embd\.", "decoder.stack.embedding.token."),
    (r"blk\.(\d+)\.attn_norm\.", r"decoder.stack.blocks.\1.attention_norm."),
    (r"blk\.(\d+)\.attn_q\.", r"decoder.stack.blocks.\1.attention.query."),
    (r"blk\.(\d+)\.attn_k\.", r"decoder.stack.blocks.\1.attention.key."),
    (r"blk\.(\d+)\.attn_v\.", r"decoder.stack.blocks.\1.attention.value."),
    (r"blk\.(\d+)\.attn_output\.", r"decoder.stack.blocks.\1.attention.output."),
    (r"blk\.(\d+)\.ffn_norm\.", r"decoder.stack.blocks.\1.feed_forward_norm."),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.", r"decoder.stack.blocks.\1.feed_forward.\2."),
    (r"output_norm\.", "decoder.stack.norm."),
    (r"output\.", "head."),
)
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
ADDED = (CONTROL, USER_DEFINED)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def as_written(stored: float) -> float:
    """The number that was meant by a stored float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(stored)))


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    return {key: field.contents() for key, field in reader.fields.items()}


def sizes(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of the architecture, without its prefix."""
    prefix = f"{metadata['general.architecture']}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def gguf_config(metadata: dict[str, Any], tensors: dict[str, ReaderTensor]) -> ModelConfig:
    """Raises ValueError for an architecture or variant that our modules would not compute."""
    values = sizes(metadata)
    num_heads, width = values["attention.head_count"], values["embedding_length"]
    found = {**metadata, **values, ROPE_FACTORS: ROPE_FACTORS in tensors}
    check_variant(
        found,
        {
            "general.architecture": ("llama",),
            "rope.scaling.type": ("none", None),
            "rope.dimension_count": (width // num_heads, None),
            "attention.key_length": (width // num_heads, None),
            ROPE_FACTORS: (False,),
        },
    )
    return ModelConfig(
        kind="decoder",
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        width=width,
        num_heads=num_heads,
        num_kv_heads=values.get("attention.head_count_kv"),
        num_layers=values["block_count"],
        feed_forward=values["feed_forward_length"],
        max_length=values["context_length"],
        norm="rms",
        norm_order="pre",
        norm_eps=as_written(values["attention.layer_norm_rms_epsilon"]),
        positions="rotary",
        rope_theta=as_written(values.get("rope.freq_base", 10_000.0)),
        activation="swiglu",
        has_bias=False,
        has_embedding_norm=False,
        tie_embeddings="output.weight" not in tensors,
        pad_id=metadata.get("tokenizer.ggml.padding_token_id", 0),
    )


def unpermute(rows: Tensor, num_heads: int) -> Tensor:
    """Rows (H * D, W) whose rotary pairs are neighbours -> the same rows with the two of a pair D/2 apart."""
    return rows.view(num_heads, -1, 2, rows.size(1)).transpose(1, 2).reshape(rows.shape)


def gguf_weight(tensor: ReaderTensor, config: ModelConfig) -> Tensor:
    """One tensor in float32, its rows in our order."""
    value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    if tensor.name.endswith("attn_q.weight"):
        return unpermute(value, config.num_heads)
    return unpermute(value, config.kv_heads) if tensor.name.endswith("attn_k.weight") else value


def gguf_state(tensors: dict[str, ReaderTensor], config: ModelConfig) -> dict[str, Tensor]:
    """All tensors under our names, in float32."""
    state = {rename(name, NAMES): gguf_weight(tensor, config) for name, tensor in tensors.items()}
    if config.tie_embeddings:
        tie_head(state, head=HEAD, token=TOKEN)
    return state


class Splitting(NamedTuple):
    """How a family cuts text into words before its merges apply."""

    steps: tuple[pre_tokenizers.PreTokenizer, ...]
    ignore_merges: bool = False  # a word that is a token stays whole
    adds_bos: bool = False  # unless the file says otherwise


def splitting(name: str) -> Splitting:
    """The splitting that GGUF calls `tokenizer.ggml.pre`; raises ValueError for one that is not known."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    match name:
        case "gpt-2":
            return Splitting((gpt2,))
        case "smollm":
            return Splitting((pre_tokenizers.Digits(individual_digits=True), gpt2))
        case "llama-bpe":
            words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
            letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            return Splitting((words, letters), ignore_merges=True, adds_bos=True)
    raise ValueError(f"pre-tokenizer {name!r} is not supported, only gpt-2, smollm and llama-bpe")


def added_tokens(metadata: dict[str, Any]) -> list[AddedToken]:
    """Tokens whose text is found before any splitting: control tokens (special) and user-defined ones (plain text)."""
    pairs = zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    return [AddedToken(text, special=kind == CONTROL, normalized=False) for text, kind in pairs if kind in ADDED]


def beginning(token: str, token_id: int) -> processors.TemplateProcessing:
    """Puts the begin-of-sequence token before every text."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, token_id)]
    )


def gguf_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer in the metadata; raises ValueError for another kind or an unknown pre-tokenizer."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer model {kind!r} is not supported, only 'gpt2' (byte-level BPE)")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    split = splitting(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]],
            ignore_merges=split.ignore_merges,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(split.steps))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added_tokens(metadata))
    if metadata.get("tokenizer.ggml.add_bos_token", split.adds_bos):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = beginning(tokens[bos], bos)
    return tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """What a GGUF file holds. `end_ids` end a text; `chat_template` is Jinja source, to be run in a sandbox only."""

    config: ModelConfig
    model: LanguageModel
    tokenizer: Tokenizer
    chat_template: str | None
    bos_id: int | None
    end_ids: tuple[int, ...]
    licence: str | None


def load_gguf(path: Path) -> Checkpoint:
    """Reads one file; raises ValueError on an unsupported variant and on missing, unexpected or misshapen weights."""
    reader = GGUFReader(path)
    metadata, tensors = read_metadata(reader), {tensor.name: tensor for tensor in reader.tensors}
    config = gguf_config(metadata, tensors)
    model = LanguageModel(config)
    load_strictly(model, gguf_state(tensors, config), path)
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return Checkpoint(
        config=config,
        model=model,
        tokenizer=gguf_tokenizer(metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        end_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        licence=metadata.get("general.license"),
    )
