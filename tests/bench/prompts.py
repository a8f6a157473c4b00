"""What generation is measured on: prompts of mixed lengths that no server can have seen before.

Texts are cut from a plain text file (WikiText-2's test set) or from made-up reviews. Each begins with its own number,
so that a prefix cache finds nothing to reuse. Prompts of an exact number of tokens are drawn as token ids: the work of
a forward pass depends on how many tokens there are, not on which.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from .sentences import own_sentences

# Of the vocabularies in question: past the special tokens, within the smallest.
_FIRST_ID, _LAST_ID = 1000, 30_000

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """A seed's prompts. `lengths` are words of text or token ids; each comes as often as the others, in any order."""

    lengths: tuple[int, ...]
    unit: Literal["words", "ids"] = "words"
    seed: int = 0
    corpus: str | None = None  # a text file; None: made-up reviews


def plan_from(described: Mapping[str, Any]) -> PromptPlan:
    """The inverse of `asdict`, after a way through JSON."""
    return PromptPlan(**{**described, "lengths": tuple(described["lengths"])})


def prompts_of(plan: PromptPlan) -> Iterator[Prompt]:
    """Prompts without end, the same for the same plan and different ones for another seed."""
    draw = random.Random(plan.seed)
    words = _words(plan.corpus) if plan.unit == "words" else []
    for number in count():
        if number % len(plan.lengths) == 0:
            lengths = draw.sample(plan.lengths, len(plan.lengths))
        length = lengths[number % len(plan.lengths)]
        if plan.unit == "ids":
            yield [draw.randint(_FIRST_ID, _LAST_ID) for _ in range(length)]
        else:
            start = draw.randrange(max(1, len(words) - length))
            yield " ".join([f"{plan.seed}-{number}", *words[start : start + length - 1]])


def _words(corpus: str | None) -> list[str]:
    """Raises ValueError for a file without words."""
    text = Path(corpus).read_text(encoding="utf-8") if corpus else "\n".join(own_sentences())
    words = [word for word in text.split() if "@" not in word and "<" not in word]
    if not words:
        raise ValueError(f"{corpus} has no words")
    return words
