"""model.verify_translator passes a faithful bundle, and each kind of damage fails the check that is there for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from model import verify_translator
from model.checks import Report
from model.pairs import Pair
from model.translator_weights import WEIGHTS_FILE
from service.worker.generation.beam_search import BeamSearch
from tests.tiny import change_graph, change_manifest, multiply_output, reverse_vocabulary, sign
from tests.tiny_translator import (
    CONFIG,
    LIMITS,
    SAMPLES,
    SENTENCES,
    subwords,
    tiny_translation_bundle,
    translator,
)

PAIRS = [Pair("A dog.", "Ein Hund."), Pair("Where is the garden?", "Wo ist der Garten?")]


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NUM_NEW": 12, "NUM_SLOTS": 5, **LIMITS}.items():
        monkeypatch.setattr(verify_translator, name, value)


def verified(
    directory: Path, sets: dict[str, list[Pair]] | None = None, *, num_written: int = CONFIG.vocab_size
) -> Report:
    sources = [encoding.ids for encoding in subwords().encode_batch(list(SENTENCES[::2]))]
    return verify_translator.verify_translator(directory, translator(num_written), sources, SAMPLES, sets=sets or {})


def failed(report: Report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}


def test_a_faithful_bundle_passes_in_float32(tmp_path: Path) -> None:
    report = verified(tiny_translation_bundle(tmp_path / "bundle", precision="float32"), {"tiny": PAIRS})
    assert report.passed, report.text()
    assert report.quality["bleu"]["tiny"]["sentences"] == len(PAIRS)
    assert [report.quality["bleu"]["tiny"][kind]["same"] for kind in ("greedy", "5 beams")] == [1.0, 1.0]


def test_a_faithful_bundle_passes_in_int8(tmp_path: Path) -> None:
    report = verified(tiny_translation_bundle(tmp_path / "bundle"))
    assert report.passed, report.text()
    assert report.checks[-1].found == "skipped: no pairs were given"


def test_beams_are_the_reference_s_among_the_tokens_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = CONFIG.vocab_size // 2
    bundle = tiny_translation_bundle(tmp_path / "bundle", precision="float32", num_written=some)
    assert failed(verified(bundle, num_written=some)) <= {"greedy tokens"}  # the reference writes others, too
    monkeypatch.setattr(BeamSearch, "score", lambda search, beam: -beam.total)
    assert "beams" in failed(verified(bundle, num_written=some))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_translation_bundle(tmp_path / "bundle", precision="float32")


def test_a_broken_weight_is_found(bundle: Path) -> None:
    path = bundle / WEIGHTS_FILE
    values = np.frombuffer(path.read_bytes(), np.float32).copy()
    values[-CONFIG.width * 20] += 3  # somewhere in the last block
    path.write_bytes(values.tobytes())
    assert failed(verified(bundle)) == {"loads"}  # its checksum
    sign(bundle, WEIGHTS_FILE)
    assert failed(verified(bundle)) >= {"weights", "logits"}


def test_a_renamed_output_is_found(bundle: Path) -> None:
    def rename(graph: onnx.ModelProto) -> None:
        node = next(node for node in graph.graph.node if graph.graph.output[0].name in node.output)
        graph.graph.output[0].name = node.output[0] = "kept"

    change_graph(bundle, rename, "encode.onnx")
    assert failed(verified(bundle)) == {"loads"}  # the session compares it with the manifest
    change_manifest(bundle, lambda values: values["graphs"]["encode"]["outputs"][0].update(name="kept"))
    assert failed(verified(bundle)) == {"interface"}


@pytest.mark.parametrize(("graph", "checks"), [("encode", "encoded together"), ("decode", "batched")])
def test_a_frozen_axis_is_found(bundle: Path, graph: str, checks: str) -> None:
    """Of rows: a source alone, or a token alone, is still computed."""

    def freeze(model: onnx.ModelProto) -> None:
        for tensor in (*model.graph.input, *model.graph.output):
            if (shape := tensor.type.tensor_type.shape).dim:
                shape.dim[0].dim_value = 1

    change_graph(bundle, freeze, f"{graph}.onnx")

    def agree(values: dict) -> None:
        for tensor in (*values["graphs"][graph]["inputs"], *values["graphs"][graph]["outputs"]):
            tensor["axes"][:1] = [1] * len(tensor["axes"][:1])

    change_manifest(bundle, agree)
    assert failed(verified(bundle)) >= {"interface", f"{checks} == alone"}


def test_a_swapped_head_is_found_in_the_maps_alone(bundle: Path) -> None:
    """The graph that tells attention may not tell another one than is paid."""

    def swap(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.name == "cross_attention.1")
        node.output[0] = "paid"
        for other in model.graph.node:
            other.input[:] = ["paid" if name == "cross_attention.1" else name for name in other.input]
        model.graph.node.append(onnx.helper.make_node("Identity", ["decoder_attention.1"], ["cross_attention.1"]))

    change_graph(bundle, swap, "attention.onnx")
    assert failed(verified(bundle)) == {"attention"}


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_weights_that_are_no_numbers_are_found(tmp_path: Path, precision: str) -> None:
    bundle = tiny_translation_bundle(tmp_path / "bundle", precision=precision)
    change_graph(bundle, lambda model: multiply_output(model, "cross_attention.0", float("nan")), "attention.onnx")
    assert failed(verified(bundle)) == {"attention"}


def test_other_logits_beside_the_maps_are_found_in_int8_too(tmp_path: Path) -> None:
    def negate(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "logits" in node.output)
        node.output[list(node.output).index("logits")] = "negative"
        model.graph.node.append(onnx.helper.make_node("Neg", ["negative"], ["logits"]))

    bundle = tiny_translation_bundle(tmp_path / "bundle")
    change_graph(bundle, negate, "attention.onnx")
    assert failed(verified(bundle)) == {"attention"}


FACTS = [
    ("end_ids", lambda values: values["generation"].update(end_ids=[77])),
    ("temperature", lambda values: values["generation"].update(temperature=1)),
    ("task", lambda values: values.update(task="generation")),
    ("graphs", lambda values: values["graphs"].update(extra=values["graphs"]["decode"])),
    ("provenance.checkpoint_sha256", lambda values: values["provenance"].update(checkpoint_sha256="0" * 64)),
]


@pytest.mark.parametrize(("fact", "change"), FACTS)
def test_a_fact_that_is_not_the_checkpoints_is_found(bundle: Path, fact: str, change: Callable[[dict], None]) -> None:
    change_manifest(bundle, change)
    report = verified(bundle)
    assert failed(report) == {"facts"}
    assert report.checks[0].found.startswith(f"{fact} is ")


def test_another_tokenizer_is_found_and_scored_by_the_checkpoints(bundle: Path) -> None:
    good = verified(bundle, {"tiny": PAIRS}).quality
    reverse_vocabulary(bundle, kept=3)
    report = verified(bundle, {"tiny": PAIRS})
    assert failed(report) == {"facts"}
    assert report.quality == good


def test_a_bleu_that_is_not_the_measured_one_is_found(bundle: Path) -> None:
    measured = verified(bundle, {"tiny": PAIRS}).quality
    change_manifest(bundle, lambda values: values.update(quality=measured))
    assert verified(bundle, {"tiny": PAIRS}).passed
    measured["bleu"]["tiny"]["greedy"]["bleu"] += 1
    change_manifest(bundle, lambda values: values.update(quality=measured))
    assert failed(verified(bundle, {"tiny": PAIRS})) == {"stated quality"}


def test_without_its_training_pairs_that_is_all_it_says(tmp_path: Path) -> None:
    bundle = tiny_translation_bundle(tmp_path / "bundle", precision="float32", num_written=200)
    report = verified(bundle)
    assert failed(report) == {"training pairs"}
    assert report.text() == (
        "FAIL training pairs: the bundle writes 200 tokens, these pairs 300: give the --data that it was exported with"
    )


def test_another_size_in_the_manifest_is_found(bundle: Path) -> None:
    change_manifest(bundle, lambda values: values["architecture"].update(norm_eps=0.5))
    assert failed(verified(bundle)) == {"facts"}


@pytest.mark.parametrize("kind", ["greedy", "5 beams"])
@pytest.mark.parametrize(("bleu", "passes"), [(39.7, True), (39.69, False)])
def test_int8_may_lose_three_tenths_of_bleu_on_no_set_and_in_no_search(kind: str, bleu: float, passes: bool) -> None:
    gain, loss = {"bleu": 31.0, "bleu_of_checkpoint": 30.0}, {"bleu": bleu, "bleu_of_checkpoint": 40.0}
    scores = {"gain": {"greedy": gain, "5 beams": gain}, "loss": {"greedy": gain, "5 beams": gain, kind: loss}}
    assert verify_translator.judged(scores).passed == passes
