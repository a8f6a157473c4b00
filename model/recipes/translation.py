"""English to German, from scratch: a tiny model of captions to compare with papers, and the larger one that is shipped.

    python -m model.recipes.translation --data FOLDER --out runs/translation

`captions` is transformer_tiny (Wu et al. 2021) on Multi30k alone, lower-cased, in tokens. `everyday` is larger, takes
raw text and gives raw text, and learns from Tatoeba too. Each stage has its own folder under --out; a stage that is
done is skipped, one that was interrupted resumes, and data other than those they were made of are refused:
  NAME-subwords  the joint vocabulary, and random segmentations of the training pairs
  NAME-plain     cross-entropy
  NAME-descent-N captions only: trained on with less dropout, the rate falling to 0, and so again
  NAME-longer    everyday only: trained on for more epochs, the rate falling to 0 again
  NAME-longest   everyday only: and once more
  NAME           what the last stage ended with, and its scores
Each stage ends with the moving average of its weights.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
from tokenizers import Tokenizer

from model.commands import run
from model.config import ModelConfig
from model.curve import Metrics
from model.evaluate import Score, bleu, chrf, moses_tokens
from model.objective import initialise, translation_loss
from model.pairs import Variants
from model.recipes.translation_corpora import Corpus, captions_corpus, everyday_corpus
from model.search import beam
from model.subwords import PAD_ID, START_ID, encode_pairs, load_encoded, load_subwords, save_encoded, train_subwords
from model.train import Run, TrainConfig, load_checkpoint, save_checkpoint, train
from model.transformer import EncoderDecoder
from model.translate import translate

BPE_DROPOUT = 0.1
MADE_OF = "made_of.json"
SMOOTHING = 0.1
BEAMS = 5
LENGTH_PENALTY = 1.0  # what the paper's figure was made with, fairseq's default, and the service's
DATA_HELP = """folder with multi30k/{train,val,test_2016_flickr}.{en,de}, the same as .lc.norm.tok.{en,de}
(github.com/multi30k/dataset, task 1), and tatoeba/train.tsv, English TAB German (manythings.org/anki)"""


@dataclass(frozen=True)
class Stage:
    """One run, from where the one before ended."""

    name: str
    dropout: float
    train: TrainConfig


@dataclass(frozen=True)
class Plan:
    """One model: its size and how it is trained."""

    name: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    num_variants: int  # segmentations of the training pairs, taken in turn

    def folders(self) -> list[str]:
        """Where the vocabulary, each stage and the result are."""
        return [f"{self.name}-{name}" for name in ("subwords", *(stage.name for stage in self.stages))] + [self.name]


TINY = ModelConfig(
    kind="encoder-decoder",
    vocab_size=6000,
    width=128,
    num_heads=4,
    num_layers=4,
    feed_forward=256,
    max_length=256,
    norm_order="pre",
    norm_eps=1e-5,
    positions="sinusoidal",
    activation="relu",
    has_embedding_norm=False,
    scale_embeddings=True,
    attention_dropout=0.1,
    pad_id=PAD_ID,
)
PLAIN = TrainConfig(
    learning_rate=4e-3,
    epochs=40,
    batch_size=4000,
    schedule="inverse-sqrt",
    warmup=0.2,
    beta2=0.98,
    average=0.99,
    precision="bfloat16",
    seed=1,
    evaluate_every=300,
    save_every=150,
)
DESCENT = replace(PLAIN, schedule="linear", warmup=0.01, average=0.98, evaluate_every=600, save_every=100)
DESCENTS = ((1.8e-3, 24), (1.2e-3, 11), (1.5e-3, 16), (1.5e-3, 20))  # learning rate, epochs
SHORT = replace(
    PLAIN,
    learning_rate=2e-3,
    epochs=3,
    batch_size=3000,
    schedule="linear",
    warmup=0.1,
    average=0.98,
    evaluate_every=1000,
    save_every=100,
)
LONGER = replace(SHORT, learning_rate=1.6e-3, epochs=5, warmup=0.02, seed=2)
LONGEST = replace(LONGER, learning_rate=1.4e-3, epochs=4, seed=3)
CAPTIONS = Plan(
    name="captions",
    model=TINY,
    stages=(
        Stage("plain", 0.3, PLAIN),
        *(
            Stage(f"descent-{number}", 0.2, replace(DESCENT, learning_rate=rate, epochs=epochs, seed=2 + number))
            for number, (rate, epochs) in enumerate(DESCENTS, start=1)
        ),
    ),
    num_variants=16,
)
EVERYDAY = Plan(
    name="everyday",
    model=replace(TINY, vocab_size=8000, width=256, num_decoder_layers=2, feed_forward=768),
    stages=(Stage("plain", 0.1, SHORT), Stage("longer", 0.1, LONGER), Stage("longest", 0.1, LONGEST)),
    num_variants=8,
)
PLANS = (CAPTIONS, EVERYDAY)


def make_subwords(folder: Path, corpus: Corpus, plan: Plan) -> None:
    """Writes tokenizer.json and the segmentations that the epochs take in turn; a file that is there is kept.

    ValueError if they are of other pairs, or made in another way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / MADE_OF).write_text(json.dumps(made_of(corpus, plan), indent=2))
    check_stage(folder / MADE_OF, made_of(corpus, plan))
    pairs, path = corpus.training, folder / "tokenizer.json"
    if not path.exists():
        train_subwords((text for pair in pairs for text in pair), plan.model.vocab_size).save(str(path))
    tokenizer = load_subwords(path)
    for number in range(plan.num_variants):
        variant = folder / f"{number:02d}.safetensors"
        if not variant.exists():
            save_encoded(encode_pairs(tokenizer, pairs, dropout=BPE_DROPOUT), variant)


