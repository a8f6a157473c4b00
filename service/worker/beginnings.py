"""The beginning of a text that has tokens enough: what comes behind it cannot matter, and need not be read.

A text is cut only where the tokens before the place are sure to be the same whatever follows. That is known of two
kinds of tokenizers, BERT's and byte-level BPE, whose words end at certain characters and are tokenized one by one; of
any other a text stays whole.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.worker.byte_level import byte_alphabet

CHARACTERS_A_TOKEN = 16  # far more than texts have, so that the first beginning is mostly enough
GROWTH = 8  # times as long is the next, so that reading them all costs little beside reading the whole

# BERT's words end before each of these: white space, punctuation and ideographs, which are words themselves. No
# normalization changes one of them, or joins it to the character before it.
_BERT = re.compile(r"[ \t\n\r\u00a0\u2002-\u200a\u3000-\u3002!-/:;=?@\\^`{}~\u4e00-\u9fff]")
# GPT-2's words end before white space that follows something else.
_BYTE_LEVEL = re.compile(r"(?<=\S)[ \t\n\r]")


class Beginnings:
    """Of texts for one tokenizer. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """`path`: its tokenizer.json."""
        spec = json.loads(path.read_text(encoding="utf-8"))
        self._seam = seam_of(spec)
        self._longest, self._dropped = longest_of(spec), dropped_of(spec)

    def of(self, text: str, num_tokens: int, count: Callable[[str], int]) -> str:
        """A beginning of `text` with more than `num_tokens` tokens, which are the first of the whole, too.

        All of `text` where none is found. `count` tells the tokens of a text.
        """
        end = CHARACTERS_A_TOKEN * (num_tokens + 1)
        while self._seam is not None and (found := self._seam.search(text, end)) is not None:
            beginning = text[: found.start()]
            if count(beginning) > num_tokens:
                return beginning
            end = GROWTH * found.start()
        return text

    def showing_more(self, text: str, num_tokens: int, count: Callable[[str], int]) -> str:
        """What of `text` has more than `num_tokens` tokens, so that the whole has; all of it where nothing less does.

        Its tokens need not be the first of the whole.
        """
        part = text if self._longest is None else text[: self._longest * num_tokens + 1]
        if not self._dropped.isdisjoint(part):
            part = text
        part = self.of(part, num_tokens, count)
        return part if count(part) > num_tokens else text


def seam_of(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Characters before which a text may be cut; None where that is not known. `spec`: a tokenizer.json."""
    seam = _BERT if _is_bert(spec) else _BYTE_LEVEL if _is_byte_level(spec) else None
    added = spec.get("added_tokens") or []
    if seam is None or any(_is_fussy(token) or _can_be_cut(token["content"], seam) for token in added):
        return None
    return seam


def longest_of(spec: dict[str, Any]) -> int | None:
    """The most characters that a token stands for, so that a text has at least its own divided by that, but for those
    of `dropped_of`. None where it is not known, or where a token may stand for any number."""
    added, model = spec.get("added_tokens") or [], spec["model"]
    if not _is_byte_level(spec) or model.get("type") != "BPE" or any(map(_is_fussy, added)):
        return None
    if model.get("unk_token") is not None or model.get("continuing_subword_prefix") is not None:
        return None
    # Of a character beyond ASCII the bytes behind the first have tokens, even where some first bytes have none.
    if not all(chr(name) in model["vocab"] for name, byte in byte_alphabet().items() if 0x80 <= byte < 0xC0):
        return None
    return max([*map(len, model["vocab"]), *(len(token["content"].encode()) for token in added)])


def dropped_of(spec: dict[str, Any]) -> frozenset[str]:
    """ASCII characters that byte-level BPE leaves out, since their byte has no token: mostly some of control."""
    model = spec["model"]
    names = model["vocab"] if model.get("type") == "BPE" else ()
    return frozenset([chr(byte) for name, byte in byte_alphabet().items() if byte < 0x80 and chr(name) not in names])


def _is_bert(spec: dict[str, Any]) -> bool:
    normalizer, pre_tokenizer = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    return (
        normalizer.get("type") == "BertNormalizer"
        and normalizer["handle_chinese_chars"]
        and pre_tokenizer.get("type") == "BertPreTokenizer"
    )


def _is_byte_level(spec: dict[str, Any]) -> bool:
    normalizer, pre_tokenizer = spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    *first, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    return (
        (normalizer is None or normalizer["type"] == "Prepend")  # a space before the first word
        and all(stage["type"] == "Digits" for stage in first)
        and last.get("type") == "ByteLevel"
        and last.get("use_regex", True)
    )


def _is_fussy(token: dict[str, Any]) -> bool:
    """Whether an added token looks at what stands beside it."""
    return any(token[option] for option in ("single_word", "lstrip", "rstrip", "normalized"))


def _can_be_cut(content: str, seam: re.Pattern[str]) -> bool:
    return seam.search(content) is not None or any(one.isspace() for one in content)
