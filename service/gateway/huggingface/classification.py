"""Text classification. The reply is always nested, a list of labels for each input, even for a single one, of which the
client takes the first. A list of inputs is a batch.
"""

from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from service.domain import Classification, ClassifyRequest, FunctionToApply, Inputs, TopK
from service.errors import TooLarge
from service.gateway.huggingface.fields import names_under
from service.gateway.names import Names, names_of_items, told_as
from service.validation import invalid

_STRICT = ConfigDict(extra="forbid", strict=True)
_NAMES = names_under("parameters", ("top_k", "function_to_apply"), truncation="truncate")


@dataclass(frozen=True, config=_STRICT)
class Parameters:
    """What transformers' text classification pipeline calls them; a parameter that is not known is an error."""

    top_k: TopK | None = None
    function_to_apply: FunctionToApply | None = None
    truncation: bool | None = True


@dataclass(frozen=True, config=_STRICT)
class HuggingFaceRequest:
    """`options` (use_cache, wait_for_model) are taken and mean nothing here."""

    inputs: Inputs
    parameters: Parameters | None = None
    options: dict[str, Any] | None = None


_REQUEST = TypeAdapter(HuggingFaceRequest)


def parse(body: bytes, path: Mapping[str, Any]) -> tuple[ClassifyRequest, Names]:
    """Raises InvalidRequest and TooLarge."""
    try:
        asked: Any = _REQUEST.validate_json(body)
        parameters = asked.parameters or Parameters()
        request = ClassifyRequest(
            input=asked.inputs,
            model=path.get("model_id"),
            top_k=parameters.top_k,
            function_to_apply=parameters.function_to_apply,
            truncate=parameters.truncation is not False,
        )
        return request, _NAMES | names_of_items("input", len(asked.inputs), "inputs")
    except ValidationError as error:
        raise invalid(error) from None
    except TooLarge as error:  # of a list; how long it may be is the request's rule
        raise told_as({"input": "inputs"}, error) from None


def render(result: Classification) -> bytes:
    return orjson.dumps(result.results)
