"""Text generation, as text-generation-inference answers it: in one piece or as a stream of tokens.

Of its stream, the last event is ours: it has no token but what ends an output, marked as special, with whatever text
had been held back, and the whole text and its details.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from service.domain import MAX_LOGPROBS, End, Event, Finish, FinishReason, GenerateRequest, Start, Token, TokenLogprob
from service.gateway import sse
from service.gateway.bodies import body_model, generate_request, given, read
from service.gateway.generation import Asked, Transcript
from service.gateway.huggingface.fields import COMMON, TAKEN, common_values, names_under, refuse
from service.gateway.names import names_of_items

_OWN = ("frequency_penalty", "stop")
_REFUSED: dict[str, tuple[Any, ...]] = {
    "adapter_id": (),
    "best_of": (1,),
    "grammar": (),
    "truncate": (),
    "typical_p": (1.0,),
    "watermark": (False,),
}
_RENAMED = {"max_new_tokens": "max_tokens", "top_n_tokens": "logprobs", "decoder_input_details": "echo"}
_NAMES = names_under("parameters", (*TAKEN, *_OWN), **_RENAMED) | names_of_items("prompt", 1, "inputs")

TextGenerationParameters = body_model(
    "TextGenerationParameters",
    "What text-generation-inference calls them.",
    (*TAKEN, *_OWN),
    nullable=True,
    **COMMON,
    details=(bool | None, None),
    decoder_input_details=(bool | None, None),
    return_full_text=(bool | None, None),
    top_n_tokens=(Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, None),
    **dict.fromkeys(_REFUSED, (Any, None)),
)
TextGenerationBody = body_model(
    "TextGenerationBody",
    "A text to continue; `options` are taken and mean nothing here.",
    (),
    nullable=True,
    inputs=(str, ...),
    parameters=(TextGenerationParameters | None, None),
    stream=(bool | None, None),
    options=(dict[str, Any] | None, None),
)

Reason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(frozen=True)
class TokenObject:
    id: int
    text: str
    logprob: float
    special: bool = False


@dataclass(frozen=True)
class PrefillToken:
    """A token of the prompt; of the first the log-probability is 0, since it has none."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Details:
    """`prefill` is empty unless asked for with `decoder_input_details`, `top_tokens` unless with `top_n_tokens`."""

    finish_reason: Reason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[TokenObject]
    top_tokens: list[list[TokenObject]]


@dataclass(frozen=True)
class StreamDetails:
    finish_reason: Reason
    generated_tokens: int
    seed: int | None
    input_length: int


@dataclass(frozen=True)
class GeneratedText:
    """`details` is there if asked for."""

    generated_text: str
    details: Details | None = None


def parse(body: bytes, model: str) -> Asked:
    """Raises InvalidRequest, and Unsupported for what cannot be honoured."""
    sent: Any = read(TextGenerationBody, body)
    parameters: Any = sent.parameters or TextGenerationParameters()
    refuse(parameters, _REFUSED)
    is_stream, has_details = bool(sent.stream), bool(parameters.details)
    values = common_values(parameters) | given(parameters, _OWN) | {"prompt": sent.inputs, "model": model}
    if is_stream or has_details:
        values["logprobs"] = parameters.top_n_tokens or 0
    values["echo"] = has_details and not is_stream and bool(parameters.decoder_input_details)
    request = generate_request(values, _NAMES)
    shown = sent.inputs if parameters.return_full_text else ""
    return Asked(request, is_stream, partial(TextGenerationAnswer, request, shown, has_details), _NAMES)


class TextGenerationAnswer:
    def __init__(self, request: GenerateRequest, shown: str, has_details: bool, _request_id: str) -> None:
        """`shown` is what the generated text begins with."""
        self._request = request
        self._has_details = has_details
        self._pieces = [shown]
        self._num_tokens = 0
        self._num_read = 0
        self._finish = Finish(0, "stop")

    def whole(self, transcript: Transcript) -> bytes:
        (output,) = transcript.outputs
        found: dict[str, Any] = {"generated_text": "".join(self._pieces) + output.text}
        if self._has_details:
            found["details"] = Details(
                _reason(output.finish_reason, output.stop),
                transcript.usage.completion_tokens,
                self._request.seed,
                [PrefillToken(*_named(one)) for tokens in transcript.prompts for one in tokens],
                [TokenObject(*_named(one)) for one in output.logprobs],
                [_top(one) for one in output.logprobs] if self._request.logprobs else [],
            )
        return orjson.dumps([found])

    def piece(self, event: Event) -> bytes:
        match event:
            case Token(text=text, logprob=logprob):
                assert logprob is not None
                return self._token(TokenObject(logprob.id, text, logprob.logprob), _top(logprob))
            case Start(prompt_tokens=num_read):
                self._num_read = num_read
            case Finish():
                self._finish = event
            case End(usage):
                reason = _reason(self._finish.finish_reason, self._finish.stop)
                details = StreamDetails(reason, usage.completion_tokens, self._request.seed, self._num_read)
                return self._token(TokenObject(0, self._finish.text, 0.0, special=True), [], details)
        return b""

    def _token(self, token: TokenObject, top: Sequence[TokenObject], details: StreamDetails | None = None) -> bytes:
        self._pieces.append(token.text)
        self._num_tokens += 1
        about: dict[str, Any] = {"index": self._num_tokens, "token": token}
        if self._request.logprobs:
            about["top_tokens"] = top
        text = None if details is None else "".join(self._pieces)
        shown = details if self._has_details else None
        return sse.event(orjson.dumps(about | {"generated_text": text, "details": shown}))


def _reason(reason: FinishReason, stop: str | int | None) -> Reason:
    return "length" if reason == "length" else "eos_token" if stop is None else "stop_sequence"


def _named(token: TokenLogprob) -> tuple[int, str, float]:
    return token.id, token.text, token.logprob


def _top(token: TokenLogprob) -> list[TokenObject]:
    return [TokenObject(*_named(one)) for one in token.top]
