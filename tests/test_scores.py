"""Label semantics, against transformers' own functions and by hand."""

import math

import numpy as np
import pytest
from transformers.pipelines.text_classification import sigmoid as their_sigmoid
from transformers.pipelines.text_classification import softmax as their_softmax

from service.domain import Score
from service.worker.classification.scores import apply, function_for, ranked

LOGITS = ([0.3, -1.25], [12.0, -12.0], [0.0, 0.0], [700.0, -700.0], [1.0, 2.0, 3.0, -4.5])


@pytest.mark.parametrize("logits", LOGITS)
def test_softmax_and_sigmoid_equal_transformers(logits: list[float]) -> None:
    with np.errstate(over="ignore"):
        expected = their_sigmoid(np.array(logits)), their_softmax(np.array(logits))
    assert apply("sigmoid", logits) == pytest.approx(expected[0], abs=1e-12)
    assert apply("softmax", logits) == pytest.approx(expected[1], abs=1e-12)
    assert apply("none", logits) == logits


def test_softmax_survives_large_logits() -> None:
    assert apply("softmax", [1e4, 0.0]) == [1.0, 0.0]
    assert all(math.isfinite(score) for score in apply("sigmoid", [-1e4, 1e4]))


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "function"),
    [
        ("single_label_classification", 2, "softmax"),
        ("single_label_classification", 1, "sigmoid"),
        ("multi_label_classification", 3, "sigmoid"),
        ("regression", 1, "none"),
        ("regression", 2, "none"),
    ],
)
def test_the_problem_type_chooses_the_function(problem_type: str, num_labels: int, function: str) -> None:
    assert function_for(problem_type, num_labels) == function


def test_scores_are_ranked_and_cut() -> None:
    labels = ("A", "B", "C")
    assert ranked(labels, (0.2, 0.5, 0.3), None) == (Score("B", 0.5), Score("C", 0.3), Score("A", 0.2))
    assert ranked(labels, (0.2, 0.5, 0.3), 1) == (Score("B", 0.5),)
    assert ranked(labels, (0.2, 0.5, 0.3), 9) == ranked(labels, (0.2, 0.5, 0.3), None)
    assert [score.label for score in ranked(labels, (0.5, 0.5, 0.5), None)] == ["A", "B", "C"]
