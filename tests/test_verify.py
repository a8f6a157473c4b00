"""model.verify: passes what was exported, and finds each way in which a bundle can be wrong, all of them at once.

The bundles here are broken with correct checksums: what is found is found by running the graph.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tiny import CONFIG, GRAPH_FILE, change_graph, change_manifest, confident_rows, multiply_output, without_attention

from model.data import Row
from model.verify import Report, judged, main, verify


@pytest.fixture(params=["float32", "int8"])
def bundle(request: pytest.FixtureRequest, tiny_bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_bundles[request.param], tmp_path / request.param))


def failed(report: Report) -> dict[str, str]:
    return {check.name: check.found for check in report.checks if not check.passed}


def test_what_was_exported_passes(bundle: Path, tiny_checkpoint: Path) -> None:
    report = verify(bundle, tiny_checkpoint)
    assert report.passed, report.text()
    assert [check.name for check in report.checks] == [
        "facts", "interface", "weights", "shapes", "values", "attention", "batched == alone",
    ]  # fmt: skip
    assert report.facts()["passed"] is True


def negate(graph: onnx.ModelProto) -> None:
    """One matrix of the second block with the wrong sign."""
    (tensor,) = (one for one in graph.graph.initializer if one.name == "blocks.1.attention.output.weight")
    tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))


def test_a_corrupted_weight_is_found(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, negate)
    found = failed(verify(bundle, tiny_checkpoint))
    assert set(found) == {"weights", "values"}
    assert "blocks.1.attention.output.weight is" in found["weights"]
    assert "largest difference" in found["values"]


def without_a_head(graph: onnx.ModelProto) -> None:
    """The last block's first one is paid no heed. Logits may hardly tell: other heads see the same."""
    (tensor,) = (one for one in graph.graph.initializer if one.name == "blocks.1.attention.output.weight")
    values = numpy_helper.to_array(tensor).copy()  # int8: (inputs, outputs), float32: (outputs, inputs)
    head = CONFIG.width // CONFIG.num_heads
    (values if values.dtype == np.int8 else values.T)[:head] = 0
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def test_a_head_that_is_missing_is_found(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, without_a_head)
    assert "weights" in failed(verify(bundle, tiny_checkpoint))


@pytest.mark.parametrize(("precision", "other"), [("float32", "int8"), ("int8", "float32")])
def test_a_bundle_in_another_precision_than_it_says_is_found(
    tiny_bundles: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, precision: str, other: str
) -> None:
    copy = Path(shutil.copytree(tiny_bundles[precision], tmp_path / "copy"))
    change_manifest(copy, lambda values: values.update(precision=other))
    assert f"in {precision}" in failed(verify(copy, tiny_checkpoint))["weights"]


@pytest.mark.parametrize(("operator", "operand"), [("Mul", [0.01]), ("Mul", [100.0]), ("Add", [9.0, -9.0])])
def test_logits_that_are_scaled_or_shifted_are_found(
    bundle: Path, tiny_checkpoint: Path, operator: str, operand: list[float]
) -> None:
    """No label changes by a scale, no correlation by either; probabilities do."""

    def change(graph: onnx.ModelProto) -> None:
        (node,) = (one for one in graph.graph.node if "logits" in one.output)
        node.output[0] = "own"
        graph.graph.initializer.append(numpy_helper.from_array(np.float32(operand), "operand"))
        graph.graph.node.append(helper.make_node(operator, ["own", "operand"], ["logits"]))

    change_graph(bundle, change)
    assert set(failed(verify(bundle, tiny_checkpoint))) == {"values"}


