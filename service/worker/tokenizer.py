"""Text to token ids, with offsets and a report of what was cut. Knows no queue and no engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

from service.domain import TextInput
from service.errors import BundleError, TooLarge


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input as the model reads it, special tokens included.

    `is_truncated` says that the input was longer than the model's limit and was cut at its end (the longer text of a
    pair first).
    """

    ids: Sequence[int]
    type_ids: Sequence[int] | None  # None when all are zero
    is_truncated: bool
    encoding: Encoding

    @property
    def offsets(self) -> Sequence[tuple[int, int]]:
        """For each token the characters (start, end) of the text that it came from; (0, 0) for a special one."""
        return self.encoding.offsets


class Tokenizer:
    """A bundle's tokenizer.json, cutting at `max_tokens` and never padding. Thread-safe; encoding releases the GIL."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        try:
            self._whole = RustTokenizer.from_file(str(path))
            self._cut = RustTokenizer.from_file(str(path))
        except Exception as error:  # the binding raises bare Exception
            raise BundleError(f"{path} is not a tokenizer: {error}") from error
        self.max_tokens = max_tokens
        self._whole.no_padding()
        self._whole.no_truncation()
        self._cut.no_padding()
        self._cut.enable_truncation(max_tokens)

    def encode(self, inputs: Sequence[TextInput], *, truncate: bool) -> list[Encoded]:
        """Raises TooLarge, naming the input, its tokens and the limit, if one must be cut and `truncate` is False."""
        encoded = [self._encode(item) for item in inputs]
        if not truncate:
            for index, one in enumerate(encoded):
                if one.is_truncated:
                    raise self._too_long(index, inputs[index])
        return encoded

    def _encode(self, item: TextInput) -> Encoded:
        encoding = self._cut.encode(item.text, item.text_pair)
        type_ids = None if item.text_pair is None else encoding.type_ids
        return Encoded(encoding.ids, type_ids, bool(encoding.overflowing), encoding)

    def _too_long(self, index: int, item: TextInput) -> TooLarge:
        length = len(self._whole.encode(item.text, item.text_pair).ids)
        message = f"input {index} has {length} tokens, the limit is {self.max_tokens}; set truncate to true to cut it"
        return TooLarge(message, param=f"input.{index}", code="too_many_tokens")
