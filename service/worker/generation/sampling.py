"""Logits -> the next token, and log-probabilities. Pure arithmetic: knows no sequence, no text, no end.

A vocabulary has tens of thousands of tokens and a step many rows, so nothing here sorts a vocabulary. The cuts are
exact all the same.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from service.domain import GenerateRequest
from service.errors import EngineFailed, InvalidRequest

Logits = NDArray[np.float32]
Weights = NDArray[np.float64]  # probabilities before they are divided by their sum
Ids = NDArray[np.intp]

COLDEST = 1e-5  # temperatures below are 0: their reciprocal is no use in float32
FIRST_PIVOT = 1e-3  # of the likeliest token's probability: most nuclei lie above
SORTED_AT_ONCE = 512
PIECE, SMALL_PIECE = 256, 64  # of a vocabulary
NOT_FINITE = "the model gave logits that are not finite"


def check_token_ids(request: GenerateRequest, vocab_size: int) -> None:
    """Raises InvalidRequest for a token in `logit_bias` or `stop_token_ids` that the model does not have."""
    for param, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        check_ids(ids, vocab_size, param)


def check_ids(ids: Iterable[int], vocab_size: int, param: str) -> None:
    """Raises InvalidRequest that names the limit and the first id over it."""
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise InvalidRequest(f"{param}: token ids are below {vocab_size}, got {wrong}", param=param)


class Sampler:
    """Draws the tokens of one output. What it draws depends on its own logits, request and seed only."""

    def __init__(
        self,
        request: GenerateRequest,
        *,
        temperature: float,
        seed: int,
        prompt_ids: Sequence[int],
        end_ids: Sequence[int],
        vocab_size: int,
    ) -> None:
        """`temperature` 0 takes the likeliest token. Raises InvalidRequest for ids outside of the vocabulary."""
        check_token_ids(request, vocab_size)
        self._request, self._temperature = request, temperature
        if temperature >= COLDEST:
            self._random = np.random.Generator(np.random.Philox(key=seed % 2**64))
        self._bias_ids = np.fromiter(request.logit_bias.keys(), np.intp)
        self._bias = np.fromiter(request.logit_bias.values(), np.float32)
        self._banned = np.array(sorted({*end_ids, *request.stop_token_ids}), np.intp)
        self._num_drawn = 0
        self._repetition = np.float32(request.repetition_penalty)
        # In the prompt or the output, a place for each token; empty if there is no penalty on it.
        self._seen = np.zeros(vocab_size if self._repetition != 1 else 0, np.bool_)
        if self._seen.size:
            self._seen[list(prompt_ids)] = True
        self._counts_output = request.presence_penalty != 0 or request.frequency_penalty != 0
        self._counts: dict[int, int] = {}  # of each token in the output
        is_adjusted = self._bias.size or self._seen.size or self._counts_output or request.min_tokens
        self._is_greatest = temperature < COLDEST and not is_adjusted

    def sample(self, logits: Logits) -> int:
        """(vocabulary,) -> a token. `logits` stay as they are. Raises EngineFailed as `greatest_of` does."""
        token = greatest_of(logits)
        if self._is_greatest:
            return token
        token = self._choose(self._adjusted(logits))
        self._num_drawn += 1
        if self._seen.size:
            self._seen[token] = True
        if self._counts_output:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _adjusted(self, logits: Logits) -> Logits:
        """Bias, penalties and bans, on a copy if there are any."""
        is_banning = self._num_drawn < self._request.min_tokens and self._banned.size
        if not (self._bias.size or self._seen.size or self._counts_output or is_banning):
            return logits
        logits = logits.copy()
        logits[self._bias_ids] += self._bias
        if self._seen.size:
            repeated(logits, np.flatnonzero(self._seen), self._repetition)
        if self._counts_output:
            self._discourage(logits)
        if is_banning:
            logits[self._banned] = -np.inf
        return logits

    def _discourage(self, logits: Logits) -> None:
        """logit - count * frequency - (count > 0) * presence, counted in the output, as OpenAI's API defines both."""
        ids = np.fromiter(self._counts.keys(), np.intp)
        counts = np.fromiter(self._counts.values(), np.float32)
        logits[ids] -= counts * np.float32(self._request.frequency_penalty) + np.float32(self._request.presence_penalty)

    def _choose(self, logits: Logits) -> int:
        if self._temperature < COLDEST:
            return int(logits.argmax())  # the first of equals
        ids, weights = candidates(
            logits,
            temperature=self._temperature,
            top_k=self._request.top_k,
            top_p=self._request.top_p,
            min_p=self._request.min_p,
        )
        place = drawn(weights, self._random.random())
        return place if ids is None else int(ids[place])


def greatest_of(logits: Logits) -> int:
    """The token with the greatest logit, of equals the first. Raises EngineFailed if that is not finite.

    NaN counts as the greatest. A token whose logit is -inf is impossible, which is no failure.
    """
    token = int(logits.argmax())
    if not math.isfinite(logits[token]):
        raise EngineFailed(NOT_FINITE)
    return token


def repeated(logits: Logits, ids: Ids, penalty: np.float32) -> None:
    """Divides positive logits of tokens seen before, multiplies negative ones (Keskar et al. 2019, section 4.1)."""
    seen = logits[ids]
    logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)


