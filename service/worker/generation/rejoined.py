"""The sentences' events of a translation -> those of its texts: told in order, with what stood between the sentences.

Knows no generator, and how a text was split only by its pieces.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from service.domain import End, Event, Finish, FinishReason, GenerateRequest, GenerateUsage, Progress, Start, Token
from service.worker.generation.detokenizer import StopStrings

Source = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt's sentences, at least one, and what stands before, between and behind them: one more."""

    sources: tuple[Source, ...]
    spaces: tuple[str, ...]


class Rejoined:
    """A generation's events about sentences -> those about texts. `take` each of them, in turn."""

    def __init__(self, texts: Sequence[Text], request: GenerateRequest) -> None:
        self._outputs = [
            [RejoinedOutput(index * request.n + place, text, request) for place in range(request.n)]
            for index, text in enumerate(texts)
        ]
        self._of_sentence = [
            (output, sentence)
            for outputs, text in zip(self._outputs, texts, strict=True)
            for sentence in range(len(text.sources))
            for output in outputs
        ]
        self._num_open = len(self._of_sentence)  # outputs of sentences that have not ended
        self._num_read = self._num_written = 0

    def take(self, event: Event) -> Iterator[Event]:
        if isinstance(event, Token | Finish):
            self._count(event)
            output, sentence = self._of_sentence[event.index]
            yield from output.take(sentence, event)
        else:
            if isinstance(event, Start):
                self._num_read = event.prompt_tokens
            yield event

    def _count(self, event: Token | Finish) -> None:
        if isinstance(event, Token):
            self._num_written += 1
        else:
            self._num_open -= 1
            is_by_token = event.finish_reason == "stop" and not isinstance(event.stop, str)
            self._num_written += len(event.ids) + is_by_token

    @property
    def is_stopped(self) -> bool:
        """Nothing more will be told, but something is still being written."""
        return self._num_open > 0 and all(output.is_finished for outputs in self._outputs for output in outputs)

    def end(self, progress: Progress) -> End:
        """In place of the generator's own, which is not waited for."""
        progress.finished = time.monotonic()
        usage = GenerateUsage(self._num_read, self._num_written, cached_tokens=0)
        return End(usage, progress.generate_timing(progress.finished))


class RejoinedOutput:
    """One output in the making."""

    def __init__(self, index: int, text: Text, request: GenerateRequest) -> None:
        self._index = index
        self._spaces = text.spaces
        self._waiting: list[deque[Token | Finish]] = [deque() for _ in text.sources]
        self._stop, self._min_tokens = request.stop, request.min_tokens
        self._stops = StopStrings(self._stop)  # each sentence's lane knows its own text only
        self._sentence = self._num_tokens = 0  # the one that is being told, and how many of its tokens have been
        self._said = text.spaces[0]  # by what was no token, and told with the next
        self._reason: FinishReason = "stop"
        self._ids: tuple[int, ...] = ()  # that no token told of
        self._score: float | None = None
        self.is_finished = False

    def take(self, sentence: int, event: Token | Finish) -> Iterator[Event]:
        self._waiting[sentence].append(event)
        while not self.is_finished and (waiting := self._waiting[self._sentence]):
            event = waiting.popleft()
            yield from self._tell(event) if isinstance(event, Token) else self._end_sentence(event)

    def _tell(self, event: Token) -> Iterator[Event]:
        self._num_tokens += 1
        shown, stop = self._feed(event.text)
        yield Token(self._index, event.id, self._said + shown, event.logprob)
        self._said = ""
        if stop is not None:
            yield self._finish("stop", stop)

    def _end_sentence(self, event: Finish) -> Iterator[Event]:
        """A stop string that its lane has found is complete here, too; unless one was complete before."""
        following = self._spaces[self._sentence + 1] if event.stop is None else event.stop
        shown, stop = self._feed(event.text + (following if isinstance(following, str) else ""))
        self._said += shown
        self._ids += event.ids
        if event.score is not None:
            self._score = event.score + (self._score or 0.0)
        self._sentence, self._num_tokens = self._sentence + 1, 0
        if event.finish_reason == "length":
            self._reason = "length"
        if stop is not None or event.stop is not None:
            yield self._finish("stop", event.stop if stop is None else stop)
        elif self._sentence == len(self._waiting):
            yield self._finish(self._reason, None)

    def _feed(self, text: str) -> tuple[str, str | None]:
        """What can be shown, and the stop that ended the output. As in a sentence, not before its `min_tokens`."""
        if self._num_tokens < self._min_tokens:
            held, self._stops = self._stops.flush(), StopStrings(self._stop)
            return held + text, None
        return self._stops.feed(text)

    def _finish(self, reason: FinishReason, stop: str | int | None) -> Finish:
        self.is_finished = True
        return Finish(self._index, reason, self._said + self._stops.flush(), stop, self._ids, self._score)
