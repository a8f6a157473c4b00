"""What a caller asks for and what it gets: requests that validate themselves, and plain results.

Both edges (HTTP and gRPC) build these same classes, so they validate alike. Nothing here knows a wire format, except
that a result's field names are the native API's field names. Bounds that depend on the deployment (inputs a request,
bytes, queue) are settings and are checked by the worker; here stand those that hold everywhere. Results have no slots:
orjson writes them nine times as fast from a `__dict__`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass as plain
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

from service.errors import NotFound, TooLarge, Unsupported

FunctionToApply = Literal["softmax", "sigmoid", "none"]
TopK = Annotated[int, Field(ge=1, le=2**31 - 1)]  # what every wire format can carry
ModelId = Annotated[str, StringConstraints(min_length=1, max_length=128)]

MAX_INPUTS = 16_384  # inputs a request whatever the settings, so that even validating it is soon over

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True, config=_STRICT)
class TextInput:
    """One text to classify, or a pair of them (premise and hypothesis, question and passage)."""

    text: str
    text_pair: str | None = None


def _as_input(value: Any) -> Any:
    return {"text": value} if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_INPUTS:
            raise TooLarge(f"input: at most {MAX_INPUTS} inputs a request, got {len(value)}", param="input")
        return tuple(_as_input(item) for item in value)
    if isinstance(value, (str, dict, TextInput)):
        return (_as_input(value),)
    raise ValueError('expected a string, {"text", "text_pair"}, or a list of those')


Inputs = Annotated[
    tuple[TextInput, ...],
    # Stops at the first bad input: a body of a million of them must not cost a million error records.
    Field(min_length=1, strict=False, fail_fast=True),
    BeforeValidator(_one_or_many, json_schema_input_type=str | TextInput | list[str | TextInput]),
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
class Timing:
    """Where a request's time went, in seconds.

    tokenize: from admission until all texts were tokens. queue: from there until the first of them entered a batch.
    compute: from there until the last of them left the engine. total: from the first byte seen to the result.
    """

    queue_seconds: float
    tokenize_seconds: float
    compute_seconds: float
    total_seconds: float


@plain(slots=True)
class Progress:
    """How far a request has come, as `time.monotonic()` instants in seconds; None where it has not been yet.

    The one mutable thing about a call: whoever does the work marks it, and however the request ends, its timing is read
    from here.
    """

    begun: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    tokenized: float | None = None
    started: float | None = None
    finished: float | None = None

    def timing(self, now: float) -> Timing:
        """The stage that was under way at `now` gets the time until then; stages never reached get 0."""
        admitted = now if self.admitted is None else self.admitted
        tokenized = now if self.tokenized is None else self.tokenized
        started = now if self.started is None else self.started
        finished = now if self.finished is None else self.finished
        return Timing(
            queue_seconds=max(0.0, started - tokenized),
            tokenize_seconds=max(0.0, tokenized - admitted),
            compute_seconds=max(0.0, finished - started),
            total_seconds=now - self.begun,
        )


@plain(frozen=True, slots=True)
class Call:
    """The circumstances of a request: who asked, through which route, until when, and how far it is.

    `deadline` is a `time.monotonic()` instant in seconds.
    """

    request_id: str
    route: str
    deadline: float
    progress: Progress = field(default_factory=Progress)


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


@plain(frozen=True, slots=True)
class ModelInfo:
    """A served model: its id, its task and the facts of its manifest that a caller may want to know."""

    id: str
    task: str
    created: int
    facts: dict[str, Any]


def choose_model(models: Sequence[ModelInfo], task: str, wanted: str | None) -> ModelInfo:
    """The model called `wanted`, or the first that can do `task` when none is named.

    Raises NotFound when there is none of that name or task, Unsupported when the named one has another task; both list
    what is served.
    """
    able = [model for model in models if model.task == task]
    if wanted is None:
        if not able:
            raise NotFound(f"no model for {task} is served; served are: {_list(models)}", param="model")
        return able[0]
    for model in models:
        if model.id == wanted:
            if model.task == task:
                return model
            message = f"model {wanted!r} is for {model.task}, not {task}; models for {task}: {_list(able)}"
            raise Unsupported(message, param="model", code="wrong_task")
    raise NotFound(f"no model {wanted!r} is served; served are: {_list(models)}", param="model")


def _list(models: Sequence[ModelInfo]) -> str:
    return ", ".join(model.id for model in models) or "none"
