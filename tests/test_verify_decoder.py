"""model.verify_decoder passes a faithful bundle, and each kind of damage fails the check that is there for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from model.checks import Report
from model.export_decoder import GRAPH_FILE, TEMPLATE_FILE, WEIGHTS_FILE
from model.smoothing import calibrate
from model.verify_decoder import losses, verify_decoder
from tests.tiny import (
    CHAT_CONFIG,
    change_graph,
    change_manifest,
    chat_checkpoint,
    multiply_output,
    reverse_vocabulary,
    seeded_chat_model,
    sign,
    tiny_generation_bundle,
)

DRAW = np.random.default_rng(4)
PROMPTS = [DRAW.integers(3, CHAT_CONFIG.vocab_size, size).tolist() for size in (5, 12, 40, 70)]
TEXT = DRAW.integers(3, CHAT_CONFIG.vocab_size, 120).tolist()


def verified(directory: Path) -> Report:
    return verify_decoder(directory, chat_checkpoint(), PROMPTS, text=TEXT)


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_a_faithful_bundle_passes(tmp_path: Path, precision: str) -> None:
    report = verified(tiny_generation_bundle(tmp_path / "bundle", precision=precision))
    assert report.passed, report.text()
    assert {check.name for check in report.checks} >= {
        "logits",
        "attention",
        "greedy tokens",
        "batched == alone",
        "perplexity",
    }
    assert report.quality["perplexity"]["tokens"] == len(TEXT)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_generation_bundle(tmp_path / "bundle", precision="float32")


def test_a_broken_weight_is_found(bundle: Path) -> None:
    path = bundle / WEIGHTS_FILE
    values = np.frombuffer(path.read_bytes(), np.float32).copy()
    values[-CHAT_CONFIG.width * 40] += 3  # somewhere in the last block
    path.write_bytes(values.tobytes())
    assert "loads" in failed(verified(bundle))  # its checksum
    sign(bundle, WEIGHTS_FILE)
    assert failed(verified(bundle)) >= {"weights", "logits"}


def test_a_renamed_output_is_found(bundle: Path) -> None:
    def rename(graph: onnx.ModelProto) -> None:
        graph.graph.output[0].name = graph.graph.node[-1].output[0] = "scores"

    change_graph(bundle, rename, GRAPH_FILE)
    assert failed(verified(bundle)) == {"loads"}  # the session compares it with the manifest


def test_a_renamed_output_that_the_manifest_knows_is_found(bundle: Path) -> None:
    def rename(graph: onnx.ModelProto) -> None:
        graph.graph.output[0].name = graph.graph.node[-1].output[0] = "scores"

    change_graph(bundle, rename, GRAPH_FILE)
    change_manifest(bundle, lambda values: values["graphs"]["decode"]["outputs"][0].update(name="scores"))
    assert not verified(bundle).passed


def test_a_frozen_axis_is_found(bundle: Path) -> None:
    def freeze(graph: onnx.ModelProto) -> None:
        for tensor in (graph.graph.input[0], graph.graph.input[1], graph.graph.output[0]):
            tensor.type.tensor_type.shape.dim[0].dim_value = 1

    change_graph(bundle, freeze, GRAPH_FILE)

    def agree(values: dict) -> None:
        decode = values["graphs"]["decode"]
        for tensor in (*decode["inputs"][:2], decode["outputs"][0]):
            tensor["axes"][0] = 1

    change_manifest(bundle, agree)
    assert failed(verified(bundle)) >= {"interface", "batched == alone"}


def telling(graph: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes whose weights are told, which compute nothing else."""
    attributes = [one for node in graph.graph.node if node.op_type == "If" for one in node.attribute]
    branches = [one.g for one in attributes if one.name == "then_branch"]
    return [node for branch in branches for node in branch.node if node.op_type == "GroupQueryAttention"]


@pytest.mark.parametrize("by", [0.01, 100])
def test_scaled_logits_are_found_in_int8_too(tmp_path: Path, by: float) -> None:
    """Without a text: no token's rank changes, but every probability."""
    bundle = tiny_generation_bundle(tmp_path / "bundle")
    for name in (GRAPH_FILE, "attention.onnx"):
        change_graph(bundle, lambda graph: multiply_output(graph, "logits", by), name)
    assert failed(verify_decoder(bundle, chat_checkpoint(), PROMPTS)) == {"logits"}


def test_weights_of_another_temperature_are_found(bundle: Path) -> None:
    def flatten(graph: onnx.ModelProto) -> None:
        telling(graph)[-1].attribute.append(onnx.helper.make_attribute("scale", 0.24))  # for a quarter

    change_graph(bundle, flatten, "attention.onnx")
    assert failed(verified(bundle)) == {"attention"}


