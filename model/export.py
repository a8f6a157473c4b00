"""Checkpoint -> bundle: trace the packed form with torch.onnx, quantise, write files and manifest, verify.

    python -m model.export runs/sentiment/best --out model/zoo/sentiment --data FOLDER

The same checkpoint and data give the same bytes. A bundle that fails its verification is not left behind.
"""

import argparse
import json
import logging
import random
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from model.commands import run
from model.config import ModelConfig
from model.data import Row, read_sst2
from model.packed import INPUT_AXES, PackedClassifier
from model.quantize import Batch, calibrate, quantize
from model.tokenization import encode, load_tokenizer
from model.train import CHECKPOINT_HELP, checkpoint_sha256, load_checkpoint
from model.verify import verify
from service.worker.bundle import (
    MANIFEST,
    PRECISIONS,
    PROBLEM_TYPES,
    TOKENIZER,
    VERSION,
    FileSpec,
    GraphSpec,
    Limits,
    Manifest,
    TensorSpec,
    file_spec,
    load_bundle,
)
from service.worker.classification.engine import GRAPH, Tokens, pack, padded_length

OPSET = 20  # the first with Gelu
GRAPH_FILE = "classify.onnx"
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64"}
NUM_CALIBRATION = 1024  # rows of the training data
NUM_PER_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a checkpoint does not say about the bundle."""

    id: str
    precision: str = "int8"
    problem_type: str = "single_label_classification"
    licence: str = "Apache-2.0"
    calibration: Sequence[Sequence[int]] = field(default=(), repr=False)  # token ids of sample texts, for int8


def export(checkpoint: Path, out: Path, options: Options) -> None:
    """Writes graph, tokenizer and manifest (not verified yet) into the empty or new directory `out`."""
    config, classifier = load_checkpoint(checkpoint)
    model = PackedClassifier(config, classifier).eval()
    if options.precision == "int8":
        activations = calibrate(model, calibration_batches(options.calibration))
        graph = quantize(trace(model), activations)
    else:
        graph = trace(model)
    onnx.checker.check_model(graph)
    out.mkdir(parents=True, exist_ok=True)
    (out / GRAPH_FILE).write_bytes(graph.SerializeToString(deterministic=True))
    shutil.copyfile(checkpoint / TOKENIZER, out / TOKENIZER)
    files = {name: file_spec(out / name) for name in (GRAPH_FILE, TOKENIZER)}
    write_manifest(out, manifest(checkpoint, config, options, {GRAPH: graph_spec(graph)}, files))


def trace(model: PackedClassifier) -> onnx.ModelProto:
    """The float32 graph. Positions, batch and length stay open: the example sizes below leave no trace in it."""
    example = pack([Tokens([0] * 3), Tokens([0] * 5), Tokens([0])], padded_length(5), watched=[0, 2])
    axes = {axis: torch.export.Dim(axis) for axis in ("tokens", "batch", "length", "watched")}
    with warnings.catch_warnings(), quiet_exporter():
        warnings.simplefilter("ignore")  # of torch about torch
        program = torch.onnx.export(
            model,
            kwargs={name: torch.from_numpy(array) for name, array in example.items()},
            dynamic_shapes={name: [axes[axis] for axis in names] for name, names in INPUT_AXES.items()},
            input_names=list(INPUT_AXES),
            output_names=list(model.outputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return stripped(program.model_proto)


class quiet_exporter:
    """The exporter tells of every optional package that it did not find."""

    logger = logging.getLogger("torch.onnx")

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def stripped(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Without notes on where in whose sources a node came from: they differ from machine to machine."""
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    del graph.graph.value_info[:]
    for part in (*graph.graph.node, *graph.graph.initializer, *graph.graph.input, *graph.graph.output):
        part.doc_string = ""
        del part.metadata_props[:]
    return graph


