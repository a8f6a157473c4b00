"""Sentence pairs and how they become batches of equal work; owns reading, grouping and padding, not the vocabulary.

A batch holds as many pairs as fit a number of tokens (Vaswani et al. 2017, section 5.1), so that each update costs the
same and averages over about as many words.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.data import Batches, digest, pad


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


class PairBatch(NamedTuple):
    """What a decoder is taught with: it sees `start` and each token of the target, and is asked for the next.

    source (B, S) and its mask, None if nothing is padded; inputs (B, T) begin with the start token; targets (B, T) are
    the inputs moved by one, then the end token, and `pad_id` where there is nothing to ask.
    """

    source: Tensor
    source_mask: Tensor | None
    inputs: Tensor
    targets: Tensor


class Ragged(Sequence[list[int]]):
    """Lists of ids as one row and where each ends: a tenth of the memory of Python's numbers."""

    def __init__(self, flat: Tensor, lengths: Tensor) -> None:
        self.flat, self.lengths = flat, lengths
        self.ends = [0, *lengths.cumsum(0).tolist()]

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> "Ragged":
        lists = list(lists)
        flat = torch.tensor([number for ids in lists for number in ids], dtype=torch.int32)
        return cls(flat, torch.tensor([len(ids) for ids in lists], dtype=torch.int32))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: Any) -> Any:
        return self.flat[self.ends[at] : self.ends[at + 1]].tolist()


@dataclass(frozen=True)
class EncodedPairs:
    """Ids of sources and of targets, both with the end token."""

    sources: Ragged
    targets: Ragged

    def __len__(self) -> int:
        return len(self.sources)

    def batch(self, indices: Sequence[int], *, start_id: int, pad_id: int) -> PairBatch:
        source, mask = pad([self.sources[i] for i in indices], pad_id)
        targets, _ = pad([self.targets[i] for i in indices], pad_id)
        start = torch.full((len(indices), 1), start_id)
        return PairBatch(source, mask, torch.cat((start, targets[:, :-1]), dim=1), targets)


@dataclass(frozen=True)
class Variants:
    """One corpus in several segmentations, which the epochs take in turn (BPE dropout, Provilkov et al. 2020)."""

    corpora: list[EncodedPairs]
    start_id: int

    def digest(self) -> str:
        sides = [side for corpus in self.corpora for side in (corpus.sources, corpus.targets)]
        return digest(tensor for side in sides for tensor in (side.flat, side.lengths))

    def epoch(self, number: int, *, batch_size: int, seed: int, pad_id: int) -> Batches[PairBatch]:
        """`batch_size` is in tokens: see `token_batches`."""
        corpus = self.corpora[number % len(self.corpora)]
        order = token_batches(corpus, batch_size, seed=seed)
        return Batches(order, lambda indices: corpus.batch(indices, start_id=self.start_id, pad_id=pad_id))


def token_batches(corpus: EncodedPairs, limit: int, *, seed: int) -> list[list[int]]:
    """Batches of indices that cover each pair once; rows times the longest side, padding included, stay within `limit`.

    Pairs of like lengths share a batch; which ones is drawn anew for each seed. ValueError for a pair beyond the limit.
    """
    draw = random.Random(seed)
    lengths = list(zip(corpus.sources.lengths.tolist(), corpus.targets.lengths.tolist(), strict=True))
    keys = [snake(source + draw.random(), target) for source, target in lengths]
    batches: list[list[int]] = [[]]
    longest = 0
    for index in sorted(range(len(keys)), key=keys.__getitem__):
        longest = max(longest, *lengths[index])
        if longest * (len(batches[-1]) + 1) > limit:
            batches.append([])
            longest = max(lengths[index])
        if longest > limit:
            raise ValueError(f"pair {index} has {longest} tokens, a batch holds {limit}")
        batches[-1].append(index)
    draw.shuffle(batches)
    return batches


def snake(source: float, target: int, *, width: int = 3) -> tuple[int, float]:
    """Sorts by target length in steps of `width`, within a step by source length, now up, now down."""
    level = target // width
    return level, source if level % 2 else -source


def read_parallel(source: Path, target: Path) -> list[Pair]:
    """Two files, one sentence a line; ValueError if they do not have the same number of lines, or are empty."""
    sides = [path.read_text(encoding="utf-8").rstrip("\n").split("\n") for path in (source, target)]
    if sides == [[""], [""]]:
        raise ValueError(f"{source} and {target} are empty")
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{source} has {len(sides[0])} lines, {target} has {len(sides[1])}")
    return [Pair(*(side.strip() for side in pair)) for pair in zip(*sides, strict=True)]


def read_pairs(path: Path) -> list[Pair]:
    """One file, source TAB target on each line; ValueError names a line that is not so."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    for number, columns in enumerate(lines, start=1):
        if len(columns) != 2:
            raise ValueError(f"{path}:{number}: expected a sentence, a tab and its translation, found {columns}")
    return [Pair(source.strip(), target.strip()) for source, target in lines]


def split_by_source(pairs: Iterable[Pair], num_sources: int, *, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): every translation of a held-out source, compared without case and spaces, is held out.

    ValueError if there are fewer than `num_sources`.
    """
    pairs = list(pairs)
    sources = sorted({folded(pair.source) for pair in pairs})
    if len(sources) < num_sources:
        raise ValueError(f"{len(sources)} different sources are too few to hold out {num_sources}")
    held = set(random.Random(seed).sample(sources, num_sources))
    return (
        [pair for pair in pairs if folded(pair.source) not in held],
        [pair for pair in pairs if folded(pair.source) in held],
    )


def folded(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum())
