"""A generation bundle == its checkpoint: interface, weights, logits, greedy tokens, batch independence, perplexity.

    python -m model.verify_decoder BUNDLE FILE.gguf [--text wikitext2/test.txt]

The reference is the PyTorch model, which shares no code with the graph; the subject is the engine that serves. Every
check runs, whatever the others say, and states what it found.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model import decoder_attention_graph, decoder_graph
from model.checks import Check, Found, Report, checked, difference, error, largest, stated
from model.commands import run
from model.config import ModelConfig
from model.export_decoder import ATTENTION_GRAPH, GRAPH, SMOOTHING_FILE, WEIGHTS_FILE, tensors_of
from model.importers.gguf import Checkpoint, load_gguf
from model.transformer import LanguageModel
from model.verify_attention import attention
from model.verify_generation import agreement, facts, interface, packed_again
from service.worker.bundle import Bundle, load_bundle
from service.worker.generation.decoder import DecoderEngine
from service.worker.generation.kv_memory import BLOCK
from service.worker.weights.packing import PRECISIONS, decoder_pieces, read_smoothing

NUM_SLOTS = 16
NUM_NEW = 50  # greedy tokens a prompt
CUTS = (8, 16, 40)  # tokens in a piece
NUM_STEPS = 6  # of decoding, when batches are compared
MAX_DIFFERENCE = 1e-3  # of float32 logits, which go to 30
MAX_ERROR = 0.14  # of int8 logits (shipped: 0.08)
MIN_AGREEMENT = 0.9  # of int8's greedy tokens with the reference's choice after the same text
MAX_INCREASE = 0.02  # of int8's perplexity
MAX_MISSTATED = 0.1  # of a perplexity of 27
WINDOW = 512  # tokens

Ids = Sequence[int]
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Subject:
    """What is compared: the bundle with its engine, and the model it claims to be."""

    bundle: Bundle
    engine: DecoderEngine
    checkpoint: Checkpoint
    prompts: Sequence[Ids]

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def model(self) -> LanguageModel:
        return self.checkpoint.model

    @property
    def is_exact(self) -> bool:
        return self.bundle.manifest.precision == "float32"

    @torch.no_grad()
    def reference(self, ids: Ids) -> Logits:
        """(T, V)."""
        return self.model(torch.tensor([list(ids)]))[0][0].numpy()


def pieces_of(ids: Ids) -> Iterator[tuple[int, Ids]]:
    """As serving cuts a prompt: where each piece starts, and its ids."""
    for start in range(0, len(ids), BLOCK):
        yield start, ids[start : start + BLOCK]


def served(engine: DecoderEngine, ids: Ids, slot: int = 0) -> Logits:
    """Every position's logits (T, V)."""
    return np.concatenate([engine.prefill(slot, piece, start, keep="all") for start, piece in pieces_of(ids)])


def open_engine(bundle: Bundle, *, threads: int = 1) -> DecoderEngine:
    return DecoderEngine(bundle, num_slots=NUM_SLOTS, num_blocks=0, threads=threads)


def verify_decoder(
    directory: Path, checkpoint: Checkpoint, prompts: Sequence[Ids], *, text: Ids = (), temperature: float = 0.0
) -> Report:
    """Compares the bundle with the checkpoint on `prompts`, and on `text`, whose perplexity is measured, if any.

    `temperature`: what the export chose.
    """
    try:
        bundle = load_bundle(directory)
        subject = Subject(bundle, open_engine(bundle), checkpoint, prompts)
    except Exception as error:  # whatever keeps it from being served is the finding
        return Report((Check("loads", False, str(error)),))
    checkpoint.model.eval()
    config = checkpoint.config
    declared = {GRAPH: decoder_graph.interface(config), ATTENTION_GRAPH: decoder_attention_graph.interface(config)}
    own_facts = partial(facts, task="generation", graphs=declared, temperature=temperature)
    checks = [
        checked("facts", own_facts, bundle, config, checkpoint.text),
        checked("interface", interface, bundle, declared),
        checked("weights", weights, subject),
        checked("logits", logits, subject),
        checked(
            "attention", attention, subject.bundle, subject.model, subject.prompts, partial(served, subject.engine)
        ),
        checked("greedy tokens", greedy_tokens, subject),
        checked("batched == alone", batched_alone, subject),
        checked("cut == whole", cut_whole, subject),
    ]
    if not text:
        return Report((*checks, Check("perplexity", True, "skipped: no text was given")))
    measured = quality(subject, text)
    found, precision = {"perplexity": measured}, bundle.manifest.precision
    said = {name: one for name, one in bundle.manifest.quality.items() if name == precision}
    checks += [
        judged(measured, is_exact=subject.is_exact),
        *stated(said, {precision: found}, within=MAX_MISSTATED),
    ]
    return Report(tuple(checks), found)


