"""Text to token ids, with offsets and a report of what was cut. Knows no queue and no engine.

The binding's `encode` holds the GIL until it is done, so that other threads stand still meanwhile. `encode_batch` lets
it go.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer

from service.domain import AttendedToken, Part, TextInput
from service.errors import BundleError, TooLarge
from service.worker.beginnings import Beginnings

LONG_TEXT = 4096  # characters from which on tokenizing would hold up the event loop (about 1 ms)
HUGE_TEXT = 65_536  # characters from which on it takes a tenth of a second, tens of megabytes and more

_Text = str | tuple[str, str]  # a pair
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
    # A batch is tokenized by the thread that asks for it. Otherwise all share one pool of the library's, where texts of
    # a few milliseconds wait for those of seconds.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = RustTokenizer.from_file(str(path))
    except Exception as error:  # the binding raises bare Exception
        raise BundleError(f"{path} is not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def num_characters(item: TextInput) -> int:
    return len(item.text) + len(item.text_pair or "")


def encode(tokenizer: RustTokenizer, text: str) -> Encoding:
    """A whole text. Releases the GIL for one from LONG_TEXT on."""
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text)
    (encoding,) = tokenizer.encode_batch([text])
    return encoding


def ids_of(tokenizer: RustTokenizer, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens alone. As `encode`, and in half the time where the text is long."""
    if len(text) < LONG_TEXT:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    else:
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids = encoding.ids
    return ids


class Tokenizer:
    """A bundle's tokenizer.json, cutting at `max_tokens` and never padding.

    Thread-safe. Encoding texts from LONG_TEXT on releases the GIL, and reads little more of them than is kept.
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        self._whole, self._cut = load_tokenizer(path), load_tokenizer(path)
        self._beginnings = Beginnings(path)
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
        if num_characters(item) < LONG_TEXT:
            encoding = self._cut.encode(item.text, item.text_pair or None)
        else:
            (encoding,) = self._cut.encode_batch([self._beginning(item)])
        type_ids = encoding.type_ids if item.text_pair else None
        return Encoded(encoding.ids, type_ids, bool(encoding.overflowing), encoding)

    def _beginning(self, item: TextInput) -> _Text:
        """What of an input is to be read, so that it has the tokens of the whole once these are cut.

        Which text of a pair is cut, and where, follows from the number of tokens of the shorter one, and from which one
        that is. It is read to its end, and the other until it has more.
        """
        text, pair, most = item.text, item.text_pair, self.max_tokens
        if not pair:
            return self._beginnings.of(text, most, self._count)
        if len(text) < len(pair):
            return text, self._beginnings.of(pair, max(most, self._count(text)), self._count)
        return self._beginnings.of(text, max(most, self._count(pair)), self._count), pair

    def _count(self, text: _Text) -> int:
        """Tokens, special ones included."""
        (encoding,) = self._whole.encode_batch_fast([text])
        return len(encoding)

    def _too_long(self, index: int, item: TextInput) -> TooLarge:
        """Of a huge input no more is read than is needed to know that it is too long."""
        whole = (item.text, item.text_pair) if item.text_pair else item.text
        read = whole if num_characters(item) < HUGE_TEXT else self._beginning(item)
        has = f"{self._count(read)}" if read == whole else f"more than {self.max_tokens}"
        param = f"input.{index}"
        message = f"{param} has {has} tokens, the limit is {self.max_tokens}; set truncate to true to cut it"
        return TooLarge(message, param=param, code="too_many_tokens")
