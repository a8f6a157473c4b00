"""/v1/completions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import orjson
from pydantic import Field

from service.domain import (
    MAX_LOGPROBS,
    End,
    Event,
    Finish,
    FinishReason,
    GenerateRequest,
    PromptTokens,
    Start,
    Token,
    TokenLogprob,
)
from service.errors import InvalidRequest, Unsupported
from service.gateway.bodies import body_model, generate_request, read
from service.gateway.generation import Asked, Output, Transcript
from service.gateway.names import names_of_items
from service.gateway.openai.chunks import Chunks, UsageObject, now, usage_object
from service.gateway.openai.fields import COMMON, TAKEN, StreamOptions, anything, common_values
from service.gateway.openai.offsets import Offsets, prompt_offsets

DEFAULT_MAX_TOKENS = 16  # OpenAI's

_REFUSED: dict[str, tuple[Any, ...]] = {"suffix": ("",)}

CompletionBody = body_model(
    "CompletionBody",
    "What OpenAI's clients send, and vLLM's names for the rest; a field that cannot be honoured is an error.",
    (*TAKEN, "prompt"),
    nullable=True,
    echo=(bool | None, None),
    logprobs=(Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, None),
    best_of=(Annotated[int, Field(ge=1)] | None, None),
    **COMMON,
    **anything(_REFUSED),
)


@dataclass(frozen=True)
class CompletionLogprobs:
    """A prompt's first token has neither a log-probability nor alternatives. Offsets are in characters of the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass(frozen=True)
class CompletionChoice:
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


@dataclass(frozen=True)
class Completion:
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject
    object: Literal["text_completion"] = "text_completion"


def parse(body: bytes, _path: Mapping[str, Any]) -> Asked:
    """Raises InvalidRequest, and Unsupported for what cannot be honoured."""
    sent: Any = read(CompletionBody, body)
    values = {"max_tokens": DEFAULT_MAX_TOKENS} | common_values(sent, _REFUSED)
    if sent.prompt is None:
        raise InvalidRequest("prompt: expected a text, token ids, or a list of those", param="prompt")
    n = values.get("n", 1)
    if sent.best_of not in (None, n):
        message = f"best_of: only n ({n}) is supported, since all outputs are returned; got {sent.best_of}"
        raise Unsupported(message, param="best_of", code="unsupported_parameter")
    has_ids = any(not isinstance(prompt, str) for prompt in sent.prompt)
    own = {
        "prompt": sent.prompt,
        "logprobs": sent.logprobs,
        # A text without log-probabilities is known here, and need not be computed.
        "echo": bool(sent.echo) and (has_ids or sent.logprobs is not None),
    }
    request = generate_request(values | own)
    answer = partial(CompletionAnswer, request, bool(sent.echo), sent.stream_options)
    names = names_of_items("prompt", len(sent.prompt))
    return Asked(request, bool(sent.stream), answer, names, says_prompt=bool(sent.echo) and not request.echo)


class CompletionAnswer:
    """Each choice begins with its prompt if that is wanted, and ends with what was held back and the finish_reason."""

    def __init__(self, request: GenerateRequest, echo: bool, options: StreamOptions | None, request_id: str) -> None:
        self._prompts = request.prompt or ()
        self._n = request.n
        self._has_logprobs = request.logprobs is not None
        self._echo = echo
        self._is_echo_computed = request.echo
        self._id = f"cmpl-{request_id}"
        self._chunks = Chunks(self._id, "text_completion", options)
        self._is_held = bool(request.stop)  # text that may begin a stop string
        self._offsets = [self._offsets_after("") for _ in range(request.num_outputs)]

    def whole(self, transcript: Transcript) -> bytes:
        echoed = transcript.prompts if self._is_echo_computed else [()] * len(self._prompts)
        choices = [
            self._choice(index, output, echoed[index // self._n]) for index, output in enumerate(transcript.outputs)
        ]
        return orjson.dumps(Completion(self._id, now(), transcript.model, choices, usage_object(transcript.usage)))

    def _choice(self, index: int, output: Output, echoed: Sequence[TokenLogprob]) -> CompletionChoice:
        text = self._prompt_text(index // self._n, echoed) if self._echo else ""
        logprobs = None
        if self._has_logprobs:
            place = self._offsets_after(text).place
            told = zip(output.logprobs, output.pieces, strict=False)  # the last piece is the end's, and no token's
            offsets = prompt_offsets(echoed) + [place(token, shown) for token, shown in told]
            logprobs = _logprobs([*echoed, *output.logprobs], offsets, num_first=min(len(echoed), 1))
        return CompletionChoice(index, text + output.text, logprobs, output.finish_reason)

    def _offsets_after(self, text: str) -> Offsets:
        return Offsets(len(text), is_held=self._is_held)

    def _prompt_text(self, prompt: int, echoed: Sequence[TokenLogprob]) -> str:
        given = self._prompts[prompt]
        return given if isinstance(given, str) else b"".join(token.bytes for token in echoed).decode("utf-8", "replace")

    def piece(self, event: Event) -> bytes:
        match event:
            case Token():
                return self._token(event)
            case Finish(index, reason, text):
                return self._chunks.choice(index, _content(text), finish_reason=b'"%b"' % reason.encode())
            case Start():
                self._chunks.start(event)
                is_known = self._echo and not self._is_echo_computed
                return b"".join(self._echoed(prompt, ()) for prompt in range(len(self._prompts)) if is_known)
            case PromptTokens(prompt, tokens):
                return self._echoed(prompt, tokens)
            case End(usage):
                return self._chunks.end(usage)

    def _token(self, event: Token) -> bytes:
        """The hot path. A token that nothing can be shown of yet makes no chunk, unless it has a log-probability."""
        self._chunks.count_token()
        if event.logprob is not None:
            offset = self._offsets[event.index].place(event.logprob, event.text)
            logprobs = _logprobs((event.logprob,), (offset,), num_first=0)
            return self._chunks.choice(event.index, _content(event.text), orjson.dumps(logprobs))
        return self._chunks.choice(event.index, _content(event.text)) if event.text else b""

    def _echoed(self, prompt: int, tokens: Sequence[TokenLogprob]) -> bytes:
        """The prompt as the first chunk of each of its choices."""
        text, indices = self._prompt_text(prompt, tokens), range(prompt * self._n, (prompt + 1) * self._n)
        if not self._has_logprobs:
            return b"".join(self._chunks.choice(index, _content(text)) for index in indices)
        logprobs = orjson.dumps(_logprobs(tokens, prompt_offsets(tokens), num_first=1))
        for index in indices:
            self._offsets[index] = self._offsets_after(text)
        return b"".join(self._chunks.choice(index, _content(text), logprobs) for index in indices)


def _content(text: str) -> bytes:
    return b'"text":%b' % orjson.dumps(text)


def _logprobs(tokens: Sequence[TokenLogprob], offsets: Iterable[int], *, num_first: int) -> CompletionLogprobs:
    """`num_first` is 1 if the first of `tokens` is its prompt's first, and 0 if not."""
    found = CompletionLogprobs([], [], [], list(offsets))
    for at, token in enumerate(tokens):
        found.tokens.append(token.text)
        found.token_logprobs.append(None if at < num_first else token.logprob)
        found.top_logprobs.append(None if at < num_first else _top(token))
    return found


def _top(token: TokenLogprob) -> dict[str, float]:
    """The likeliest, and the one that was chosen. Of those that read alike, the likeliest."""
    top: dict[str, float] = {}
    for one in (*token.top, token):
        top.setdefault(one.text, one.logprob)
    return top
