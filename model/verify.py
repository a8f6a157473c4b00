"""bundle == checkpoint: interface, weights, values, attention, batch independence, quality. On the engine that serves.

    python -m model.verify model/zoo/sentiment runs/sentiment/best --data FOLDER

The reference is the PyTorch model in its padded form, one sequence at a time; it shares no code with the packed graph.
Every check runs, whatever the others say, and states what it found.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from model.checks import Check, Found, Logits, Report, agree, checked, common_facts, difference, error, largest, stated
from model.commands import run
from model.config import ModelConfig
from model.data import Examples, Row, one_hot, read_sst2
from model.evaluate import predict
from model.packed import INPUT_AXES, PackedClassifier, output_axes
from model.quantize import rounding_error
from model.tokenization import encode, load_tokenizer
from model.train import CHECKPOINT_HELP, checkpoint_sha256, load_checkpoint
from model.transformer import Classifier
from service.worker.bundle import PROBLEM_TYPES, TOKENIZER, Bundle, TensorSpec, file_spec, load_bundle
from service.worker.classification.engine import GRAPH, ClassificationEngine, Tokens, Weights

MAX_DIFFERENCE = 1e-4  # of float32 logits
MAX_LEVELS = 8  # that an int8 weight is from the reference's, of 63 or 127 (shipped: 3.5)
MAX_ERROR = 0.2  # of int8 logits (shipped: 0.03 on texts, 0.11 on random tokens)
MIN_AGREEMENT = 0.97  # of int8 labels with the reference's
MAX_ACCURACY_LOSS = 0.003
MAX_MISSTATED = 0.003  # of accuracy and agreement
MAX_ATTENTION_DIFFERENCE = 1e-4  # of float32 weights
MIN_ATTENTION_CORRELATION = 0.95  # of a layer's int8 weights with the reference's
MAX_SUM_ERROR = 1e-5  # of a row of weights, which sums to 1
NUM_SAMPLES = 48
NUM_NEIGHBOURS = 16  # in the largest batch that a sequence is compared in

Ids = Sequence[int]


@dataclass(frozen=True)
class Subject:
    """What is compared: the bundle with its engine, and the model it claims to be."""

    bundle: Bundle
    engine: ClassificationEngine
    config: ModelConfig
    model: Classifier
    checkpoint: Path

    @property
    def is_exact(self) -> bool:
        return self.bundle.manifest.precision == "float32"

    def served(self, sequences: Sequence[Ids]) -> Logits:
        return self.engine.logits([Tokens(ids) for ids in sequences])

    def served_attention(self, sequences: Sequence[Ids]) -> tuple[Logits, list[Weights]]:
        every = range(len(sequences))
        batch = [Tokens(ids) for ids in sequences]
        logits, weights = self.engine.attend(batch, range(self.config.num_layers), every)
        return logits, [weights[at] for at in every]

    @torch.no_grad()
    def reference(self, sequences: Sequence[Ids]) -> Logits:
        return np.concatenate([self.model(torch.tensor([ids])).numpy() for ids in sequences])

    @torch.no_grad()
    def reference_attention(self, ids: Ids) -> Weights:
        """By the model's explicit path, the one that keeps its weights."""
        trace: list[torch.Tensor] = []
        self.model(torch.tensor([ids]), trace=trace)
        return {layer: weights[0].numpy() for layer, weights in enumerate(trace)}


def verify(
    directory: Path, checkpoint: Path, *, rows: Sequence[Row] = (), problem_type: str = PROBLEM_TYPES[0]
) -> Report:
    """Compares the bundle with the checkpoint, which does not say what `problem_type` it was trained for.

    `rows` are labelled texts on which quality is measured.
    """
    try:
        bundle = load_bundle(directory)
        subject = Subject(bundle, ClassificationEngine(bundle), *load_checkpoint(checkpoint), checkpoint)
    except Exception as error:  # whatever keeps it from being served is the finding
        return Report((Check("loads", False, str(error)),))
    samples = sample_texts(subject, rows) if rows else sample_ids(subject.config)
    checks = [
        checked("facts", facts, subject, problem_type),
        checked("interface", interface, subject),
        checked("weights", weights, subject),
        checked("shapes", shapes, subject),
        checked("values", values, subject, samples),
        checked("attention", attention, subject, samples),
        checked("batched == alone", batched_alone, subject, samples),
    ]
    if not rows:
        return Report(tuple(checks))
    measured = quality(subject, rows)
    checks.append(Check("quality", *judged(measured, subject)))
    return Report((*checks, *stated(bundle.manifest.quality, measured, within=MAX_MISSTATED)), measured)


