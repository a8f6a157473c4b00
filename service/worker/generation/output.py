"""One output in the making: logits in, events out. Sampling, log-probabilities, text, and when it ends.

Knows no slot, no queue and no neighbour: what an output says depends on its own logits and request alone.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.domain import Event, Finish, FinishReason, GenerateRequest, PromptTokens, Token, TokenLogprob
from service.worker.generation.detokenizer import Detokenizer, StopStrings
from service.worker.generation.sampling import Sampler, logprobs

Logits = NDArray[np.float32]


class Tokenizer(Protocol):
    """How tokens read: alone, one after another, and all together."""

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...

    def detokenizer(self) -> Detokenizer: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Output:
    """`end_ids` end it, as do the request's stop ids and strings, and `max_tokens` do."""

    num_likely = 0  # of the likeliest tokens it asks for none: see BeamOutput

    def __init__(
        self,
        index: int,
        request: GenerateRequest,
        *,
        sampler: Sampler,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        max_tokens: int,
        wants_tokens: bool,
    ) -> None:
        """`wants_tokens` False: its text may be told at its end only."""
        self._index = index
        self._sampler = sampler
        self._tokenizer = tokenizer
        is_told = wants_tokens or request.logprobs is not None or bool(request.stop)
        self._detokenizer = tokenizer.detokenizer() if is_told else None
        self.is_told = is_told  # a token at a time
        self._stops = StopStrings(request.stop)
        self._num_top = request.logprobs
        self._min_tokens = request.min_tokens
        self._max_tokens = max_tokens
        self._stop_ids = frozenset(request.stop_token_ids)
        self._end_ids = frozenset(end_ids)
        self._echoed: list[TokenLogprob] = []
        self._untold: list[int] = []  # tokens that its end will tell the text of
        self.num_tokens = 0  # written, the one that ended it included
        self.num_shown = 0  # that are part of the text
        self.last_id = -1
        self.is_finished = False

    def read(self, ids: Sequence[int], start: int, logits: Logits) -> None:
        """For echo: (len(logits), vocabulary), the logits of a prompt's tokens `ids` from `start` on."""
        if start == 0:
            self._echoed.append(self._named(ids[0], 0.0))
        for token, row in zip(ids[start + 1 :], logits, strict=False):  # the last row is of the first token to write
            self._echoed.append(self._logprob(row, token))

    def echoed(self, prompt: int) -> PromptTokens:
        """What was read, as the event for the request's prompt of that index."""
        tokens, self._echoed = tuple(self._echoed), []
        return PromptTokens(prompt, tokens)

    def write(self, rows: Sequence[Logits]) -> Sequence[Event]:
        """One more token, from its one row of (vocabulary,). Raises EngineFailed if they are not finite."""
        (logits,) = rows
        token = self._sampler.sample(logits)
        return self.say(token, None if self._num_top is None else self._logprob(logits, token))

    def say(self, token: int, logprob: TokenLogprob | None) -> Sequence[Event]:
        """One more token, whoever chose it."""
        self.num_tokens += 1
        self.last_id = token
        if token in self._stop_ids:
            return (self._end("stop", token),)
        if token in self._end_ids:
            return (self._end("stop"),)
        self.num_shown += 1
        return self._keep(token) if self._detokenizer is None else self._show(token, logprob, self._detokenizer)

    def logprob(self, logits: Logits, token: int) -> TokenLogprob | None:
        """What the request wants to know of a token, from (vocabulary,)."""
        return None if self._num_top is None else self._logprob(logits, token)

    def _keep(self, token: int) -> Sequence[Event]:
        self._untold.append(token)
        return (self._end("length"),) if self.num_tokens >= self._max_tokens else ()

    def _show(self, token: int, logprob: TokenLogprob | None, detokenizer: Detokenizer) -> Sequence[Event]:
        text, stop = detokenizer.add(token), None
        if self.num_tokens >= self._min_tokens:
            text, stop = self._stops.feed(text)
        shown = Token(self._index, token, text, logprob)
        if stop is not None:
            self.is_finished = True
            return shown, Finish(self._index, "stop", "", stop)
        return (shown, self._end("length")) if self.num_tokens >= self._max_tokens else (shown,)

    def _end(self, reason: FinishReason, stop: int | None = None) -> Finish:
        """The end, with all text that was held back; which may complete a stop string still."""
        self.is_finished = True
        if self._detokenizer is None:
            return Finish(self._index, reason, self._tokenizer.decode(self._untold), stop, tuple(self._untold))
        text, matched = self._stops.feed(self._detokenizer.flush())
        if matched is not None:
            return Finish(self._index, "stop", text, matched)
        return Finish(self._index, reason, text + self._stops.flush(), stop)

    def _logprob(self, logits: Logits, token: int) -> TokenLogprob:
        own, top = logprobs(logits, token, self._num_top or 0)
        return self._named(token, own, tuple(self._named(one, value) for one, value in top))

    def _named(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        return TokenLogprob(token, self._tokenizer.token_text(token), self._tokenizer.token_bytes(token), logprob, top)
