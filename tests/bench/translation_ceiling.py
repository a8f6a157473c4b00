"""Our own translations with nothing around the engine: a bare loop over sources, greedy or by beam search.

Runs as a process (`python -m tests.bench.translation_ceiling BUNDLE SOURCES < plan.json`), because its threads must be
gone before anything else is measured. It computes on one core, as a lane of the service does, but takes no request
apart and puts none together: so many sources are translated at once, and where one has ended the next begins, shortest
first, so that those of one length are encoded together.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from service.worker.bundle import load_bundle
from service.worker.generation.beam_search import BeamSearch, Continuation, Rated
from service.worker.generation.likeliest import Likeliest
from service.worker.generation.translator import TranslatorEngine

from .translation_contenders import MOST_TOKENS
from .translation_offline import OfflinePlan, plan_from

Logits = NDArray[np.float32]


class Engine(Protocol):
    """What the loop needs of a TranslatorEngine."""

    def encode(self, slots: Sequence[int], sources: Sequence[Sequence[int]]) -> None: ...

    def decode(self, ids: Sequence[int], lengths: Sequence[int]) -> Logits: ...

    def move(self, source: int, target: int, start: int, end: int) -> None: ...


class Greedy:
    """What BeamSearch is to beams, in one row, which is told its likeliest token."""

    def __init__(self, end_ids: Sequence[int], most: int) -> None:
        self.ids: list[int] = []
        self.is_finished = False
        self._end_ids, self._most = end_ids, most

    @property
    def continuations(self) -> Sequence[Continuation]:
        return ((0, self.ids[-1]),)

    def step(self, rows: Sequence[int]) -> None:
        self.ids += rows
        self.is_finished = rows[0] in self._end_ids or len(self.ids) == self._most


@dataclass(frozen=True, slots=True)
class Way:
    """How to search: what begins for each source, in how many rows, and what it is told instead of its rows' logits."""

    num_rows: int
    begin: Callable[[], Greedy | BeamSearch]
    rate: Callable[[Logits], Sequence[Any]]


def way_of(num_beams: int, end_ids: Sequence[int], most: int) -> Way:
    """As a request has it that names `num_beams` only. A translation has up to `most` tokens, its end included."""
    if num_beams == 1:
        return Way(1, partial(Greedy, end_ids, most), lambda logits: logits.argmax(axis=1).tolist())

    def begin() -> BeamSearch:
        return BeamSearch(
            num_beams=num_beams,
            end_ids=end_ids,
            min_tokens=0,
            max_tokens=most,
            length_penalty=1.0,
            describe=lambda logits, token: None,
        )

    likeliest, count = Likeliest(), begin().num_likely
    return Way(num_beams, begin, lambda logits: list(map(Rated, logits, likeliest.of(logits, count, stays=True))))


@dataclass(slots=True)
class Text:
    """A source that is being translated, in slots from `first` on."""

    place: int  # among the sources
    source: Sequence[int]
    first: int
    search: Any  # as its way begins it
    lasts: list[int]  # what each row reads next
    num_read: int  # tokens, by each

    @property
    def ids(self) -> Sequence[int]:
        """What was found, the end included."""
        if isinstance(self.search, Greedy):
            return self.search.ids
        return [token for token, _ in self.search.best[0].written]


class BareLoop:
    """`at_once` sources, always; they are ids, by length without end."""

    def __init__(self, engine: Engine, sources: Sequence[Sequence[int]], way: Way, *, at_once: int) -> None:
        self.ended: list[tuple[int, Sequence[int]]] = []  # place among the sources, ids with the end
        self._engine, self._way = engine, way
        self._sources = cycle(sorted(enumerate(sources), key=lambda one: len(one[1])))
        self._texts: dict[int, Text] = {}  # by their first slots, in this order
        self._begin(range(0, at_once * way.num_rows, way.num_rows))

    def step(self) -> None:
        """One token for every row; then the next sources begin where some have ended."""
        texts, num_rows = self._texts.values(), self._way.num_rows
        lasts = [token for text in texts for token in text.lasts]
        lengths = [text.num_read for text in texts for _ in text.lasts]
        rated = self._way.rate(self._engine.decode(lasts, lengths))
        free: list[int] = []
        for text in texts:
            text.search.step(rated[text.first : text.first + num_rows])
            if text.search.is_finished:
                self.ended.append((text.place, text.ids))
                free.append(text.first)
            else:
                self._go_on(text)
        self._begin(free)

    def _go_on(self, text: Text) -> None:
        """A beam that comes from another row takes over what is written there; the source it has."""
        text.num_read += 1
        for row, (parent, token) in enumerate(text.search.continuations):
            text.lasts[row] = token
            if parent != row:
                self._engine.move(text.first + parent, text.first + row, len(text.source), text.num_read)

    def _begin(self, slots: Sequence[int]) -> None:
        """The next sources, each encoded once; their last tokens are read in the step that writes the first."""
        begun = [self._text(first, *next(self._sources)) for first in slots]
        self._texts.update({text.first: text for text in begun})
        for _, alike in groupby(begun, key=lambda text: len(text.source)):
            group = list(alike)
            self._engine.encode([text.first for text in group], [text.source for text in group])
            for text in group:
                for row in range(1, self._way.num_rows):
                    self._engine.move(text.first, text.first + row, 0, text.num_read)

    def _text(self, first: int, place: int, source: Sequence[int]) -> Text:
        return Text(place, source, first, self._way.begin(), [source[-1]] * self._way.num_rows, len(source) - 1)


def bare_rate(bundle_path: Path, plan: OfflinePlan, *, at_once: int) -> dict[str, Any]:
    """As `translation_offline.whole_passes`, but that one pass begins before the other has ended."""
    bundle = load_bundle(bundle_path)
    generation = bundle.manifest.generation
    assert generation is not None
    tokenizer = Tokenizer.from_file(str(bundle.tokenizer_path))
    sources = [encoding.ids for encoding in tokenizer.encode_batch(list(plan.sentences))]
    engine = TranslatorEngine(bundle, num_slots=at_once * plan.num_beams, threads=1)
    engine.warm_up()
    way = way_of(plan.num_beams, generation.end_ids, min(MOST_TOKENS, engine.max_tokens))
    loop = BareLoop(engine, sources, way, at_once=at_once)
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
    bundle, at_once = sys.argv[1:]
    print(json.dumps(bare_rate(Path(bundle), plan_from(json.load(sys.stdin)), at_once=int(at_once))))


if __name__ == "__main__":
    main()
