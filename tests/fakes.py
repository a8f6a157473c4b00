"""A Backend without a model: what the edges are tested on.

Its scores depend on the text alone, so that a test can say what the right answer is. It can be told to fail, and to
hold requests until released.
"""

import asyncio
import struct
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from service.domain import (
    AttendedToken,
    AttentionMap,
    AttentionMaps,
    AttentionRequest,
    Call,
    Classification,
    ClassifyRequest,
    End,
    Event,
    ExplainRequest,
    Explanation,
    Finish,
    GenerateRequest,
    GenerateTiming,
    GenerateUsage,
    ModelInfo,
    Prediction,
    PromptTokens,
    Score,
    Start,
    TextInput,
    Timing,
    Token,
    TokenLogprob,
    Usage,
    attention_tasks,
    choose_model,
    generation_tasks,
)
from service.errors import AttndError, Overloaded, TooLarge

MODEL = ModelInfo(
    id="sentiment",
    task="classification",
    created=1_700_000_000,
    facts={"labels": ["NEGATIVE", "POSITIVE"], "precision": "int8", "limits": {"max_tokens": 512}},
)

CHAT = ModelInfo(
    id="chat", task="generation", created=1_700_000_001, facts={"precision": "int8", "limits": {"max_tokens": 2048}}
)


def fake_scores(text: TextInput) -> tuple[Score, ...]:
    """Two scores that sum to one, highest first, given by the text."""
    positive = zlib.crc32(f"{text.text}\0{text.text_pair}".encode()) % 1000 / 1000
    scores = [Score("POSITIVE", positive), Score("NEGATIVE", round(1 - positive, 3))]
    return tuple(sorted(scores, key=lambda score: score.score, reverse=True))


NUM_LAYERS, NUM_HEADS = 3, 2  # of the fake model's attention


def fake_tokens(text: str) -> tuple[AttendedToken, ...]:
    """A special token, then the words."""
    tokens, end = [AttendedToken(0, "[CLS]", 0, 0, True, None)], 0
    for word in text.split():
        start = text.index(word, end)
        end = start + len(word)
        tokens.append(AttendedToken(len(word), word, start, end, False, "text"))
    return tuple(tokens)


def fake_maps(request: AttentionRequest) -> tuple[AttentionMap, ...]:
    """Weights that tell layer, head, query and key apart: thousands, hundreds, tens and ones."""
    num_tokens = len(fake_tokens(request.text))
    layers = {"all": range(NUM_LAYERS), "last": [NUM_LAYERS - 1], None: [NUM_LAYERS - 1]}.get(request.layers)
    heads = tuple(range(NUM_HEADS)) if request.heads == "all" else request.heads
    maps = []
    for layer in request.layers if layers is None else layers:
        weights = [
            1000 * layer + 100 * head + 10 * query + key
            for head in (heads if request.reduce == "none" else (0,))
            for query in range(num_tokens)
            for key in range(num_tokens)
        ]
        told = heads if request.reduce == "none" else None
        shape = (1 if told is None else len(told), num_tokens, num_tokens)
        maps.append(AttentionMap("encoder", layer, told, shape, struct.pack(f"<{len(weights)}f", *weights)))
    return tuple(maps)


