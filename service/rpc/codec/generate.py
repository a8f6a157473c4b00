"""A generation: its request, and its events.

Names are the same on both sides, so that most fields are copied by name. A field that is not set is not passed on:
its default is the domain's alone.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from service.domain import (
    MAX_MESSAGES,
    End,
    Event,
    Finish,
    FinishReason,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    Message,
    PromptTokens,
    Start,
    Token,
    TokenLogprob,
)
from service.errors import InvalidRequest
from service.rpc.codec.received import received
from service.rpc.pb.attnd.v1 import inference_pb2 as pb
from service.validation import invalid

# Unset and zero are the same thing; unset and zero differ.
_PLAIN = ("min_tokens", "top_k", "min_p", "presence_penalty", "frequency_penalty", "ignore_eos", "echo")
_OPTIONAL = (
    "temperature", "top_p", "repetition_penalty", "length_penalty", "seed", "n", "logprobs", "num_beams",
)  # fmt: skip
_SCALARS = _PLAIN + _OPTIONAL

_NO_LIMIT = 0  # max_tokens None; not set means the default
_MAX_ID = 2**32 - 1

_REASONS: dict[FinishReason, pb.FinishReason] = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
_REASON_NAMES = {int(number): name for name, number in _REASONS.items()}


def encode_request(request: GenerateRequest, *, wants_tokens: bool = True) -> pb.GenerateRequest:
    """`wants_tokens` is the Call's.

    Raises InvalidRequest for what no message can carry: lone surrogates, token ids of more than 32 bits.
    """
    try:
        return pb.GenerateRequest(
            prompts=[_encode_prompt(prompt) for prompt in request.prompt or ()],
            messages=[pb.Message(role=turn.role, content=turn.content) for turn in request.messages or ()],
            model=request.model,
            max_tokens=_NO_LIMIT if request.max_tokens is None else request.max_tokens,
            logit_bias=_in_range(request.logit_bias, "logit_bias"),
            stop=request.stop,
            stop_token_ids=_in_range(request.stop_token_ids, "stop_token_ids"),
            wants_tokens=wants_tokens,
            **{name: getattr(request, name) for name in _SCALARS},
        )
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"not valid Unicode text: {error.reason}", param="prompt") from None


def _encode_prompt(prompt: str | tuple[int, ...]) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    return pb.Prompt(token_ids=pb.TokenIds(ids=_in_range(prompt, "prompt")))


def _in_range(ids: Any, param: str) -> Any:
    """`ids`, when all of them are 32 bits wide at most."""
    if ids and not 0 <= min(ids) <= max(ids) <= _MAX_ID:
        bad = next(id for id in ids if not 0 <= id <= _MAX_ID)
        raise InvalidRequest(f"{param}: a token id is from 0 to {_MAX_ID}, got {bad}", param=param)
    return ids


def decode_request(message: pb.GenerateRequest) -> GenerateRequest:
    if bool(message.prompts) == bool(message.messages):
        raise InvalidRequest("exactly one of prompts and messages must be given")
    if (num_messages := len(message.messages)) > MAX_MESSAGES:  # before anything is made of them
        raise InvalidRequest(f"messages: at most {MAX_MESSAGES} are taken, not {num_messages}", param="messages")
    fields = {name: getattr(message, name) for name in _PLAIN}
    fields |= {name: getattr(message, name) for name in _OPTIONAL if message.HasField(name)}
    if message.HasField("max_tokens"):
        fields["max_tokens"] = None if message.max_tokens == _NO_LIMIT else message.max_tokens
    try:
        return GenerateRequest(
            prompt=tuple([_decode_prompt(prompt, at) for at, prompt in enumerate(message.prompts)]) or None,
            messages=tuple([_decode_message(turn, at) for at, turn in enumerate(message.messages)]) or None,
            model=message.model or None,
            logit_bias=dict(message.logit_bias),
            stop=tuple(message.stop),
            stop_token_ids=tuple(message.stop_token_ids),
            **fields,
        )
    except ValidationError as error:
        raise invalid(error) from None


def _decode_message(message: pb.Message, at: int) -> Message:
    try:
        return Message(role=message.role, content=message.content)  # type: ignore[arg-type]  # that the role is one is seen here
    except ValidationError as error:
        wrong = invalid(error)
        raise InvalidRequest(f"messages.{at}.{wrong.message}", param=f"messages.{at}.{wrong.param}") from None


def _decode_prompt(message: pb.Prompt, at: int) -> str | tuple[int, ...]:
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest(f"prompt.{at}: either text or token_ids must be set", param=f"prompt.{at}")
    return message.text if kind == "text" else tuple(message.token_ids.ids)


def request_bytes(request: GenerateRequest, *, wants_tokens: bool = True) -> bytes:
    """The message of a Generate call; `wants_tokens` is the Call's. Raises InvalidRequest."""
    return encode_request(request, wants_tokens=wants_tokens).SerializeToString()


