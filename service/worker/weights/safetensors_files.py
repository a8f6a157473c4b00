"""Llama-family checkpoints as transformers saves them, read without torch: config.json, safetensors, tokenizer.json.

Owns the table of names and the safetensors layout (a length, a JSON header, raw little-endian arrays).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.worker.weights.checkpoint import FAMILY, Checkpoint, Floats, Text, check_shapes, check_variant, rename

INDEX = "model.safetensors.index.json"
UNUSED = re.compile(r".*rotary_emb\.inv_freq$|__metadata__$")  # old checkpoints store what the config already says
NAMES = (
    (r"model\.embed_tokens\.", "decoder.stack.embedding.token."),
    (r"model\.layers\.(\d+)\.input_layernorm\.", r"decoder.stack.blocks.\1.attention_norm."),
    (r"model\.layers\.(\d+)\.self_attn\.q_proj\.", r"decoder.stack.blocks.\1.attention.query."),
    (r"model\.layers\.(\d+)\.self_attn\.k_proj\.", r"decoder.stack.blocks.\1.attention.key."),
    (r"model\.layers\.(\d+)\.self_attn\.v_proj\.", r"decoder.stack.blocks.\1.attention.value."),
    (r"model\.layers\.(\d+)\.self_attn\.o_proj\.", r"decoder.stack.blocks.\1.attention.output."),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.", r"decoder.stack.blocks.\1.feed_forward_norm."),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.", r"decoder.stack.blocks.\1.feed_forward.\2."),
    (r"model\.norm\.", "decoder.stack.norm."),
    (r"lm_head\.", "head."),
)
DTYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def rope_theta(values: Mapping[str, Any]) -> float:
    """The base of the rotary angles, from either generation of config.json. Raises ValueError for scaled positions."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rotary positions of type {kind!r} are not supported, only 'default'")
    return float(rope.get("rope_theta", values.get("rope_theta", 10_000.0)))


def architecture(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json under our names. Raises ValueError for a variant that we would not compute."""
    check_variant(
        values,
        {
            "model_type": ("llama", "mistral"),
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "sliding_window": (None,),
            "head_dim": (values["hidden_size"] // values["num_attention_heads"], None),
        },
    )
    return {
        **FAMILY,
        "vocab_size": values["vocab_size"],
        "width": values["hidden_size"],
        "num_heads": values["num_attention_heads"],
        "num_kv_heads": values.get("num_key_value_heads"),
        "num_layers": values["num_hidden_layers"],
        "feed_forward": values["intermediate_size"],
        "max_length": values["max_position_embeddings"],
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": rope_theta(values),
        "tie_embeddings": values.get("tie_word_embeddings", False),
        "pad_id": values.get("pad_token_id") or 0,
    }


class Stored(NamedTuple):
    """Where a tensor stands."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def header(path: Path) -> dict[str, Stored]:
    """Every tensor of one file. Raises ValueError if the file is not what its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"{path.name} is damaged or cut off: it has {size} bytes, its header alone {length}")
        values = json.loads(file.read(length))
    found = {}
    for name, one in values.items():
        if UNUSED.match(name):
            continue
        if one["dtype"] not in DTYPES:
            raise ValueError(f"{name} is {one['dtype']}, only {', '.join(DTYPES)} are read")
        first, end = one["data_offsets"]
        if first < 0 or 8 + length + end > size:
            raise ValueError(
                f"{path.name} is damaged or cut off: it has {size} bytes, {name} ends at {8 + length + end}"
            )
        num_bytes = math.prod(one["shape"]) * DTYPES[one["dtype"]].itemsize
        if end - first != num_bytes:
            raise ValueError(f"{path.name} is damaged: {name} has {end - first} bytes, its shape takes {num_bytes}")
        found[name] = Stored(path, one["dtype"], tuple(one["shape"]), 8 + length + first, num_bytes)
    return found


def read(stored: Stored) -> Floats:
    with stored.path.open("rb") as file:
        file.seek(stored.offset)
        content = file.read(stored.length)
    values: NDArray[Any] = np.frombuffer(content, DTYPES[stored.dtype]).reshape(stored.shape)
    if stored.dtype == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(values, np.float32)


def files_of(directory: Path) -> list[Path]:
    """model.safetensors, or the files that its index lists."""
    index = directory / INDEX
    if not index.exists():
        return [directory / "model.safetensors"]
    return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def optional(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return values


def text_of(directory: Path, config: Mapping[str, Any]) -> Text:
    generation = optional(directory / "generation_config.json")
    template = optional(directory / "tokenizer_config.json").get("chat_template")
    file = directory / "chat_template.jinja"
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    return Text(
        tokenizer=(directory / "tokenizer.json").read_text(encoding="utf-8"),
        bos_id=config.get("bos_token_id"),
        end_ids=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
        chat_template=file.read_text(encoding="utf-8")
        if file.exists()
        else template
        if isinstance(template, str)
        else None,
    )


def read_safetensors(directory: Path) -> Checkpoint:
    """The weights are read when asked for. Raises ValueError for what is missing, damaged or of another family."""
    for name in ("config.json", "tokenizer.json"):
        if not (directory / name).is_file():
            raise ValueError(f"{name} is missing in {directory}")
    config = json.loads((directory / "config.json").read_text())
    foreign = {name: place for path in files_of(directory) for name, place in header(path).items()}
    places = {rename(name, NAMES): place for name, place in foreign.items()}
    checkpoint = Checkpoint(
        architecture=architecture(config),
        shapes={name: place.shape for name, place in places.items()},
        read=lambda name: read(places[name]),
        text=text_of(directory, config),
        licence=None,
    )
    check_shapes(checkpoint)
    return checkpoint