def facts(subject: Subject, problem_type: str) -> Found:
    """What the manifest says about the model is what the checkpoint says."""
    manifest, config = subject.bundle.manifest, subject.config
    sha256 = checkpoint_sha256(subject.checkpoint)
    common = common_facts(manifest, config, task="classification", graphs=[GRAPH], checkpoint_sha256=sha256)
    own = {
        "labels": (manifest.labels, config.labels),
        "problem_type": (manifest.problem_type, problem_type),
        "limits.max_tokens": (manifest.limits.max_tokens, config.max_length),
        TOKENIZER: (manifest.files[TOKENIZER], file_spec(subject.checkpoint / TOKENIZER)),
    }
    return agree(common | own)


def interface(subject: Subject) -> Found:
    """Names, types and open axes of the graph. (That the graph is what the manifest says, the session has checked.)"""
    spec = subject.bundle.graph(GRAPH)
    expected = [TensorSpec(name=name, dtype="int64", axes=axes) for name, axes in INPUT_AXES.items()]
    expected += [
        TensorSpec(name=name, dtype="float32", axes=axes) for name, axes in output_axes(subject.config).items()
    ]
    found = [*spec.inputs, *spec.outputs]
    wrong = [f"{ours} instead of {theirs}" for ours, theirs in zip(found, expected, strict=False) if ours != theirs]
    if len(found) != len(expected):
        wrong.append(f"{len(found)} inputs and outputs instead of {len(expected)}")
    return not wrong, "; ".join(wrong) or f"{len(spec.inputs)} inputs, {len(spec.outputs)} outputs, axes open"