def weights(subject: Subject) -> Found:
    """Packed once more, the checkpoint's weights are the file's, byte for byte."""
    bundle, config, smoothing = subject.bundle, subject.config, None
    if SMOOTHING_FILE in bundle.manifest.files:
        stored = np.frombuffer((bundle.directory / SMOOTHING_FILE).read_bytes(), "<f4")
        smoothing = read_smoothing(stored, width=config.width, feed_forward=config.feed_forward)
    parts = decoder_pieces(
        tensors_of(subject.model),
        num_layers=config.num_layers,
        is_tied=config.tie_embeddings,
        kinds=PRECISIONS[bundle.manifest.precision],
        smoothing=smoothing,
    )
    return packed_again(bundle, WEIGHTS_FILE, parts)


def logits(subject: Subject) -> Found:
    """All positions of every prompt: to MAX_DIFFERENCE in float32, to an error of MAX_ERROR in int8."""
    ours = np.concatenate([served(subject.engine, ids) for ids in subject.prompts])
    theirs = np.concatenate([subject.reference(ids) for ids in subject.prompts])
    gap, distance = difference(ours, theirs), error(ours, theirs)
    found = f"largest difference {gap:.2e}, error {distance:.4f} at {len(ours)} positions"
    return (gap <= MAX_DIFFERENCE if subject.is_exact else distance <= MAX_ERROR), found


def continued(engine: DecoderEngine, prompt: Ids, num_new: int) -> list[int]:
    """The likeliest tokens, one after another."""
    new = [int(served(engine, prompt)[-1].argmax())]
    while len(new) < num_new:
        new.append(int(engine.decode([new[-1]], [len(prompt) + len(new) - 1])[0].argmax()))
    return new


def greedy_tokens(subject: Subject) -> Found:
    """Each token that the engine writes, is it what the reference would write after the same text?"""
    hits = []
    for prompt in subject.prompts:
        room = subject.bundle.manifest.limits.max_tokens - len(prompt)
        new = continued(subject.engine, prompt, min(NUM_NEW, room))
        chosen = subject.reference([*prompt, *new[:-1]])[len(prompt) - 1 :].argmax(-1)
        hits.append(chosen == new)
    return agreement(hits, 1.0 if subject.is_exact else MIN_AGREEMENT)


def decoded(engine: DecoderEngine, prompts: Sequence[Ids], tokens: NDArray[np.int64]) -> list[Logits]:
    """Logits (rows, V) of each step: the prompts read one after another, then `tokens` (steps, rows) fed together."""
    for slot, prompt in enumerate(prompts):
        for start, piece in pieces_of(prompt):
            engine.prefill(slot, piece, start, keep="none")
    return [
        engine.decode(list(map(int, step)), [len(prompt) + at for prompt in prompts]).copy()
        for at, step in enumerate(tokens)
    ]


