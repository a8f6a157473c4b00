"""Generations on a tiny seeded model: an engine that can be held up and made to fail, and what a request gave."""

import threading
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from service.backend import Backend
from service.domain import Call, End, Event, Finish, GenerateRequest, PromptTokens, Start, Token
from service.metrics import Metrics
from service.worker.bundle import Bundle, load_bundle
from service.worker.generation.decoder import DecoderEngine
from service.worker.generation.generator import Generator
from service.worker.generation.outputs import Outputs
from service.worker.generation.prompt_tokenizer import PromptTokenizer
from service.worker.generation.prompts import PromptReader
from service.worker.generation.scheduler import slots_for
from service.worker.generation.thread_lane import ThreadLane
from service.worker.local import LocalBackend

PATIENCE_S = 10.0


class WatchedEngine:
    """A DecoderEngine; a closed `gate` holds up every run, a run that reads `poison` fails, `rows` counts decodes."""

    def __init__(self, engine: DecoderEngine) -> None:
        self._engine = engine
        self.gate = threading.Event()
        self.gate.set()
        self.poison: int | None = None
        self.rows: list[int] = []
        self.chunks: list[tuple[int, int]] = []  # start, tokens
        self.vocab_size = engine.vocab_size

    def prefill(self, slot: int, ids: Sequence[int], start: int, *, keep: Any) -> np.ndarray:
        self._pass(ids)
        self.chunks.append((start, len(ids)))
        return self._engine.prefill(slot, ids, start, keep=keep)

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        self._pass(ids)
        self.rows.append(len(ids))
        return self._engine.decode(ids, lengths)

    def _pass(self, ids: Sequence[int]) -> None:
        assert self.gate.wait(PATIENCE_S)
        if self.poison in ids:
            raise RuntimeError("poisoned")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def make_generator(
    directory: Path, metrics: Metrics, *, max_rows: int = 4, max_waiting: int = 64, num_blocks: int = 16
) -> tuple[Generator, WatchedEngine]:
    bundle = load_bundle(directory)
    watched = WatchedEngine(DecoderEngine(bundle, num_slots=slots_for(max_rows), num_blocks=num_blocks, threads=1))
    sizes = {"max_rows": max_rows, "max_waiting": max_waiting, "num_blocks": num_blocks}
    return in_threads(bundle, [watched], metrics, **sizes), watched


def in_threads(
    bundle: Bundle, engines: Sequence[Any], metrics: Metrics, *, max_rows: int, max_waiting: int, num_blocks: int = 0
) -> Generator:
    """A generator with a lane in a thread for each engine."""
    vocab_size, tokenizer = engines[0].vocab_size, PromptTokenizer(bundle.tokenizer_path)
    outputs = Outputs(bundle, tokenizer, vocab_size=vocab_size)
    lanes = [
        ThreadLane(engine, outputs, max_rows=max_rows, num_blocks=num_blocks, name=f"{bundle.manifest.id}-{at}")
        for at, engine in enumerate(engines)
    ]
    prompts = PromptReader(bundle, tokenizer, vocab_size=vocab_size)
    sizes = {"max_rows": max_rows, "max_waiting": max_waiting, "num_blocks": num_blocks}
    return Generator(bundle, lanes, metrics, prompts=prompts, **sizes)


async def serving(generator: Generator, *, drain_timeout_s: float = 5.0) -> LocalBackend:
    backend = LocalBackend(lambda: [generator], drain_timeout_s=drain_timeout_s)
    await backend.start()
    return backend


def call(seconds: float = PATIENCE_S) -> Call:
    return Call("id", "/v1/generate", time.monotonic() + seconds)


@dataclass
class Collected:
    """A generation's events, by output where they belong to one."""

    events: list[Event] = field(default_factory=list)

    @property
    def start(self) -> Start:
        return next(event for event in self.events if isinstance(event, Start))

    @property
    def end(self) -> End:
        return next(event for event in self.events if isinstance(event, End))

    @property
    def prompts(self) -> list[PromptTokens]:
        return [event for event in self.events if isinstance(event, PromptTokens)]

    def tokens(self, index: int = 0) -> list[Token]:
        return [event for event in self.events if isinstance(event, Token) and event.index == index]

    def ids(self, index: int = 0) -> list[int]:
        return [token.id for token in self.tokens(index)]

    def finish(self, index: int = 0) -> Finish:
        return next(event for event in self.events if isinstance(event, Finish) and event.index == index)

    def text(self, index: int = 0) -> str:
        return "".join(token.text for token in self.tokens(index)) + self.finish(index).text


async def collect(backend: Backend, circumstances: Call | None = None, **fields: Any) -> Collected:
    """All events of one request."""
    request = GenerateRequest(**fields)
    async with aclosing(backend.generate(request, circumstances or call())) as events:
        return Collected([event async for event in events])
