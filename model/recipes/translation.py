"""English to German, from scratch: a tiny model of captions to compare with papers, and the larger one that is shipped.

    python -m model.recipes.translation --data FOLDER --out runs/translation

`captions` is transformer_tiny (Wu et al. 2021) on Multi30k alone, lower-cased, in tokens. `everyday` is larger, takes
raw text and gives raw text, and learns from Tatoeba too. Each stage has its own folder under --out; a stage that is
done is skipped, one that was interrupted resumes:
  NAME-subwords  the joint vocabulary, and random segmentations of the training pairs
  NAME-plain     cross-entropy, the rate falling with the inverse square root
  NAME-paired    trained on, two passes of each batch made consistent (R-Drop, Liang et al. 2021), the rate falling to 0
  NAME           the mean of the last weights that `paired` kept, and its scores
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from model.config import ModelConfig
from model.curve import Metrics
from model.evaluate import Score, bleu, chrf, moses_tokens
from model.objective import initialise, translation_loss
from model.pairs import Pair, Variants
from model.recipes.translation_corpora import Corpus, captions_corpus, everyday_corpus
from model.search import beam
from model.subwords import PAD_ID, START_ID, encode_pairs, load_encoded, load_subwords, save_encoded, train_subwords
from model.train import Run, TrainConfig, load_checkpoint, mean_of_kept, save_checkpoint, train
from model.transformer import EncoderDecoder
from model.translate import translate

BPE_DROPOUT = 0.1
SMOOTHING = 0.1
CONSISTENCY = 5.0
BEAMS = 5
PENALTIES = (0.6, 1.0, 1.4)  # of the length; chosen on validation
DATA_HELP = """folder with multi30k/{train,val,test_2016_flickr}.{en,de}, the same as .lc.norm.tok.{en,de}
(github.com/multi30k/dataset, task 1), and tatoeba/train.tsv, English TAB German (manythings.org/anki)"""


@dataclass(frozen=True)
class Plan:
    """One model: its size and how it is trained."""

    name: str
    model: ModelConfig
    plain: TrainConfig
    paired: TrainConfig
    num_variants: int  # segmentations of the training pairs, taken in turn

    def stages(self) -> tuple[str, ...]:
        return (f"{self.name}-subwords", f"{self.name}-plain", f"{self.name}-paired", self.name)


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
    dropout=0.3,
    attention_dropout=0.1,
    pad_id=PAD_ID,
)
CAPTIONS = Plan(
    name="captions",
    model=TINY,
    plain=TrainConfig(
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
        keep=10,
    ),
    paired=TrainConfig(
        learning_rate=2e-3,
        epochs=20,
        batch_size=4000,
        warmup=0.02,
        beta2=0.98,
        average=0.98,
        precision="bfloat16",
        seed=2,
        evaluate_every=200,
        save_every=50,
        keep=5,
    ),
    num_variants=16,
)
EVERYDAY = Plan(
    name="everyday",
    model=replace(TINY, vocab_size=8000, width=256, num_layers=6, num_decoder_layers=2, feed_forward=1024, dropout=0.2),
    plain=replace(CAPTIONS.plain, learning_rate=1.5e-3, epochs=14, batch_size=6000, evaluate_every=500, save_every=50),
    paired=replace(CAPTIONS.paired, learning_rate=6e-4, epochs=3, batch_size=6000, save_every=25),
    num_variants=8,
)
PLANS = (CAPTIONS, EVERYDAY)


def make_subwords(folder: Path, pairs: list[Pair], plan: Plan) -> None:
    """Writes tokenizer.json and the segmentations that the epochs take in turn; a file that is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    if not path.exists():
        train_subwords((text for pair in pairs for text in pair), plan.model.vocab_size).save(str(path))
    tokenizer = load_subwords(path)
    for number in range(plan.num_variants):
        variant = folder / f"{number:02d}.safetensors"
        if not variant.exists():
            save_encoded(encode_pairs(tokenizer, pairs, dropout=BPE_DROPOUT), variant)


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


def train_plain(plan: Plan, out: Path, corpus: Corpus) -> None:
    torch.manual_seed(plan.plain.seed)
    model = EncoderDecoder(plan.model)
    initialise(model)
    train_stage(plan, out, corpus, model, plan.plain, "plain", consistency=0.0)


