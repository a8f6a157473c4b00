"""Beam search over the logits of its rows: which beams live on, in which rows, and what is told when it is over.

Knows no slot, no queue and no neighbour. Row i of K holds beam i, and its K/V; a beam that comes from another row must
be given a copy of what is there. The rules are those of model.search, which the tests compare this with.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.domain import Event, Finish, GenerateRequest, TokenLogprob
from service.errors import EngineFailed, InvalidRequest, TooLarge
from service.worker.generation.likeliest import Likely
from service.worker.generation.output import Output
from service.worker.generation.sampling import NOT_FINITE

Logits = NDArray[np.float32]
Written = tuple[int, TokenLogprob | None]  # a token, and what the request wants to know of it
Continuation = tuple[int, int]  # the row that is continued, and with which token
Candidate = tuple[float, int, int]  # the sum of log-probabilities with this token, the row it comes from, the token

# Fields that have no meaning in a search, which compares beams by the model's own probabilities of whole texts.
NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": ()}


def check_beams(request: GenerateRequest, max_rows: int) -> None:
    """Raises TooLarge and InvalidRequest for a search that cannot be done."""
    if request.num_beams == 1:
        return
    if request.num_beams > max_rows:
        message = f"num_beams is {request.num_beams}, the limit is {max_rows}: the outputs that are written at once"
        raise TooLarge(message, param="num_beams", code="too_many_beams")
    if request.n > request.num_beams:
        raise InvalidRequest(f"n is {request.n}, a search with {request.num_beams} beams finds no more", param="n")
    for name, neutral in NEUTRAL.items():
        if getattr(request, name) != neutral:
            raise InvalidRequest(f"{name} goes with num_beams 1 only, not {request.num_beams}", param=name)


class Rated(NamedTuple):
    """A row's logits (vocabulary,), and which tokens are the likeliest by them: a search's `num_likely` or more."""

    logits: Logits
    likely: Likely


class Beam(NamedTuple):
    """A hypothesis: what it has written, the sum of log-probabilities, and the row that held it without its last."""

    written: tuple[Written, ...] = ()
    total: float = 0.0
    parent: int = 0

    @property
    def last_id(self) -> int:
        return self.written[-1][0]


class BeamSearch:
    """The `num_beams` best continuations of one prompt.

    A step takes the best continuations of all beams: of the first K those that end are finished, and the K best of the
    others live on. It is over with K finished ones, when none lives, or at `max_tokens`, when those that live count as
    finished. They are ranked by log p / n^length_penalty; the n tokens include the one that ended it.
    """

    def __init__(
        self,
        *,
        num_beams: int,
        end_ids: Collection[int],
        min_tokens: int,
        max_tokens: int,
        length_penalty: float,
        describe: Callable[[Logits, int], TokenLogprob | None],
    ) -> None:
        """`min_tokens` come before the end. `describe` tells of a token that is written what the request asks for."""
        self._num_beams = num_beams
        self._end_ids = frozenset(end_ids)
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._length_penalty = length_penalty
        self._describe = describe
        self.num_likely = num_beams + len(self._end_ids)  # of a row: all that live on may come from it
        self._rows: list[Beam | None] = placed([Beam()], num_beams)  # at first all beams are the same one
        self._finished: list[Beam] = []
        self._num_tokens = 0  # of each beam

    @property
    def is_finished(self) -> bool:
        is_cut = self._num_tokens == self._max_tokens
        return is_cut or len(self._finished) >= self._num_beams or not any(self._rows)

    @property
    def best(self) -> list[Beam]:
        """The finished ones, the best first."""
        return sorted(self._finished, key=self.score, reverse=True)[: self._num_beams]

    @property
    def continuations(self) -> list[Continuation]:
        """For each row the row that it goes on from, and the token that it reads; where no beam is any will do."""
        return [(at, 0) if beam is None else (beam.parent, beam.last_id) for at, beam in enumerate(self._rows)]

    def score(self, beam: Beam) -> float:
        return beam.total / float(len(beam.written) ** self._length_penalty)

    def step(self, rows: Sequence[Rated]) -> None:
        """One more token. Raises EngineFailed."""
        self._num_tokens += 1
        ranked = self._candidates([row.likely for row in rows])
        ended = [one for one in ranked[: self._num_beams] if one[2] in self._end_ids]
        living = [one for one in ranked if one[2] not in self._end_ids][: self._num_beams]
        self._finished += [self._continued(one, rows) for one in ended]
        beams = [self._continued(one, rows) for one in living]
        if self._num_tokens == self._max_tokens:
            self._finished += beams
        self._rows = placed(beams, self._num_beams)

    def _candidates(self, likely: Sequence[Likely]) -> list[Candidate]:
        """The best first, among them the best that do not end, as many as there are beams. None is impossible.

        Of equal ones that of the first row comes first, and of its lowest token. Nothing here is an array: there are
        so few that each operation on one would cost more than all of them.
        """
        found: list[Candidate] = []
        for at, (beam, (ids, log_p)) in enumerate(zip(self._rows, likely, strict=True)):
            if beam is None:
                continue
            if not math.isfinite(log_p[0]):
                raise EngineFailed(NOT_FINITE)
            total = beam.total
            found += [(total + one, at, token) for token, one in zip(ids[: self.num_likely], log_p, strict=False)]
        found.sort(key=itemgetter(0), reverse=True)  # stable
        may_end = self._num_tokens > self._min_tokens
        return [one for one in found if one[0] > -math.inf and (may_end or one[2] not in self._end_ids)]

    def _continued(self, candidate: Candidate, rows: Sequence[Rated]) -> Beam:
        total, row, token = candidate
        beam = self._rows[row]
        assert beam is not None
        return Beam((*beam.written, (token, self._describe(rows[row].logits, token))), total, row)


def placed(beams: Sequence[Beam], num_rows: int) -> list[Beam | None]:
    """By row. The best child of a beam stays in its row, so that K/V are copied for others only, to rows left over."""
    rows: list[Beam | None] = [None] * num_rows
    others = []
    for beam in beams:
        if rows[beam.parent] is None:
            rows[beam.parent] = beam
        else:
            others.append(beam)
    for beam in others:
        rows[rows.index(None)] = beam
    return rows


class BeamOutput:
    """The outputs of one search. They are told when it is over, the best first, and nothing of them before."""

    num_shown = 0  # there is no token of theirs before it is over, and then there are all
    is_told = False

    def __init__(self, search: BeamSearch, outputs: Sequence[Output]) -> None:
        self._search = search
        self._outputs = outputs
        self.num_likely = search.num_likely  # of each row, to choose from

    @property
    def is_finished(self) -> bool:
        return self._search.is_finished

    @property
    def num_tokens(self) -> int:
        """Of the outputs; what other beams wrote is not counted."""
        return sum(output.num_tokens for output in self._outputs)

    @property
    def continuations(self) -> list[Continuation]:
        return self._search.continuations

    def read(self, ids: Sequence[int], start: int, logits: Logits) -> None:
        """See Output.read."""
        self._outputs[0].read(ids, start, logits)

    def echoed(self, prompt: int) -> Event:
        """See Output.echoed."""
        return self._outputs[0].echoed(prompt)

    def write(self, rows: Sequence[Rated]) -> list[Event]:
        """One more token of every beam. Raises EngineFailed if logits are not finite."""
        self._search.step(rows)
        if not self._search.is_finished:
            return []
        told = zip(self._outputs, self._search.best[: len(self._outputs)], strict=True)
        return [event for output, beam in told for event in self._told(output, beam)]

    def _told(self, output: Output, beam: Beam) -> list[Event]:
        events = [event for one in beam.written for event in output.say(*one)]
        score = self._search.score(beam)
        return [replace(event, score=score) if isinstance(event, Finish) else event for event in events]
