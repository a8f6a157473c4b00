"""The likeliest tokens of rows: those of a stable sort, bits that no neighbour changes, and the committed graph."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from service.worker.generation.likeliest import GRAPH, MOST_BOUND, Likeliest, Likely, blocks_of

Logits = NDArray[np.float32]
Of = Callable[[Logits, int], list[Likely]]


@pytest.fixture(params=[False, True], ids=["passed", "bound"])
def of(request: pytest.FixtureRequest, found: Likeliest) -> Of:
    return partial(found.of, stays=request.param)


@pytest.fixture(scope="module")
def found() -> Likeliest:
    return Likeliest()


@pytest.mark.parametrize("size", [3, 64, 257, 300, 5902])
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("is_rounded", [False, True])
def test_they_are_those_of_a_stable_sort(of: Of, size: int, num_rows: int, is_rounded: bool) -> None:
    """Rounded ones are full of equals, in blocks that lie apart."""
    logits = np.random.default_rng(size).standard_normal((num_rows, size)).astype(np.float32) * 3
    logits = np.round(logits) if is_rounded else logits
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :9]
    found = of(logits, 9)
    assert [row.ids for row in found] == expected.tolist()
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    assert np.array([row.log_p for row in found]) == pytest.approx(np.take_along_axis(exact, expected, 1), abs=2e-6)


def test_of_equals_those_of_the_first_blocks_are_taken(of: Of) -> None:
    """Two in the middle are greater; then 1 is everywhere, in more blocks than are looked into."""
    logits = np.ones((1, 100), np.float32)
    logits[0, [55, 57]] = 2, 3
    (found,) = of(logits, 5)
    assert found.ids == [57, 55, 0, 1, 2]
    logits[0, [3, 4, 5]] = 1.5
    logits[0, :3] = 0
    assert of(logits, 7)[0].ids == [57, 55, 3, 4, 5, 6, 7]


def test_logits_are_read_where_they_are_now(of: Of) -> None:
    """The same memory written again, other memory of the same shape, and rows amid a larger piece of memory."""
    first = np.random.default_rng(2).standard_normal((8, 60)).astype(np.float32)
    second = first[::-1].copy()
    wanted = [row.ids for row in of(first, 4)]
    assert [row.ids for row in of(second, 4)] == wanted[::-1]
    assert [row.ids for row in of(first[2:5], 4)] == wanted[2:5]
    assert [row.ids for row in of(first[3:6], 4)] == wanted[3:6]
    first[:] = first[::-1].copy()
    assert [row.ids for row in of(first, 4)] == wanted[::-1]


def test_only_contiguous_logits_can_be_bound() -> None:
    """The same memory with gaps is other logits."""
    logits, likeliest = np.eye(4, 6, dtype=np.float32), Likeliest()
    assert [row.ids[0] for row in likeliest.of(logits[:2], 1, stays=True)] == [0, 1]
    with pytest.raises(ValueError, match="contiguous"):
        likeliest.of(logits[::2], 1, stays=True)
    assert [row.ids[0] for row in likeliest.of(logits[::2], 1)] == [0, 2]
    assert [row.ids[0] for row in likeliest.of(logits[:2], 1, stays=True)] == [0, 1]


def test_no_more_shapes_stay_bound_than_are_likely_to_come_again() -> None:
    logits, likeliest = np.random.default_rng(3).standard_normal((MOST_BOUND + 2, 9)).astype(np.float32), Likeliest()
    for _ in range(2):
        for num_rows in range(1, len(logits) + 1):
            found = likeliest.of(logits[:num_rows], 2, stays=True)
            assert [row.ids for row in found] == np.argsort(-logits[:num_rows], axis=1)[:, :2].tolist()
            assert len(likeliest._bound) <= MOST_BOUND


@pytest.mark.parametrize(
    ("vocab_size", "blocks"), [(5902, (26, 227)), (49152, (192, 256)), (257, (1, 257)), (1, (1, 1))]
)
def test_a_vocabulary_is_cut_into_blocks_of_one_size(vocab_size: int, blocks: tuple[int, int]) -> None:
    assert blocks_of(vocab_size) == blocks


def test_a_row_gets_the_same_bits_alone_and_among_others(of: Of) -> None:
    logits = np.random.default_rng(1).standard_normal((16, 5000)).astype(np.float32) * 5
    logits[3] *= 100  # far from all others
    for one, row in zip(of(logits, 20), logits, strict=True):
        (alone,) = of(row[None], 8)
        assert (alone.ids, alone.log_p) == (one.ids[:8], one.log_p[:8])


def test_what_differs_in_one_bit_is_told_apart_though_its_probability_does_not(of: Of) -> None:
    logits = np.array([[200, 1, np.nextafter(np.float32(1), np.float32(2))]], np.float32)
    (found,) = of(logits, 3)
    assert found.ids == [0, 2, 1]
    assert found.log_p[1] > found.log_p[2]


def test_the_impossible_comes_last(of: Of) -> None:
    (found,) = of(np.array([[-np.inf, 0, -np.inf]], np.float32), 3)
    assert (found.ids, found.log_p) == ([1, 0, 2], [0, -np.inf, -np.inf])


@pytest.mark.parametrize("times", [1, 3, 100])
@pytest.mark.parametrize("wrong", [[0, np.nan, 1], [np.nan, 0, 1], [0, np.inf, 1], [-np.inf] * 3])
def test_what_is_not_finite_is_told_of_its_row_alone(of: Of, wrong: list[float], times: int) -> None:
    logits = np.array([[0, 1, 2], wrong], np.float32)
    right, row = of(np.repeat(logits, times, axis=1), 2)
    assert np.isfinite(right.log_p).all()
    assert not np.isfinite(row.log_p).any()


def test_the_graph_is_what_the_model_s_side_writes() -> None:
    onnx = pytest.importorskip("onnx", reason="writing graphs needs onnx")
    from model.likeliest_graph import build_likeliest

    assert onnx.load_from_string(Path(GRAPH).read_bytes()) == build_likeliest()
