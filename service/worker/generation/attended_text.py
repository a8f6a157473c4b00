"""Texts as tokens that say where in the text they stand: what is read, what was written, what is to have been written.

Owns a tokenizer of its own, loaded when the first text comes: who only wants text needs no offsets. Knows no weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from service.domain import AttendedToken, Token
from service.worker.bundle import Bundle
from service.worker.tokenizer import load_tokenizer, told


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

    def __init__(self, bundle: Bundle, *, start_id: int | None) -> None:
        """`start_id` is what a translation starts from; None: a model that continues its prompt."""
        self._path = bundle.tokenizer_path
        self._start_id = start_id

    def read(self, text: str) -> tuple[AttendedToken, ...]:
        """As the model reads it. In a text to translate the names of special tokens are text, in a prompt they are
        the tokens."""
        return told(self._tokenizer.encode(text))

    def forced(self, text: str) -> Written:
        """As if a translator had written it."""
        tokens = [replace(one, part="target") for one in self.read(text) if not one.special]
        return Written((*self._start(), *tokens), text)

    def written(self, tokens: Sequence[Token], rest: str) -> Written:
        """`tokens` as they were told one by one; `rest` is the text that came with none.

        A token that ends inside of a character told nothing, and stands where that character does.
        """
        text = "".join(one.text for one in tokens) + rest
        named, end = [], 0
        for one in tokens:
            start, end = end, end + len(one.text)
            shown = (start, end) if one.text else (start, min(start + 1, len(text)))
            named.append(AttendedToken(one.id, self._name(one.id), *shown, False, "target"))
        return Written((*self._start(), *named), text)

    def _start(self) -> tuple[AttendedToken, ...]:
        if self._start_id is None:
            return ()
        return (AttendedToken(self._start_id, self._name(self._start_id), 0, 0, True, None),)

    def _name(self, token: int) -> str:
        name: str | None = self._tokenizer.id_to_token(token)
        return name or ""

    @cached_property
    def _tokenizer(self) -> Any:  # a Tokenizer of the package whose only importer is service.worker.tokenizer
        tokenizer = load_tokenizer(self._path)
        tokenizer.encode_special_tokens = self._start_id is not None
        return tokenizer
