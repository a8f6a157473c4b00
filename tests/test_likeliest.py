"""The likeliest tokens of rows: those of a stable sort, bits that no neighbour changes, and the committed graph."""

from pathlib import Path

import numpy as np
import pytest

from service.worker.generation.likeliest import GRAPH, Likeliest


@pytest.fixture(scope="module")
def likeliest() -> Likeliest:
    return Likeliest()


@pytest.mark.parametrize("size", [3, 64, 300, 8000])
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("is_rounded", [False, True])
def test_they_are_those_of_a_stable_sort(likeliest: Likeliest, size: int, num_rows: int, is_rounded: bool) -> None:
    """Rounded ones are full of equals."""
    logits = np.random.default_rng(size).standard_normal((num_rows, size)).astype(np.float32) * 3
    logits = np.round(logits) if is_rounded else logits
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :9]
    found = likeliest.of(logits, 9)
    assert [row.ids for row in found] == expected.tolist()
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    assert np.array([row.log_p for row in found]) == pytest.approx(np.take_along_axis(exact, expected, 1), abs=2e-6)


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


@pytest.mark.parametrize("wrong", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3])
def test_what_is_not_finite_is_told_of_its_row_alone(likeliest: Likeliest, wrong: list[float]) -> None:
    right, row = likeliest.of(np.array([[0, 1, 2], wrong], np.float32), 2)
    assert np.isfinite(right.log_p).all()
    assert not np.isfinite(row.log_p).any()


def test_the_graph_is_what_the_model_s_side_writes() -> None:
    onnx = pytest.importorskip("onnx", reason="writing graphs needs onnx")
    from model.likeliest_graph import build_likeliest

    assert onnx.load_from_string(Path(GRAPH).read_bytes()) == build_likeliest()
