"""Where a model that writes looked: what it reads, what it writes or is to have written, and the maps of both.

The generator that serves everyone writes the text, so that the prediction is the served one; of a text to translate,
which it would get sentence by sentence, there may be one. Then one run of another
graph reads prompt and output once more, in a thread of its own: one such run at a time, beside the engine's steps. How
large the maps can get is known, and refused, before anything is written. Knows no queue and no slot.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TypeVar

from service.domain import (
    MAX_OUTPUTS,
    AttendedToken,
    AttentionMap,
    AttentionMaps,
    AttentionRequest,
    Call,
    Event,
    Finish,
    GenerateOptions,
    GenerateRequest,
    Prediction,
    Usage,
)
from service.errors import DeadlineExceeded, EngineFailed, InvalidRequest, Overloaded, TooLarge, Unavailable
from service.worker.attention.views import View, check_size, views_of
from service.worker.bundle import Bundle
from service.worker.generation.attended_text import AttendedText, Written
from service.worker.generation.attention_graph import GRAPH, AttentionGraph
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.sentences import as_read, places_as_read, sentence_spans
from service.worker.long_texts import LongTexts
from service.worker.tokenizer import HUGE_TEXT

NUM_NEW = 32  # tokens that a model which continues texts writes unless a request says otherwise
MAX_OPEN = 64  # requests of which maps are told or waited for
LONG_TEXT = 1024  # characters from which on naming all tokens would hold up the event loop (about 1 ms)

Told = TypeVar("Told")
Generate = Callable[[GenerateRequest, Call], AsyncGenerator[Event, None]]


class Attending:
    """Tells the attention of one model for generation or translation."""

    def __init__(self, bundle: Bundle, tokenizer: PromptTokenizer, *, max_bytes: int) -> None:
        """Raises BundleError if the bundle has no graph for it."""
        generation = bundle.manifest.generation
        assert generation is not None
        self._id = bundle.manifest.id
        self._is_translator = bundle.manifest.task == "translation"
        self._max_tokens = bundle.manifest.limits.max_tokens
        self._max_bytes = max_bytes
        self._text = AttendedText(tokenizer, start_id=generation.bos_id if self._is_translator else None)
        self._graph = AttentionGraph(bundle)
        self._long_texts = LongTexts(self._id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"attention-{self._id}")
        self._runs: set[asyncio.Future[tuple[AttentionMap, ...]]] = set()
        self._num_open = 0

    async def attention(self, request: AttentionRequest, call: Call, generate: Generate) -> AttentionMaps:
        """`generate` is the model's own. Raises what it raises, InvalidRequest, TooLarge and Overloaded."""
        if self._num_open >= MAX_OPEN:
            raise Overloaded(f"{self._num_open} requests for the attention of {self._id} are open, as many as may be")
        self._num_open += 1
        try:
            return await self._attention(request, call, generate)
        finally:
            self._num_open -= 1

    async def aclose(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for the maps that are being made; drop those whose turn has not come."""
        if self._runs:
            await asyncio.wait(self._runs, timeout=timeout_s)
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._long_texts.close()

    async def _attention(self, request: AttentionRequest, call: Call, generate: Generate) -> AttentionMaps:
        for name in ("text_pair", "top_k"):
            if getattr(request, name) is not None:
                raise InvalidRequest(f"{name} is for models that classify, {self._id} writes", param=name)
        views = views_of(request, self._graph.sizes)
        most = self._max_tokens - (not self._is_translator)
        read = await self._told(partial(self._read_text, request.text, most), request.text, call)
        self._check_length("text", len(read), most=most)
        if request.target is None:
            options = self._options(request, read)
            assert options.max_tokens is not None
            self._check_size(views, len(read), options.max_tokens + self._is_translator)
            written = await self._write(options, call, generate)
        else:
            forced = partial(self._read, self._text.forced, "target", request.target, self._max_tokens)
            written = await self._told(forced, request.target, call)
            self._check_length("target", len(written.tokens), most=self._max_tokens)
            self._check_size(views, len(read), len(written.tokens))
            call.progress.tokenized = call.progress.started = time.monotonic()
        maps = await self._maps(read, written, views, call)
        now = call.progress.finished = time.monotonic()
        usage, timing = Usage(prompt_tokens=len(read), truncated=0), call.progress.timing(now)
        return AttentionMaps(self._id, GRAPH, read, written.tokens, maps, Prediction(text=written.text), usage, timing)

    def _read_text(self, text: str, most: int) -> tuple[AttendedToken, ...]:
        """Of a text to translate its sentence, as `translate` has it read. Raises as `_read` does."""
        if not self._is_translator:
            return self._read(self._text.read, "text", text, most)
        start, end = _sentence_of(text)
        tokens = self._read(self._text.read, "text", as_read(text[start:end]), most)
        at = places_as_read(text, start, end)
        return tuple(one if one.special else replace(one, start=at[one.start], end=at[one.end]) for one in tokens)

    def _read(self, read: Callable[[str], Told], param: str, text: str, most: int) -> Told:
        """Of a huge text the tokens are counted before they are named. Raises TooLarge and InvalidRequest."""
        if len(text) >= HUGE_TEXT:
            self._check_length(param, *self._text.count(text, most), most=most)
        return read(text)

    def _check_length(self, param: str, num_tokens: int, is_all: bool = True, *, most: int) -> None:
        if not num_tokens:
            raise InvalidRequest(f"{param} has no tokens, at least one is needed", param=param)
        if num_tokens > most:
            has = f"{num_tokens}" if is_all else f"more than {most}"
            message = f"{param} has {has} tokens, at most {most} can be attended to"
            raise TooLarge(message, param=param, code="context_length_exceeded")

    def _check_size(self, views: Sequence[View], num_read: int, num_written: int) -> None:
        check_size(views, self._graph.shapes(num_read, num_written), self._max_bytes)

    def _options(self, request: AttentionRequest, read: Sequence[AttendedToken]) -> GenerateRequest:
        """The prompt is the tokens that were counted; what is written fits beside them."""
        asked = request.generate or GenerateOptions()
        room = self._max_tokens - (1 if self._is_translator else len(read))
        wanted = asked.max_tokens or (room if self._is_translator else NUM_NEW)
        return GenerateRequest(
            prompt=(tuple(one.id for one in read),),
            max_tokens=min(wanted, room),
            temperature=asked.temperature,
            seed=asked.seed,
        )

    async def _write(self, request: GenerateRequest, call: Call, generate: Generate) -> Written:
        ids: tuple[int, ...] = ()
        text = ""
        async with aclosing(generate(request, replace(call, wants_tokens=False))) as events:
            async for event in events:
                if isinstance(event, Finish):
                    ids, text = event.ids, event.text
        return await self._told(partial(self._text.written, ids, text), text, call)

    async def _told(self, tell: Callable[[], Told], text: str, call: Call) -> Told:
        """What `tell` says of a text; of a long one in a thread. Raises DeadlineExceeded."""
        if len(text) < LONG_TEXT:
            return tell()
        async with _deadline_of(call):
            return await self._long_texts.read(tell, len(text))

    async def _maps(
        self, read: Sequence[AttendedToken], written: Written, views: Sequence[View], call: Call
    ) -> tuple[AttentionMap, ...]:
        """Made when it is their turn. Raises DeadlineExceeded, EngineFailed and Unavailable."""
        ids = [one.id for one in read]
        try:
            run = asyncio.get_running_loop().run_in_executor(self._thread, self._graph.run, ids, written.ids, views)
        except RuntimeError:  # the thread takes nothing any more
            raise Unavailable("the server is stopping", code="draining") from None
        self._runs.add(run)
        run.add_done_callback(self._runs.discard)
        try:
            async with _deadline_of(call):
                return await run
        except DeadlineExceeded:
            raise
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # whoever asked has left
            raise Unavailable("the server is stopping", code="draining") from None
        except Exception as error:
            raise EngineFailed(f"the attention graph of {self._id} failed") from error


def _sentence_of(text: str) -> tuple[int, int]:
    """(start, end) of the only one. Raises InvalidRequest."""
    spans = list(islice(sentence_spans(text), MAX_OUTPUTS + 1))
    if not spans:
        raise InvalidRequest("text has nothing to translate", param="text")
    if len(spans) > 1:
        found = f"{len(spans)}" if len(spans) <= MAX_OUTPUTS else f"more than {MAX_OUTPUTS}"
        message = f"text has {found} sentences, at most 1 can be attended to: ask for each by itself"
        raise InvalidRequest(message, param="text")
    return spans[0]


@asynccontextmanager
async def _deadline_of(call: Call) -> AsyncIterator[None]:
    """Raises DeadlineExceeded when it passes."""
    try:
        async with asyncio.timeout(call.deadline - time.monotonic()):
            yield
    except TimeoutError:
        seconds = time.monotonic() - call.progress.begun
        raise DeadlineExceeded(f"the deadline passed after {seconds:.3f} s") from None
