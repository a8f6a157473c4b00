"""Draws attention maps into a PNG file. The only file that imports matplotlib, and nothing of its global state.

Sizes are inches, of fonts points (72 an inch).
"""

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font

from service.cli.maps import Picture

DOTS_PER_INCH = 150
COLORS = "Blues"  # lightness falls evenly, so that it reads in grey and with any kind of colour vision
FONT = "DejaVu Sans"  # comes with matplotlib
_NO_FONT = "Last Resort"  # so does this, which has a box for every character
_POINTS = 72  # an inch
_CELL = 0.28  # a side, when there is room
_LEAST, _MOST = 2.0, 16.0  # of a panel's side, and of all panels' sides together
_FONT_LEAST, _FONT_MOST = 5.5, 9.0
_TITLE = 0.1  # a character of the title


def save_png(picture: Picture, path: Path) -> None:
    """All panels of `picture`, on one scale of colours from 0 to their greatest weight. Raises OSError."""
    panels = [panel for row in picture.rows for panel in row]
    wide = len(picture.rows[0]) if len(picture.rows[0]) > 1 else math.ceil(math.sqrt(len(panels)))
    high = math.ceil(len(panels) / wide)
    num_queries, num_keys = len(panels[0].queries), len(panels[0].keys)
    cell = min(_CELL, _MOST / (wide * num_keys), _MOST / (high * num_queries))
    across, down = max(_LEAST, cell * num_keys), max(_LEAST, cell * num_queries)
    size = (max(wide * across + 3, _TITLE * len(picture.title)), high * (down + 0.3) + 2)
    figure = Figure(size, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(high, wide, squeeze=False)
    top = max(weight for panel in panels for weights in panel.weights for weight in weights)
    for at, (place, panel) in enumerate(zip_longest(axes.flat, panels)):
        if panel is None:
            place.remove()
            continue
        image = place.imshow(panel.weights, cmap=COLORS, vmin=0, vmax=top, aspect="auto")
        place.set_title(panel.title, fontsize=_FONT_MOST)
        _name_side(place.xaxis, panel.keys if at + wide >= len(panels) else (), across, rotation=90)
        _name_side(place.yaxis, panel.queries if at % wide == 0 else (), down)
    (title,), style = _shown([picture.title])
    figure.suptitle(title, **style)
    figure.supxlabel("token looked at", fontsize=_FONT_MOST)
    figure.supylabel("token that looks", fontsize=_FONT_MOST)
    figure.colorbar(
        image, ax=list(axes.flat[: len(panels)]), label="attention weight", fraction=0.6 / size[0], aspect=5 * size[1]
    )
    figure.savefig(path, format="png")


def _name_side(axis: Axis, labels: Sequence[str], side: float, **style: Any) -> None:
    """Every token has its label where they fit; where not, every second, third ... has."""
    room = side * _POINTS / max(1, len(labels))  # for a label
    size = min(_FONT_MOST, max(_FONT_LEAST, 0.8 * room))
    step = math.ceil(size / room)
    shown, drawn = _shown(labels[::step])
    axis.set_ticks(range(0, len(labels), step), shown, fontsize=size, **drawn, **style)


def _shown(texts: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """`texts` as they can be drawn, and the style to draw them in.

    Characters that FONT has not are taken from other installed fonts; one that none has is told by its number.
    """
    missing, families = {one for text in texts for one in text}, [FONT]
    for entry in sorted(fontManager.ttflist, key=lambda entry: entry.name != FONT):
        if not missing or entry.name.startswith(_NO_FONT):
            continue
        font = get_font(entry.fname)
        if found := {one for one in missing if font.scalable and font.get_char_index(ord(one))}:
            families.append(entry.name)
            missing -= found
    names = str.maketrans({one: f"U+{ord(one):04X}" for one in missing})
    return [text.translate(names) for text in texts], {"fontfamily": families, "parse_math": False}