def parse_request(data: bytes) -> tuple[GenerateRequest, bool]:
    """The request of a Generate call, and whether it wants tokens, as unless it says no.

    Raises InvalidRequest, also when `data` is no such message.
    """
    message = received(pb.GenerateRequest, data)
    return decode_request(message), message.wants_tokens or not message.HasField("wants_tokens")


def encode_event(event: Event) -> pb.GenerateEvent:
    match event:
        case Token():
            return pb.GenerateEvent(token=_encode_token(event))
        case Start():
            return pb.GenerateEvent(start=pb.Start(model=event.model, prompt_tokens=event.prompt_tokens))
        case PromptTokens():
            tokens = [_encode_logprob(token) for token in event.tokens]
            return pb.GenerateEvent(prompt_tokens=pb.PromptTokens(prompt=event.prompt, tokens=tokens))
        case Finish():
            return pb.GenerateEvent(finish=_encode_finish(event))
        case End():
            usage, timing = pb.GenerateUsage(**vars(event.usage)), pb.GenerateTiming(**vars(event.timing))
            return pb.GenerateEvent(end=pb.End(usage=usage, timing=timing))


def _encode_token(token: Token) -> pb.Token:
    logprob = None if token.logprob is None else _encode_logprob(token.logprob)
    return pb.Token(index=token.index, id=token.id, text=token.text, logprob=logprob)


def _encode_logprob(token: TokenLogprob) -> pb.TokenLogprob:
    top = [_encode_logprob(other) for other in token.top]
    return pb.TokenLogprob(id=token.id, text=token.text, bytes=token.bytes, logprob=token.logprob, top=top)


def _encode_finish(finish: Finish) -> pb.Finish:
    return pb.Finish(
        index=finish.index,
        finish_reason=_REASONS[finish.finish_reason],
        text=finish.text,
        stop_string=finish.stop if isinstance(finish.stop, str) else None,
        stop_token_id=finish.stop if isinstance(finish.stop, int) else None,
        ids=finish.ids,
        score=finish.score,
    )


def decode_event(message: pb.GenerateEvent) -> Event:
    kind = message.WhichOneof("event")
    if kind == "token":
        return _decode_token(message.token)
    if kind == "start":
        return Start(message.start.model, message.start.prompt_tokens)
    if kind == "prompt_tokens":
        prompt = message.prompt_tokens
        return PromptTokens(prompt.prompt, tuple([_decode_logprob(token) for token in prompt.tokens]))
    if kind == "finish":
        return _decode_finish(message.finish)
    return _decode_end(message.end)


def _decode_token(message: pb.Token) -> Token:
    logprob = _decode_logprob(message.logprob) if message.HasField("logprob") else None
    return Token(message.index, message.id, message.text, logprob)


def _decode_logprob(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple([_decode_logprob(other) for other in message.top])
    return TokenLogprob(message.id, message.text, message.bytes, message.logprob, top)


def _decode_finish(message: pb.Finish) -> Finish:
    kind = message.WhichOneof("stop")
    stop = None if kind is None else getattr(message, kind)
    score = message.score if message.HasField("score") else None
    return Finish(message.index, _REASON_NAMES[message.finish_reason], message.text, stop, tuple(message.ids), score)


def _decode_end(message: pb.End) -> End:
    usage, timing = message.usage, message.timing
    return End(
        GenerateUsage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        GenerateTiming(
            queue_seconds=timing.queue_seconds,
            tokenize_seconds=timing.tokenize_seconds,
            prefill_seconds=timing.prefill_seconds,
            decode_seconds=timing.decode_seconds,
            first_token_seconds=timing.first_token_seconds,
            total_seconds=timing.total_seconds,
        ),
    )


def events_bytes(events: Sequence[Event]) -> bytes:
    """One message of a Generate call: what came together."""
    return pb.GenerateResponse(events=[encode_event(event) for event in events]).SerializeToString()


def parse_events(data: bytes) -> list[Event]:
    """What a worker sent in one message of a Generate call."""
    return [decode_event(event) for event in pb.GenerateResponse.FromString(data).events]
