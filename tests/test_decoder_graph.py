"""model.decoder_graph on the engine that serves: the PyTorch model's logits, whatever is cut, kept or beside it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.decoder_graph import build_decoder
from service.worker.bundle import load_bundle
from service.worker.generation.decoder import DecoderEngine
from service.worker.session import Session
from service.worker.weights.packing import FLOAT32, PRECISIONS, Kinds
from tests.tiny import CHAT_CONFIG, seeded_chat_model, tiny_generation_bundle

IDS = np.random.default_rng(1).integers(3, CHAT_CONFIG.vocab_size, 150).tolist()


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_generation_bundle(tmp_path_factory.mktemp("exact") / "bundle", precision="float32")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of its two layers one reads `down` in rows, the other in blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRECISIONS, "int8", Kinds(blocks_of_down=frozenset({1})))
        return tiny_generation_bundle(tmp_path_factory.mktemp("int8") / "bundle")


def engine(directory: Path, num_slots: int = 3) -> DecoderEngine:
    return DecoderEngine(load_bundle(directory), num_slots=num_slots, num_blocks=0, threads=1)


@torch.no_grad()
def reference(ids: list[int]) -> np.ndarray:
    return seeded_chat_model()(torch.tensor([ids]))[0][0].numpy()


def test_every_position_has_the_logits_of_the_module(exact: Path) -> None:
    np.testing.assert_allclose(engine(exact).prefill(1, IDS, 0, keep="all"), reference(IDS), atol=1e-4, rtol=0)


def test_pieces_and_single_steps_continue_what_was_read(exact: Path) -> None:
    """A prompt in two pieces, then token by token, beside rows of other lengths."""
    subject, expected = engine(exact), reference(IDS)
    subject.prefill(0, IDS[:64], 0, keep="none")
    (last,) = subject.prefill(0, IDS[64:100], 64, keep="last")
    np.testing.assert_allclose(last, expected[99], atol=1e-4, rtol=0)
    subject.prefill(1, IDS[:7], 0, keep="none")
    for at in range(3):
        rows = subject.decode([IDS[100 + at], IDS[7 + at]], [100 + at, 7 + at])
        np.testing.assert_allclose(rows[0], expected[100 + at], atol=1e-4, rtol=0)
        np.testing.assert_allclose(rows[1], expected[7 + at], atol=1e-4, rtol=0)


def test_int8_stays_near_and_gives_rows_the_same_bits_in_any_company(shipped: Path) -> None:
    alone = engine(shipped).prefill(0, IDS, 0, keep="all")
    assert np.corrcoef(alone.ravel(), reference(IDS).ravel())[0, 1] > 0.99
    together = engine(shipped, num_slots=16)
    for slot in range(16):
        together.prefill(slot, IDS[slot : slot + 5 + slot], 0, keep="none")
    many = together.decode(IDS[:16], [5 + slot for slot in range(16)]).copy()
    for slot in (0, 7, 15):
        single = engine(shipped, num_slots=1)
        single.prefill(0, IDS[slot : slot + 5 + slot], 0, keep="none")
        np.testing.assert_array_equal(single.decode([IDS[slot]], [5 + slot])[0], many[slot])


def test_no_position_at_all_may_be_kept(shipped: Path) -> None:
    bundle = load_bundle(shipped)
    session = Session(bundle.graph_path("decode"), bundle.graph("decode"))
    past = {
        f"past_{part}.{layer}": np.zeros((1, 2, 8, 16), np.float32) for layer in range(2) for part in ("key", "value")
    }
    feeds = {"ids": np.array([[3, 4]]), "lengths": np.array([1], np.int32), "longest": np.array(2, np.int32)}
    logits, *_ = session.run(feeds | {"keep": np.array([], np.int64)} | past)
    assert logits.shape == (1, 0, CHAT_CONFIG.vocab_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"norm": "layer"}, "norm is 'layer'"), ({"positions": "learned"}, "positions"), ({"has_bias": True}, "has_bias")],
)
def test_what_the_graph_does_not_compute_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_decoder(replace(CHAT_CONFIG, **change), FLOAT32, places={}, file="x", max_length=8)  # type: ignore[arg-type]