def made_of(corpus: Corpus, plan: Plan) -> dict[str, Any]:
    """All that the segmentations depend on."""
    sizes = {"vocab_size": plan.model.vocab_size, "num_variants": plan.num_variants}
    return {"pairs": corpus.digest, "bpe_dropout": BPE_DROPOUT, **sizes}


def check_stage(path: Path, facts: dict[str, Any]) -> None:
    """ValueError if the file in which a stage says what it is of is not there, or says other than `facts`."""
    folder = path.parent
    if not path.exists():
        raise ValueError(f"{path} is missing; run --stage {folder.name} first, or remove what is there of it")
    if not facts.items() <= json.loads(path.read_text()).items():
        raise ValueError(f"{folder} is not of these data; give another --out, or remove it and the stages after it")


def read_variants(folder: Path) -> Variants:
    return Variants([load_encoded(path) for path in sorted(folder.glob("*.safetensors"))], START_ID)


def scorer(model: EncoderDecoder, tokenizer: Tokenizer, corpus: Corpus) -> Callable[[], Metrics]:
    """BLEU on each validation set of the greedy translations of the model as it is when called."""
    return lambda: {f"{name}_bleu": score.value for name, score in scores(model, tokenizer, corpus).items()}


def scores(model: EncoderDecoder, tokenizer: Tokenizer, corpus: Corpus, **how: Any) -> dict[str, Score]:
    """BLEU on each validation set; `how` goes to `translate`."""
    found = {}
    for name, pairs in corpus.validation.items():
        sources, references = zip(*pairs, strict=True)
        found[name] = bleu(translate(model, tokenizer, sources, **how), references, tokenize=corpus.tokenize)
    return found


def train_stage(plan: Plan, number: int, out: Path, corpus: Corpus) -> None:
    subwords, *earlier = (out / name for name in plan.folders()[: number + 1])
    stage, tokenizer = plan.stages[number], subwords / "tokenizer.json"
    check_stage(subwords / MADE_OF, made_of(corpus, plan))
    torch.manual_seed(stage.train.seed)
    config = replace(plan.model, dropout=stage.dropout)
    model = EncoderDecoder(config)
    initialise(model)
    if earlier:
        check_stage(earlier[-1] / "train.json", {"pairs": corpus.digest})
        load_model(model, earlier[-1] / "model.safetensors")
    loss = partial(translation_loss, pad_id=PAD_ID, smoothing=SMOOTHING)
    folder = out / plan.folders()[number + 1]
    run = Run(folder, model, stage.train, architecture=config, examples=read_variants(subwords), loss=loss)
    score = scorer(model, load_subwords(tokenizer), corpus)
    train(run, score)
    facts = {"train": asdict(stage.train), "updates": run.step, "scores": score()}
    save(folder, config, corpus, model, facts, tokenizer)


