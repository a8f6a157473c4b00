"""The served models, and which of them answers a request."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import StringConstraints

from service.errors import NotFound, Unsupported

ModelId = Annotated[str, StringConstraints(min_length=1, max_length=128)]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A served model: its id, its task and the facts of its manifest that a caller may want to know."""

    id: str
    task: str
    created: int
    facts: dict[str, Any]


def choose_model(models: Sequence[ModelInfo], tasks: Sequence[str], wanted: str | None) -> ModelInfo:
    """The model called `wanted`, or the first that can do the first of `tasks` when none is named.

    Raises NotFound when there is none of that name or task, Unsupported when the named one has a task not in `tasks`;
    both list what is served.
    """
    able = [model for model in models if model.task in tasks]
    if wanted is None:
        if not able:
            raise NotFound(f"no model for {tasks[0]} is served; served are: {_list(models)}", param="model")
        return min(able, key=lambda model: tasks.index(model.task))
    for model in models:
        if model.id == wanted:
            if model.task in tasks:
                return model
            message = f"model {wanted!r} is for {model.task}, not {tasks[0]}; models for {tasks[0]}: {_list(able)}"
            raise Unsupported(message, param="model", code="wrong_task")
    raise NotFound(f"no model {wanted!r} is served; served are: {_list(models)}", param="model")


def _list(models: Sequence[ModelInfo]) -> str:
    return ", ".join(model.id for model in models) or "none"
