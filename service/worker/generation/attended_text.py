"""Texts as tokens that say where in the text they stand: what is read, what was written, what is to have been written.

Knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.domain import AttendedToken
from service.worker.generation.prompt_tokenizer import PromptTokenizer


@dataclass(frozen=True)
class Written:
    """An output; a translation's tokens begin with the one that it starts from."""

    tokens: tuple[AttendedToken, ...]
    text: str

    @property
    def ids(self) -> list[int]:
        return [one.id for one in self.tokens]


class AttendedText:
    """Thread-safe."""

    def __init__(self, tokenizer: PromptTokenizer, *, start_id: int | None) -> None:
        """`start_id`: what every translation starts from, None for a model that continues texts."""
        self._tokenizer = tokenizer
        self._start_id = start_id

    def read(self, text: str) -> tuple[AttendedToken, ...]:
        """As the model reads it. In a text to translate the names of special tokens are text, in a prompt they are
        the tokens."""
        return self._tokenizer.attended(text, is_plain=self._start_id is not None)

    def count(self, text: str, num_enough: int) -> tuple[int, bool]:
        """How many tokens `read` would find, and whether these are all: where it can be told by fewer, no more than is
        needed to know that there are more than `num_enough` is read."""
        encode = self._tokenizer.encode if self._start_id is None else self._tokenizer.encode_plain
        part = self._tokenizer.showing_more(text, num_enough, encode)
        return len(encode(part)), len(part) == len(text)

    def forced(self, text: str) -> Written:
        """As if a translator had written it."""
        tokens = [replace(one, part="target") for one in self.read(text) if not one.special]
        return Written((*self._start(), *tokens), text)

    def written(self, ids: Sequence[int], text: str) -> Written:
        """`text` is what the tokens `ids` are together.

        A token that ends inside of a character adds nothing, and stands where that character does.
        """
        detokenizer = self._tokenizer.detokenizer()
        named, end = [], 0
        for id in ids:
            start, end = end, end + len(detokenizer.add(id))
            shown = (start, end) if end > start else (start, min(start + 1, len(text)))
            named.append(AttendedToken(id, self._tokenizer.token_name(id), *shown, False, "target"))
        return Written((*self._start(), *named), text)

    def _start(self) -> tuple[AttendedToken, ...]:
        if self._start_id is None:
            return ()
        return (AttendedToken(self._start_id, self._tokenizer.token_name(self._start_id), 0, 0, True, None),)
