"""What a decoder's and a translator's bundle are checked for alike: facts, interface, weights, logits, greedy tokens.

Each check says whether it passed, and what it found. Knows no engine: whoever calls has computed what is compared.
"""

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from model.checks import Found, agree, common_facts
from model.config import ModelConfig
from model.export_decoder import tensor_spec
from service.worker.bundle import TOKENIZER, Bundle, file_spec
from service.worker.weights.checkpoint import Text
from service.worker.weights.packing import Piece, write_pieces

Interface = tuple[Sequence[onnx.ValueInfoProto], Sequence[onnx.ValueInfoProto]]  # inputs, outputs
Hits = Sequence[NDArray[np.bool_]]


def facts(
    bundle: Bundle,
    config: ModelConfig,
    text: Text,
    *,
    task: str,
    graphs: Iterable[str],
    temperature: float = 0.0,
    checkpoint_sha256: str | None = None,
) -> Found:
    """What the manifest says is what the checkpoint does; the temperature is the export's choice."""
    manifest, template = bundle.manifest, text.chat_template
    given = manifest.generation
    assert given is not None  # its task has it
    return agree(
        common_facts(manifest, config, task=task, graphs=graphs, checkpoint_sha256=checkpoint_sha256)
        | {
            "bos_id": (given.bos_id, text.bos_id),
            "end_ids": (given.end_ids, text.end_ids),
            "temperature": (given.temperature, temperature),
            "chat_template": (
                None if given.chat_template is None else manifest.files[given.chat_template].sha256,
                None if template is None else sha256_of(template),
            ),
            TOKENIZER: (manifest.files[TOKENIZER].sha256, sha256_of(text.tokenizer)),
            "limits.max_tokens": (manifest.limits.max_tokens, min(manifest.limits.max_tokens, config.max_length)),
        }
    )


def sha256_of(text: str) -> str:
    """Of a file that holds it."""
    return hashlib.sha256(text.encode()).hexdigest()


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
