"""GGUF files of the Llama family, read without torch: sizes, weights in float32, vocabulary, chat template.

Owns GGUF's names, row order and metadata; `gguf` itself undoes every quantisation that it knows. Two things differ from
what the models were published as: names, and the rows of query and key matrices, whose rotary pairs are (2i, 2i + 1)
there and (i, i + D/2) here.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, dequantize

from service.worker.weights.checkpoint import FAMILY, Checkpoint, Floats, Text, check_shapes, check_variant, rename
from service.worker.weights.gguf_tokenizer import tokenizer_json

MAGIC = b"GGUF"
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


def as_written(stored: float) -> float:
    """The number that was meant by a stored float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(stored)))


def sizes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of the architecture, without its prefix."""
    prefix = f"{metadata['general.architecture']}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def architecture(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Sizes under our names; `shapes` have GGUF's names. Raises ValueError for a variant that we would not compute."""
    check_variant(metadata, {"general.architecture": ("llama",)})  # others' sizes may be lists
    values = sizes(metadata)
    num_heads, width = values["attention.head_count"], values["embedding_length"]
    check_variant(
        {**metadata, **values, ROPE_FACTORS: ROPE_FACTORS in shapes},
        {
            "rope.scaling.type": ("none", None),
            "rope.dimension_count": (width // num_heads, None),
            "attention.key_length": (width // num_heads, None),
            ROPE_FACTORS: (False,),
        },
    )
    return {
        **FAMILY,
        "vocab_size": shapes["token_embd.weight"][0],
        "width": width,
        "num_heads": num_heads,
        "num_kv_heads": values.get("attention.head_count_kv"),
        "num_layers": values["block_count"],
        "feed_forward": values["feed_forward_length"],
        "max_length": values["context_length"],
        "norm_eps": as_written(values["attention.layer_norm_rms_epsilon"]),
        "rope_theta": as_written(values.get("rope.freq_base", 10_000.0)),
        "tie_embeddings": "output.weight" not in shapes,
        "pad_id": metadata.get("tokenizer.ggml.padding_token_id", 0),
    }


def unpermute(rows: Floats, num_heads: int) -> Floats:
    """Rows (H * D, W) whose rotary pairs are neighbours -> the same rows with the two of a pair D/2 apart."""
    return rows.reshape(num_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def weight(tensor: ReaderTensor, values: Mapping[str, Any]) -> Floats:
    """One tensor in float32, its rows in our order."""
    stored = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if tensor.name.endswith("attn_q.weight"):
        return unpermute(stored, values["num_heads"])
    if tensor.name.endswith("attn_k.weight"):
        return unpermute(stored, values["num_kv_heads"] or values["num_heads"])
    return stored


def text_of(metadata: Mapping[str, Any]) -> Text:
    ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return Text(
        tokenizer=tokenizer_json(metadata),
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        end_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def read_gguf(path: Path) -> Checkpoint:
    """Maps the file; its weights are read when asked for. Raises ValueError for what is no whole file of the family."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a GGUF file")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or cut off: {error}") from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    values = architecture(metadata, shapes)
    tensors = {rename(tensor.name, NAMES): tensor for tensor in reader.tensors}
    checkpoint = Checkpoint(
        architecture=values,
        shapes={name: shapes[tensor.name] for name, tensor in tensors.items()},
        read=lambda name: weight(tensors[name], values),
        text=text_of(metadata),
        licence=metadata.get("general.license"),
    )
    check_shapes(checkpoint)
    return checkpoint
