"""A GGUF file's vocabulary -> tokenizer.json, the same bytes everywhere. Owns the layout of GGUF's metadata for it."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class Splitting(NamedTuple):
    """How a family cuts text into words before its merges apply."""

    steps: tuple[Mapping[str, Any], ...]
    ignore_merges: bool = False  # a word that is a token stays whole
    adds_bos: bool = False  # unless the file says otherwise


def splitting(name: str) -> Splitting:
    """The splitting that GGUF calls `tokenizer.ggml.pre`. Raises ValueError for one that is not known."""
    match name:
        case "gpt-2":
            return Splitting((BYTES,))
        case "smollm":
            return Splitting(({"type": "Digits", "individual_digits": True}, BYTES))
        case "llama-bpe":
            words = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
            return Splitting((words, BYTES | {"use_regex": False}), ignore_merges=True, adds_bos=True)
    raise ValueError(f"pre-tokenizer {name!r} is not supported, only gpt-2, smollm and llama-bpe")


def added_tokens(tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    """Tokens whose text is found before any splitting: control tokens (special) and user-defined ones (plain text)."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": text, **plain, "special": kind == CONTROL}
        for index, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]


def beginning(token: str, token_id: int) -> dict[str, Any]:
    """Puts the begin-of-sequence token before every text."""
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def tokenizer_json(metadata: Mapping[str, Any]) -> str:
    """The byte-level BPE tokenizer. Raises ValueError for another kind or an unknown pre-tokenizer."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"tokenizer model {kind!r} is not supported, only 'gpt2' (byte-level BPE)")
    tokens = metadata["tokenizer.ggml.tokens"]
    split = splitting(metadata.get("tokenizer.ggml.pre", "gpt-2"))
    bos = metadata["tokenizer.ggml.bos_token_id"]
    adds_bos = metadata.get("tokenizer.ggml.add_bos_token", split.adds_bos)
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(tokens, metadata["tokenizer.ggml.token_type"]),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split.steps},
        "post_processor": beginning(tokens[bos], bos) if adds_bos else None,
        "decoder": BYTES | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split.ignore_merges,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))
