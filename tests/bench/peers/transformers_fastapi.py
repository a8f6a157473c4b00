"""transformers' text classification pipeline behind FastAPI: `transformers_fastapi.py MODEL_DIR PORT WORKERS THREADS`.

What most people write first. The handler is a plain `def`, so FastAPI runs it in its thread pool; WORKERS bounds how
many run at once, because 40 (the pool's default) on few cores only get in each other's way.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
import uvicorn
from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline


class Body(BaseModel):
    input: str


def create_app(directory: str, workers: int) -> FastAPI:
    """POST /classify `{"input": text}` -> `{"label", "score"}`."""
    classify = pipeline("sentiment-analysis", model=directory, device="cpu")

    @asynccontextmanager
    async def bounded(_: FastAPI) -> AsyncIterator[None]:
        current_default_thread_limiter().total_tokens = workers
        yield

    app = FastAPI(lifespan=bounded)

    @app.post("/classify")
    def answer(body: Body) -> dict[str, str | float]:
        return classify(body.input, truncation=True)[0]

    return app


def main() -> None:
    directory, port, workers, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    uvicorn.run(
        create_app(directory, int(workers)), host="127.0.0.1", port=int(port), log_level="warning", access_log=False
    )


if __name__ == "__main__":
    main()
