"""A translation bundle == its checkpoint: interface, weights, logits, tokens, beams, attention, batching, BLEU.

    python -m model.verify_translator BUNDLE CHECKPOINT --data FOLDER

The reference is the PyTorch model, which shares no code with the graphs; the subject is the engine that serves. Every
check runs, whatever the others say, and states what it found.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.checks import Check, Found, Report, checked, difference, error, largest, stated
from model.commands import run
from model.config import ModelConfig
from model.data import pad
from model.recipes.translation import DATA_HELP
from model.recipes.translation_corpora import everyday_corpus
from model.search import beam_search
from model.subwords import PAD_ID, START_ID
from model.train import CHECKPOINT_HELP
from model.translator_graph import interfaces
from model.translator_quality import NUM_BEAMS, SEARCHES, Ids, Logits, Sets, Written, quality, search, write
from model.translator_samples import Samples, random_ids, samples_for
from model.translator_vocabulary import Translator, load_translator
from model.translator_weights import WEIGHTS_FILE, translator_pieces
from model.verify_generation import agreement, facts, interface, packed_again
from service.worker.bundle import Bundle, load_bundle
from service.worker.generation.likeliest import Likeliest
from service.worker.generation.translator import TranslatorEngine
from service.worker.session import Session

NUM_SLOTS = 16
NUM_SOURCES = 100
NUM_NEW = 60  # greedy tokens a source
NUM_STEPS = 8  # of decoding, when batches are compared
NUM_MAPS = 8  # sources whose attention is compared
MAX_DIFFERENCE = 1e-4  # of float32 logits, and of attention weights
MAX_ERROR = 0.14  # of int8 logits (shipped: 0.05)
MIN_AGREEMENT = 0.9  # of int8's greedy tokens with the reference's choice after the same text
MIN_SAME = 0.5  # of int8's best hypotheses with the reference's
MAX_MOVED = 0.05  # of int8 attention: the share of a row that lies elsewhere, on average
MAX_FROM_ONE = 1e-5  # of a row's sum
MAX_BLEU_LOSS = 0.3
MAX_MISSTATED = 0.3  # of BLEU


@dataclass(frozen=True)
class Subject:
    """What is compared: the bundle with its engine, and the model it claims to be."""

    bundle: Bundle
    engine: TranslatorEngine
    translator: Translator
    sources: Sequence[Ids]
    samples: Samples

    @property
    def is_exact(self) -> bool:
        return self.bundle.manifest.precision == "float32"

    @cached_property
    def written(self) -> list[Written]:
        """The engine's greedy translation of each source."""
        limit = min(NUM_NEW, self.engine.max_tokens - 1)
        groups = [self.sources[at : at + NUM_SLOTS] for at in range(0, len(self.sources), NUM_SLOTS)]
        return [one for group in groups for one in write(self.engine, group, [limit] * len(group))]

    @cached_property
    def reference(self) -> list[Logits]:
        """What the model says (T, vocabulary) after each token that the engine wrote."""
        return [self.forced(source, one.ids)[0] for source, one in zip(self.sources, self.written, strict=True)]

    @torch.no_grad()
    def forced(self, source: Ids, target: Ids) -> tuple[Logits, dict[str, Logits]]:
        """Logits (T, vocabulary) for the tokens of `target`; each attention's weights (1, H, queries, keys) by name."""
        traces: dict[str, list[Tensor]] = {"encoder": [], "decoder": [], "cross": []}
        memory = self.translator.model.encode(torch.tensor([list(source)]), trace=traces["encoder"])
        ids = torch.tensor([[START_ID, *target[:-1]]])
        logits, _ = self.translator.model.decode(ids, memory, trace=traces["decoder"], cross_trace=traces["cross"])
        told = {f"{part}_attention.{at}": one.numpy() for part, trace in traces.items() for at, one in enumerate(trace)}
        return logits[0].numpy(), told


def open_engine(bundle: Bundle, *, threads: int = 1) -> TranslatorEngine:
    return TranslatorEngine(bundle, num_slots=NUM_SLOTS, threads=threads)


