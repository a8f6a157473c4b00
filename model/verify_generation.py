"""What a decoder's and a translator's bundle are checked for alike: facts, interface, weights, logits, greedy tokens.

Each check says whether it passed, and what it found. Knows no engine: whoever calls has computed what is compared.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from model.checks import Found
from model.config import ModelConfig
from model.export_decoder import tensor_spec
from service.worker.bundle import Bundle, file_spec
from service.worker.weights.packing import Piece, write_pieces

Interface = tuple[Sequence[onnx.ValueInfoProto], Sequence[onnx.ValueInfoProto]]  # inputs, outputs
Hits = Sequence[NDArray[np.bool_]]


def facts(bundle: Bundle, config: ModelConfig) -> Found:
    manifest, facts = bundle.manifest, asdict(config)
    wrong = [name for name in facts if name != "labels" and manifest.architecture.get(name) != facts[name]]
    if manifest.limits.max_tokens > config.max_length:
        wrong.append("limits.max_tokens")
    return not wrong, f"differ from the checkpoint: {', '.join(wrong)}" if wrong else "equal to the checkpoint's"


def interface(bundle: Bundle, declared: Mapping[str, Interface]) -> Found:
    """Names, types and open axes. (That the graphs are what the manifest says, the sessions have checked.)"""
    wrong, found = [], []
    for name, sides in declared.items():
        spec = bundle.graph(name)
        for ours, side in zip((spec.inputs, spec.outputs), sides, strict=True):
            theirs = tuple(map(tensor_spec, side))
            wrong += [f"{name}: {a} instead of {b}" for a, b in zip(ours, theirs, strict=True) if a != b]
        found.append(f"{name}: {len(spec.inputs)} inputs, {len(spec.outputs)} outputs")
    return not wrong, "; ".join(wrong) or f"{', '.join(found)}, axes open"


def packed_again(bundle: Bundle, file: str, parts: Iterable[list[Piece]]) -> Found:
    """The checkpoint's weights, in `parts`, are the bundle's `file`, byte for byte."""
    with tempfile.TemporaryDirectory() as folder:
        write_pieces(Path(folder) / file, parts)
        again = file_spec(Path(folder) / file)
    same = again == bundle.manifest.files[file]
    return same, f"packed again: {'the same' if same else 'other'} {again.bytes} bytes"


def agreement(hits: Hits, at_least: float) -> Found:
    """`hits`: for each text, whether each of its tokens is the one that the reference would write there."""
    share, whole = float(np.concatenate(hits).mean()), sum(bool(one.all()) for one in hits)
    found = f"{share:.2%} of {sum(map(len, hits))} tokens, {whole} of {len(hits)} texts whole"
    return share >= at_least, found