def batched_alone(subject: Subject) -> Found:
    """The same bits for a row alone, among others of any length, among fewer, and on two threads."""
    longest = subject.bundle.manifest.limits.max_tokens - NUM_STEPS
    prompts = [(ids * 3)[: min(longest, 20 + 9 * at)] for at, ids in enumerate(map(list, subject.prompts[:NUM_SLOTS]))]
    tokens = np.random.default_rng(0).integers(0, subject.config.vocab_size, (NUM_STEPS, len(prompts)))
    alone = [
        np.concatenate(decoded(subject.engine, [prompt], tokens[:, at : at + 1])) for at, prompt in enumerate(prompts)
    ]  # (steps, V) a prompt
    half = len(prompts) // 2
    tried = {
        "all together": (subject.engine, slice(None)),
        "half of them": (subject.engine, slice(half, None)),
        "all together on two threads": (open_engine(subject.bundle, threads=2), slice(None)),
    }
    wrong = []
    for name, (engine, rows) in tried.items():
        together = np.stack(decoded(engine, prompts[rows], tokens[:, rows]), axis=1)  # (rows, steps, V)
        gap = largest(difference(a, b) for a, b in zip(together, alone[rows], strict=True))
        wrong += [f"{name}: largest difference {gap:.2e}"] if gap else []
    return not wrong, "; ".join(
        wrong
    ) or f"bit-equal for {len(prompts)} rows, {NUM_STEPS} steps, {len(tried)} kinds of batch"


def cut_whole(subject: Subject) -> Found:
    """The same bits for a prompt however its chunks are cut, which the scheduler does by what else runs."""
    prompt = (list(subject.prompts[0]) * BLOCK)[: min(3 * BLOCK - 10, subject.bundle.manifest.limits.max_tokens)]
    whole = served(subject.engine, prompt)
    wrong = []
    for size in CUTS:
        parts = []
        for start, chunk in pieces_of(prompt):
            cuts = [*range(0, max(1, len(chunk) - 1), size), len(chunk)]
            parts += [
                subject.engine.prefill(1, chunk[at:end], start + at, keep="all") for at, end in itertools.pairwise(cuts)
            ]
        gap = difference(np.concatenate(parts), whole)
        wrong += [f"in pieces of {size}: largest difference {gap:.2e}"] if gap else []
    return not wrong, "; ".join(wrong) or f"bit-equal for {len(prompt)} tokens in pieces of {CUTS}"


def losses(logits: Logits, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log p of each id after the first, in nats."""
    rows = logits[:-1].astype(np.float64)
    peak = rows.max(-1)
    return np.log(np.exp(rows - peak[:, None]).sum(-1)) + peak - rows[np.arange(len(rows)), ids[1:]]


def quality(subject: Subject, text: Ids) -> dict[str, Any]:
    """Perplexity of the bundle and of the reference, on windows of `text`, and how often both choose the same token."""
    ours, theirs, same = [], [], []
    window = min(WINDOW, subject.bundle.manifest.limits.max_tokens)
    for start in range(0, len(text) - 1, window):
        ids = np.array(text[start : start + window])
        mine, reference = served(subject.engine, ids.tolist()), subject.reference(ids.tolist())
        ours.append(losses(mine, ids))
        theirs.append(losses(reference, ids))
        same.append(mine.argmax(-1) == reference.argmax(-1))
    a, b = np.concatenate(ours), np.concatenate(theirs)
    return {
        "tokens": len(text),
        "window": window,
        "perplexity": round(float(np.exp(a.mean())), 3),
        "perplexity_of_checkpoint": round(float(np.exp(b.mean())), 3),
        "increase": round(float(np.exp((a - b).mean()) - 1), 5),
        "standard_error": round(float((a - b).std() / len(a) ** 0.5), 5),
        "top1_agreement": round(float(np.concatenate(same).mean()), 4),
    }


def judged(measured: dict[str, Any], *, is_exact: bool) -> Check:
    passed = abs(measured["increase"]) <= (1e-4 if is_exact else MAX_INCREASE)
    return Check("perplexity", passed, ", ".join(f"{name} {value}" for name, value in measured.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    from model.recipes.chat import prompt_ids, read_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help="GGUF file")
    parser.add_argument("--text", type=Path, help="WikiText-2's test.txt, for perplexity")
    flags = parser.parse_args(arguments)
    checkpoint = load_gguf(flags.checkpoint)
    tokenizer = checkpoint.tokenizer
    text = read_text(tokenizer, flags.text)
    report = verify_decoder(flags.bundle, checkpoint, prompt_ids(tokenizer), text=text)
    print(report.text())
    return 0 if report.passed else 1


if __name__ == "__main__":
    run(main)
