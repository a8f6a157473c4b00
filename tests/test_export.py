"""model.export and model.packed: the packed form is the reference, and exporting is repeatable and leaves no trace."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from tiny import (
    CONFIG,
    GRAPH_FILE,
    LABELS,
    confident_rows,
    export_tiny,
    random_ids,
    save_tiny_checkpoint,
    seeded_classifier,
)

from model import export as export_module
from model.checks import Check, Report
from model.config import ModelConfig
from model.data import Row
from model.export import Options, export, export_verified, main
from model.packed import PackedClassifier
from model.train import save_checkpoint
from model.verify import verify
from service.worker.bundle import load_bundle
from service.worker.classification.engine import Tokens, pack

STYLES = {
    "post-norm": CONFIG,
    "pre-norm": replace(CONFIG, norm_order="pre"),
    "mean": replace(CONFIG, pooling="mean"),
    "last": replace(CONFIG, pooling="last", has_pooler=False),
    "relu, rms": replace(CONFIG, activation="relu", norm="rms"),
    "sinusoidal": replace(CONFIG, positions="sinusoidal", scale_embeddings=True, num_types=0),
}


def packed_logits(model: PackedClassifier, batch: Sequence[Tokens], length: int) -> torch.Tensor:
    return packed(model, batch, length)[0]


def packed(model: PackedClassifier, batch: Sequence[Tokens], length: int) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        feeds = pack(batch, length, watched=range(len(batch)))
        return model(**{name: torch.from_numpy(array) for name, array in feeds.items()})


@pytest.mark.parametrize("style", STYLES)
def test_the_packed_form_is_the_reference(style: str) -> None:
    classifier = seeded_classifier(STYLES[style])
    sequences = random_ids(7)
    types = [[index % 2 for index in range(len(ids))] if CONFIG.num_types else None for ids in sequences]
    batch = [Tokens(ids, kinds) for ids, kinds in zip(sequences, types, strict=True)]
    with torch.no_grad():
        expected = [
            classifier(torch.tensor([ids]), types=torch.tensor([kinds]))
            for ids, kinds in zip(sequences, types, strict=True)
        ]
    for length in (24, 32):
        found = packed_logits(PackedClassifier(STYLES[style], classifier).eval(), batch, length)
        torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", STYLES)
def test_the_packed_forms_attention_is_the_references(style: str) -> None:
    classifier = seeded_classifier(STYLES[style])
    sequences = random_ids(5)
    found = packed(PackedClassifier(STYLES[style], classifier).eval(), [Tokens(ids) for ids in sequences], 32)[1:]
    assert len(found) == CONFIG.num_layers
    for at, ids in enumerate(sequences):
        expected: list[torch.Tensor] = []
        with torch.no_grad():
            classifier(torch.tensor([ids]), trace=expected)
        for weights, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(weights[at, :, : len(ids), : len(ids)], reference[0], atol=1e-6, rtol=0)
            assert (weights[at, :, : len(ids), len(ids) :] == 0).all()  # padding is not looked at


def test_packing_leaves_the_classifier_alone() -> None:
    classifier = seeded_classifier()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    PackedClassifier(CONFIG, classifier)
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("kind", replace(CONFIG, kind="decoder")),
        ("positions", replace(CONFIG, positions="rotary")),
        ("num_kv_heads", replace(CONFIG, num_kv_heads=2)),
        ("relative_buckets", replace(CONFIG, relative_buckets=8)),
    ],
)
def test_a_model_without_packed_form_is_refused_by_name(name: str, config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=f"{name} .* has no packed form"):
        PackedClassifier(config, seeded_classifier())


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_same_checkpoint_gives_the_same_bytes(
    tiny_checkpoint: Path, tiny_bundles: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    again = export_tiny(tiny_checkpoint, tmp_path / "again", precision)
    for path in tiny_bundles[precision].iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_model_whose_biases_are_zero_is_exported(tmp_path: Path) -> None:
    """Their layers have none in the graph."""
    checkpoint, model = save_tiny_checkpoint(tmp_path / "tiny"), seeded_classifier()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0 if name.endswith("bias") else 1)
    save_checkpoint(checkpoint, CONFIG, model, tokenizer=checkpoint / "source.json", provenance={"created": 0})
    for precision in ("float32", "int8"):
        report = verify(export_tiny(checkpoint, tmp_path / precision, precision), checkpoint)
        assert report.passed, report.text()


def test_the_manifest_says_what_was_exported(tiny_bundles: dict[str, Path]) -> None:
    manifest = load_bundle(tiny_bundles["int8"]).manifest
    assert (manifest.id, manifest.task, manifest.precision) == ("tiny", "classification", "int8")
    assert (manifest.labels, manifest.limits.max_tokens) == (LABELS, CONFIG.max_length)
    assert manifest.created == 1_700_000_000
    assert manifest.architecture["num_layers"] == CONFIG.num_layers
    assert manifest.provenance["recipe"] == "tests"
    assert set(manifest.files) == {GRAPH_FILE, "tokenizer.json"}
    outputs = {tensor.name: tensor.axes for tensor in manifest.graphs["classify"].outputs}
    weights = ("watched", CONFIG.num_heads, "length", "length")
    assert outputs == {"logits": ("batch", 2), "attention.0": weights, "attention.1": weights}


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_graph_tells_nothing_of_the_machine(tiny_bundles: dict[str, Path], precision: str) -> None:
    content = (tiny_bundles[precision] / GRAPH_FILE).read_bytes()
    for trace in (str(Path.home()), str(Path(__file__).parents[1]), "site-packages", "stack_trace"):
        assert trace.encode() not in content


def test_the_graph_holds_no_file_names(tiny_bundles: dict[str, Path]) -> None:
    graph = onnx.load(tiny_bundles["int8"] / GRAPH_FILE, load_external_data=False)
    assert not any(tensor.external_data for tensor in graph.graph.initializer)


def test_int8_needs_sample_texts(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sample texts"):
        export(tiny_checkpoint, tmp_path / "out", Options(id="tiny"))


def test_int8_needs_data_on_the_command_line(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tiny_checkpoint), "--out", "unused"])
    assert "int8 needs --data" in capsys.readouterr().err


def test_a_bundle_that_fails_its_verification_does_not_replace_a_good_one(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    (out / "good").touch()
    monkeypatch.setattr(export_module, "export", lambda checkpoint, new, options: new.mkdir())
    monkeypatch.setattr(export_module, "verify", lambda *_, **__: Report((Check("values", False, "all wrong"),)))
    assert not export_verified(tiny_checkpoint, out, Options(id="tiny", precision="float32"))
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "good"]
    assert "FAIL values: all wrong" in capsys.readouterr().out


def write_rows(path: Path, rows: list[Row]) -> None:
    path.write_text("sentence\tlabel\n" + "".join(f"{row.text}\t{row.label}\n" for row in rows))


def test_the_command_exports_and_verifies(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "train.tsv", confident_rows(64, seed=7))
    write_rows(tmp_path / "dev.tsv", confident_rows(40, seed=8))
    out = tmp_path / "sentiment"
    status = main([str(tiny_checkpoint), "--out", str(out), "--data", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    manifest = load_bundle(out).manifest
    assert manifest.id == "sentiment"
    assert manifest.verification["passed"] is True
    assert set(manifest.verification["checks"]) >= {"interface", "shapes", "values", "batched == alone", "quality"}
    assert manifest.quality["rows"] == 40
    assert json.loads((out / "manifest.json").read_text())["provenance"]["recipe"] == "tests"
