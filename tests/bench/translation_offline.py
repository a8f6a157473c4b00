"""Our own translations without a server: `python -m tests.bench.translation_offline attnd|bare BUNDLE < plan.json`.

`attnd` is the backend that the service has, asked in process; `bare` its engine in a loop, which takes no request apart
and puts none together: so many rows decode together, and a row whose translation has ended is filled at once with the
next sentence. A process of its own, because its threads must be gone before anything else is measured.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from service.backend import Backend
from service.cli.local import open_local
from service.config import Settings
from service.domain import Call, Finish, GenerateRequest, Token
from service.worker.bundle import load_bundle
from service.worker.generation.translator import TranslatorEngine
from service.worker.machine import available_threads

from .translation_contenders import MOST_TOKENS

ROWS = 16
_PROMPTS = 64  # in a request
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """As the peers take it. A bare loop knows greedy search only, and stops in mid-pass."""

    sentences: tuple[str, ...]
    num_beams: int
    seconds: float


async def translate_all(backend: Backend, plan: OfflinePlan) -> list[str]:
    """All sentences, in requests that are sent together; in order."""
    chunks = [plan.sentences[at : at + _PROMPTS] for at in range(0, len(plan.sentences), _PROMPTS)]
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


class Engine(Protocol):
    """What the loop needs of a TranslatorEngine."""

    def prefill(self, slot: int, ids: Sequence[int], start: int, *, keep: Any) -> NDArray[np.float32]: ...

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float32]: ...


class BareLoop:
    """`rows` rows, always full, greedy. `sources` are ids, taken in turn without end; a translation has `most` ids."""

    def __init__(self, engine: Engine, sources: Sequence[Sequence[int]], *, rows: int, end_id: int, most: int) -> None:
        self.ended: list[tuple[int, list[int]]] = []  # place among the sources, ids without the end
        self._engine, self._end_id, self._most = engine, end_id, most
        self._sources = cycle(enumerate(sources))
        self._rows = [self._begin(row) for row in range(rows)]

    def step(self) -> None:
        """One token for every row; then those that have ended begin again."""
        lengths = [num_source + len(ids) - 1 for _, num_source, ids in self._rows]
        logits = self._engine.decode([ids[-1] for _, _, ids in self._rows], lengths)
        for row, token in enumerate(logits.argmax(axis=1).tolist()):
            place, _, ids = self._rows[row]
            if token != self._end_id:
                ids.append(token)
            if token == self._end_id or len(ids) == self._most:
                self.ended.append((place, ids))
                self._rows[row] = self._begin(row)

    def _begin(self, row: int) -> tuple[int, int, list[int]]:
        """Place, tokens of source, ids written. A translation whose first token is the end has it for its only one."""
        place, source = next(self._sources)
        first = int(self._engine.prefill(row, source, 0, keep="last")[0].argmax())
        return place, len(source), [first]


def bare_rate(bundle_path: Path, plan: OfflinePlan) -> dict[str, Any]:
    """As `whole_passes`; a translation counts when it ends."""
    bundle = load_bundle(bundle_path)
    generation = bundle.manifest.generation
    assert generation is not None
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    sources = [encoding.ids for encoding in tokenizer.encode_batch(list(plan.sentences))]
    engine = TranslatorEngine(bundle, num_slots=ROWS, threads=available_threads(), spin=True)
    engine.warm_up()
    most = min(MOST_TOKENS, engine.max_tokens)
    loop = BareLoop(engine, sources, rows=ROWS, end_id=generation.end_ids[0], most=most)
    while len({place for place, _ in loop.ended}) < len(sources):
        loop.step()
    texts = dict(loop.ended)
    begin, ended = time.perf_counter(), len(loop.ended)
    while (elapsed := time.perf_counter() - begin) < max(plan.seconds, 0.1):
        loop.step()
    found = tokenizer.decode_batch([texts[place] for place in range(len(sources))])
    return {"rate": (len(loop.ended) - ended) / elapsed, "texts": found}


def main() -> None:
    mode, bundle = sys.argv[1:]
    described = json.load(sys.stdin)
    plan = OfflinePlan(**{**described, "sentences": tuple(described["sentences"])})
    found = bare_rate(Path(bundle), plan) if mode == "bare" else asyncio.run(whole_passes(Path(bundle), plan))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
