"""The likeliest tokens of rows: those of a stable sort, bits that no neighbour changes, and the committed graph."""

from pathlib import Path

import numpy as np
import pytest

from service.worker.generation.likeliest import GRAPH, Likeliest, blocks_of


@pytest.fixture(scope="module")
def likeliest() -> Likeliest:
    return Likeliest()


@pytest.mark.parametrize("size", [3, 64, 257, 300, 5902])
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("is_rounded", [False, True])
def test_they_are_those_of_a_stable_sort(likeliest: Likeliest, size: int, num_rows: int, is_rounded: bool) -> None:
    """Rounded ones are full of equals, in blocks that lie apart."""
    logits = np.random.default_rng(size).standard_normal((num_rows, size)).astype(np.float32) * 3
    logits = np.round(logits) if is_rounded else logits
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :9]
    found = likeliest.of(logits, 9)
    assert [row.ids for row in found] == expected.tolist()
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    assert np.array([row.log_p for row in found]) == pytest.approx(np.take_along_axis(exact, expected, 1), abs=2e-6)


def test_of_equals_those_of_the_first_blocks_are_taken(likeliest: Likeliest) -> None:
    """Two in the middle are greater; then 1 is everywhere, in more blocks than are looked into."""
    logits = np.ones((1, 100), np.float32)
    logits[0, [55, 57]] = 2, 3
    (found,) = likeliest.of(logits, 5)
    assert found.ids == [57, 55, 0, 1, 2]
    logits[0, [3, 4, 5]] = 1.5
    logits[0, :3] = 0
    assert likeliest.of(logits, 7)[0].ids == [57, 55, 3, 4, 5, 6, 7]


def test_logits_are_read_where_they_are_now(likeliest: Likeliest) -> None:
    """The same memory written again, other memory of the same shape, and rows amid a larger piece of memory."""
    first = np.random.default_rng(2).standard_normal((8, 60)).astype(np.float32)
    second = first[::-1].copy()
    wanted = [row.ids for row in likeliest.of(first, 4)]
    assert [row.ids for row in likeliest.of(second, 4)] == wanted[::-1]
    assert [row.ids for row in likeliest.of(first[2:5], 4)] == wanted[2:5]
    assert [row.ids for row in likeliest.of(first[3:6], 4)] == wanted[3:6]
    first[:] = first[::-1].copy()
    assert [row.ids for row in likeliest.of(first, 4)] == wanted[::-1]


@pytest.mark.parametrize(
    ("vocab_size", "blocks"), [(5902, (26, 227)), (49152, (192, 256)), (257, (1, 257)), (1, (1, 1))]
)
def test_a_vocabulary_is_cut_into_blocks_of_one_size(vocab_size: int, blocks: tuple[int, int]) -> None:
    assert blocks_of(vocab_size) == blocks


def test_a_row_gets_the_same_bits_alone_and_among_others(likeliest: Likeliest) -> None:
    logits = np.random.default_rng(1).standard_normal((16, 5000)).astype(np.float32) * 5
    logits[3] *= 100  # far from all others
    for one, row in zip(likeliest.of(logits, 20), logits, strict=True):
        (alone,) = likeliest.of(row[None], 8)
        assert (alone.ids, alone.log_p) == (one.ids[:8], one.log_p[:8])


def test_what_differs_in_one_bit_is_told_apart_though_its_probability_does_not(likeliest: Likeliest) -> None:
    logits = np.array([[200, 1, np.nextafter(np.float32(1), np.float32(2))]], np.float32)
    (found,) = likeliest.of(logits, 3)
    assert found.ids == [0, 2, 1]
    assert found.log_p[1] > found.log_p[2]


def test_the_impossible_comes_last(likeliest: Likeliest) -> None:
    (found,) = likeliest.of(np.array([[-np.inf, 0, -np.inf]], np.float32), 3)
    assert (found.ids, found.log_p) == ([1, 0, 2], [0, -np.inf, -np.inf])


@pytest.mark.parametrize("num_blocks", [1, 3, 100])
@pytest.mark.parametrize("wrong", [[0, np.nan, 1], [np.nan, 0, 1], [0, np.inf, 1], [-np.inf] * 3])
def test_what_is_not_finite_is_told_of_its_row_alone(likeliest: Likeliest, wrong: list[float], num_blocks: int) -> None:
    logits = np.array([[0, 1, 2], wrong], np.float32)
    right, row = likeliest.of(np.repeat(logits, num_blocks, axis=1), 2)
    assert np.isfinite(right.log_p).all()
    assert not np.isfinite(row.log_p).any()


def test_the_graph_is_what_the_model_s_side_writes() -> None:
    onnx = pytest.importorskip("onnx", reason="writing graphs needs onnx")
    from model.likeliest_graph import build_likeliest

    assert onnx.load_from_string(Path(GRAPH).read_bytes()) == build_likeliest()