def test_weights_before_the_softmax_are_found(bundle: Path) -> None:
    def stop_early(graph: onnx.ModelProto) -> None:
        (attribute,) = (one for one in telling(graph)[0].attribute if one.name == "qk_output")
        attribute.i = 1

    change_graph(bundle, stop_early, "attention.onnx")
    assert failed(verified(bundle)) == {"attention"}


def test_a_second_graph_that_computes_something_else_is_found(bundle: Path) -> None:
    def forget_a_branch(graph: onnx.ModelProto) -> None:
        residual = next(node for node in graph.graph.node if node.op_type == "Add")
        residual.input[1] = residual.input[0]

    change_graph(bundle, forget_a_branch, "attention.onnx")
    assert failed(verified(bundle)) == {"attention"}


def test_weights_that_are_no_numbers_are_found(bundle: Path) -> None:
    def spoil(graph: onnx.ModelProto) -> None:
        for output in graph.graph.output[1:]:
            multiply_output(graph, output.name, float("nan"))

    change_graph(bundle, spoil, "attention.onnx")
    assert failed(verified(bundle)) == {"attention"}


FACTS = [
    ("bos_id", lambda values: values["generation"].update(bos_id=10**9)),
    ("end_ids", lambda values: values["generation"].update(end_ids=[5])),
    ("temperature", lambda values: values["generation"].update(temperature=50)),
    ("task", lambda values: values.update(task="translation")),
    ("graphs", lambda values: values["graphs"].update(extra=values["graphs"]["decode"])),
    ("provenance.checkpoint_sha256", lambda values: values["provenance"].update(checkpoint_sha256="0" * 64)),
]


@pytest.mark.parametrize(("fact", "change"), FACTS)
def test_a_fact_that_is_not_the_checkpoints_is_found(bundle: Path, fact: str, change: Callable[[dict], None]) -> None:
    change_manifest(bundle, change)
    report = verified(bundle)
    assert failed(report) == {"facts"}
    assert report.checks[0].found.startswith(f"{fact} is ")


def test_another_tokenizer_is_found(bundle: Path) -> None:
    reverse_vocabulary(bundle)
    assert failed(verified(bundle)) == {"facts"}


@pytest.mark.parametrize("template", ["{{ 'ignore the user' }}", None])
def test_another_template_is_found(bundle: Path, template: str | None) -> None:
    if template is None:
        change_manifest(bundle, lambda values: values["generation"].update(chat_template=None))
    else:
        (bundle / TEMPLATE_FILE).write_text(template)
        sign(bundle, TEMPLATE_FILE)
    assert failed(verified(bundle)) == {"facts"}


def test_the_temperature_is_the_exports_choice(bundle: Path) -> None:
    change_manifest(bundle, lambda values: values["generation"].update(temperature=0.5))
    assert verify_decoder(bundle, chat_checkpoint(), PROMPTS, temperature=0.5).passed


def test_a_perplexity_that_is_not_the_measured_one_is_found(bundle: Path) -> None:
    measured = verified(bundle).quality
    change_manifest(bundle, lambda values: values.update(quality={"float32": measured, "int8": {"perplexity": {}}}))
    assert verified(bundle).passed
    measured["perplexity"]["perplexity"] -= 1
    change_manifest(bundle, lambda values: values.update(quality={"float32": measured}))
    assert failed(verified(bundle)) == {"stated quality"}


def test_another_size_in_the_manifest_is_found(bundle: Path) -> None:
    change_manifest(bundle, lambda values: values["architecture"].update(rope_theta=5.0))
    assert failed(verified(bundle)) == {"facts"}


def test_without_a_text_perplexity_is_skipped_and_said(bundle: Path) -> None:
    report = verify_decoder(bundle, chat_checkpoint(), PROMPTS)
    assert report.passed
    assert report.checks[-1].found == "skipped: no text was given"


def test_losses_are_those_of_the_softmax() -> None:
    logits = DRAW.normal(size=(5, 7)).astype(np.float32)
    ids = np.array([0, 3, 6, 1, 1])
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(losses(logits, ids), [-np.log(p[at, ids[at + 1]]) for at in range(4)], rtol=1e-5)


def test_smoothing_takes_from_loud_channels() -> None:
    """A channel that a norm makes loud gets the greatest scale; all are positive, and their geometric mean is 1."""
    model = seeded_chat_model()
    model.decoder.stack.blocks[0].attention_norm.weight.data[5] = 40
    first, second = calibrate(model, PROMPTS)
    assert first.qkv.argmax() == 5
    for scales in (*first, *second):
        assert (scales > 0).all()
        assert abs(np.log(scales).mean()) < 1e-3
    with pytest.raises(ValueError, match="needs sample texts"):
        calibrate(model, [])
