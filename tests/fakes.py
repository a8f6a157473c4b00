"""A Backend without a model: what the edges are tested on.

Its scores depend on the text alone, so that a test can say what the right answer is. It can be told to fail, and to
hold requests until released.
"""

import asyncio
import zlib
from collections.abc import Callable

from service.domain import (
    Call,
    Classification,
    ClassifyRequest,
    ModelInfo,
    Score,
    TextInput,
    Timing,
    Usage,
    choose_model,
)
from service.errors import AttndError, Overloaded, TooLarge

MODEL = ModelInfo(
    id="sentiment",
    task="classification",
    created=1_700_000_000,
    facts={"labels": ["NEGATIVE", "POSITIVE"], "precision": "int8", "limits": {"max_tokens": 512}},
)


def fake_scores(text: TextInput) -> tuple[Score, ...]:
    """Two scores that sum to one, highest first, given by the text."""
    positive = zlib.crc32(f"{text.text}\0{text.text_pair}".encode()) % 1000 / 1000
    scores = [Score("POSITIVE", positive), Score("NEGATIVE", round(1 - positive, 3))]
    return tuple(sorted(scores, key=lambda score: score.score, reverse=True))


class FakeBackend:
    """`error` fails every request, `hold()` keeps them until `release()`, `max_inputs` and `max_waiting` refuse."""

    def __init__(self, *, error: BaseException | None = None, max_inputs: int = 1024, max_waiting: int = 1000) -> None:
        self.error = error
        self.unready: AttndError | None = None
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
        model = choose_model(self.served, "classification", request.model)
        if self.num_waiting >= self.max_waiting:
            raise Overloaded(f"the queue is full ({self.max_waiting})", retry_after_s=1.5)
        await self._wait()
        return Classification(
            model=model.id,
            results=tuple(fake_scores(text)[: request.top_k] for text in request.input),
            usage=Usage(prompt_tokens=sum(len(text.text.split()) + 2 for text in request.input), truncated=0),
            timing=Timing(0.001, 0.0001, 0.004, 0.0051),
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
