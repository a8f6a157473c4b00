"""Text to ids for training, with the same tokenizer.json that serving reads; owns truncation, leaves padding to the
batches.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


def load_tokenizer(path: Path, max_length: int) -> Tokenizer:
    """Reads tokenizer.json; no padding, truncation to `max_length` ids with the special ones."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
