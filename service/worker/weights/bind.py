"""Makes a shipped bundle whole: its graph comes with attnd, its weights from somebody's checkpoint. Without torch.

A shipped directory holds everything but the weights and the tokenizer; its manifest names the two with their sha256.
The whole bundle is an ordinary one. It is written beside its place and renamed, so that there is never half of one.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from service.errors import BundleError
from service.worker.bundle import (
    MANIFEST,
    TOKENIZER,
    Generation,
    Limits,
    Manifest,
    file_spec,
    load_bundle,
    read_manifest,
)
from service.worker.weights.checkpoint import Checkpoint
from service.worker.weights.packing import PRECISIONS, Smoothing, decoder_pieces, read_smoothing, write_pieces

WEIGHTS = "decode.data"
SMOOTHING = "smoothing.data"
TEMPLATE = "chat_template.jinja"
FREE = ("max_length", "pad_id")  # may differ between a checkpoint and the graph that it is bound to

T = TypeVar("T")


def bind(shipped: Path, checkpoint: Checkpoint, out: Path) -> None:
    """Writes the whole of a shipped bundle to `out`, from its pinned checkpoint. Raises BundleError; leaves nothing."""
    manifest = read_manifest(shipped)
    check_architecture(manifest, checkpoint)
    with _beside(out) as new:
        for name in manifest.files.keys() - {WEIGHTS, TOKENIZER}:
            shutil.copyfile(shipped / name, new / name)
        _write(shipped, manifest, checkpoint, new)
        shutil.copyfile(shipped / MANIFEST, new / MANIFEST)
        load_bundle(new)  # every byte is the one that was verified when the bundle was made


def bind_other(shipped: Path, checkpoint: Checkpoint, out: Path, *, id: str, source: Mapping[str, Any]) -> None:
    """The same graph with other weights of its shape, and a manifest that claims nothing about their quality."""
    manifest = read_manifest(shipped)
    check_architecture(manifest, checkpoint)
    text = checkpoint.text
    with _beside(out) as new:
        for name in manifest.files.keys() - {WEIGHTS, TOKENIZER, TEMPLATE}:
            shutil.copyfile(shipped / name, new / name)
        _write(shipped, manifest, checkpoint, new)
        if text.chat_template is not None:
            (new / TEMPLATE).write_text(text.chat_template, encoding="utf-8")
        content = replace(
            manifest,
            id=id,
            files={path.name: file_spec(path) for path in sorted(new.iterdir())},
            limits=Limits(max_tokens=min(manifest.limits.max_tokens, checkpoint.architecture["max_length"])),
            generation=Generation(
                bos_id=text.bos_id,
                end_ids=text.end_ids,
                temperature=0.0,
                chat_template=None if text.chat_template is None else TEMPLATE,
            ),
            licence=checkpoint.licence or "unknown",
            provenance={"source": dict(source), "graph_of": manifest.id},
            weights=None,
            quality={},
            verification={},
        )
        (new / MANIFEST).write_text(content.to_json(), encoding="utf-8")
        load_bundle(new)


def check_architecture(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raises BundleError if the graph was made for a model of other sizes."""
    ours, theirs = manifest.architecture, checkpoint.architecture
    wrong = [f"{name} is {theirs[name]!r}, not {ours.get(name)!r}" for name in theirs if ours.get(name) != theirs[name]]
    wrong = [text for text in wrong if text.split(" ", 1)[0] not in FREE]
    if wrong:
        raise BundleError(f"the weights do not fit the graph of {manifest.id!r}: {'; '.join(wrong)}")


def _write(shipped: Path, manifest: Manifest, checkpoint: Checkpoint, new: Path) -> None:
    """The weights and the tokenizer."""
    num_layers = checkpoint.architecture["num_layers"]
    parts = decoder_pieces(
        checkpoint.tensor,
        num_layers=num_layers,
        is_tied=checkpoint.architecture["tie_embeddings"],
        kinds=PRECISIONS[manifest.precision],
        smoothing=_smoothing(shipped, manifest),
    )
    write_pieces(new / WEIGHTS, progress(parts, f"binding {manifest.id}", total=num_layers + 2))
    (new / TOKENIZER).write_text(checkpoint.text.tokenizer, encoding="utf-8")


def _smoothing(shipped: Path, manifest: Manifest) -> list[Smoothing] | None:
    if SMOOTHING not in manifest.files:
        return None
    values = np.frombuffer((shipped / SMOOTHING).read_bytes(), "<f4")
    sizes = manifest.architecture
    return read_smoothing(values, width=sizes["width"], feed_forward=sizes["feed_forward"])


def progress(parts: Iterable[T], what: str, *, total: int) -> Iterator[T]:
    """A bar on stderr, when that is a terminal."""
    return iter(tqdm(parts, desc=what, total=total, unit="part", disable=None, leave=False))


class _beside:
    """A new directory that becomes `out` if all goes well, and vanishes if not, as does what a killed one left."""

    def __init__(self, out: Path) -> None:
        self.out, self.new = out, out.with_name(out.name + ".new")

    def __enter__(self) -> Path:
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir(parents=True)
        return self.new

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.new, ignore_errors=True)
            return
        shutil.rmtree(self.out, ignore_errors=True)
        self.new.rename(self.out)
