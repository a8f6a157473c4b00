"""What both routes take beside a prompt or messages, and what they do not."""

from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from service.errors import InvalidRequest, Unsupported
from service.gateway.bodies import given

# Of GenerateRequest; those that OpenAI does not have are called as vLLM calls them.
TAKEN = (
    "model", "max_tokens", "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos", "seed", "n",
)  # fmt: skip

_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "priority",
)  # fmt: skip

# The values that ask for nothing, beside null.
_REFUSED: dict[str, tuple[Any, ...]] = {"skip_special_tokens": (True,), "include_stop_str_in_output": (False,)}

Shape = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class StreamOptions:
    """`continuous_usage_stats`, with `include_usage`: the tokens so far on every chunk. Nothing is ever obfuscated."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


def anything(names: tuple[str, ...] | dict[str, tuple[Any, ...]]) -> Shape:
    """Fields that may have any value, since it is ignored or looked at later."""
    return dict.fromkeys(names, (Any, None))


COMMON: Shape = {
    "top_k": (Annotated[int, Field(ge=-1, le=2**31 - 1, description="-1 and 0: all")] | None, None),
    "stream": (bool | None, None),
    "stream_options": (StreamOptions | None, None),
    **anything(_IGNORED),
    **anything(_REFUSED),
}


def common_values(sent: Any, refused: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of a GenerateRequest that both routes take. Raises Unsupported for what cannot be honoured.

    `refused` are the route's own such fields, each with the values that ask for nothing.
    """
    for name, harmless in (_REFUSED | refused).items():
        value = getattr(sent, name)
        if value is not None and value not in harmless:
            able = f"; {name} may only be {' or '.join(map(repr, harmless))}" if harmless else ""
            raise Unsupported(f"{name} is not supported{able}", param=name, code="unsupported_parameter")
    if sent.stream_options is not None and not sent.stream:
        raise InvalidRequest("stream_options goes with stream only", param="stream_options")
    values = given(sent, TAKEN)
    top_k = sent.top_k
    return values if top_k is None else values | {"top_k": max(top_k, 0)}
