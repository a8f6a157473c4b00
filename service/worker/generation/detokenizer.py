"""Tokens -> text, a token at a time: never half a character, never a part of a stop string.

Owns how a tokenizer.json's decoder turns tokens into text, as a chain of stages that remember only what is still open,
so that a token costs the same however long the text is. What comes out in pieces is, put together, what the decoder
makes of all tokens at once. Knows the tokens' names from its caller and nothing of the rest of a tokenizer.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from service.errors import BundleError
from service.worker.byte_level import byte_alphabet

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
UNKNOWN = "\ufffd"


class Stage(Protocol):
    """One step of a decoder. `feed` takes a piece and gives those that are complete, `flush` those that were open."""

    def feed(self, piece: str) -> Iterable[str]: ...

    def flush(self) -> Iterable[str]: ...


# Code point -> byte, for str.translate; what is not in the alphabet must not stay a byte either.
BYTES = dict.fromkeys(range(256), 0xFFFF) | byte_alphabet()


def bytes_of(piece: str) -> bytes:
    """The bytes that a byte-level token stands for; text that is not in the alphabet stands for itself."""
    try:
        return piece.translate(BYTES).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


class ByteLevel:
    """Every character of a token is a byte; bytes that are no UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, piece: str) -> Iterable[str]:
        return (self._utf8.decode(bytes_of(piece)),)

    def flush(self) -> Iterable[str]:
        return (self._utf8.decode(b"", True),)


class ByteFallback:
    """Tokens <0x00> to <0xFF> are bytes, the others text. A run of bytes is text, or else U+FFFD for each of them."""

    def __init__(self) -> None:
        self._run = bytearray()

    def feed(self, piece: str) -> Iterable[str]:
        if found := BYTE_TOKEN.fullmatch(piece):
            self._run.append(int(found[1], 16))
            return ()
        return (*self.flush(), piece)

    def flush(self) -> Iterable[str]:
        run, self._run = self._run, bytearray()
        if not run:
            return ()
        try:
            return (run.decode(),)
        except UnicodeDecodeError:
            return (UNKNOWN,) * len(run)


class EachPiece:
    """Changes every piece for itself."""

    def __init__(self, change: Callable[[str], str]) -> None:
        self._change = change

    def feed(self, piece: str) -> Iterable[str]:
        return (self._change(piece),)

    def flush(self) -> Iterable[str]:
        return ()


class AfterFirst:
    """Changes the first piece in one way and the later ones in another."""

    def __init__(self, first: Callable[[str], str], later: Callable[[str], str]) -> None:
        self._change, self._later = first, later

    def feed(self, piece: str) -> Iterable[str]:
        changed, self._change = self._change(piece), self._later
        return (changed,)

    def flush(self) -> Iterable[str]:
        return ()


class StripStart:
    """Takes away up to `count` of `character` where the whole text begins."""

    def __init__(self, character: str, count: int) -> None:
        self._character, self._left = character, count

    def feed(self, piece: str) -> Iterable[str]:
        while self._left and piece.startswith(self._character):
            piece, self._left = piece[1:], self._left - 1
        if piece:
            self._left = 0
        return (piece,)

    def flush(self) -> Iterable[str]:
        return ()


def strip(piece: str, character: str, start: int, stop: int) -> str:
    """Takes up to `start` of `character` from the front of a piece and up to `stop` from its end."""
    num_front = len(piece) - len(piece.lstrip(character))
    piece = piece[min(start, num_front) :]
    num_end = len(piece) - len(piece.rstrip(character))
    return piece[: len(piece) - min(stop, num_end)]


def metaspace(spec: Mapping[str, Any]) -> Stage:
    """The mark is a space, but not in the first token where encoding has put it."""
    mark: str = spec["replacement"]
    of_first = " " if spec.get("prepend_scheme", "always") == "never" else ""
    return AfterFirst(lambda piece: piece.replace(mark, of_first), lambda piece: piece.replace(mark, " "))


def replacement(spec: Mapping[str, Any]) -> Stage:
    """Raises KeyError for a pattern that is a regular expression."""
    pattern, content = spec["pattern"]["String"], spec["content"]
    return EachPiece(lambda piece: piece.replace(pattern, content))