def fake_words(request: GenerateRequest, index: int) -> list[str]:
    """What output `index` of `request` says: the words of its prompt (or last message), each with a space after it."""
    if request.messages is not None:
        text = request.messages[-1].content
    else:
        assert request.prompt is not None
        prompt = request.prompt[index // request.n]
        text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    return [word + " " for word in text.split()]


def fake_logprob(word: str, num_top: int) -> TokenLogprob:
    """A token with `num_top` alternatives, itself the likeliest."""
    own = TokenLogprob(len(word), word, word.encode(), -0.25)
    others = tuple(TokenLogprob(100 + at, f"<{at}>", b"<%d>" % at, -1.5 - at) for at in range(num_top - 1))
    return TokenLogprob(len(word), word, word.encode(), -0.25, (own, *others)[:num_top])


class FakeBackend:
    """`error` fails every request, `hold()` keeps them until `release()`, `max_inputs` and `max_waiting` refuse.

    `error_after` lets so many tokens of a generation pass before `error`.
    """

    def __init__(self, *, error: BaseException | None = None, max_inputs: int = 1024, max_waiting: int = 1000) -> None:
        self.error = error
        self.error_after: int | None = None
        self.generations: list[GenerateRequest] = []
        self.unready: AttndError | None = None
        self.failure: str | None = None
        self.max_inputs = max_inputs
        self.max_waiting = max_waiting
        self.served = [MODEL]
        self.requests: list[ClassifyRequest] = []
        self.calls: list[Call] = []
        self.num_cancelled = 0
        self.num_waiting = 0
        self.is_closed = False
        self._open = asyncio.Event()
        self._open.set()

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def classify(self, request: ClassifyRequest, call: Call) -> Classification:
        self.requests.append(request)
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        if len(request.input) > self.max_inputs:
            raise TooLarge(
                f"input: at most {self.max_inputs} inputs a request, got {len(request.input)}", param="input"
            )
        model = choose_model(self.served, ("classification",), request.model)
        if self.num_waiting >= self.max_waiting:
            raise Overloaded(f"the queue is full ({self.max_waiting})", retry_after_s=1.5)
        await self._wait()
        return Classification(
            model=model.id,
            results=tuple(fake_scores(text)[: request.top_k] for text in request.input),
            usage=Usage(prompt_tokens=sum(len(text.text.split()) + 2 for text in request.input), truncated=0),
            timing=Timing(0.001, 0.0001, 0.004, 0.0051),
        )

    async def attention(self, request: AttentionRequest, call: Call) -> AttentionMaps:
        model = await self._asked(request, call, attention_tasks(request), request.model)
        prediction = Prediction(scores=fake_scores(TextInput(request.text, request.text_pair))[: request.top_k])
        tokens = fake_tokens(request.text)
        usage, timing = Usage(prompt_tokens=len(tokens), truncated=0), Timing(0.001, 0.0001, 0.004, 0.0051)
        return AttentionMaps(model.id, "classify", tokens, None, fake_maps(request), prediction, usage, timing)

    async def explain(self, request: ExplainRequest, call: Call) -> Explanation:
        model = await self._asked(request, call, ("classification",), request.model)
        best = fake_scores(TextInput(request.text, request.text_pair))[0]
        tokens = fake_tokens(request.text)
        scores = tuple(token.id / 100 for token in tokens)
        usage, timing = Usage(prompt_tokens=len(tokens), truncated=0), Timing(0.001, 0.0001, 0.004, 0.0051)
        label = request.label or best.label
        return Explanation(model.id, request.method, label, best.score, tokens, scores, usage, timing)

    async def _asked(self, request: Any, call: Call, tasks: Sequence[str], wanted: str | None) -> ModelInfo:
        self.requests.append(request)
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        model = choose_model(self.served, tasks, wanted)
        await self._wait()
        return model

    async def generate(self, request: GenerateRequest, call: Call) -> AsyncGenerator[Event, None]:
        """The words of each prompt, all outputs in turn, up to max_tokens; held before the first token."""
        self.generations.append(request)
        self.calls.append(call)
        if self.error is not None and self.error_after is None:
            raise self.error
        model = choose_model(self.served, generation_tasks(request), request.model)
        if self.num_waiting >= self.max_waiting:
            raise Overloaded(f"the queue is full ({self.max_waiting})", retry_after_s=1.5)
        await self._wait()
        words = [fake_words(request, index) for index in range(request.num_outputs)]
        num_prompt = sum(len(words[index]) for index in range(0, request.num_outputs, request.n))
        yield Start(model.id, num_prompt)
        for index in range(0, request.num_outputs if request.echo else 0, request.n):
            tokens = tuple(fake_logprob(word, request.logprobs or 0) for word in words[index])
            yield PromptTokens(index // request.n, tokens)
        num_tokens = 0
        try:
            for at in range(max(map(len, words), default=0)):
                for index, said in enumerate(words):
                    if at >= len(said) or at >= (request.max_tokens or len(said)):
                        continue
                    if self.error is not None and num_tokens == self.error_after:
                        raise self.error
                    num_tokens += 1
                    top = request.logprobs
                    yield Token(index, len(said[at]), said[at], None if top is None else fake_logprob(said[at], top))
                    await asyncio.sleep(0)
        except (GeneratorExit, asyncio.CancelledError):
            self.num_cancelled += 1
            raise
        for index, said in enumerate(words):
            is_cut = request.max_tokens is not None and len(said) > request.max_tokens
            yield Finish(index, "length" if is_cut else "stop")
        yield End(
            GenerateUsage(num_prompt, num_tokens, cached_tokens=0), GenerateTiming(0.001, 0.0001, 0.01, 0.1, 0.02, 0.2)
        )

    async def _wait(self) -> None:
        self.num_waiting += 1
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_waiting -= 1

    async def models(self) -> list[ModelInfo]:
        if self.unready is not None:
            raise self.unready
        return self.served

    async def aclose(self) -> None:
        self.is_closed = True


async def until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Return as soon as `condition` is true, for what another task brings about; fail when it never is."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.001)
