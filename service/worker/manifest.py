"""What a bundle's manifest says: its keys, and what each of them must be.

Owns the JSON form. Knows no file; whether a bundle's files are the ones that its manifest names is `bundle`'s business.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Self, TypeVar

from service.errors import BundleError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
VERSION = 1  # of the manifest's format
OWN = {  # keys of a manifest that only one task has
    "classification": ("labels", "problem_type"),
    "generation": ("generation",),
    "translation": ("generation",),
}
TASKS = tuple(OWN)
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
DTYPES = ("float32", "int32", "int64")
PRECISIONS = ("int8", "float32")
MAX_DEPTH = 16  # of values in values; protobuf's readers stop at 33
MAX_NUMBER = 2**63 - 1  # an int64 of protobuf
SUFFIXES = (".json", ".onnx", ".data", ".jinja", ".md", ".txt")  # nothing that a loader would execute
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")
Facts = Mapping[str, Any]  # JSON values, passed on to people and hardly interpreted here


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
class Generation:
    """What a model that continues texts does unless a request says otherwise."""

    bos_id: int | None  # what an empty prompt stands for; where else it belongs, tokenizer and template put it
    end_ids: tuple[int, ...]  # each of them ends one
    temperature: float  # 0: greedy
    chat_template: str | None  # the file's name; None: the model does not chat


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known about a model apart from its weights; the JSON form has exactly these keys.

    `labels` and `problem_type` belong to classification, `generation` to generation; a task's own must be there.
    `weights` names the package whose file holds the weights of a bundle that comes without; `pull` interprets it.
    """

    version: int
    id: str
    task: str
    created: int  # seconds since 1970, of the checkpoint
    architecture: Facts
    limits: Limits
    precision: str
    graphs: Mapping[str, GraphSpec]
    files: Mapping[str, FileSpec]
    licence: str
    provenance: Facts
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None
    generation: Generation | None = None
    weights: Facts | None = None
    quality: Facts = field(default_factory=dict)
    verification: Facts = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What a caller of the API may know, ready for JSON; the files are the operator's business."""
        hidden = {"version", "id", "created", "graphs", "files", "weights"}
        return {name: value for name, value in self._values().items() if name not in hidden}

    def to_json(self) -> str:
        return json.dumps(self._values(), indent=2, sort_keys=True) + "\n"

    def _values(self) -> dict[str, Any]:
        """Without what the task has not."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, text: str, source: str) -> Self:
        """Raises BundleError that names `source` and the key. `source` is where the text came from."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{source} is not JSON: {error}") from error
        return cls(**_Reader(source).manifest(values))


class _Reader:
    """JSON values -> the dataclasses above; every refusal names the file and the dotted key."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, key: str, message: str) -> BundleError:
        return BundleError(f"{self.source}: {key or 'the manifest'} {message}", param=key or None)

    def manifest(self, values: Any) -> dict[str, Any]:
        self.portable(values, "")
        given = self.record(Manifest, values, "")
        if self.whole(given["version"], "version") != VERSION:
            raise self.fail("version", f"is {given['version']!r}, this release reads {VERSION}")
        self.one_of(given["task"], TASKS, "task")
        self.matching(given["id"], ID, "id")
        self.one_of(given["precision"], PRECISIONS, "precision")
        self.typed(given["licence"], str, "licence")
        for key in ("architecture", "provenance", "quality", "verification"):
            self.typed(given.get(key, {}), dict, key)
        self.whole(given["created"], "created")
        files = {name: self.file(name, spec) for name, spec in self.typed(given["files"], dict, "files").items()}
        graphs = self.typed(given["graphs"], dict, "graphs")
        self.typed(given.get("weights", {}), dict, "weights")
        return (
            given
            | self.own(given, files)
            | {
                "limits": self.limits(given["limits"], given["architecture"]),
                "files": self.with_tokenizer(files),
                "graphs": {name: self.graph(f"graphs.{name}", spec, files) for name, spec in graphs.items()},
            }
        )

    def portable(self, value: Any, key: str, depth: int = 0) -> None:
        """Facts are told over JSON and protobuf: nothing may stand in them that a reader of either cannot take."""
        if depth > MAX_DEPTH:
            raise self.fail(key, f"is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            for name, one in value.items():
                self.portable(name, key, depth)
                self.portable(one, f"{key}.{name}".lstrip("."), depth + 1)
        elif isinstance(value, list):
            for at, one in enumerate(value):
                self.portable(one, f"{key}.{at}".lstrip("."), depth + 1)
        elif isinstance(value, str):
            if any("\ud800" <= character <= "\udfff" for character in value):
                raise self.fail(key, f"holds {value!r:.80}, which is half a character")
        elif isinstance(value, int | float) and not -MAX_NUMBER <= value <= MAX_NUMBER:
            raise self.fail(key, f"is {value!r:.80}, it must be a number within {MAX_NUMBER} of 0")

    def limits(self, values: Any, architecture: Facts) -> Limits:
        """No more than the model has positions for, where its architecture says how many."""
        max_tokens = self.whole(self.record(Limits, values, "limits")["max_tokens"], "limits.max_tokens", least=1)
        positions = self.whole(architecture.get("max_length", max_tokens), "architecture.max_length")
        if max_tokens > positions:
            raise self.fail("limits.max_tokens", f"is {max_tokens}, more than architecture.max_length, {positions}")
        return Limits(max_tokens=max_tokens)

    def own(self, given: dict[str, Any], files: Mapping[str, FileSpec]) -> dict[str, Any]:
        """What only the manifest's task has. All of it must be there, nothing of another task may."""
        needed = OWN[given["task"]]
        for name in sorted({name for names in OWN.values() for name in names}):
            if name in needed and name not in given:
                raise self.fail(name, "is missing")
            if name in given and name not in needed:
                raise self.fail(name, f"is not a key for the task {given['task']}")
        if "generation" in needed:
            return {"generation": self.generation(given["generation"], files)}
        problem_type = self.one_of(given["problem_type"], PROBLEM_TYPES, "problem_type")
        return {"labels": self.labels(given["labels"]), "problem_type": problem_type}

    def generation(self, values: Any, files: Mapping[str, FileSpec]) -> Generation:
        key = "generation"
        given = self.record(Generation, values, key)
        template = given["chat_template"]
        if template is not None and self.typed(template, str, f"{key}.chat_template") not in files:
            raise self.fail(f"{key}.chat_template", f"is {template!r:.80}, which is not listed under files")
        ends = self.typed(given["end_ids"], list, f"{key}.end_ids")
        bos_id = given["bos_id"]
        return Generation(
            bos_id=None if bos_id is None else self.whole(bos_id, f"{key}.bos_id"),
            end_ids=tuple(self.whole(one, f"{key}.end_ids.{at}") for at, one in enumerate(ends)),
            temperature=self.number(given["temperature"], f"{key}.temperature"),
            chat_template=template,
        )

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

    def number(self, value: Any, key: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.fail(key, f"is {value!r:.80}, it must be a number of at least 0")
        return float(value)

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
