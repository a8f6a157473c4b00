"""Text to token ids, with offsets and a report of what was cut. Knows no queue and no engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

from service.domain import AttendedToken, Part, TextInput
from service.errors import BundleError, TooLarge

_PARTS: tuple[Part, Part] = ("text", "text_pair")
# Names that tokenizers give to what stands for a token that is not told, the best first.
_BLANKS = ("[MASK]", "<mask>", "[UNK]", "<unk>", "[PAD]", "<pad>")


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

    @property
    def is_special(self) -> Sequence[bool]:
        """For each token whether the tokenizer added it."""
        return [part is None for part in self.encoding.sequence_ids]

    def told(self) -> tuple[AttendedToken, ...]:
        """The tokens as a caller is told of them."""
        return told(self.encoding)


def told(encoding: Encoding) -> tuple[AttendedToken, ...]:
    rows = zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.sequence_ids, strict=True)
    return tuple(
        AttendedToken(id, text, 0, 0, True, None)
        if part is None
        else AttendedToken(id, text, *offsets, False, _PARTS[part])
        for id, text, offsets, part in rows
    )


def load_tokenizer(path: Path) -> RustTokenizer:
    """A tokenizer.json that neither pads nor cuts. Raises BundleError."""
    try:
        tokenizer = RustTokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise BundleError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Tokenizer:
    """A bundle's tokenizer.json, cutting at `max_tokens` and never padding. Thread-safe; encoding releases the GIL."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        self._whole, self._cut = load_tokenizer(path), load_tokenizer(path)
        self.max_tokens = max_tokens
        self._cut.enable_truncation(max_tokens)

    def encode(self, inputs: Sequence[TextInput], *, truncate: bool) -> list[Encoded]:
        """Raises TooLarge, naming the input, its tokens and the limit, if one must be cut and `truncate` is False."""
        encoded = [self._encode(item) for item in inputs]
        if not truncate:
            for index, one in enumerate(encoded):
                if one.is_truncated:
                    raise self._too_long(index, inputs[index])
        return encoded

    @property
    def blank_id(self) -> int | None:
        """What to put in a token's place to hide it: the mask token, else the unknown one, else padding, if any."""
        found = (self._whole.token_to_id(name) for name in _BLANKS)
        return next((id for id in found if id is not None), None)

    def _encode(self, item: TextInput) -> Encoded:
        encoding = self._cut.encode(item.text, item.text_pair)
        type_ids = None if item.text_pair is None else encoding.type_ids
        return Encoded(encoding.ids, type_ids, bool(encoding.overflowing), encoding)

    def _too_long(self, index: int, item: TextInput) -> TooLarge:
        length = len(self._whole.encode(item.text, item.text_pair).ids)
        param = f"input.{index}"
        message = f"{param} has {length} tokens, the limit is {self.max_tokens}; set truncate to true to cut it"
        return TooLarge(message, param=param, code="too_many_tokens")
