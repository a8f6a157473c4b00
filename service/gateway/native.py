"""The native API: its field names are the domain's, so that parsing is validation and rendering is dumping."""

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError

from service.domain import Classification, ClassifyRequest, ModelInfo
from service.errors import NotFound
from service.validation import invalid

_REQUEST = TypeAdapter(ClassifyRequest)


def parse(body: bytes, _path: Mapping[str, Any]) -> ClassifyRequest:
    """Raises InvalidRequest."""
    try:
        return _REQUEST.validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def render(result: Classification) -> bytes:
    return orjson.dumps(result)


def model_object(info: ModelInfo) -> dict[str, Any]:
    """OpenAI's model object, and what the manifest knows beside it."""
    base = {"id": info.id, "object": "model", "created": info.created, "owned_by": "attnd", "task": info.task}
    return base | info.facts | base  # in this order, and no fact in the place of a field


def model_list(models: list[ModelInfo]) -> dict[str, Any]:
    return {"object": "list", "data": [model_object(info) for info in models]}


def find_model(models: list[ModelInfo], model_id: str) -> ModelInfo:
    """Raises NotFound, which lists what there is."""
    for info in models:
        if info.id == model_id:
            return info
    served = ", ".join(info.id for info in models) or "none"
    raise NotFound(f"no model {model_id!r} is served; served are: {served}", param="model")
