"""Where tokens stand in a text, in characters. One that goes on with a character stands where that begins."""

import codecs
from collections.abc import Iterable
from itertools import accumulate

from service.domain import TokenLogprob

_DECODER = codecs.getincrementaldecoder("utf-8")
_BROKEN = "\ufffd"  # what bytes that are no character read as


def prompt_offsets(tokens: Iterable[TokenLogprob]) -> list[int]:
    """Of the tokens that a prompt consists of."""
    decode = _DECODER(errors="replace").decode
    *starts, _ = accumulate((len(decode(token.bytes)) for token in tokens), initial=0)
    return starts


class Offsets:
    """Of the tokens of one output: `place` each of them, in turn.

    They are told from what each token shows: a text has what no token stands for, the white space between sentences,
    and lacks what some do, special tokens and the space that a sentence's first token begins with. (That token stands
    at such a space where one is shown before it.) It may also come late, when a stop string may be under way; of
    several tokens before any text, all but the first may so be told to stand one character too far.
    """

    def __init__(self, start: int, *, is_held: bool) -> None:
        """`start` characters come before the output; `is_held`: its text may come late."""
        self._decode = _DECODER(errors="replace").decode
        self._shown = start
        self._is_held = is_held
        self._held = ""  # what is still to be shown of the tokens so far

    def place(self, token: TokenLogprob, text: str) -> int:
        """Of a token with which `text` is shown."""
        held = next(one for one in (self._held, self._held.lstrip(), "") if _agree(one, text))
        num_before, own = _found(self._read(token), text[len(held) :])
        offset = self._shown + len(held) + num_before
        if self._is_held:
            self._held = (held + own)[max(0, len(text) - num_before) :]
        self._shown += len(text)
        return offset

    def _read(self, token: TokenLogprob) -> str:
        """The characters that are whole with this token; not what earlier ones turn out to have left broken."""
        read = self._decode(token.bytes)
        return read if token.text.startswith(_BROKEN) else read.removeprefix(_BROKEN)


def _found(token: str, text: str) -> tuple[int, str]:
    """How many characters of `text` come before `token`, and the token as it is shown there, as far as it is."""
    bare = token.lstrip()
    for own in (token, bare):
        if own and text.endswith(own):
            return len(text) - len(own), own
    if not text or (token and _agree(token, text)):
        return 0, token
    return len(text) - len(text.lstrip()), bare


def _agree(one: str, other: str) -> bool:
    """Whether they may be the same text, one of them farther than the other."""
    return one.startswith(other) or other.startswith(one)
