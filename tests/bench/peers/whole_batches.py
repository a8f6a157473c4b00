"""OpenAI's POST /v1/completions over a function that generates a batch: what comes while it runs is the next batch.

No streaming: a reply is sent when its batch is through. Used by the peers that have no continuous batching on the CPU.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

MOST_ROWS = 32


class Wanted(BaseModel):
    """What is understood of a request. `ignore_eos` is always so: every reply has exactly `max_tokens`."""

    prompt: str | list[int]
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


# For each of a batch: how many tokens its prompt had, and the text that follows it.
Generate = Callable[[Sequence[Wanted]], Sequence[tuple[int, str]]]
Waiting = asyncio.Queue[tuple[Wanted, asyncio.Future[tuple[int, str]]]]


async def _work(waiting: Waiting, generate: Generate) -> None:
    """One batch after another, for ever; a batch that fails fails its requests."""
    while True:
        batch = [await waiting.get()]
        while len(batch) < MOST_ROWS and not waiting.empty():
            batch.append(waiting.get_nowait())
        try:
            found = await asyncio.to_thread(generate, [wanted for wanted, _ in batch])
            for (_, reply), result in zip(batch, found, strict=True):
                reply.set_result(result)
        except Exception as error:
            for _, reply in batch:
                if not reply.done():
                    reply.set_exception(RuntimeError(str(error)))


def create_app(generate: Generate) -> FastAPI:
    waiting: Waiting = asyncio.Queue()

    @asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_work(waiting, generate))
        yield
        task.cancel()

    app = FastAPI(lifespan=working)

    @app.post("/v1/completions")
    async def complete(wanted: Wanted) -> dict[str, Any]:
        reply: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((wanted, reply))
        prompt_tokens, text = await reply
        return {
            "object": "text_completion",
            "choices": [{"index": 0, "text": text, "finish_reason": "length"}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": wanted.max_tokens},
        }

    return app