def test_one_corrupted_number_is_found(tiny_bundles: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    def corrupt(graph: onnx.ModelProto) -> None:
        (tensor,) = (one for one in graph.graph.initializer if one.name == "blocks.0.attention.qkv.weight")
        values = numpy_helper.to_array(tensor).copy()
        values[0, 0] += 0.5
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    copy = Path(shutil.copytree(tiny_bundles["float32"], tmp_path / "copy"))
    change_graph(copy, corrupt)
    assert set(failed(verify(copy, tiny_checkpoint))) == {"weights", "values", "attention"}


def blunt(graph: onnx.ModelProto) -> None:
    """The second layer tells the first layer's weights as its own; the logits are right."""
    own, other = (next(one for one in graph.graph.node if f"attention.{layer}" in one.output) for layer in (1, 0))
    renamed = own.output[0] + ".own"
    for node in graph.graph.node:
        node.input[:] = [renamed if name == own.output[0] else name for name in node.input]
    own.output[0] = renamed
    graph.graph.node.append(helper.make_node("Identity", [other.output[0]], ["attention.1"]))


def test_attention_that_is_not_the_models_own_is_found(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, blunt)
    found = failed(verify(bundle, tiny_checkpoint))
    assert set(found) == {"attention"}
    assert "largest difference" in found["attention"]


def scale_weights(graph: onnx.ModelProto) -> None:
    """Rows that sum to 1.00002: too little for the values, not for a promise."""
    multiply_output(graph, "attention.0", 1.00002)


def test_rows_that_do_not_sum_to_one_are_found(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, scale_weights)
    assert set(failed(verify(bundle, tiny_checkpoint))) == {"attention"}


def test_a_bundle_without_attention_outputs_is_not_what_is_exported(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    old = without_attention(bundle, tmp_path / "old")
    assert set(failed(verify(old, tiny_checkpoint))) == {"interface", "attention"}


def test_a_flipped_bit_is_found_by_its_checksum(bundle: Path, tiny_checkpoint: Path) -> None:
    content = bytearray((bundle / GRAPH_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / GRAPH_FILE).write_bytes(content)
    assert "sha256" in failed(verify(bundle, tiny_checkpoint))["loads"]


def rename_output(graph: onnx.ModelProto) -> None:
    graph.graph.output[0].name = "scores"
    (node,) = (one for one in graph.graph.node if "logits" in one.output)
    node.output[0] = "scores"


def rename_in_manifest(values: dict[str, Any]) -> None:
    values["graphs"]["classify"]["outputs"][0]["name"] = "scores"


def test_a_renamed_output_is_found(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, rename_output)
    assert (
        "outputs are ['scores', 'attention.0', 'attention.1'], expected ['logits', "
        in failed(verify(bundle, tiny_checkpoint))["loads"]
    )
    change_manifest(bundle, rename_in_manifest)
    assert "interface" in failed(verify(bundle, tiny_checkpoint))


def freeze_axis(graph: onnx.ModelProto) -> None:
    for value in graph.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param == "tokens":
                axis.dim_value = 8


def freeze_in_manifest(values: dict[str, Any]) -> None:
    for tensor in values["graphs"]["classify"]["inputs"]:
        tensor["axes"] = [8 if axis == "tokens" else axis for axis in tensor["axes"]]


def test_a_frozen_axis_is_found(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, freeze_axis)
    assert "has axes [8], expected ['tokens']" in failed(verify(bundle, tiny_checkpoint))["loads"]
    change_manifest(bundle, freeze_in_manifest)
    assert {"interface", "shapes"} <= set(failed(verify(bundle, tiny_checkpoint)))


def mix_rows(graph: onnx.ModelProto) -> None:
    """Adds a thousandth of the batch's mean to every row: too little for the values, enough for the bits."""
    (node,) = (one for one in graph.graph.node if "logits" in one.output)
    node.output[0] = "own"
    graph.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "rows"))
    graph.graph.initializer.append(numpy_helper.from_array(np.float32(1e-5), "little"))
    graph.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["own", "rows"], ["mean"]),
            helper.make_node("Mul", ["mean", "little"], ["leak"]),
            helper.make_node("Add", ["own", "leak"], ["logits"]),
        ]
    )


def test_a_result_that_depends_on_its_neighbours_is_found(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, mix_rows)
    assert set(failed(verify(bundle, tiny_checkpoint))) == {"batched == alone"}


