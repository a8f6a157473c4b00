"""What the translation models learn from and are scored on: Multi30k and Tatoeba, and what is held out of them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from model.pairs import Pair, folded, read_pairs, read_parallel, split_by_source

NUM_HELD = 1000  # everyday sentences for validation, and as many for the final figure

MULTI30K = "Multi30k task 1: captions of Flickr30k and translations, for research"
TATOEBA = "Tatoeba through manythings.org, CC-BY 2.0"


@dataclass(frozen=True)
class Corpus:
    """Pairs for training, named sets for choosing and for the final figures, and how sacrebleu takes them apart."""

    training: list[Pair]
    validation: dict[str, list[Pair]]
    test: dict[str, list[Pair]]
    tokenize: str
    data: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pairs for training."""
        return hashlib.sha256(json.dumps(self.training).encode()).hexdigest()


def read_captions(folder: Path, form: str) -> dict[str, list[Pair]]:
    """Multi30k (Elliott et al. 2016), task 1; `form` is "" for raw text, ".lc.norm.tok" for what papers score."""
    names = ("train", "val", "test_2016_flickr")
    return {name: read_parallel(folder / f"{name}{form}.en", folder / f"{name}{form}.de") for name in names}


def captions_corpus(folder: Path) -> Corpus:
    pairs = read_captions(folder / "multi30k", ".lc.norm.tok")
    held = {"test_2016_flickr": pairs["test_2016_flickr"]}
    return Corpus(pairs["train"], {"validation": pairs["val"]}, held, "none", (MULTI30K,))


def everyday_corpus(folder: Path) -> Corpus:
    """Captions four times, for they are so few, and Tatoeba without any source that is held out anywhere."""
    captions = read_captions(folder / "multi30k", "")
    tatoeba = folder / "tatoeba" / "train.tsv"
    pairs = read_pairs(tatoeba)
    try:
        rest, held = split_by_source(pairs, 2 * NUM_HELD, seed=1)
    except ValueError as error:
        raise ValueError(f"{tatoeba}: {error}") from None
    first = list({folded(pair.source): pair for pair in reversed(held)}.values())  # one translation of each
    validation = {"captions": captions["val"], "everyday": first[:NUM_HELD]}
    test = {"test_2016_flickr": captions["test_2016_flickr"], "everyday_test": first[NUM_HELD:]}
    barred = {folded(pair.source) for pairs in (*validation.values(), *test.values()) for pair in pairs}
    training = [pair for pair in rest + 4 * captions["train"] if folded(pair.source) not in barred]
    return Corpus(training, validation, test, "13a", (MULTI30K, TATOEBA))
