"""The shape of Hugging Face's inference API for text classification, which `huggingface_hub.InferenceClient` speaks.

The reply is always nested, a list of labels for each input, even for a single one: the client takes the first.
A list of inputs is a batch; the model is the path's, or the one that can do the task.
"""

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from service.domain import Classification, ClassifyRequest, FunctionToApply, Inputs, ModelInfo, TopK
from service.validation import invalid

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class Parameters:
    """What transformers' text classification pipeline calls them; a parameter that is not known is an error."""

    top_k: TopK | None = None
    function_to_apply: FunctionToApply | None = None
    truncation: bool = True


@dataclass(frozen=True, config=_STRICT)
class HuggingFaceRequest:
    """`options` (use_cache, wait_for_model) are taken and mean nothing here."""

    inputs: Inputs
    parameters: Parameters | None = None
    options: dict[str, Any] | None = None


_REQUEST = TypeAdapter(HuggingFaceRequest)


def parse(body: bytes, path: Mapping[str, Any]) -> ClassifyRequest:
    """Raises InvalidRequest."""
    try:
        asked = _REQUEST.validate_json(body)
        parameters = asked.parameters or Parameters()
        return ClassifyRequest(
            input=asked.inputs,
            model=path.get("model_id"),
            top_k=parameters.top_k,
            function_to_apply=parameters.function_to_apply,
            truncate=parameters.truncation,
        )
    except ValidationError as error:
        raise invalid(error) from None


def render(result: Classification) -> bytes:
    return orjson.dumps(result.results)


def endpoint_info(models: list[ModelInfo], version: str, max_inputs: int) -> dict[str, Any]:
    """What `InferenceClient.get_endpoint_info` asks for, under the names that text-embeddings-inference uses."""
    model_id = next((info.id for info in models if info.task == "classification"), None)
    return {
        "model_id": model_id,
        "model_pipeline_tag": "text-classification",
        "max_client_batch_size": max_inputs,
        "version": version,
    }
