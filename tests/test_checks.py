"""model.checks: what a wrong scale, an offset and noise come to."""

import numpy as np
import pytest

from model.checks import difference, error, largest

ROWS = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=ROWS.shape).astype(np.float32)


def test_no_number_is_the_largest_of_all() -> None:
    assert np.isnan(largest([1.0, float("nan"), 2.0]))
    assert np.isnan(difference(np.array([0, np.nan], np.float32), np.zeros(2, np.float32)))
    assert largest(iter([1.0, 3.0, 2.0])) == 3


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (ROWS, 0.0),
        (ROWS * np.float32(0.01), 0.99),
        (ROWS + 2, 2.0),
        (-ROWS, 2.0),
        (ROWS + np.float32(0.1) * NOISE, 0.1),
    ],
)
def test_an_error_is_a_share_of_what_varies(ours: np.ndarray, expected: float) -> None:
    assert error(ours, ROWS) == pytest.approx(expected, rel=0.1)
    offset = np.float32([100, 0, -100])  # of both: what each label has in every row does not vary
    assert error(ours + offset, ROWS + offset) == pytest.approx(expected, rel=0.1, abs=1e-4)