def candidates(
    logits: Logits, *, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Ids | None, Weights]:
    """The tokens that may be drawn (None: all), in an order that depends on `logits` alone, and their weights.

    Each filter sees what the one before it left: top_k (0: all), top_p, min_p. Among equals the lowest id wins.
    """
    ids = likeliest(logits, top_k) if 0 < top_k < len(logits) else None
    kept = logits if ids is None else logits[ids]
    weights: Logits = np.exp((kept - kept.max()) * np.float32(1 / temperature))
    if top_p == 1 and min_p == 0:
        return ids, weights.astype(np.float64)
    places = nucleus(weights, top_p) if top_p < 1 else np.flatnonzero(weights >= np.float32(min_p))
    if top_p < 1:
        places = places[weights[places] >= np.float32(min_p)]  # the likeliest has weight 1 (Nguyen et al. 2024)
    return places if ids is None else ids[places], weights[places].astype(np.float64)


def drawn(weights: Weights, uniform: float) -> int:
    """The place where the running sum passes `uniform`, of [0, 1), times the sum; never one of weight 0.

    In two levels, as a running sum over a vocabulary takes ten times as long as sums of its pieces.
    """
    piece, left = passed(np.add.reduceat(weights, np.arange(0, len(weights), PIECE)), uniform)
    inside = weights[piece * PIECE : (piece + 1) * PIECE]
    return piece * PIECE + passed(inside, left / inside.sum())[0]


def passed(weights: Weights, uniform: float) -> tuple[int, float]:
    """The place, and how far into its weight the sum is there."""
    until = weights.cumsum()
    target = min(uniform * until[-1], np.nextafter(until[-1], 0))  # the product may round up to the sum
    place = int(until.searchsorted(target, side="right"))
    return place, float(target - (until[place - 1] if place else 0))


def likeliest(logits: Logits, count: int) -> Ids:
    """The ids of the `count` greatest logits, in the order of ids; of equal ones the lowest ids.

    The count-th greatest of the maxima of pieces is at most the count-th greatest of all, so what is below it can go.
    A piece is every num_pieces-th of them: so numpy compares whole runs, which is far faster than runs of a piece.
    """
    num_pieces = len(logits) // SMALL_PIECE
    if count > num_pieces:
        return greatest(logits, count)
    maxima = logits[: num_pieces * SMALL_PIECE].reshape(SMALL_PIECE, num_pieces).max(axis=0)
    ids = np.flatnonzero(logits >= np.partition(maxima, num_pieces - count)[num_pieces - count])
    return ids if len(ids) == count else ids[greatest(logits[ids], count)]


def greatest(values: Logits, count: int) -> Ids:
    """The places of the `count` greatest, in order; of equal ones the first."""
    least = np.partition(values, len(values) - count)[len(values) - count]
    above, level = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.sort(np.concatenate((above, level[: count - len(above)])))


def nucleus(weights: Logits, top_p: float) -> Ids:
    """The places of the fewest weights whose sum reaches `top_p` of all (Holtzman et al. 2020), of equals the first.

    `weights` are relative to the greatest, which is 1. Quickselect by mass: what lies above a pivot is either all in
    the nucleus or all that is still to be looked at. Only the last few are sorted.
    """
    missing = top_p * float(weights.sum(dtype=np.float64))
    places, pivot, inside = np.arange(len(weights)), np.float32(FIRST_PIVOT), []
    while len(weights) > SORTED_AT_ONCE and weights.min() != pivot:
        is_above = weights >= pivot
        above = np.flatnonzero(is_above)
        mass = float(weights[above].sum(dtype=np.float64))
        if mass < missing and len(above) < len(weights):  # all of them can seem too little, by rounding
            inside.append(places[above])
            missing -= mass
            above = np.flatnonzero(~is_above)
        places, weights = places[above], weights[above]
        pivot = middling(weights)
    order = np.argsort(-weights, kind="stable")
    mass_until = weights[order].cumsum(dtype=np.float64)
    inside.append(places[order[: int(mass_until.searchsorted(missing, side="left")) + 1]])
    return np.concatenate(inside)


def middling(weights: Logits) -> np.float32:
    """One of them, near the middle."""
    sample = np.sort(weights[:: max(1, len(weights) // 64)])
    return np.float32(sample[len(sample) // 2])


def log_sums(logits: Logits) -> NDArray[np.float64]:
    """log sum exp over the last axis of (..., vocabulary); a row's is the same bits whatever the other rows are.

    Raises EngineFailed as `greatest_of` does.
    """
    greatest = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(greatest).all():
        raise EngineFailed(NOT_FINITE)
    sums = np.exp(logits - greatest).sum(axis=-1)
    found: NDArray[np.float64] = np.log(sums, dtype=np.float64) + greatest[..., 0]
    return found


def logprobs(logits: Logits, token: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    """log softmax of (vocabulary,) at `token`, and the `num_top` likeliest tokens with theirs, the likeliest first."""
    log_sum = float(log_sums(logits))
    top: Ids = likeliest(logits, min(num_top, len(logits))) if num_top else np.empty(0, np.intp)
    ranked = top[np.argsort(-logits[top], kind="stable")]
    return float(logits[token]) - log_sum, [(int(one), float(logits[one]) - log_sum) for one in ranked]
