"""Texts to label, and their labels."""

from dataclasses import dataclass as plain
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidatorFunctionWrapHandler, WrapValidator
from pydantic.dataclasses import dataclass

from service.domain.call import Timing
from service.domain.models import ModelId
from service.errors import TooLarge

FunctionToApply = Literal["softmax", "sigmoid", "none"]
TopK = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what every wire format can carry

MAX_INPUTS = 16_384  # inputs a request whatever the settings, so that even validating it is soon over

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, config=_STRICT)
class TextInput:
    """One text to classify, or a pair of them (premise and hypothesis, question and passage).

    An empty second text is as good as none, as it is to transformers' pipeline.
    """

    text: str
    text_pair: str | None = None


_ONE = TypeAdapter(TextInput)


def _as_input(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


def check_num_inputs(number: int) -> None:
    """Raises TooLarge. To be asked before anything is made of the inputs."""
    if number > MAX_INPUTS:
        raise TooLarge(f"input: at most {MAX_INPUTS} inputs a request, got {number}", param="input")


def _one_or_many(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """What is wrong with one that is sent by itself has no number in its path."""
    if isinstance(value, (list, tuple)):
        check_num_inputs(len(value))
        return read(tuple(_as_input(item) for item in value))
    if isinstance(value, (str, dict, TextInput)):
        return (_ONE.validate_python(_as_input(value), strict=False),)
    raise ValueError('expected a string, {"text", "text_pair"}, or a list of those')


Inputs = Annotated[
    tuple[TextInput, ...],
    # Stops at the first bad input: a body of a million of them must not cost a million error records.
    Field(min_length=1, strict=False, fail_fast=True),
    WrapValidator(_one_or_many, json_schema_input_type=str | TextInput | list[str | TextInput]),
]


@dataclass(frozen=True, slots=True, config=_STRICT)
class ClassifyRequest:
    """Texts to label.

    `input` takes one text, one pair or a list of either, and always reads as a tuple of `TextInput`. `top_k` keeps the
    best k labels (all when None). `function_to_apply` overrides what the model's problem type implies. With
    `truncate=False` a text over the model's token limit is an error instead of being cut.
    """

    input: Inputs
    model: ModelId | None = None
    top_k: TopK | None = None
    function_to_apply: FunctionToApply | None = None
    truncate: bool = True


@plain(frozen=True)
class Usage:
    """Tokens that the model read (special tokens included), and how many of the texts were cut to its limit."""

    prompt_tokens: int
    truncated: int


@plain(frozen=True)
class Score:
    label: str
    score: float


@plain(frozen=True)
class Classification:
    """Scores per input, in input order; within an input the highest first."""

    model: str
    results: tuple[tuple[Score, ...], ...]
    usage: Usage
    timing: Timing
