"""What every translating peer shares: a server over a function that translates a batch, and the same without a server.

    python PEER.py WEIGHTS serve PORT ROWS WORKERS THREADS  POST /translate {"text", "num_beams"} -> {"text"}
    python PEER.py WEIGHTS offline ROWS WORKERS THREADS     {"sentences", "num_beams", "seconds"} on stdin

WEIGHTS is a folder that bench.translation_weights has written.
The server has no timer: each of its workers takes what has come while it was busy, up to so many rows.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

MOST_TOKENS = 128  # of a translation; the same for every contender


@dataclass(frozen=True)
class Layout:
    """Batches of up to `rows`, `workers` of them at once, `threads` for each."""

    rows: int
    workers: int
    threads: int


class Wanted(BaseModel):
    text: str
    num_beams: int = 1


Translate = Callable[[Sequence[str], int], Sequence[str]]  # texts, beams
Waiting = asyncio.Queue[tuple[Wanted, asyncio.Future[str]]]


async def _work(waiting: Waiting, translate: Translate, rows: int) -> None:
    """One batch after another, for ever; a batch that fails fails its requests. All of a load have as many beams."""
    while True:
        batch = [await waiting.get()]
        while len(batch) < rows and not waiting.empty():
            batch.append(waiting.get_nowait())
        try:
            found = await asyncio.to_thread(translate, [wanted.text for wanted, _ in batch], batch[0][0].num_beams)
            for (_, reply), text in zip(batch, found, strict=True):
                reply.set_result(text)
        except Exception as error:
            for _, reply in batch:
                if not reply.done():
                    reply.set_exception(RuntimeError(str(error)))


def create_app(translate: Translate, layout: Layout) -> FastAPI:
    waiting: Waiting = asyncio.Queue()

    @asynccontextmanager
    async def working(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_work(waiting, translate, layout.rows)) for _ in range(layout.workers)]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(lifespan=working)

    @app.post("/translate")
    async def translation(wanted: Wanted) -> dict[str, str]:
        reply: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting.put_nowait((wanted, reply))
        return {"text": await reply}

    return app


def offline(translate: Translate, plan: dict[str, Any]) -> dict[str, Any]:
    """Sentences a second over whole passes that fill the time, after one to warm up; and what that one gave."""
    sentences, num_beams = plan["sentences"], plan["num_beams"]
    texts = translate(sentences, num_beams)
    begin, passes, elapsed = time.perf_counter(), 0, 0.0
    while passes == 0 or elapsed < plan["seconds"]:
        translate(sentences, num_beams)
        passes, elapsed = passes + 1, time.perf_counter() - begin
    return {"rate": passes * len(sentences) / elapsed, "texts": list(texts)}


def main(load: Callable[[Path, Layout], Translate]) -> None:
    """`load` takes the folder of weights and the layout."""
    folder, mode, *numbers = sys.argv[1:]
    *port, rows, workers, threads = map(int, numbers)
    layout = Layout(rows, workers, threads)
    translate = load(Path(folder), layout)
    if mode == "offline":
        print(json.dumps(offline(translate, json.load(sys.stdin))))
        return
    app = create_app(translate, layout)
    uvicorn.run(app, host="127.0.0.1", port=port[0], log_level="warning", access_log=False)
