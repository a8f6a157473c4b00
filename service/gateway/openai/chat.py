"""/v1/chat/completions."""

from collections.abc import Mapping
from dataclasses import dataclass as plain
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from pydantic import ConfigDict, Field, WithJsonSchema
from pydantic.dataclasses import dataclass

from service.domain import (
    MAX_LOGPROBS,
    MAX_MESSAGES,
    End,
    Event,
    Finish,
    FinishReason,
    GenerateRequest,
    Message,
    Start,
    Token,
    TokenLogprob,
)
from service.errors import InvalidRequest, Unsupported
from service.gateway.bodies import body_model, generate_request, read
from service.gateway.generation import Asked, Output, Transcript
from service.gateway.names import SAME, Names
from service.gateway.openai.chunks import Chunks, UsageObject, now, usage_object
from service.gateway.openai.fields import COMMON, TAKEN, StreamOptions, anything, common_values

_PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}

Content = Annotated[Any, WithJsonSchema(_CONTENT)]  # read by `_text`, which can say what is wrong with it


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class ChatMessage:
    """A turn. What servers add to the assistant's turns may be sent back; a call of a tool may not."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: str | None = None


# The values that ask for nothing, beside null.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "moderation": (), "prediction": (), "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (),
}  # fmt: skip

ChatBody = body_model(
    "ChatBody",
    "What OpenAI's clients send, and vLLM's names for the rest; a field that cannot be honoured is an error.",
    TAKEN,
    nullable=True,
    messages=(Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)], ...),
    max_completion_tokens=(Annotated[int, Field(ge=1, le=2**31 - 1)] | None, None),
    logprobs=(bool | None, None),
    top_logprobs=(Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, None),
    **COMMON,
    **anything(_REFUSED),
)


@plain(frozen=True)
class TopLogprob:
    token: str
    logprob: float
    bytes: list[int]


@plain(frozen=True)
class ChatLogprob:
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


@plain(frozen=True)
class ChatLogprobs:
    content: list[ChatLogprob]
    refusal: None = None


@plain(frozen=True)
class AssistantMessage:
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


@plain(frozen=True)
class ChatChoice:
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


@plain(frozen=True)
class ChatCompletion:
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    object: Literal["chat.completion"] = "chat.completion"


def parse(body: bytes, _path: Mapping[str, Any]) -> Asked:
    """Raises InvalidRequest, and Unsupported for what cannot be honoured."""
    sent: Any = read(ChatBody, body)
    values = common_values(sent, _REFUSED)
    if sent.top_logprobs is not None and not sent.logprobs:
        raise InvalidRequest("top_logprobs goes with logprobs only", param="top_logprobs")
    messages = tuple(_message(message, f"messages.{at}") for at, message in enumerate(sent.messages))
    own = {
        "messages": messages,
        "max_tokens": sent.max_completion_tokens or sent.max_tokens,  # None: as many as there is room for
        "logprobs": (sent.top_logprobs or 0) if sent.logprobs else None,
    }
    names: Names = {"max_tokens": "max_completion_tokens"} if sent.max_completion_tokens else SAME
    request = generate_request(values | own, names)
    return Asked(request, bool(sent.stream), partial(ChatAnswer, request, sent.stream_options), names)


def _message(sent: ChatMessage, where: str) -> Message:
    for name in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if getattr(sent, name):
            raise Unsupported(f"{where}.{name} is not supported", param=f"{where}.{name}", code="unsupported_parameter")
    match sent.role:
        case "tool" | "function":
            message = f"{where}.role: {sent.role!r} is not supported: there are no tools here"
            raise Unsupported(message, param=f"{where}.role", code="unsupported_parameter")
        case "developer":
            return Message("system", _text(sent.content, where))
        case role:
            return Message(role, _text(sent.content, where))


def _text(content: Any, where: str) -> str:
    """A text, or the texts of its parts on lines of their own."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content: expected a text or a list of parts", param=f"{where}.content")
    return "\n".join(_part(part, f"{where}.content.{at}") for at, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    if isinstance(kind, str) and kind != "text":
        message = f"{where}.type: only text parts are supported, got {kind[:60]!r}"
        raise Unsupported(message, param=f"{where}.type", code="unsupported_parameter")
    raise InvalidRequest(f'{where}: expected {{"type": "text", "text": str}}', param=where)


class ChatAnswer:
    """Each choice begins with its role and ends with an empty delta that has the finish_reason."""

    def __init__(self, request: GenerateRequest, options: StreamOptions | None, request_id: str) -> None:
        self._request = request
        self._id = f"chatcmpl-{request_id}"
        self._chunks = Chunks(self._id, "chat.completion.chunk", options)

    def whole(self, transcript: Transcript) -> bytes:
        choices = [self._choice(index, output) for index, output in enumerate(transcript.outputs)]
        return orjson.dumps(ChatCompletion(self._id, now(), transcript.model, choices, usage_object(transcript.usage)))

    def _choice(self, index: int, output: Output) -> ChatChoice:
        logprobs = None if self._request.logprobs is None else ChatLogprobs([_logprob(one) for one in output.logprobs])
        return ChatChoice(index, AssistantMessage(output.text), logprobs, output.finish_reason)

    def piece(self, event: Event) -> bytes:
        match event:
            case Token():
                return self._token(event)
            case Finish(index, reason, text):
                held = self._chunks.choice(index, _content(text)) if text else b""
                return held + self._chunks.choice(index, b'"delta":{}', finish_reason=b'"%b"' % reason.encode())
            case Start():
                self._chunks.start(event)
                role = b'"delta":{"role":"assistant","content":""}'
                return b"".join(self._chunks.choice(index, role) for index in range(self._request.num_outputs))
            case End(usage):
                return self._chunks.end(usage)
            case _:
                return b""

    def _token(self, event: Token) -> bytes:
        """The hot path. A token that nothing can be shown of yet makes no chunk, unless it has a log-probability."""
        self._chunks.count_token()
        if event.logprob is not None:
            logprobs = orjson.dumps(ChatLogprobs([_logprob(event.logprob)]))
            return self._chunks.choice(event.index, _content(event.text), logprobs)
        return self._chunks.choice(event.index, _content(event.text)) if event.text else b""


def _content(text: str) -> bytes:
    return b'"delta":{"content":%b}' % orjson.dumps(text)


def _logprob(token: TokenLogprob) -> ChatLogprob:
    top = [TopLogprob(other.text, other.logprob, list(other.bytes)) for other in token.top]
    return ChatLogprob(token.text, token.logprob, list(token.bytes), top)
