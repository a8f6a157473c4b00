"""The texts that every server is asked about: a file's, or our own with a like spread of lengths.

A file is either plain text, one sentence a line, or a table whose last tab-separated column is the sentence (SST-2's
layout, with a header line).
"""

import random
from pathlib import Path

# SST-2's development set: 19.5 words a sentence on average, standard deviation 8.7, longest 47.
_MEAN_WORDS, _SPREAD_WORDS, _MOST_WORDS = 19.5, 8.7, 47

_CLAUSES = (
    "the film moves slowly",
    "the first hour is a pleasure to watch",
    "nobody in the cast seems to believe a word of it",
    "the camera finds beauty in plain rooms and tired faces",
    "a joke that was thin to begin with is told four times",
    "it left me smiling all the way home",
    "the ending asks for tears that it has not earned",
    "every scene between the two sisters rings true",
    "the plot is a knot that nobody bothers to untie",
    "its songs are warm and its heart is in the right place",
    "the dialogue sounds as if it had been written on the bus",
    "what a clever and generous little comedy",
    "i looked at my watch more often than at the screen",
    "the director trusts silence and is right to",
    "even the chases are dull",
    "you will have seen better stories in an advertisement for soap",
    "small",
    "moving",
    "never boring",
    "a waste of good actors",
)
_JOINTS = (" , and ", " , but ", " ; ", " , while ", " because ")


def read_sentences(path: Path) -> tuple[str, ...]:
    """The file's sentences in file order. Raises ValueError when there are none."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if lines and "\t" in lines[0]:
        lines = [line.rsplit("\t", 1)[1] for line in lines[1:]]
    if not lines:
        raise ValueError(f"{path} has no sentences")
    return tuple(line.strip() for line in lines)


def own_sentences(count: int = 872, seed: int = 0) -> tuple[str, ...]:
    """Made-up film reviews, the same for the same seed."""
    draw = random.Random(seed)
    return tuple(_review(draw) for _ in range(count))


def _review(draw: random.Random) -> str:
    wanted = min(_MOST_WORDS, max(1, round(draw.gauss(_MEAN_WORDS, _SPREAD_WORDS))))
    text = draw.choice(_CLAUSES)
    while len(text.split()) < wanted:
        text += draw.choice(_JOINTS) + draw.choice(_CLAUSES)
    return " ".join(text.split()[:wanted]) + " ."
