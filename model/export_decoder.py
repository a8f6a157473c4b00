"""A decoder -> a bundle of task "generation": packed weights, the graphs that read them, tokenizer, template, manifest.

The same model gives the same bytes. Nothing is traced: graphs are written node by node (`decoder_graph`), since no
tracer knows attention that writes its keys and values in place.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from model.config import ModelConfig
from model.decoder_attention_graph import build_attention
from model.decoder_graph import build_decoder
from service.worker.bundle import (
    MANIFEST,
    TOKENIZER,
    VERSION,
    Generation,
    GraphSpec,
    Limits,
    Manifest,
    TensorSpec,
    file_spec,
)
from service.worker.weights.checkpoint import Text
from service.worker.weights.packing import PRECISIONS, Smoothing, Tensors, decoder_pieces, write_pieces

GRAPH = "decode"
GRAPH_FILE = "decode.onnx"
ATTENTION_GRAPH = "attention"
BUILDERS = {GRAPH: build_decoder, ATTENTION_GRAPH: build_attention}
WEIGHTS_FILE = "decode.data"
TEMPLATE_FILE = "chat_template.jinja"
SMOOTHING_FILE = "smoothing.data"
DTYPES = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.INT64: "int64", onnx.TensorProto.INT32: "int32"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a checkpoint does not say about the bundle."""

    id: str
    created: int  # seconds since 1970
    licence: str
    precision: str = "int8"
    max_length: int | None = None  # of a context; None: the model's
    temperature: float = 0.0  # unless a request says otherwise
    smoothing: list[Smoothing] | None = field(default=None, repr=False)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] | None = None  # see Manifest


def tensors_of(model: nn.Module) -> Tensors:
    state = model.state_dict()
    return lambda name: state[name].detach().float().numpy()


def export_decoder(config: ModelConfig, tensors: Tensors, text: Text, out: Path, options: Options) -> Manifest:
    """Writes all files (not verified yet) into the new directory `out`. Raises ValueError for what cannot be served."""
    out.mkdir(parents=True)
    max_length, kinds = options.max_length or config.max_length, PRECISIONS[options.precision]
    parts = decoder_pieces(
        tensors,
        num_layers=config.num_layers,
        is_tied=config.tie_embeddings,
        kinds=kinds,
        smoothing=options.smoothing,
    )
    places = write_pieces(out / WEIGHTS_FILE, parts)
    graphs = {}
    for name, build in BUILDERS.items():
        graph = build(config, kinds, places=places, file=WEIGHTS_FILE, max_length=max_length)
        (out / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))
        graphs[name] = graph_spec(graph, f"{name}.onnx")
    (out / TOKENIZER).write_text(text.tokenizer, encoding="utf-8")
    if text.chat_template is not None:
        (out / TEMPLATE_FILE).write_text(text.chat_template, encoding="utf-8")
    if options.smoothing is not None:
        (out / SMOOTHING_FILE).write_bytes(np.concatenate([np.concatenate(one) for one in options.smoothing]).tobytes())
    content = manifest("generation", config, text, options, graphs, out)
    (out / MANIFEST).write_text(content.to_json())
    return content


def manifest(
    task: str, config: ModelConfig, text: Text, options: Options, graphs: Mapping[str, GraphSpec], out: Path
) -> Manifest:
    """Of the files that stand in `out`."""
    made_by = {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    generation = Generation(
        bos_id=text.bos_id,
        end_ids=text.end_ids,
        temperature=options.temperature,
        chat_template=None if text.chat_template is None else TEMPLATE_FILE,
    )
    return Manifest(
        version=VERSION,
        id=options.id,
        task=task,
        created=options.created,
        architecture={name: value for name, value in asdict(config).items() if name != "labels"},
        generation=generation,
        limits=Limits(max_tokens=options.max_length or config.max_length),
        precision=options.precision,
        graphs=graphs,
        files={path.name: file_spec(path) for path in sorted(out.iterdir())},
        licence=options.licence,
        provenance={**options.provenance, "exported_with": made_by},
        weights=options.weights,
    )


def graph_spec(graph: onnx.ModelProto, file: str) -> GraphSpec:
    inputs, outputs = (tuple(map(tensor_spec, side)) for side in (graph.graph.input, graph.graph.output))
    return GraphSpec(file=file, inputs=inputs, outputs=outputs)


def tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    axes = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=DTYPES[tensor.elem_type], axes=axes)
