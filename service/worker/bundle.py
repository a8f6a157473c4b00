"""What is in a bundle directory: the manifest, the checksums, where the tokenizer and the graphs are.

A bundle is data and nothing else: `manifest.json`, `tokenizer.json`, one or more `.onnx` graphs and their weights,
perhaps a chat template, which is Jinja source and only ever runs in a sandbox. The manifest names every file with its
size and sha256, and a bundle is refused when a file is missing, different, unlisted, or could carry code. Knows
neither onnxruntime nor arrays: that a graph has the interface which the manifest states is checked by `session`, that
it computes what the checkpoint does by `model.verify` and `model.verify_decoder`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from service.errors import BundleError
from service.worker.manifest import (
    DTYPES,
    ID,
    MANIFEST,
    PRECISIONS,
    PROBLEM_TYPES,
    TASKS,
    TOKENIZER,
    VERSION,
    FileSpec,
    Generation,
    GraphSpec,
    Limits,
    Manifest,
    TensorSpec,
)

__all__ = [
    "DTYPES",
    "ID",
    "MANIFEST",
    "PRECISIONS",
    "PROBLEM_TYPES",
    "TASKS",
    "TOKENIZER",
    "VERSION",
    "Bundle",
    "FileSpec",
    "Generation",
    "GraphSpec",
    "Limits",
    "Manifest",
    "TensorSpec",
    "file_spec",
    "load_bundle",
]


@dataclass(frozen=True)
class Bundle:
    """A checked bundle directory."""

    directory: Path
    manifest: Manifest

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / TOKENIZER

    @property
    def chat_template_path(self) -> Path | None:
        generation = self.manifest.generation
        if generation is None or generation.chat_template is None:
            return None
        return self.directory / generation.chat_template

    def graph(self, name: str) -> GraphSpec:
        """Raises BundleError if the bundle has no such graph."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.directory} has no graph {name!r}, only {', '.join(self.manifest.graphs)}")
        return self.manifest.graphs[name]

    def graph_path(self, name: str) -> Path:
        return self.directory / self.graph(name).file


def load_bundle(directory: Path) -> Bundle:
    """Reads the manifest and every file once, to compare size and sha256. Raises BundleError."""
    manifest = read_manifest(directory)
    for name in sorted(manifest.files):
        _check_file(directory, name, manifest.files[name])
    _check_nothing_else(directory, manifest)
    return Bundle(directory, manifest)


def read_manifest(directory: Path) -> Manifest:
    """The manifest alone; no file that it names is looked at. Raises BundleError."""
    path = directory / MANIFEST
    _check_plain(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    return Manifest.from_json(text, str(path))


def file_spec(path: Path) -> FileSpec:
    """What a manifest says about the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileSpec(sha256=digest.hexdigest(), bytes=path.stat().st_size)


def _check_file(directory: Path, name: str, spec: FileSpec) -> None:
    path = directory / name
    _check_plain(path)
    if (size := path.stat().st_size) != spec.bytes:
        raise BundleError(f"{path} has {size} bytes, the manifest says {spec.bytes}")
    if (found := file_spec(path).sha256) != spec.sha256:
        raise BundleError(f"{path} has sha256 {found}, the manifest says {spec.sha256}")


def _check_plain(path: Path) -> None:
    """Not a way to another place, nor a pipe, on which reading would wait for ever."""
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is missing or not a plain file")


def _check_nothing_else(directory: Path, manifest: Manifest) -> None:
    unlisted = sorted({path.name for path in directory.iterdir()} - {MANIFEST, *manifest.files})
    if unlisted:
        raise BundleError(f"{directory} holds files that the manifest does not list: {', '.join(unlisted)}")
