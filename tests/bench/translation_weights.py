"""The weights that the peers get: the bundle's own, taken out of its graphs again, as numbers and under plain names.

What was folded into them stays (a norm's weights carry what smoothing moved there): they are another form of the same
function, whose integers are multiplied out. So every contender has what is served, and no checkpoint is needed.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import save_file

Array = NDArray[Any]
Tensors = dict[str, Array]

# A layer's pieces -> the names that they have in model.transformer, whose outputs stand side by side.
_MATRICES = {
    "qkv": ("attention.query", "attention.key", "attention.value"),
    "output": ("attention.output",),
    "cross.query": ("cross.query",),
    "cross.output": ("cross.output",),
    "up": ("feed_forward.up",),
    "down": ("feed_forward.down",),
}
_NORMS = {
    "attention_norm": "attention_norm",
    "cross.attention_norm": "cross_norm",
    "feed_forward_norm": "feed_forward_norm",
}


def write_weights(bundle: Path, out: Path) -> None:
    """config.json, model.safetensors and tokenizer.json of a bundle of task "translation", in the new directory `out`.

    Only the tokens that are written have a row in `head.weight`; they are the first ones of the vocabulary.
    """
    out.mkdir(parents=True)
    config = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["architecture"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors_of(bundle, config), out / "model.safetensors")
    shutil.copyfile(bundle / "tokenizer.json", out / "tokenizer.json")


def tensors_of(bundle: Path, config: dict[str, Any]) -> Tensors:
    """All weights in float32 by their names in model.transformer's EncoderDecoder, whose head is not tied here."""
    pieces = _pieces(bundle)
    table = table_of(pieces) / np.float32(math.sqrt(config["width"]))
    found = {"encoder.stack.embedding.token.weight": table, "head.weight": _matrix(pieces, "logits")}
    num_decoder_layers = config["num_decoder_layers"] or config["num_layers"]
    for stack, num_layers in (("encoder", config["num_layers"]), ("decoder", num_decoder_layers)):
        _norm(found, pieces, f"{stack}.norm", f"{stack}.stack.norm")
        for layer in range(num_layers):
            _layer(found, pieces, f"{stack}.{layer}", f"{stack}.stack.blocks.{layer}")
    memory = [
        f"decoder.stack.blocks.{at}.cross.{part}" for at in range(num_decoder_layers) for part in ("key", "value")
    ]
    _linear(found, pieces, "memory", *memory)
    return found


def _pieces(bundle: Path) -> Tensors:
    """Everything that encoding and decoding read."""
    graphs = [onnx.load(bundle / f"{name}.onnx").graph for name in ("encode", "decode")]
    return {one.name: numpy_helper.to_array(one) for graph in graphs for one in graph.initializer}


def _layer(found: Tensors, pieces: Tensors, name: str, ours: str) -> None:
    for part, names in _MATRICES.items():
        if f"{name}.{part}.bias" in pieces:
            _linear(found, pieces, f"{name}.{part}", *(f"{ours}.{one}" for one in names))
    for part, its in _NORMS.items():
        if f"{name}.{part}.weight" in pieces:
            _norm(found, pieces, f"{name}.{part}", f"{ours}.{its}")


def _linear(found: Tensors, pieces: Tensors, name: str, *ours: str) -> None:
    for part, whole in (("weight", _matrix(pieces, name)), ("bias", pieces[f"{name}.bias"])):
        shares = np.split(whole, len(ours))
        found.update((f"{one}.{part}", np.ascontiguousarray(share)) for one, share in zip(ours, shares, strict=True))


def _norm(found: Tensors, pieces: Tensors, name: str, ours: str) -> None:
    found.update((f"{ours}.{part}", pieces[f"{name}.{part}"]) for part in ("weight", "bias"))


def _matrix(pieces: Tensors, name: str) -> Array:
    """(N, K); a graph has it turned."""
    if f"{name}.weight" in pieces:
        return np.ascontiguousarray(pieces[f"{name}.weight"].T)
    return np.ascontiguousarray(pieces[f"{name}.codes"].T.astype(np.float32) * pieces[f"{name}.scale"])


def table_of(pieces: Tensors) -> Array:
    """The embedding (V, W), times the root of W."""
    if "embedding.weight" in pieces:
        return pieces["embedding.weight"]
    codes, scales = pieces["embedding.codes"], pieces["embedding.scales"]
    blocks = codes.reshape(*scales.shape, -1).astype(np.float32) - np.float32(128)
    found: Array = (blocks * scales[..., None]).reshape(codes.shape)
    return found
