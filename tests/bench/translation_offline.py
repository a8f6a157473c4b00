"""Our own translations without a server: `python -m tests.bench.translation_offline attnd|bare BUNDLE < plan.json`.

`attnd` is the backend that the service has, asked in process; `bare` its engine in a loop, which takes no request apart
and puts none together: so many rows decode together, and a row whose translation has ended is filled at once with the
next sentence, shortest first, so that those of one length are encoded together. A process of its own, because its
threads must be gone before anything else is measured.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import cycle, groupby
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

from .translation_contenders import MOST_TOKENS

ROWS = 16
_OUTPUTS = 64  # of a request, all beams counted: two requests at once are well within the queue's limit
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """As the peers take it. A bare loop knows greedy search only."""

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


class Engine(Protocol):
    """What the loop needs of a TranslatorEngine."""

    def encode(self, slots: Sequence[int], sources: Sequence[Sequence[int]]) -> None: ...

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> NDArray[np.float32]: ...


@dataclass(slots=True)
class Row:
    place: int  # among the sources
    source: Sequence[int]
    ids: list[int] = field(default_factory=list)  # written so far


class BareLoop:
    """`rows` rows, always full, greedy. `sources` are ids, by length without end; a translation has `most` ids."""

    def __init__(self, engine: Engine, sources: Sequence[Sequence[int]], *, rows: int, end_id: int, most: int) -> None:
        self.ended: list[tuple[int, list[int]]] = []  # place among the sources, ids without the end
        self._engine, self._end_id, self._most = engine, end_id, most
        self._sources = cycle(sorted(enumerate(sources), key=lambda one: len(one[1])))
        self._rows: dict[int, Row] = {}
        self._begin(range(rows))

    def step(self) -> None:
        """One token for every row; then those that have ended begin again."""
        rows = [self._rows[slot] for slot in range(len(self._rows))]
        lasts = [(row.ids or row.source)[-1] for row in rows]
        logits = self._engine.decode(lasts, [len(row.source) + len(row.ids) - 1 for row in rows])
        free: list[int] = []
        for slot, (row, token) in enumerate(zip(rows, logits.argmax(axis=1).tolist(), strict=True)):
            if token != self._end_id:
                row.ids.append(token)
            if token == self._end_id or len(row.ids) == self._most:
                self.ended.append((row.place, row.ids))
                free.append(slot)
        self._begin(free)

    def _begin(self, slots: Sequence[int]) -> None:
        """The next sources into these slots; their last tokens are read in the step that writes the first."""
        begun = [(slot, Row(*next(self._sources))) for slot in slots]
        self._rows.update(begun)
        for _, alike in groupby(begun, key=lambda one: len(one[1].source)):
            group = list(alike)
            self._engine.encode([slot for slot, _ in group], [row.source for _, row in group])


def bare_rate(bundle_path: Path, plan: OfflinePlan) -> dict[str, Any]:
    """As `whole_passes`, but that one begins before the other has ended."""
    bundle = load_bundle(bundle_path)
    generation = bundle.manifest.generation
    assert generation is not None
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    sources = [encoding.ids for encoding in tokenizer.encode_batch(list(plan.sentences))]
    engine = TranslatorEngine(bundle, num_slots=ROWS, threads=1)  # one of the lanes that the service has
    engine.warm_up()
    most = min(MOST_TOKENS, engine.max_tokens)
    loop = BareLoop(engine, sources, rows=ROWS, end_id=generation.end_ids[0], most=most)
    while len({place for place, _ in loop.ended}) < len(sources):
        loop.step()
    texts = dict(loop.ended)
    begin, ended, passes, elapsed = time.perf_counter(), len(loop.ended), 0, 0.0
    while passes == 0 or elapsed < plan.seconds:
        passes += 1
        while len(loop.ended) < ended + passes * len(sources):
            loop.step()
        elapsed = time.perf_counter() - begin
    found = tokenizer.decode_batch([texts[place] for place in range(len(sources))])
    return {"rate": passes * len(sources) / elapsed, "texts": found}


def main() -> None:
    mode, bundle = sys.argv[1:]
    described = json.load(sys.stdin)
    plan = OfflinePlan(**{**described, "sentences": tuple(described["sentences"])})
    found = bare_rate(Path(bundle), plan) if mode == "bare" else asyncio.run(whole_passes(Path(bundle), plan))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