def save(
    folder: Path, config: ModelConfig, corpus: Corpus, model: EncoderDecoder, facts: dict[str, Any], tokenizer: Path
) -> None:
    told = {"recipe": "model.recipes.translation", "data": corpus.data, "pairs": corpus.digest, "smoothing": SMOOTHING}
    told |= {**facts, "bpe_dropout": BPE_DROPOUT}
    save_checkpoint(folder, config, model, tokenizer=tokenizer, provenance=told)


def conclude(plan: Plan, out: Path, corpus: Corpus) -> None:
    """Scores the validation sets and the test sets with beam search, and prints the figures."""
    *_, last, result = (out / name for name in plan.folders())
    check_stage(last / "train.json", {"pairs": corpus.digest})
    config, model = load_checkpoint(last, EncoderDecoder)
    tokenizer = load_subwords(last / "tokenizer.json")
    search = partial(beam, num_beams=BEAMS, length_penalty=LENGTH_PENALTY)
    validation = {name: score._asdict() for name, score in scores(model, tokenizer, corpus, search=search).items()}
    facts: dict[str, Any] = {"num_beams": BEAMS, "length_penalty": LENGTH_PENALTY, "validation": validation}
    facts["test"] = test_scores(model, tokenizer, corpus, search=search)
    print(json.dumps(facts, indent=2))
    save(result, config, corpus, model, facts, last / "tokenizer.json")


def test_scores(model: EncoderDecoder, tokenizer: Tokenizer, corpus: Corpus, **how: Any) -> dict[str, Any]:
    """BLEU and chrF of the texts as they are; of raw text also the BLEU of papers, lower-cased and in Moses tokens."""
    told: dict[str, Any] = {}
    for name, pairs in corpus.test.items():
        sources, references = zip(*pairs, strict=True)
        found = translate(model, tokenizer, sources, **how)
        told[name] = {"bleu": bleu(found, references, tokenize=corpus.tokenize), "chrf": chrf(found, references)}
        if corpus.tokenize != "none":
            forms = (moses_tokens(texts, "de") for texts in (found, references))
            told[name]["lower_case_tokens_bleu"] = bleu(*forms, tokenize="none")
    return {name: {metric: score._asdict() for metric, score in each.items()} for name, each in told.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/translation"))
    parser.add_argument("--data", type=Path, required=True, help=DATA_HELP)
    parser.add_argument("--plan", choices=[plan.name for plan in PLANS], help="default: both")
    stages = [name for plan in PLANS for name in plan.folders()]
    parser.add_argument("--stage", choices=stages, help="default: all that are not done")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    return parser.parse_args()


def run_plan(plan: Plan, out: Path, corpus: Corpus, stage: str | None) -> None:
    first, *trained, last = plan.folders()
    if stage in (None, first):
        make_subwords(out / first, corpus, plan)
    works = [(name, partial(train_stage, plan, number)) for number, name in enumerate(trained)]
    for name, work in [*works, (last, partial(conclude, plan))]:
        if stage in (None, name):
            told = out / name / "train.json"
            if not told.exists():
                work(out, corpus)
            check_stage(told, {"pairs": corpus.digest})


def main() -> None:
    flags = parse()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    for plan, read in zip(PLANS, (captions_corpus, everyday_corpus), strict=True):
        if flags.plan in (None, plan.name) and flags.stage in (None, *plan.folders()):
            run_plan(plan, flags.out, read(flags.data), flags.stage)


if __name__ == "__main__":
    run(main)
