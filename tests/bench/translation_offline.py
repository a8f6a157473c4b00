"""Our own translations without a server: `python -m tests.bench.translation_offline BUNDLE < plan.json`.

The backend that the service has is asked in process. A process of its own, because its threads must be gone before
anything else is measured.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from service.backend import Backend
from service.cli.local import open_local
from service.config import Settings
from service.domain import Call, Finish, GenerateRequest, Token

from .translation_contenders import MOST_TOKENS

_OUTPUTS = 64  # of a request, all beams counted: two requests at once are well within the queue's limit
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """As the peers take it."""

    sentences: tuple[str, ...]
    num_beams: int
    seconds: float


async def translate_all(backend: Backend, plan: OfflinePlan) -> list[str]:
    """All sentences, two requests at a time so that one fills the rows that the other leaves; in order."""
    size = max(1, _OUTPUTS // plan.num_beams)
    chunks = [plan.sentences[at : at + size] for at in range(0, len(plan.sentences), size)]
    room = asyncio.Semaphore(2)

    async def one(chunk: Sequence[str]) -> list[str]:
        async with room:
            return await _translate(backend, chunk, plan.num_beams)

    return [text for texts in await asyncio.gather(*map(one, chunks)) for text in texts]


async def _translate(backend: Backend, texts: Sequence[str], num_beams: int) -> list[str]:
    request = GenerateRequest(prompt=tuple(texts), max_tokens=MOST_TOKENS, temperature=0, num_beams=num_beams)
    found = [""] * len(texts)
    call = Call(uuid4().hex, "bench", time.monotonic() + _PATIENCE_S)
    async with aclosing(backend.generate(request, call)) as events:
        async for event in events:
            if isinstance(event, (Token, Finish)):
                found[event.index] += event.text
    return found


async def whole_passes(bundle: Path, plan: OfflinePlan) -> dict[str, Any]:
    """Sentences a second over whole passes that fill the time, after one to warm up; and what that one gave."""
    backend = await open_local(Settings(), str(bundle), ("translation",))
    async with aclosing(backend):
        texts = await translate_all(backend, plan)
        begin, passes, elapsed = time.perf_counter(), 0, 0.0
        while passes == 0 or elapsed < plan.seconds:
            await translate_all(backend, plan)
            passes, elapsed = passes + 1, time.perf_counter() - begin
    return {"rate": passes * len(plan.sentences) / elapsed, "texts": texts}


def plan_from(described: dict[str, Any]) -> OfflinePlan:
    """After a way through JSON."""
    return OfflinePlan(**{**described, "sentences": tuple(described["sentences"])})


def main() -> None:
    (bundle,) = sys.argv[1:]
    print(json.dumps(asyncio.run(whole_passes(Path(bundle), plan_from(json.load(sys.stdin))))))


if __name__ == "__main__":
    main()