def verify_translator(
    directory: Path, translator: Translator, sources: Sequence[Ids], samples: Samples, *, sets: Sets
) -> Report:
    """Compares the bundle with the checkpoint on `sources`, and BLEU on the `sets` of pairs, if there are any.

    `samples`: what the bundle's integers were made for.
    """
    try:
        bundle = load_bundle(directory)
        subject = Subject(bundle, open_engine(bundle), translator, sources, samples)
    except Exception as error:  # whatever keeps it from being served is the finding
        return Report((Check("loads", False, str(error)),))
    config, num_written = translator.config, translator.num_written
    if subject.engine.vocab_size != num_written:  # tokens were numbered by other pairs: all else would tell of that
        found = f"the bundle writes {subject.engine.vocab_size} tokens, these pairs {num_written}"
        return Report((Check("training pairs", False, f"{found}: give the --data that it was exported with"),))
    declared = interfaces(config, num_written)
    own_facts = partial(facts, task="translation", graphs=declared, checkpoint_sha256=translator.sha256)
    checks = [
        checked("facts", own_facts, bundle, config, translator.text),
        checked("interface", interface, bundle, declared),
        checked("weights", weights, subject),
        checked("logits", logits, subject),
        checked("greedy tokens", greedy_tokens, subject),
        checked("beams", beams, subject),
        checked("attention", attention, subject),
        checked("batched == alone", batched_alone, subject),
        checked("encoded together == alone", encoded_alone, subject),
    ]
    if not sets:
        return Report((*checks, Check("BLEU", True, "skipped: no pairs were given")))
    measured = {"bleu": quality(subject.engine, translator.model, translator.subwords, sets)}
    checks += [judged(measured["bleu"]), *stated(bundle.manifest.quality, measured, within=MAX_MISSTATED)]
    return Report(tuple(checks), measured)


def weights(subject: Subject) -> Found:
    """Packed once more, the checkpoint's weights are the file's, byte for byte."""
    samples = None if subject.is_exact else subject.samples
    translator = subject.translator
    parts = translator_pieces(translator.config, translator.model, samples, translator.num_written)
    return packed_again(subject.bundle, WEIGHTS_FILE, parts)


def logits(subject: Subject) -> Found:
    """Every step of every translation: to MAX_DIFFERENCE in float32, to an error of MAX_ERROR in int8."""
    ours = np.concatenate([one.logits for one in subject.written])
    theirs = np.concatenate(subject.reference)[:, : subject.translator.num_written]
    gap, distance = difference(ours, theirs), error(ours, theirs)
    found = f"largest difference {gap:.2e}, error {distance:.4f} at {len(ours)} steps"
    return (gap <= MAX_DIFFERENCE if subject.is_exact else distance <= MAX_ERROR), found


def greedy_tokens(subject: Subject) -> Found:
    """Each token that the engine writes, is it what the reference would write after the same text?

    The reference may write those, too, that have no logits here.
    """
    pairs = zip(subject.written, subject.reference, strict=True)
    hits = [theirs.argmax(-1) == ours.ids for ours, theirs in pairs]
    return agreement(hits, 1.0 if subject.is_exact else MIN_AGREEMENT)


def beams(subject: Subject) -> Found:
    """The search that serves against the reference's, among the same tokens: all hypotheses, in order, in float32.

    In int8 another beam may win; how many do is told, and what that means for BLEU is judged by itself.
    """
    likeliest, limit = Likeliest(), min(NUM_NEW, subject.engine.max_tokens - 1)
    options: dict[str, Any] = {"num_beams": NUM_BEAMS, "length_penalty": 1.0}
    theirs = beam_search(
        subject.translator.model,
        *pad(subject.sources, PAD_ID),
        max_new=[limit] * len(subject.sources),
        num_written=subject.translator.num_written,
        **options,
    )
    ours = [search(subject.engine, likeliest, source, limit, **options) for source in subject.sources]
    pairs = list(zip(ours, theirs, strict=True))
    num_best = sum(one[0].ids == other[0].ids for one, other in pairs)
    num_all = sum([a.ids for a in one] == [b.ids for b in other] for one, other in pairs)
    found = f"the best of {NUM_BEAMS} is the reference's for {num_best} of {len(pairs)} sources, all are for {num_all}"
    return (num_all == len(pairs) if subject.is_exact else num_best >= MIN_SAME * len(pairs)), found


def attention(subject: Subject) -> Found:
    """Every layer and head of the graph that tells attention, on what the engine wrote; its logits are the engine's."""
    spec = subject.bundle.graph("attention")
    session = Session(subject.bundle.graph_path("attention"), spec)
    names = [tensor.name for tensor in spec.outputs]
    written = subject.written[:NUM_MAPS]
    told_logits: list[Logits] = []
    gaps: list[tuple[float, float, float]] = []
    for source, one in zip(subject.sources, written, strict=False):
        feeds = {
            "ids": np.array([source]),
            "target_ids": np.array([[START_ID, *one.ids[:-1]]]),
            "keep": np.arange(len(one.ids)),
        }
        told = dict(zip(names, session.run(feeds), strict=True))
        told_logits.append(told.pop("logits")[0])
        theirs = subject.forced(source, one.ids)[1]
        for name, ours in told.items():
            moved = float(np.abs(ours - theirs[name]).sum(-1).mean()) / 2
            gaps.append((difference(ours, theirs[name]), moved, difference(ours.sum(-1), 1)))
    furthest, moved, from_one = map(largest, zip(*gaps, strict=True))
    told_all, served = np.concatenate(told_logits), np.concatenate([one.logits for one in written])
    from_decoded, distance = difference(told_all, served), error(told_all, served)
    if subject.is_exact:
        is_near = furthest <= MAX_DIFFERENCE and from_decoded <= MAX_DIFFERENCE
    else:
        is_near = moved <= MAX_MOVED and distance <= MAX_ERROR
    return is_near and from_one <= MAX_FROM_ONE, (
        f"largest difference {furthest:.2e}, {moved:.2%} of a row elsewhere, rows sum to 1 to {from_one:.0e}; "
        f"logits differ from the served ones by {from_decoded:.0e}, error {distance:.4f}"
    )


