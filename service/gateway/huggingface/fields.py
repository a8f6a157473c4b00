"""What translation and text generation take alike, under the names that transformers' `generate` has for it.

And what callers of every task call the fields of a request, which is what errors must call them.
"""

from collections.abc import Collection
from typing import Any, get_type_hints

from service.domain import GenerateRequest
from service.errors import Unsupported
from service.gateway.bodies import given

Shape = dict[str, tuple[Any, Any]]

_TYPES = get_type_hints(GenerateRequest, include_extras=True)
SAMPLING = ("temperature", "top_k", "top_p")
TAKEN = (*SAMPLING, "repetition_penalty", "seed")


def renamed(**names: str) -> Shape:
    """Optional fields, each with the type of the field of GenerateRequest that it stands for."""
    return {name: (_TYPES[meant] | None, None) for name, meant in names.items()}


COMMON: Shape = {"do_sample": (bool | None, None), **renamed(max_new_tokens="max_tokens")}


def common_values(sent: Any) -> dict[str, Any]:
    """The fields of a GenerateRequest that `sent` asks for.

    Greedy unless `do_sample` is true, or is not there and something about sampling is.
    """
    values = given(sent, TAKEN)
    is_sampled = any(name in values for name in SAMPLING) if sent.do_sample is None else sent.do_sample
    if is_sampled:
        values.setdefault("temperature", 1.0)
    else:
        values = {name: value for name, value in values.items() if name not in SAMPLING} | {"temperature": 0.0}
    return values if sent.max_new_tokens is None else values | {"max_tokens": sent.max_new_tokens}


def names_under(path: str, same: Collection[str], **renamed: str) -> dict[str, str]:
    """Of the fields that are sent under `path`: `same` by their own names, the others as `renamed`, sent=meant."""
    sent = {meant: name for name, meant in renamed.items()} | {name: name for name in same}
    return {meant: f"{path}.{name}" for meant, name in sent.items()}


def refuse(sent: Any, harmless: dict[str, tuple[Any, ...]]) -> None:
    """Raises Unsupported for a field of the parameters that has another value than null and the harmless ones."""
    for name, values in harmless.items():
        value = getattr(sent, name)
        if value is not None and value not in values:
            able = f"; it may only be {' or '.join(map(repr, values))}" if values else ""
            param = f"parameters.{name}"
            raise Unsupported(f"{param} is not supported{able}", param=param, code="unsupported_parameter")
