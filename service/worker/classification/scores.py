"""Logits to labelled scores, with the semantics of transformers' TextClassificationPipeline. Pure arithmetic."""

import math
from collections.abc import Sequence

from service.domain import FunctionToApply, Score


def function_for(problem_type: str, num_labels: int) -> FunctionToApply:
    """What a model's problem type implies: none for regression, sigmoid for many labels or one, else softmax."""
    if problem_type == "regression":
        return "none"
    if problem_type == "multi_label_classification" or num_labels == 1:
        return "sigmoid"
    return "softmax"


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    power = math.exp(logit)
    return power / (1.0 + power)


def apply(function: FunctionToApply, logits: Sequence[float]) -> list[float]:
    if function == "softmax":
        return softmax(logits)
    if function == "sigmoid":
        return [sigmoid(logit) for logit in logits]
    return list(logits)


def ranked(labels: Sequence[str], scores: Sequence[float], top_k: int | None) -> tuple[Score, ...]:
    """The best `top_k` labels (all when None), highest score first; ties stay in label order."""
    order = sorted(range(len(labels)), key=scores.__getitem__, reverse=True)
    return tuple(Score(labels[index], scores[index]) for index in order[:top_k])