def weights(subject: Subject) -> Found:
    """Every weight of the packed form stands in the graph: in float32 the same numbers, in int8 within MAX_LEVELS.

    Logits do not tell: they are off by 0.03 for rounding, and by 0.03 to 0.14 without one of the shipped model's heads.
    """
    graph = onnx.load(subject.bundle.graph_path(GRAPH)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    theirs = dict(PackedClassifier(subject.config, subject.model).named_parameters())
    theirs = {name: weight for name, weight in theirs.items() if name in stored or weight.ndim > 1}  # equal norms merge
    off = np.array([rounding_error(stored, name, weight.detach().numpy()) for name, weight in theirs.items()])
    is_rounded, worst = any(stored[name].dtype == np.int8 for name in theirs), int(off.argmax())
    found = f"{len(off)} in {'int8' if is_rounded else 'float32'}, {list(theirs)[worst]} is {off[worst]:.3g} off"
    return is_rounded != subject.is_exact and bool(off[worst] <= (0 if subject.is_exact else MAX_LEVELS)), found


def shapes(subject: Subject) -> Found:
    """Any number of sequences, of one token up to the limit, gives a finite row each."""
    longest = subject.config.max_length
    tried = [(1, 1), (1, longest), (3, 2), (2, min(17, longest)), (33, 5)]
    wrong = []
    for num_sequences, length in tried:
        logits = subject.served([[1] * length] * num_sequences)
        if logits.shape != (num_sequences, subject.config.num_labels) or not np.isfinite(logits).all():
            wrong.append(f"{num_sequences} x {length} tokens gave {logits.shape}")
    return not wrong, "; ".join(wrong) or f"batches up to 33, lengths 1 to {longest}"


def values(subject: Subject, samples: Sequence[Ids]) -> Found:
    """Logits against PyTorch: to MAX_DIFFERENCE in float32, to an error of MAX_ERROR in int8."""
    served, reference = subject.served(samples), subject.reference(samples)
    gap, distance = difference(served, reference), error(served, reference)
    found = f"largest difference {gap:.2e}, error {distance:.4f} on {len(samples)} sequences"
    return (gap <= MAX_DIFFERENCE if subject.is_exact else distance <= MAX_ERROR), found


def attention(subject: Subject, samples: Sequence[Ids]) -> Found:
    """Every weight of every layer and head against PyTorch; each row sums to 1; batching changes neither bits nor
    logits. float32 to MAX_ATTENTION_DIFFERENCE, int8 by the correlation of each layer.
    """
    logits, served = subject.served_attention(samples)
    reference = [subject.reference_attention(ids) for ids in samples]
    layers = range(subject.config.num_layers)
    ours, theirs = ([flat(weights, layer) for layer in layers] for weights in (served, reference))
    gap = largest(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    similarity = float(np.min([np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)]))
    sum_error = largest(difference(rows.sum(-1), 1) for weights in served for rows in weights.values())
    alone = [subject.served_attention([ids])[1][0] for ids in samples]
    is_same = np.array_equal(logits, subject.served(samples)) and all(
        np.array_equal(one[layer], other[layer]) for one, other in zip(alone, served, strict=True) for layer in layers
    )
    is_true = gap <= MAX_ATTENTION_DIFFERENCE if subject.is_exact else similarity >= MIN_ATTENTION_CORRELATION
    found = f"largest difference {gap:.2e}, lowest correlation of a layer {similarity:.5f}, rows sum to 1 within "
    found += f"{sum_error:.1e}, {'bit-equal' if is_same else 'other bits'} in batches and beside plain logits"
    return is_true and is_same and sum_error <= MAX_SUM_ERROR, found


def flat(weights: Sequence[Weights], layer: int) -> NDArray[np.float32]:
    """A layer's weights of all sequences in one row."""
    return np.concatenate([one[layer].ravel() for one in weights])


def batched_alone(subject: Subject, samples: Sequence[Ids]) -> Found:
    """The same bits for a sequence alone, among others of its length or of any length, and on two threads."""
    two_threads = ClassificationEngine(subject.bundle, threads=2)
    alone = np.concatenate([subject.served([ids]) for ids in samples])
    tried = {
        "all together": subject.served(samples),
        "all together on two threads": two_threads.logits([Tokens(ids) for ids in samples]),
        "among copies of itself": np.stack([subject.served([ids] * NUM_NEIGHBOURS)[-1] for ids in samples]),
        "among strangers of its length": np.stack(
            [subject.served(strangers(ids, subject.config))[0] for ids in samples]
        ),
    }
    wrong = {name: float(np.abs(rows - alone).max()) for name, rows in tried.items() if not np.array_equal(rows, alone)}
    found = [f"{name}: largest difference {difference:.2e}" for name, difference in wrong.items()]
    return not wrong, "; ".join(found) or f"bit-equal for {len(samples)} sequences in {len(tried)} kinds of batch"


def strangers(ids: Ids, config: ModelConfig) -> list[Ids]:
    draw = random.Random(len(ids))
    others = [[draw.randrange(config.vocab_size) for _ in ids] for _ in range(draw.randrange(1, NUM_NEIGHBOURS))]
    return [ids, *others]


def sample_ids(config: ModelConfig) -> list[list[int]]:
    """Random sequences of all lengths: enough for a comparison of arithmetic."""
    draw = random.Random(0)
    lengths = [draw.randint(1, min(config.max_length, 64)) for _ in range(NUM_SAMPLES - 1)] + [config.max_length]
    return [[draw.randrange(config.vocab_size) for _ in range(length)] for length in lengths]


def sample_texts(subject: Subject, rows: Sequence[Row]) -> list[list[int]]:
    texts = [row.text for row in rows[:NUM_SAMPLES]]
    return encode(load_tokenizer(subject.bundle.tokenizer_path, subject.config.max_length), texts)


def quality(subject: Subject, rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy of the bundle and of the reference, and how often both choose the same label."""
    tokenizer = load_tokenizer(subject.bundle.tokenizer_path, subject.config.max_length)
    sequences = encode(tokenizer, [row.text for row in rows])
    targets = np.array([row.label for row in rows])
    examples = Examples(sequences, one_hot(targets.tolist(), subject.config.num_labels))
    theirs = predict(subject.model, examples, pad_id=subject.config.pad_id).numpy().argmax(1)
    ours = subject.served(sequences).argmax(1)
    return {
        "rows": len(rows),
        "accuracy": share(ours == targets),
        "accuracy_of_checkpoint": share(theirs == targets),
        "label_agreement": share(ours == theirs),
    }


def share(hits: NDArray[np.bool_]) -> float:
    return round(float(hits.mean()), 5)


def judged(measured: dict[str, Any], subject: Subject) -> Found:
    loss = round(measured["accuracy_of_checkpoint"] - measured["accuracy"], 5)
    agreement = measured["label_agreement"]
    passed = loss <= MAX_ACCURACY_LOSS and agreement >= (1.0 if subject.is_exact else MIN_AGREEMENT)
    return passed, ", ".join(f"{name} {value}" for name, value in measured.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument("--data", type=Path, help="folder with dev.tsv")
    parser.add_argument("--problem-type", choices=PROBLEM_TYPES, default=PROBLEM_TYPES[0])
    flags = parser.parse_args(arguments)
    rows = read_sst2(flags.data / "dev.tsv") if flags.data else ()
    report = verify(flags.bundle, flags.checkpoint, rows=rows, problem_type=flags.problem_type)
    print(report.text())
    return 0 if report.passed else 1


if __name__ == "__main__":
    run(main)