def test_all_failures_are_reported_not_the_first(bundle: Path, tiny_checkpoint: Path) -> None:
    change_graph(bundle, negate)
    change_graph(bundle, mix_rows)
    change_manifest(bundle, lambda values: values.update(labels=["POSITIVE", "NEGATIVE"]))
    report = verify(bundle, tiny_checkpoint)
    assert set(failed(report)) == {"facts", "weights", "values", "batched == alone"}
    assert report.text().count("FAIL") == 4
    assert "labels" in failed(report)["facts"]


FACTS = [
    ("problem_type", lambda values: values.update(problem_type="regression")),
    ("graphs", lambda values: values["graphs"].update(extra=values["graphs"]["classify"])),
    ("provenance.checkpoint_sha256", lambda values: values["provenance"].update(checkpoint_sha256="0" * 64)),
    ("architecture.extra", lambda values: values["architecture"].update(extra=1)),
]


@pytest.mark.parametrize(("fact", "change"), FACTS)
def test_a_fact_that_is_not_the_checkpoints_is_found(
    bundle: Path, tiny_checkpoint: Path, fact: str, change: Callable[[dict[str, Any]], None]
) -> None:
    change_manifest(bundle, change)
    found = failed(verify(bundle, tiny_checkpoint))
    assert set(found) == {"facts"}
    assert found["facts"].startswith(f"{fact} is ")


def test_the_problem_type_is_whoever_exports_choice(bundle: Path, tiny_checkpoint: Path) -> None:
    change_manifest(bundle, lambda values: values.update(problem_type="regression"))
    assert verify(bundle, tiny_checkpoint, problem_type="regression").passed
    assert main([str(bundle), str(tiny_checkpoint), "--problem-type", "regression"]) == 0


@pytest.mark.parametrize("change", [{}, {"accuracy": 0.99}, {"rows": 20}, {"f1": 0.9}])
def test_quality_that_is_not_the_measured_one_is_found(
    bundle: Path, tiny_checkpoint: Path, change: dict[str, float]
) -> None:
    rows = [Row(row.text, at % 2) for at, row in enumerate(confident_rows(30, seed=0))]
    measured = verify(bundle, tiny_checkpoint, rows=rows).quality
    change_manifest(bundle, lambda values: values.update(quality=measured | change))
    found = failed(verify(bundle, tiny_checkpoint, rows=rows))
    assert set(found) == ({"stated quality"} if change else set())
    assert all(found["stated quality"].startswith(f"{name} is {value}, measured ") for name, value in change.items())


def test_another_tokenizer_is_found(bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    assert "tokenizer.json" in failed(verify(bundle, other))["facts"]


def test_quality_is_measured_on_labelled_rows(bundle: Path, tiny_checkpoint: Path) -> None:
    rows = confident_rows(30, seed=0)
    report = verify(bundle, tiny_checkpoint, rows=[*rows, *(Row(row.text, 1 - row.label) for row in rows[:10])])
    assert report.passed, report.text()
    assert report.quality == {"rows": 40, "accuracy": 0.75, "accuracy_of_checkpoint": 0.75, "label_agreement": 1.0}


@pytest.mark.parametrize(
    ("accuracy", "agreement", "is_exact", "passed"),
    [
        (0.917, 0.99, False, True),
        (0.916, 0.99, False, False),  # 0.4 points lost
        (0.920, 0.96, False, False),  # other labels
        (0.920, 0.99, True, False),  # float32 has no excuse
        (0.925, 0.99, False, True),
    ],
)
def test_quality_is_judged(accuracy: float, agreement: float, is_exact: bool, passed: bool) -> None:
    subject = type("Fake", (), {"is_exact": is_exact})
    measured = {"accuracy": accuracy, "accuracy_of_checkpoint": 0.92, "label_agreement": agreement}
    assert judged(measured, subject)[0] is passed  # type: ignore[arg-type]


def test_the_command_says_what_it_found(
    bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle), str(tiny_checkpoint)]) == 0
    assert "ok   values" in capsys.readouterr().out
    change_graph(bundle, negate)
    assert main([str(bundle), str(tiny_checkpoint)]) == 1
    assert "FAIL values" in capsys.readouterr().out
