"""service.worker.bundle: a bundle is served only if its manifest is whole and every file the one that was exported."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from service.errors import BundleError
from service.worker.bundle import MANIFEST, Manifest, file_spec, load_bundle

Values = dict[str, Any]


def good_values(directory: Path) -> Values:
    (directory / "tokenizer.json").write_text("{}")
    (directory / "classify.onnx").write_bytes(b"a graph")
    tensor = {"name": "logits", "dtype": "float32", "axes": ["batch", 2]}
    return {
        "version": 1,
        "id": "tiny",
        "task": "classification",
        "created": 1_700_000_000,
        "architecture": {"width": 32, "max_length": 24},
        "labels": ["NEGATIVE", "POSITIVE"],
        "problem_type": "single_label_classification",
        "limits": {"max_tokens": 24},
        "precision": "int8",
        "graphs": {"classify": {"file": "classify.onnx", "inputs": [], "outputs": [tensor]}},
        "files": {name: signature(directory / name) for name in ("tokenizer.json", "classify.onnx")},
        "licence": "Apache-2.0",
        "provenance": {"recipe": "tests"},
    }


def signature(path: Path) -> Values:
    spec = file_spec(path)
    return {"sha256": spec.sha256, "bytes": spec.bytes}


def write(directory: Path, values: object) -> Path:
    (directory / MANIFEST).write_text(json.dumps(values))
    return directory


def place(values: Any, key: str) -> tuple[Any, Any]:
    *parents, last = (int(part) if part.isdigit() else part for part in key.split("/"))
    for parent in parents:
        values = values[parent]
    return values, last


def test_a_good_bundle_loads_and_finds_its_files(tmp_path: Path) -> None:
    bundle = load_bundle(write(tmp_path, good_values(tmp_path)))
    assert bundle.tokenizer_path == tmp_path / "tokenizer.json"
    assert bundle.graph_path("classify") == tmp_path / "classify.onnx"
    assert bundle.manifest.labels == ("NEGATIVE", "POSITIVE")
    assert bundle.manifest.limits.max_tokens == 24
    assert bundle.graph("classify").outputs[0].axes == ("batch", 2)
    with pytest.raises(BundleError, match="no graph 'decode', only classify"):
        bundle.graph("decode")


def test_a_manifest_survives_its_own_json(tmp_path: Path) -> None:
    manifest = load_bundle(write(tmp_path, good_values(tmp_path))).manifest
    assert Manifest.from_json(manifest.to_json(), "again") == manifest


def test_facts_are_json_and_leave_the_files_out(tmp_path: Path) -> None:
    facts = load_bundle(write(tmp_path, good_values(tmp_path))).manifest.facts()
    assert json.loads(json.dumps(facts))["limits"] == {"max_tokens": 24}
    assert {"task", "labels", "precision", "quality", "verification", "licence"} <= facts.keys()
    assert not {"files", "graphs"} & facts.keys()


REQUIRED = ("version", "id", "task", "created", "labels", "limits", "graphs", "files", "licence", "provenance")
NESTED = ("limits/max_tokens", "graphs/classify/file", "graphs/classify/outputs", "files/tokenizer.json/sha256")


@pytest.mark.parametrize("key", REQUIRED + NESTED)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    values = good_values(tmp_path)
    parent, last = place(values, key)
    del parent[last]
    with pytest.raises(BundleError, match=f"{MANIFEST}: {key.replace('/', '.')} is missing"):
        load_bundle(write(tmp_path, values))


@pytest.mark.parametrize("key", ["licens", "limits/max_chars", "graphs/classify/opset", "files/tokenizer.json/md5"])
def test_an_unknown_key_is_named(tmp_path: Path, key: str) -> None:
    values = good_values(tmp_path)
    parent, last = place(values, key)
    parent[last] = 1
    with pytest.raises(BundleError, match=f"{key.replace('/', '.')} is not a key"):
        load_bundle(write(tmp_path, values))


MALFORMED = [
    ("version", 2, "this release reads 1"),
    ("version", True, "is True"),
    ("id", "../etc", "must match"),
    ("id", 7, "must be str"),
    ("task", "poetry", "one of classification"),
    ("problem_type", "guessing", "one of single_label"),
    ("precision", "int7", "one of int8, float32"),
    ("created", -1, "at least 0"),
    ("created", 10**30, "is 1000000000000000000000000000000, it must be a number within 9223372036854775807 of 0"),
    ("provenance/loss", float("nan"), "is nan, it must be a number"),
    ("provenance/recipe", "\ud800", r"holds '\\ud800', which is half a character"),
    ("provenance/recipe", {"\udfff": 1}, r"holds '\\udfff', which is half a character"),
    ("labels/1", "\ud800", r"labels\.1 holds '\\ud800'"),
    ("labels", "POSITIVE", "must be list"),
    ("labels", ["A", "A"], "repeats"),
    ("labels", [], "at least one label"),
    ("limits", [], "must be dict"),
    ("limits/max_tokens", 0, "at least 1"),
    ("limits/max_tokens", "24", "whole number"),
    ("limits/max_tokens", True, "whole number"),
    ("limits/max_tokens", 25, r"is 25, more than architecture\.max_length, 24"),
    ("files/tokenizer.json/sha256", "abc", "must match"),
    ("files/tokenizer.json/bytes", 1.5, "whole number"),
    ("graphs/classify/file", "other.onnx", "not an .onnx file listed under files"),
    ("graphs/classify/file", "tokenizer.json", "not an .onnx file listed under files"),
    ("graphs/classify/outputs", {}, "must be list"),
]


@pytest.mark.parametrize(("key", "value", "message"), MALFORMED)
def test_a_malformed_value_is_named_with_what_it_must_be(tmp_path: Path, key: str, value: object, message: str) -> None:
    values = good_values(tmp_path)
    parent, last = place(values, key)
    parent[last] = value
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(write(tmp_path, values))
    assert key.replace("/", ".") in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("dtype", "float64"), ("axes", [0]), ("axes", [True]), ("name", None)])
def test_a_malformed_tensor_is_named(tmp_path: Path, key: str, value: object) -> None:
    values = good_values(tmp_path)
    values["graphs"]["classify"]["outputs"][0][key] = value
    with pytest.raises(BundleError, match=f"graphs.classify.outputs.0.{key}"):
        load_bundle(write(tmp_path, values))


ESCAPES = ["../secret.json", "/etc/passwd.txt", "folder/a.json", "..", ".", "", "a\\b.json", "a\0.json", MANIFEST]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_file_outside_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    values = good_values(tmp_path)
    values["files"][name] = values["files"]["tokenizer.json"]
    with pytest.raises(BundleError, match="not the bare name of a file"):
        load_bundle(write(tmp_path, values))


@pytest.mark.parametrize("name", ["weights.pkl", "weights.bin", "custom.py", "ops.so", "weights"])
def test_a_file_that_could_carry_code_is_refused(tmp_path: Path, name: str) -> None:
    values = good_values(tmp_path)
    (tmp_path / name).write_bytes(b"")
    values["files"][name] = signature(tmp_path / name)
    with pytest.raises(BundleError, match="not of a kind that a bundle may hold"):
        load_bundle(write(tmp_path, values))


def test_an_unlisted_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, good_values(tmp_path))
    (tmp_path / "generate.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"does not list: generate\.onnx"):
        load_bundle(tmp_path)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    write(tmp_path, good_values(tmp_path))
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere.onnx"
    (tmp_path / "classify.onnx").rename(elsewhere)
    (tmp_path / "classify.onnx").symlink_to(elsewhere)
    with pytest.raises(BundleError, match="not a plain file"):
        load_bundle(tmp_path)


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    write(tmp_path, good_values(tmp_path))
    (tmp_path / "classify.onnx").write_bytes(b"A graph")
    with pytest.raises(BundleError, match=r"classify.onnx has sha256 .*, the manifest says"):
        load_bundle(tmp_path)


def test_a_cut_file_is_found(tmp_path: Path) -> None:
    write(tmp_path, good_values(tmp_path))
    (tmp_path / "classify.onnx").write_bytes(b"a gra")
    with pytest.raises(BundleError, match="has 5 bytes, the manifest says 7"):
        load_bundle(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, good_values(tmp_path))
    (tmp_path / "classify.onnx").unlink()
    with pytest.raises(BundleError, match=r"classify\.onnx is missing"):
        load_bundle(tmp_path)


def test_a_bundle_without_tokenizer_is_refused(tmp_path: Path) -> None:
    values = good_values(tmp_path)
    del values["files"]["tokenizer.json"]
    with pytest.raises(BundleError, match=r"files.tokenizer.json is missing"):
        load_bundle(write(tmp_path, values))


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_manifest_is_a_plain_file(tmp_path: Path, kind: str) -> None:
    path, elsewhere = write(tmp_path, good_values(tmp_path)) / MANIFEST, tmp_path.with_suffix(".json")
    path.rename(elsewhere)
    path.symlink_to(elsewhere) if kind == "link" else os.mkfifo(path)
    with pytest.raises(BundleError, match=r"manifest\.json is missing or not a plain file"):
        load_bundle(tmp_path)


def test_depth_has_a_limit(tmp_path: Path) -> None:
    values = good_values(tmp_path)
    deep = values["quality"] = {}
    for _ in range(20):
        deep["more"] = deep = {}
    with pytest.raises(BundleError, match=r"quality(\.more)+ is nested more than 16 deep"):
        load_bundle(write(tmp_path, values))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 200_000])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        load_bundle(tmp_path)


def test_a_directory_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is missing"):
        load_bundle(tmp_path)


def generation_values(directory: Path) -> Values:
    values = good_values(directory)
    del values["labels"], values["problem_type"]
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    values["files"]["chat_template.jinja"] = signature(directory / "chat_template.jinja")
    generation = {"bos_id": None, "end_ids": [0, 2], "temperature": 0.7, "chat_template": "chat_template.jinja"}
    return values | {"task": "generation", "generation": generation, "weights": {"package": "some"}}


def test_a_generation_bundle_loads_and_finds_its_template(tmp_path: Path) -> None:
    bundle = load_bundle(write(tmp_path, generation_values(tmp_path)))
    assert bundle.chat_template_path == tmp_path / "chat_template.jinja"
    assert bundle.manifest.generation is not None
    assert (bundle.manifest.generation.end_ids, bundle.manifest.generation.bos_id) == ((0, 2), None)
    assert Manifest.from_json(bundle.manifest.to_json(), "again") == bundle.manifest
    facts = bundle.manifest.facts()
    assert facts["generation"]["temperature"] == 0.7
    assert not {"labels", "problem_type", "weights"} & facts.keys()


def test_without_a_template_there_is_no_path(tmp_path: Path) -> None:
    values = generation_values(tmp_path)
    values["generation"]["chat_template"] = None
    assert load_bundle(write(tmp_path, values)).chat_template_path is None


WRONG_GENERATION = [
    ("generation/chat_template", "other.jinja", "not listed under files"),
    ("generation/chat_template", 7, "must be str"),
    ("generation/end_ids", 2, "must be list"),
    ("generation/end_ids", [-1], "at least 0"),
    ("generation/bos_id", True, "whole number"),
    ("generation/temperature", "hot", "a number of at least 0"),
    ("generation/temperature", -1, "a number of at least 0"),
    ("generation/top_k", 5, "is not a key"),
    ("labels", ["A"], "not a key for the task generation"),
    ("weights", [], "must be dict"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG_GENERATION)
def test_a_malformed_generation_section_is_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    values = generation_values(tmp_path)
    parent, last = place(values, key)
    parent[last] = value
    with pytest.raises(BundleError, match=message) as caught:
        load_bundle(write(tmp_path, values))
    assert key.replace("/", ".") in str(caught.value)


@pytest.mark.parametrize("key", ["bos_id", "end_ids", "temperature", "chat_template"])
def test_a_generation_section_is_whole(tmp_path: Path, key: str) -> None:
    values = generation_values(tmp_path)
    del values["generation"][key]
    with pytest.raises(BundleError, match=rf"generation\.{key} is missing"):
        load_bundle(write(tmp_path, values))


def test_each_task_needs_its_own_keys(tmp_path: Path) -> None:
    values = generation_values(tmp_path)
    del values["generation"]
    with pytest.raises(BundleError, match="generation is missing"):
        load_bundle(write(tmp_path, values))
