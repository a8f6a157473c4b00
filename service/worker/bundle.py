"""What is in a bundle directory: the manifest, the checksums, where the tokenizer and the graphs are.

A bundle is data and nothing else: `manifest.json`, `tokenizer.json`, one or more `.onnx` graphs. The manifest names
every file with its size and sha256, and a bundle is refused when a file is missing, different, unlisted, or could carry
code. Knows neither onnxruntime nor arrays: that a graph has the interface which the manifest states is checked by
`session`, that it computes what the checkpoint does by `model.verify`.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from service.errors import BundleError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VERSION = 1  # of the manifest's format
TASKS = ("classification", "generation", "translation")
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
DTYPES = ("float32", "int32", "int64")
SUFFIXES = (".json", ".onnx", ".data", ".md", ".txt")  # nothing that a loader would execute
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")
Facts = Mapping[str, Any]  # JSON values, passed on to people and not interpreted here


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph. An axis is a length, or a name where the length differs from run to run."""

    name: str
    dtype: str
    axes: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One .onnx file and its interface, in the order of the graph."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    max_tokens: int  # in one input, special tokens included


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known about a model apart from its weights; the JSON form has exactly these keys."""

    version: int
    id: str
    task: str
    created: int  # seconds since 1970, of the checkpoint
    architecture: Facts
    labels: tuple[str, ...]
    problem_type: str
    limits: Limits
    precision: str
    graphs: Mapping[str, GraphSpec]
    files: Mapping[str, FileSpec]
    licence: str
    provenance: Facts
    quality: Facts = field(default_factory=dict)
    verification: Facts = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What a caller of the API may know, ready for JSON; the files are the operator's business."""
        hidden = {"version", "id", "created", "graphs", "files"}
        return {name: value for name, value in asdict(self).items() if name not in hidden}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Self:
        """Raises BundleError that names `source` and the key. `source` is where the text came from."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{source} is not JSON: {error}") from error
        return cls(**_Reader(source).manifest(values))


@dataclass(frozen=True)
class Bundle:
    """A checked bundle directory."""

    directory: Path
    manifest: Manifest

    @property
    def tokenizer_path(self) -> Path:
        return self.directory / TOKENIZER

    def graph(self, name: str) -> GraphSpec:
        """Raises BundleError if the bundle has no such graph."""
        if name not in self.manifest.graphs:
            raise BundleError(f"{self.directory} has no graph {name!r}, only {', '.join(self.manifest.graphs)}")
        return self.manifest.graphs[name]

    def graph_path(self, name: str) -> Path:
        return self.directory / self.graph(name).file


def load_bundle(directory: Path) -> Bundle:
    """Reads the manifest and every file once, to compare size and sha256. Raises BundleError."""
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    manifest = Manifest.from_json(text, str(path))
    for name in sorted(manifest.files):
        _check_file(directory, name, manifest.files[name])
    _check_nothing_else(directory, manifest)
    return Bundle(directory, manifest)


def file_spec(path: Path) -> FileSpec:
    """What a manifest says about the file at `path`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileSpec(sha256=digest.hexdigest(), bytes=path.stat().st_size)


def _check_file(directory: Path, name: str, spec: FileSpec) -> None:
    path = directory / name
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is missing or not a plain file")
    if (size := path.stat().st_size) != spec.bytes:
        raise BundleError(f"{path} has {size} bytes, the manifest says {spec.bytes}")
    if (found := file_spec(path).sha256) != spec.sha256:
        raise BundleError(f"{path} has sha256 {found}, the manifest says {spec.sha256}")


def _check_nothing_else(directory: Path, manifest: Manifest) -> None:
    unlisted = sorted({path.name for path in directory.iterdir()} - {MANIFEST, *manifest.files})
    if unlisted:
        raise BundleError(f"{directory} holds files that the manifest does not list: {', '.join(unlisted)}")


