"""One generation over HTTP, in any dialect, in one piece or as a stream of events.

A dialect is how a body becomes what is `Asked`, and how events become bytes: an `Answer`, one a request.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from service.domain import (
    Call,
    End,
    Event,
    Finish,
    FinishReason,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    PromptTokens,
    Start,
    Token,
    TokenLogprob,
    generation_tasks,
)
from service.errors import AttndError
from service.gateway import sse
from service.gateway.endpoint import Entrance, Parse, send_json
from service.gateway.errors import body_of, failure_of_any, in_dialect
from service.gateway.exchange import Receive, Scope, Send
from service.gateway.names import FIELD_ERRORS, Names, told_as

PING_SECONDS = 15.0


@dataclass(slots=True)
class Output:
    """What one output consists of so far."""

    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # none unless they were asked for
    finish_reason: FinishReason = "stop"  # until its Finish comes
    stop: str | int | None = None
    score: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(slots=True)
class Transcript:
    """A whole generation, for a reply in one piece. `prompts` is empty unless asked for with `echo`."""

    model: str
    outputs: list[Output]
    usage: GenerateUsage
    timing: GenerateTiming
    prompts: list[tuple[TokenLogprob, ...]]


class Answer(Protocol):
    """How the reply to one request reads."""

    def whole(self, transcript: Transcript) -> bytes:
        """The body of a reply in one piece."""
        ...

    def piece(self, event: Event) -> bytes:
        """The server-sent events that `event` makes, maybe none; called with every event in turn."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, whether its reply is a stream, its Answer, given the request's id, and the caller's names.

    `says_prompt`: the Answer says the prompt's text by itself, before what the model says.
    """

    request: GenerateRequest
    is_stream: bool
    answer: Callable[[str], Answer]
    names: Names = field(default_factory=dict)
    says_prompt: bool = False


@dataclass(frozen=True)
class GenerateEndpoint:
    """`route` labels the metrics."""

    route: str
    entrance: Entrance
    parse: Parse[Asked]
    ping_seconds: float = PING_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises an AttndError, which the middleware answers unless the reply has begun.

        A client that leaves cancels this, and so closes the backend's generator.
        """
        asked, call = await self.entrance.admit(self.route, self.parse, scope, receive)
        try:
            await self._answer(asked, call, scope["path"], send)
        except FIELD_ERRORS as error:  # in a stream, too, they come before its first event
            raise told_as(asked.names, error) from None

    async def _answer(self, asked: Asked, call: Call, path: str, send: Send) -> None:
        answer = asked.answer(call.request_id)
        request = await self._to_refuse(asked.request) if asked.says_prompt else asked.request
        if not asked.is_stream:
            # Nothing is left to close: this reads to the end, and whatever cuts it short is raised by the generator.
            events = self.entrance.backend.generate(request, replace(call, wants_tokens=False))
            await send_json(send, answer.whole(await collect(events, request.num_outputs)))
            return
        async with aclosing(self.entrance.backend.generate(request, call)) as events:
            await _stream(events, answer, path, call.request_id, send, self.ping_seconds)

    async def _to_refuse(self, request: GenerateRequest) -> GenerateRequest:
        """`request`, with `echo` if its model translates: what it says does not go on from its prompt, so it refuses.

        Where no model is found, what comes of asking for it tells why, and is counted.
        """
        try:
            model = await self.entrance.model_for(generation_tasks(request), request.model)
        except AttndError:
            return request
        return replace(request, echo=True) if model.task == "translation" else request


async def _stream(
    events: AsyncGenerator[Event, None], answer: Answer, path: str, request_id: str, send: Send, ping_seconds: float
) -> None:
    """Raises what ends the generation before its end; once the head is out, it is also said as the last event."""
    first = await anext(events)
    stream = sse.EventStream(send, ping_seconds=ping_seconds)
    await stream.open()
    try:
        await stream.write(answer.piece(first))
        async for event in events:
            await stream.write(answer.piece(event))
    except Exception as error:
        failure = in_dialect(failure_of_any(error, request_id), path)
        await stream.close(sse.event(body_of(failure, path)))
        raise
    finally:
        stream.abandon()
    await stream.close(sse.DONE)


async def collect(events: AsyncGenerator[Event, None], num_outputs: int) -> Transcript:
    """All `events`: a Start, and in the end an End."""
    start: Start
    end: End
    outputs = [Output() for _ in range(num_outputs)]
    prompts: list[tuple[TokenLogprob, ...]] = []
    async for event in events:
        if type(event) is Token:
            output = outputs[event.index]
            output.pieces.append(event.text)
            if event.logprob is not None:
                output.logprobs.append(event.logprob)
        elif type(event) is Finish:
            output = outputs[event.index]
            output.pieces.append(event.text)
            output.finish_reason, output.stop, output.score = event.finish_reason, event.stop, event.score
        elif type(event) is PromptTokens:
            prompts.append(event.tokens)
        elif type(event) is Start:
            start = event
        elif type(event) is End:
            end = event
    return Transcript(start.model, outputs, end.usage, end.timing, prompts)
