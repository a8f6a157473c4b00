"""The learning curve: BLEU on the second axis where there is any, accuracy otherwise."""

import json
from pathlib import Path

import matplotlib
import pytest

from model.curve import draw_scores, plot


@pytest.mark.parametrize(
    ("lines", "label", "drawn"),
    [
        (
            [{"step": 1, "loss": 2.0, "validation_bleu": 3.0}, {"step": 2, "loss": 1.0, "validation_bleu": 9.0}],
            "BLEU",
            1,
        ),
        ([{"step": 1, "loss": 2.0, "a_accuracy": 0.5, "dev_accuracy": 0.6, "a_loss": 3.0}], "accuracy", 2),
    ],
)
def test_scores_have_their_own_axis(lines: list[dict[str, float]], label: str, drawn: int) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots()
    draw_scores(axis, lines)
    assert axis.get_ylabel() == label
    assert len(axis.get_lines()) == drawn
    pyplot.close(figure)


def test_a_run_that_measured_nothing_has_no_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    plot(tmp_path)
    assert not (tmp_path / "curve.png").exists()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "validation_bleu": 3.0}) + "\n")
    plot(tmp_path)
    assert (tmp_path / "curve.png").stat().st_size > 0
