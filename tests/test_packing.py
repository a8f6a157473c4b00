"""service.worker.weights.packing: codes give weights back, smoothing changes nothing, the bytes are always the same."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from model.export_decoder import tensors_of
from service.worker.weights.packing import (
    ALIGNMENT,
    BLOCK,
    FLOAT32,
    INT8,
    Floats,
    Kinds,
    Place,
    Smoothing,
    blocks8,
    decoder_pieces,
    read_smoothing,
    rows8,
    write_pieces,
)
from tests.tiny import CHAT_CONFIG, seeded_chat_model

RNG = np.random.default_rng(3)
WEIGHT = RNG.normal(size=(24, 96)).astype(np.float32)


def unpacked_blocks(weight: Floats) -> Floats:
    codes, scales = blocks8(weight)
    return ((codes.astype(np.float32) - 128) * scales[..., None]).reshape(weight.shape)


def test_blocks_come_back_to_half_a_step() -> None:
    step = np.abs(WEIGHT.reshape(24, -1, BLOCK)).max(-1, keepdims=True) / 127
    error = np.abs(unpacked_blocks(WEIGHT) - WEIGHT).reshape(24, -1, BLOCK)
    assert (error <= step * 0.5001).all()


def test_rows_come_back_to_half_a_step() -> None:
    codes, scales = rows8(WEIGHT)
    assert (codes.dtype, codes.shape, scales.shape) == (np.int8, (96, 24), (24,))
    assert (np.abs(codes.T * scales[:, None] - WEIGHT) <= scales[:, None] * 0.5001).all()


def test_codes_of_q8_0_come_back_exactly() -> None:
    stored = gguf.dequantize(gguf.quantize(WEIGHT, Kind.Q8_0), Kind.Q8_0)
    np.testing.assert_allclose(unpacked_blocks(stored), stored, rtol=3e-7, atol=0)


def test_zeros_stay_zeros() -> None:
    weight = np.zeros((4, 64), np.float32)
    assert (unpacked_blocks(weight) == 0).all()
    codes, scales = rows8(weight)
    assert (codes == 0).all()
    assert np.isfinite(scales).all()


def written(path: Path, kinds: Kinds, smoothing: list[Smoothing] | None = None) -> dict[str, Place]:
    parts = decoder_pieces(
        tensors_of(seeded_chat_model()),
        num_layers=CHAT_CONFIG.num_layers,
        is_tied=True,
        kinds=kinds,
        smoothing=smoothing,
    )
    return write_pieces(path, parts)


def stored(path: Path, place: Place) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), place.dtype, int(np.prod(place.shape)), place.offset).reshape(place.shape)


def test_every_piece_stands_where_it_is_said_to(tmp_path: Path) -> None:
    places = written(tmp_path / "a", FLOAT32)
    model = seeded_chat_model()
    block = model.decoder.stack.blocks[1]
    expected = {
        "embedding.weight": model.head.weight,
        "head.weight": model.head.weight.T,
        "down.1.weight": block.feed_forward.down.weight.T,
        "norm.weight": model.decoder.stack.norm.weight,
    }
    for name, weight in expected.items():
        np.testing.assert_array_equal(stored(tmp_path / "a", places[name]), weight.detach().numpy(), err_msg=name)
    assert all(place.offset % ALIGNMENT == 0 for place in places.values())


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    places = written(tmp_path / "a", INT8)
    assert "embedding.codes" in places
    assert "head.codes" not in places


def test_down_is_in_blocks_where_its_inputs_need_it(tmp_path: Path) -> None:
    places = written(tmp_path / "a", Kinds(blocks_of_down=frozenset({1})))
    assert [places[f"down.{layer}.codes"].dtype for layer in (0, 1)] == ["int8", "uint8"]
    assert (FLOAT32.down_of(0), INT8.down_of(0), INT8.down_of(15)) == ("float32", "blocks8", "rows8")


def test_the_bytes_are_the_same_again(tmp_path: Path) -> None:
    written(tmp_path / "a", INT8)
    written(tmp_path / "b", INT8)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(FileExistsError):
        written(tmp_path / "a", INT8)


def test_smoothing_leaves_the_products_as_they_were(tmp_path: Path) -> None:
    """Norm weight times columns, and up rows times down columns, are what the network computes with."""
    width, inner = CHAT_CONFIG.width, CHAT_CONFIG.feed_forward
    scales = [Smoothing(*(RNG.uniform(0.2, 5, size).astype(np.float32) for size in (width, width, inner)))] * 2
    places = written(tmp_path / "plain", FLOAT32)
    written(tmp_path / "smooth", FLOAT32, scales)

    def products(path: Path) -> list[np.ndarray]:
        norm, qkv, norm2, gate_up, down = (
            stored(path, places[f"{name}.0.weight"])
            for name in ("attention_norm", "qkv", "feed_forward_norm", "gate_up", "down")
        )  # matrices are (K, N)
        up = (norm2[:, None] * gate_up)[:, inner:]
        return [norm[:, None] * qkv, (norm2[:, None] * gate_up)[:, :inner], up @ down]

    changed = stored(tmp_path / "smooth", places["qkv.0.weight"])
    assert not np.allclose(changed, stored(tmp_path / "plain", places["qkv.0.weight"]))
    for plain, smooth in zip(products(tmp_path / "plain"), products(tmp_path / "smooth"), strict=True):
        np.testing.assert_allclose(smooth, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", [[1.0] * 7, [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, float("nan")]])
def test_malformed_smoothing_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="smoothing scales"):
        read_smoothing(np.array(values, np.float32), width=1, feed_forward=2)
