"""model.checks: what a wrong scale, an offset and noise come to."""

import numpy as np
import pytest

from model.checks import error

ROWS = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=ROWS.shape).astype(np.float32)


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