def decoded(engine: TranslatorEngine, sources: Sequence[Ids], tokens: NDArray[np.int64]) -> Logits:
    """Logits (rows, steps, V): the sources read one after another, then `tokens` (steps, rows) fed together."""
    steps = [np.stack([engine.prefill(slot, source, 0, keep="last")[0] for slot, source in enumerate(sources)])]
    for at, step in enumerate(tokens):
        steps.append(engine.decode(step.tolist(), [len(source) + at for source in sources]).copy())
    return np.stack(steps, axis=1)


def batched_alone(subject: Subject) -> Found:
    """The same bits for a row alone, beside rows of other sources, beside fewer, and on two threads."""
    draw = np.random.default_rng(0)
    longest = min(subject.engine.max_tokens, 8 * NUM_SLOTS)
    lengths = draw.permutation(np.linspace(1, longest, NUM_SLOTS, dtype=int))
    sources = [draw.integers(0, subject.translator.config.vocab_size, length).tolist() for length in lengths]
    tokens = draw.integers(0, subject.translator.config.vocab_size, (NUM_STEPS, NUM_SLOTS))
    rows = range(NUM_SLOTS)
    alone = np.concatenate([decoded(subject.engine, [sources[at]], tokens[:, at : at + 1]) for at in rows])
    half = NUM_SLOTS // 2
    tried = {
        "all together": (subject.engine, slice(None)),
        "half of them": (subject.engine, slice(half, None)),
        "all together on two threads": (open_engine(subject.bundle, threads=2), slice(None)),
    }
    wrong = []
    for name, (engine, chosen) in tried.items():
        gap = difference(decoded(engine, sources[chosen], tokens[:, chosen]), alone[chosen])
        wrong += [f"{name}: largest difference {gap:.2e}"] if gap else []
    found = f"bit-equal for {NUM_SLOTS} rows, {NUM_STEPS} steps, {len(tried)} kinds of batch"
    return not wrong, "; ".join(wrong) or found


def encoded_alone(subject: Subject) -> Found:
    """The same bits for a source alone and among others of its length."""
    path, spec = subject.bundle.graph_path("encode"), subject.bundle.graph("encode")
    one, two = (Session(path, spec, threads=threads) for threads in (1, 2))
    draw, wrong = np.random.default_rng(1), []
    lengths = [1, 2, 7, 33, subject.engine.max_tokens]
    for length in lengths:
        ids = draw.integers(0, subject.translator.config.vocab_size, (5, length))
        alone = [one.run({"ids": ids[at : at + 1]}) for at in range(len(ids))]
        for session in (one, two):
            together = session.run({"ids": ids})
            pairs = [(memory, parts) for memory, *parts in zip(together, *alone, strict=True)]
            gap = largest(difference(memory, np.concatenate(parts)) for memory, parts in pairs)
            wrong += [f"{length} tokens, {session.threads} threads: {gap:.2e}"] if gap else []
    return not wrong, "; ".join(wrong) or f"bit-equal for sources of {lengths} tokens"


def judged(measured: Mapping[str, Any]) -> Check:
    scores = {f"{name}, {kind}": one[kind] for name, one in measured.items() for kind in SEARCHES}
    loss = max(round(one["bleu_of_checkpoint"] - one["bleu"], 2) for one in scores.values())
    told = [f"{name}: {one['bleu']}, the checkpoint {one['bleu_of_checkpoint']}" for name, one in scores.items()]
    return Check("BLEU", loss <= MAX_BLEU_LOSS, "; ".join(told))


def sources_of(config: ModelConfig, subwords: Tokenizer, sets: Sets) -> list[list[int]]:
    """Ids of the first sentences of each set in turn; random ones where there are no sets."""
    texts = [pair.source for pairs in zip(*sets.values(), strict=False) for pair in pairs][:NUM_SOURCES]
    if texts:
        return [encoding.ids for encoding in subwords.encode_batch_fast(texts)]
    return random_ids(config, NUM_SOURCES, seed=2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument("--data", type=Path, help=f"needed where the export had it: {DATA_HELP}")
    flags = parser.parse_args(arguments)
    corpus = everyday_corpus(flags.data) if flags.data else None
    training, sets = (corpus.training, corpus.test) if corpus else ([], {})
    translator = load_translator(flags.checkpoint, training)
    config, subwords = translator.config, translator.subwords
    sources, samples = sources_of(config, subwords, sets), samples_for(config, subwords, training)
    report = verify_translator(flags.bundle, translator, sources, samples, sets=sets)
    print(report.text())
    return 0 if report.passed else 1


if __name__ == "__main__":
    run(main)