def joined() -> Stage:
    return AfterFirst(lambda piece: piece, lambda piece: " " + piece)


def stage_for(spec: Mapping[str, Any], *, is_fused: bool) -> Stage | None:
    """None for a kind that is not known, or not where pieces are no longer tokens (`is_fused`)."""
    match spec["type"]:
        case "ByteLevel" if not is_fused:
            return ByteLevel()
        case "ByteFallback" if not is_fused:
            return ByteFallback()
        case "Metaspace" if not is_fused:
            return metaspace(spec)
        case "Replace" if not is_fused and "String" in spec["pattern"]:
            return replacement(spec)
        case "Strip" if is_fused and not spec["stop"]:
            return StripStart(spec["content"], spec["start"])
        case "Strip" if not is_fused:
            return EachPiece(lambda piece: strip(piece, spec["content"], spec["start"], spec["stop"]))
        case "Fuse":
            return EachPiece(lambda piece: piece)
    return None


def make_stages(decoder: Mapping[str, Any] | None) -> list[Stage]:
    """New stages for the `decoder` of a tokenizer.json, for one text. Raises BundleError for one that is not known."""
    if decoder is None:
        return [joined()]
    stages: list[Stage] = []
    is_fused = False
    for spec in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        stage = stage_for(spec, is_fused=is_fused)
        if stage is None:
            raise BundleError(f"tokenizer.json: a decoder {dict(spec)} in this place is not supported")
        stages.append(stage)
        is_fused = is_fused or spec["type"] in ("Fuse", "ByteLevel")  # one text from here on
    return stages


class Detokenizer:
    """One text in the making."""

    def __init__(self, decoder: Mapping[str, Any] | None, shown: Callable[[int], str | None]) -> None:
        """`shown` gives a token's name, None for one that is not shown. Raises BundleError as `make_stages` does."""
        self._stages, self._shown = make_stages(decoder), shown

    def add(self, *tokens: int) -> str:
        """The characters that are complete now and were not before."""
        return self._through([name for token in tokens if (name := self._shown(token)) is not None], 0)

    def flush(self) -> str:
        """The rest, when no more tokens come: U+FFFD for bytes that are no character."""
        return "".join(self._through(stage.flush(), place + 1) for place, stage in enumerate(self._stages))

    def _through(self, pieces: Iterable[str], first: int) -> str:
        for stage in self._stages[first:]:
            pieces = [fed for piece in pieces for fed in stage.feed(piece)]
        return "".join(pieces)


class StopStrings:
    """Text -> text that is safe to show: nothing of a stop string, nothing that may turn out to begin one.

    The stop that is complete first ends the text, and of those that are complete at the same character the longest, so
    that the result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [Stop(text) for text in stops]
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """What can be shown, and the stop that ended the text, after which there is no more to feed."""
        if not self._stops:
            return text, None
        all_text = self._held + text
        for place, character in enumerate(text, len(self._held) + 1):
            matched = [stop for stop in self._stops if stop.passes(character)]
            if matched:
                longest = max(matched, key=lambda stop: len(stop.text))
                self._held = ""
                return all_text[: place - len(longest.text)], longest.text
        num_held = max(stop.num_matched for stop in self._stops)
        safe = len(all_text) - num_held
        self._held = all_text[safe:]
        return all_text[:safe], None

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


class Stop:
    """How much of a stop string the text ends with (Knuth, Morris and Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.num_matched = text, 0
        self._shorter = [0, 0]  # for each number matched the next smaller one that can be
        for character in text[1:]:
            self._shorter.append(self._step(self._shorter[-1], character))

    def passes(self, character: str) -> bool:
        """True where the text ends with the whole stop."""
        self.num_matched = self._step(self.num_matched, character)
        return self.num_matched == len(self.text)

    def _step(self, matched: int, character: str) -> int:
        while matched and (matched == len(self.text) or self.text[matched] != character):
            matched = self._shorter[matched]
        return matched + (self.text[matched] == character)