class _Reader:
    """JSON values -> the dataclasses above; every refusal names the file and the dotted key."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, key: str, message: str) -> BundleError:
        return BundleError(f"{self.source}: {key or 'the manifest'} {message}", param=key or None)

    def manifest(self, values: Any) -> dict[str, Any]:
        given = self.record(Manifest, values, "")
        if self.whole(given["version"], "version") != VERSION:
            raise self.fail("version", f"is {given['version']!r}, this release reads {VERSION}")
        self.one_of(given["task"], TASKS, "task")
        self.one_of(given["problem_type"], PROBLEM_TYPES, "problem_type")
        self.matching(given["id"], ID, "id")
        for key in ("precision", "licence"):
            self.typed(given[key], str, key)
        for key in ("architecture", "provenance", "quality", "verification"):
            self.typed(given.get(key, {}), dict, key)
        self.whole(given["created"], "created")
        files = {name: self.file(name, spec) for name, spec in self.typed(given["files"], dict, "files").items()}
        graphs = self.typed(given["graphs"], dict, "graphs")
        limits = self.record(Limits, given["limits"], "limits")
        return given | {
            "labels": self.labels(given["labels"]),
            "limits": Limits(max_tokens=self.whole(limits["max_tokens"], "limits.max_tokens", least=1)),
            "files": self.with_tokenizer(files),
            "graphs": {name: self.graph(f"graphs.{name}", spec, files) for name, spec in graphs.items()},
        }

    def record(self, kind: type, values: Any, key: str) -> dict[str, Any]:
        """`values` as a dict with the fields of `kind`: none missing that has no default, none unknown."""
        given = self.typed(values, dict, key)
        prefix = f"{key}." if key else ""
        known = {one.name: one.default is MISSING and one.default_factory is MISSING for one in fields(kind)}
        for name in given:
            if name not in known:
                raise self.fail(prefix + name, "is not a key that this release knows")
        for name, is_required in known.items():
            if is_required and name not in given:
                raise self.fail(prefix + name, "is missing")
        return dict(given)

    def typed(self, value: Any, kind: type[T], key: str) -> T:
        if not isinstance(value, kind):
            raise self.fail(key, f"is {value!r:.80}, it must be {kind.__name__}")
        return value

    def whole(self, value: Any, key: str, *, least: int = 0) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.fail(key, f"is {value!r:.80}, it must be a whole number of at least {least}")
        return value

    def one_of(self, value: Any, choices: tuple[str, ...], key: str) -> str:
        if value not in choices:
            raise self.fail(key, f"is {value!r:.80}, it must be one of {', '.join(choices)}")
        return str(value)

    def matching(self, value: Any, pattern: re.Pattern[str], key: str) -> str:
        if not pattern.fullmatch(self.typed(value, str, key)):
            raise self.fail(key, f"is {value!r:.80}, it must match {pattern.pattern}")
        return str(value)

    def labels(self, values: Any) -> tuple[str, ...]:
        labels = tuple(self.typed(one, str, "labels") for one in self.typed(values, list, "labels"))
        if not labels or len(set(labels)) != len(labels):
            raise self.fail("labels", f"is {list(labels)}, it must be at least one label, without repeats")
        return labels

    def file(self, name: str, values: Any) -> FileSpec:
        """A file lies beside the manifest: no folder, no way out, nothing that a loader would execute."""
        key = f"files.{name}"
        if name in ("", ".", "..", MANIFEST) or "\\" in name or "\0" in name or PurePosixPath(name).name != name:
            raise self.fail(key, "is not the bare name of a file beside the manifest")
        if PurePosixPath(name).suffix not in SUFFIXES:
            raise self.fail(key, f"is not of a kind that a bundle may hold: {', '.join(SUFFIXES)}")
        spec = self.record(FileSpec, values, key)
        sha256 = self.matching(spec["sha256"], SHA256, f"{key}.sha256")
        return FileSpec(sha256=sha256, bytes=self.whole(spec["bytes"], f"{key}.bytes"))

    def with_tokenizer(self, files: dict[str, FileSpec]) -> dict[str, FileSpec]:
        if TOKENIZER not in files:
            raise self.fail(f"files.{TOKENIZER}", "is missing")
        return files

    def graph(self, key: str, values: Any, files: Mapping[str, FileSpec]) -> GraphSpec:
        spec = self.record(GraphSpec, values, key)
        if self.typed(spec["file"], str, f"{key}.file") not in files or not spec["file"].endswith(".onnx"):
            raise self.fail(f"{key}.file", f"is {spec['file']!r}, which is not an .onnx file listed under files")
        sides = {side: self.tensors(f"{key}.{side}", spec[side]) for side in ("inputs", "outputs")}
        return GraphSpec(file=spec["file"], **sides)

    def tensors(self, key: str, values: Any) -> tuple[TensorSpec, ...]:
        return tuple(self.tensor(f"{key}.{at}", one) for at, one in enumerate(self.typed(values, list, key)))

    def tensor(self, key: str, values: Any) -> TensorSpec:
        spec = self.record(TensorSpec, values, key)
        axes = self.typed(spec["axes"], list, f"{key}.axes")
        for at, axis in enumerate(axes):
            if not isinstance(axis, str):
                self.whole(axis, f"{key}.axes.{at}", least=1)
        dtype = self.one_of(spec["dtype"], DTYPES, f"{key}.dtype")
        return TensorSpec(name=self.typed(spec["name"], str, f"{key}.name"), dtype=dtype, axes=tuple(axes))
