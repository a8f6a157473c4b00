"""The native API: its field names are the domain's, so that parsing is validation and rendering is dumping."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import orjson
from pydantic import BaseModel, TypeAdapter, ValidationError

from service.domain import (
    Classification,
    ClassifyRequest,
    End,
    Event,
    Finish,
    FinishReason,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    ModelInfo,
    PromptTokens,
    Token,
    TokenLogprob,
)
from service.errors import NotFound
from service.gateway import sse
from service.gateway.bodies import body_model, generate_request, read
from service.gateway.generation import Asked, Output, Transcript
from service.gateway.names import Names, names_of_items
from service.validation import invalid

_CLASSIFY = TypeAdapter(ClassifyRequest)
_GENERATE = TypeAdapter(GenerateRequest)
_FIELDS = tuple(one.name for one in fields(GenerateRequest))

GenerateBody = body_model("GenerateBody", GenerateRequest.__doc__ or "", _FIELDS, nullable=False, stream=(bool, False))


@dataclass(frozen=True)
class TopObject:
    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class LogprobObject:
    """A token and its log-probability, null where there is nothing before it; `top` are the likeliest at its place."""

    id: int
    text: str
    logprob: float | None
    top: list[TopObject]


@dataclass(frozen=True)
class OutputObject:
    """`stop` is the stop string or id that ended it, if one did; `score` what a beam search ranks it by, null without
    one: log p / tokens^length_penalty, the end token included, the sum of it over the sentences of a translation;
    `logprobs` is null unless asked for.
    """

    index: int
    text: str
    finish_reason: FinishReason
    stop: str | int | None
    score: float | None
    logprobs: list[LogprobObject] | None


@dataclass(frozen=True)
class Generation:
    """The reply of /v1/generate. `prompt_logprobs`, a list a prompt, is what `echo` asks for; null otherwise."""

    id: str
    model: str
    outputs: list[OutputObject]
    prompt_logprobs: list[list[LogprobObject]] | None
    usage: GenerateUsage
    timing: GenerateTiming


class ModelObject(BaseModel, extra="allow"):
    """OpenAI's model object; what the manifest knows of the model is there beside it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    task: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelObject]


def parse(body: bytes, _path: Mapping[str, Any]) -> tuple[ClassifyRequest, Names]:
    """Raises InvalidRequest."""
    try:
        request = _CLASSIFY.validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
    return request, names_of_items("input", len(request.input))


def render(result: Classification) -> bytes:
    return orjson.dumps(result)


def parse_generate(body: bytes, _path: Mapping[str, Any]) -> Asked:
    """Raises InvalidRequest."""
    try:
        request, is_stream = _GENERATE.validate_json(body), False
    except ValidationError:  # it has `stream`, or is wrong: the model of the body takes the one and names the other
        sent: Any = read(GenerateBody, body)
        request = generate_request({name: getattr(sent, name) for name in sent.model_fields_set if name != "stream"})
        is_stream = sent.stream
    names = names_of_items("prompt", len(request.prompt or ()))
    return Asked(request, is_stream, partial(NativeAnswer, request), names)


class NativeAnswer:
    """Every token is an event, then every output's end is, then the whole's."""

    def __init__(self, request: GenerateRequest, request_id: str) -> None:
        self._request = request
        self._id = request_id
        self._model = ""
        self._reasons: list[FinishReason | None] = [None] * request.num_outputs

    def whole(self, transcript: Transcript) -> bytes:
        prompts = [_prompt_logprobs(tokens) for tokens in transcript.prompts] if self._request.echo else None
        outputs = [self._output(index, output) for index, output in enumerate(transcript.outputs)]
        usage, timing = transcript.usage, transcript.timing
        return orjson.dumps(Generation(self._id, transcript.model, outputs, prompts, usage, timing))

    def _output(self, index: int, output: Output) -> OutputObject:
        logprobs = None if self._request.logprobs is None else [_logprob(token) for token in output.logprobs]
        return OutputObject(index, output.text, output.finish_reason, output.stop, output.score, logprobs)

    def piece(self, event: Event) -> bytes:
        match event:
            case Token():
                return _token_event(event)
            case Finish(index, reason, text, stop, _, score):
                self._reasons[index] = reason
                about = {"index": index, "text": text, "finish_reason": reason, "stop": stop, "score": score}
                return sse.event(orjson.dumps(about))
            case PromptTokens(prompt, tokens):
                return sse.event(orjson.dumps({"prompt": prompt, "prompt_logprobs": _prompt_logprobs(tokens)}))
            case End(usage, timing):
                end = {"id": self._id, "model": self._model, "finish_reasons": self._reasons}
                return sse.event(orjson.dumps(end | {"usage": usage, "timing": timing}))
            case _:
                self._model = event.model
                return b""


def _token_event(event: Token) -> bytes:
    """The hot path: put together by hand, in a quarter of the time. `text` is what can be shown now; a token's own text
    goes with its log-probability only.
    """
    text = orjson.dumps(event.text)
    if event.logprob is None:
        return b'data: {"index":%d,"text":%b,"token":{"id":%d}}\n\n' % (event.index, text, event.id)
    token = orjson.dumps(_logprob(event.logprob))
    return b'data: {"index":%d,"text":%b,"token":%b}\n\n' % (event.index, text, token)


def _logprob(token: TokenLogprob) -> LogprobObject:
    top = [TopObject(other.id, other.text, other.logprob) for other in token.top]
    return LogprobObject(token.id, token.text, token.logprob, top)


def _prompt_logprobs(tokens: tuple[TokenLogprob, ...]) -> list[LogprobObject]:
    first = [LogprobObject(token.id, token.text, None, []) for token in tokens[:1]]
    return first + [_logprob(token) for token in tokens[1:]]


def model_object(info: ModelInfo) -> dict[str, Any]:
    """A ModelObject. No model of it is made, since nothing is to be validated."""
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