def calibration_batches(sequences: Sequence[Sequence[int]]) -> list[Batch]:
    if not sequences:
        raise ValueError("int8 needs sample texts to measure activations on")
    ordered = sorted(sequences, key=len)
    batches = [ordered[at : at + NUM_PER_BATCH] for at in range(0, len(ordered), NUM_PER_BATCH)]
    return [packed(batch) for batch in batches]


def packed(sequences: Sequence[Sequence[int]]) -> Batch:
    arrays = pack([Tokens(ids) for ids in sequences], padded_length(max(map(len, sequences))))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def graph_spec(graph: onnx.ModelProto) -> GraphSpec:
    return GraphSpec(
        file=GRAPH_FILE,
        inputs=tuple(map(tensor_spec, graph.graph.input)),
        outputs=tuple(map(tensor_spec, graph.graph.output)),
    )


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    axes = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=DTYPES[tensor.elem_type], axes=axes)


def manifest(
    checkpoint: Path,
    config: ModelConfig,
    options: Options,
    graphs: Mapping[str, GraphSpec],
    files: Mapping[str, FileSpec],
) -> Manifest:
    weights = checkpoint / "model.safetensors"
    provenance: dict[str, Any] = json.loads((checkpoint / "train.json").read_text())
    made_by = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return Manifest(
        version=VERSION,
        id=options.id,
        task="classification",
        created=int(provenance.get("created", weights.stat().st_mtime)),
        architecture={name: value for name, value in asdict(config).items() if name != "labels"},
        labels=config.labels,
        problem_type=options.problem_type,
        limits=Limits(max_tokens=config.max_length),
        precision=options.precision,
        graphs=graphs,
        files=files,
        licence=options.licence,
        provenance=provenance | {"checkpoint_sha256": checkpoint_sha256(checkpoint), "exported_with": made_by},
    )


def write_manifest(out: Path, content: Manifest) -> None:
    (out / MANIFEST).write_text(content.to_json())


def export_verified(checkpoint: Path, out: Path, options: Options, *, rows: Sequence[Row] = ()) -> bool:
    """Exports beside `out` and puts the bundle there only if it passes. Prints every check; says whether all passed."""
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    export(checkpoint, new, options)
    report = verify(new, checkpoint, rows=rows, problem_type=options.problem_type)
    print(report.text())
    if not report.passed:
        shutil.rmtree(new)
        return False
    content = load_bundle(new).manifest
    write_manifest(new, replace(content, quality=report.quality, verification=report.facts()))
    shutil.rmtree(out, ignore_errors=True)
    new.rename(out)
    return True


def sample(rows: Sequence[Row], tokenizer: Path, max_length: int) -> list[list[int]]:
    texts = [row.text for row in random.Random(1).sample(rows, min(NUM_CALIBRATION, len(rows)))]
    return encode(load_tokenizer(tokenizer, max_length), texts)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument("--out", type=Path, required=True, help="the bundle's directory; replaced if it is there")
    parser.add_argument("--data", type=Path, help="folder with train.tsv (for int8) and dev.tsv (for accuracy)")
    parser.add_argument("--id", help="the model's id (default: the name of --out)")
    parser.add_argument("--precision", choices=PRECISIONS, default="int8")
    parser.add_argument("--problem-type", choices=PROBLEM_TYPES, default="single_label_classification")
    parser.add_argument("--licence", default="Apache-2.0")
    flags = parser.parse_args(arguments)
    if flags.precision == "int8" and flags.data is None:
        parser.error("int8 needs --data: activations are measured on training rows")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse(arguments)
    options = Options(
        id=flags.id or flags.out.name, precision=flags.precision, problem_type=flags.problem_type, licence=flags.licence
    )
    if flags.precision == "int8":
        max_length = ModelConfig.load(flags.checkpoint / "config.json").max_length
        ids = sample(read_sst2(flags.data / "train.tsv"), flags.checkpoint / TOKENIZER, max_length)
        options = replace(options, calibration=ids)
    rows = read_sst2(flags.data / "dev.tsv") if flags.data else ()
    return 0 if export_verified(flags.checkpoint, flags.out, options, rows=rows) else 1


if __name__ == "__main__":
    run(main)
