"""From a reply to what is shown of it: maps with readable tokens along their sides, and the table of a terminal.

Pure: knows neither files nor pictures.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from service.domain import AttendedToken, AttentionMap, AttentionMaps, AttentionRequest, Kind

_TELLING: tuple[Kind, ...] = ("cross", "decoder", "encoder")  # the most first
_LABEL_CHARACTERS = 16
_TITLE_CHARACTERS = 60
_LINKS = 3  # keys that the table shows of a query
_FLOAT_BYTES = 4

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """A head's weights, or those of several together: (query, key), with a label for each of both."""

    title: str
    queries: Labels
    keys: Labels
    weights: list[list[float]]


@dataclass(frozen=True)
class Picture:
    """Maps of one kind: a row of panels for each layer, in it a panel for each head."""

    title: str
    rows: tuple[tuple[Panel, ...], ...]


def picture_of(request: AttentionRequest, told: AttentionMaps) -> Picture:
    """Of the kind that tells the most, if `told` has several."""
    kind = next(kind for kind in _TELLING if any(one.kind == kind for one in told.maps))
    maps = [one for one in told.maps if one.kind == kind]
    sides = _labels(request, told)
    title = f"{told.model}: {kind} attention"
    return Picture(f"{title}; {_prediction(told)}", tuple(tuple(_panels(one, sides, request)) for one in maps))


def _prediction(told: AttentionMaps) -> str:
    if told.prediction.text is not None:
        return _cut(" ".join(told.prediction.text.split()), _TITLE_CHARACTERS)
    best = told.prediction.scores[0]
    return f"{best.label} {best.score:.3f}"


def _labels(request: AttentionRequest, told: AttentionMaps) -> tuple[Labels, Labels]:
    """What stands for each token that was read, and for each that was written."""
    texts = {"text": request.text, "text_pair": request.text_pair, "target": request.target or told.prediction.text}
    read, written = told.tokens, told.target_tokens or ()
    return tuple(_label(token, texts) for token in read), tuple(_label(token, texts) for token in written)


def _label(token: AttendedToken, texts: dict[str, str | None]) -> str:
    """The characters that the token came from; its own name when it came from none. Never empty, never long."""
    characters = (texts.get(token.part or "") or "")[token.start : token.end].strip() or token.text
    return _cut("".join(one if one.isprintable() else "·" for one in characters), _LABEL_CHARACTERS)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _panels(one: AttentionMap, sides: tuple[Labels, Labels], request: AttentionRequest) -> Iterator[Panel]:
    num_heads, num_queries, num_keys = one.shape
    queries, keys = _axes(one, *sides)
    layer = "all layers" if one.layer is None else f"layer {one.layer}"
    size = num_queries * num_keys * _FLOAT_BYTES
    for at in range(num_heads):
        head = f"head {one.heads[at]}" if one.heads is not None else f"{request.reduce} of the heads"
        rows = memoryview(one.weights)[at * size : (at + 1) * size].cast("f", (num_queries, num_keys))
        weights: Any = rows.tolist()  # nested, which its type does not tell
        yield Panel(f"{layer}, {head}" if one.layer is not None else f"rollout, {layer}", queries, keys, weights)


def _axes(one: AttentionMap, read: Labels, written: Labels) -> tuple[Labels, Labels]:
    """The queries' labels and the keys', as AttentionMap says; a translator's decoder has only what it wrote."""
    if one.kind == "cross":
        return written, read
    side = read if one.kind == "encoder" else written if one.shape[2] == len(written) else read + written
    return side, side


def table_of(picture: Picture) -> Iterator[str]:
    """Lines: where each token looks the most."""
    yield picture.title
    for panel in (panel for row in picture.rows for panel in row):
        yield f"\n{panel.title}"
        margin = max(map(_width, panel.queries))
        for query, weights in zip(panel.queries, panel.weights, strict=True):
            yield f"{_padded(query, margin)}  {'  '.join(_strongest(panel.keys, weights))}"


def _strongest(keys: Sequence[str], weights: Sequence[float]) -> Iterator[str]:
    best = sorted(range(len(keys)), key=lambda at: -weights[at])[:_LINKS]
    yield from (f"{weights[at]:.2f} {_padded(keys[at], _LABEL_CHARACTERS)}" for at in best)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    """Columns of a terminal."""
    wide = sum(unicodedata.east_asian_width(one) in "WF" for one in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