def train_paired(plan: Plan, out: Path, corpus: Corpus) -> None:
    _, model = load_checkpoint(out / f"{plan.name}-plain", EncoderDecoder)
    train_stage(plan, out, corpus, model, plan.paired, "paired", consistency=CONSISTENCY)


def train_stage(
    plan: Plan, out: Path, corpus: Corpus, model: EncoderDecoder, schedule: TrainConfig, stage: str, consistency: float
) -> None:
    folder, subwords = out / f"{plan.name}-{stage}", out / f"{plan.name}-subwords"
    loss = partial(translation_loss, pad_id=PAD_ID, smoothing=SMOOTHING, consistency=consistency)
    run = Run(folder, model, schedule, examples=read_variants(subwords), pad_id=PAD_ID, loss=loss)
    score = scorer(model, load_subwords(subwords / "tokenizer.json"), corpus)
    train(run, score)
    facts = {"train": asdict(schedule), "updates": run.step, "consistency": consistency, "scores": score()}
    save(folder, plan, corpus, model, facts, subwords / "tokenizer.json")


def save(
    folder: Path, plan: Plan, corpus: Corpus, model: EncoderDecoder, facts: dict[str, Any], tokenizer: Path
) -> None:
    told = {"recipe": "model.recipes.translation", "data": corpus.data, "smoothing": SMOOTHING, **facts}
    save_checkpoint(folder, plan.model, model, tokenizer=tokenizer, provenance=told | {"bpe_dropout": BPE_DROPOUT})


def conclude(plan: Plan, out: Path, corpus: Corpus) -> None:
    """Averages, chooses the length penalty on validation, scores the test sets once, and prints the figures."""
    folder, paired = out / plan.name, out / f"{plan.name}-paired"
    _, model = load_checkpoint(paired, EncoderDecoder)
    mean_of_kept(paired, model)
    tokenizer = load_subwords(paired / "tokenizer.json")
    found = {penalty: scores(model, tokenizer, corpus, search=searching(penalty)) for penalty in PENALTIES}
    penalty = max(found, key=lambda key: sum(score.value for score in found[key].values()))
    facts: dict[str, Any] = {"num_beams": BEAMS, "length_penalty": penalty}
    facts["validation"] = {key: {name: value._asdict() for name, value in each.items()} for key, each in found.items()}
    facts["test"] = test_scores(model, tokenizer, corpus, penalty)
    print(json.dumps(facts, indent=2))
    save(folder, plan, corpus, model, facts, paired / "tokenizer.json")


def searching(penalty: float) -> Callable[..., list[list[int]]]:
    return partial(beam, num_beams=BEAMS, length_penalty=penalty)


def test_scores(model: EncoderDecoder, tokenizer: Tokenizer, corpus: Corpus, penalty: float) -> dict[str, Any]:
    """BLEU and chrF of the texts as they are; of raw text also the BLEU of papers, lower-cased and in Moses tokens."""
    told: dict[str, Any] = {}
    for name, pairs in corpus.test.items():
        sources, references = zip(*pairs, strict=True)
        found = translate(model, tokenizer, sources, search=searching(penalty))
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
    stages = [stage for plan in PLANS for stage in plan.stages()]
    parser.add_argument("--stage", choices=stages, help="default: all that are not done")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    return parser.parse_args()


def run_plan(plan: Plan, out: Path, corpus: Corpus, stage: str | None) -> None:
    first, *rest = plan.stages()
    if stage in (None, first):
        make_subwords(out / first, corpus.training, plan)
    for name, work in zip(rest, (train_plain, train_paired, conclude), strict=True):
        if stage in (None, name) and not (out / name / "train.json").exists():
            work(plan, out, corpus)


def main() -> None:
    flags = parse()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    for plan, read in zip(PLANS, (captions_corpus, everyday_corpus), strict=True):
        if flags.plan in (None, plan.name) and flags.stage in (None, *plan.stages()):
            run_plan(plan, flags.out, read(flags.data), flags.stage)


if __name__ == "__main__":
    main()
