"""Beam search in its plain form, batched and with a cache: the reference that the serving engine is tested against."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.subwords import END_ID, START_ID
from model.transformer import Cache, EncoderDecoder, KeyValue, LayerCache
from model.translate import longest, until_end


class Hypothesis(NamedTuple):
    """Ids with the end token, unless the search was cut at its longest; the score is what hypotheses are ranked by."""

    ids: list[int]
    score: float


def beam_search(
    model: EncoderDecoder,
    source: Tensor,  # (B, S)
    mask: Tensor | None = None,  # (B, S), non-zero for real tokens
    *,
    num_beams: int,
    max_new: Sequence[int],  # for each source
    length_penalty: float = 1.0,
    num_written: int | None = None,
) -> list[list[Hypothesis]]:
    """For each source its `num_beams` best finished hypotheses, the best first.

    Written, and counted in probabilities, are the first `num_written` tokens of the vocabulary; None: all.

    A hypothesis of n tokens, the end included, has the score log p / n^length_penalty: 1 is the mean log-probability,
    0 the sum. Each step takes the 2K best continuations of a source's K beams; those that end among the first K are
    finished, and the K best of the others live on. A source is done when it has K finished hypotheses (Kasai et al.
    2022 call this first come, first served), or at its `max_new`, when the living beams count as finished.
    """
    beams, limits = Beams(model, source, mask, num_beams, num_written), torch.tensor(max_new)
    finished: list[list[Hypothesis]] = [[] for _ in source]
    for length in range(1, max(max_new) + 1):
        is_open = [length <= limit and len(each) < num_beams for limit, each in zip(max_new, finished, strict=True)]
        if not any(is_open):
            break
        for row, ids, total in beams.step(limits == length):
            if is_open[row]:
                finished[row].append(Hypothesis(ids, total / length**length_penalty))
    return [sorted(each, key=lambda hypothesis: -hypothesis.score)[:num_beams] for each in finished]


class Beams:
    """K living hypotheses for each of B sources: row b * K + k of every tensor is beam k of source b."""

    @torch.no_grad()
    def __init__(
        self, model: EncoderDecoder, source: Tensor, mask: Tensor | None, num_beams: int, num_written: int | None
    ) -> None:
        self.model, self.num_beams, self.num_written, self.past = model, num_beams, num_written, None
        self.memory = model.encode(source, mask).repeat_interleave(num_beams, dim=0)
        self.mask = None if mask is None else mask.repeat_interleave(num_beams, dim=0)
        self.ids = torch.full((len(source) * num_beams, 1), START_ID)
        self.totals = torch.full((len(source), num_beams), -torch.inf)  # log-probabilities
        self.totals[:, 0] = 0.0  # at first all beams of a source are the same one

    @torch.no_grad()
    def step(self, is_last: Tensor) -> list[tuple[int, list[int], float]]:
        """One more token; returns (source, ids, log-probability) of what ended, and of the living where `is_last`."""
        logits, cache = self.model.decode(self.ids[:, -1:], self.memory, self.mask, past=self.past)
        log_p = logits[:, -1, : self.num_written].log_softmax(-1).view(*self.totals.shape, -1)  # (B, K, V)
        vocab_size = log_p.size(-1)
        totals, at = (self.totals[..., None] + log_p).flatten(1).topk(min(2, vocab_size) * self.num_beams)
        first = torch.arange(len(totals))[:, None] * self.num_beams
        rows, tokens = first + at // vocab_size, at % vocab_size  # (B, 2K)
        ids = torch.cat((self.ids[rows], tokens[..., None]), dim=-1)  # (B, 2K, T)
        is_end = tokens == END_ID
        ended = is_end.clone()
        ended[:, self.num_beams :] = False
        alive = is_end.long().argsort(dim=1, stable=True)[:, : self.num_beams]  # the best that did not end
        ended |= torch.zeros_like(ended).scatter_(1, alive, True) & is_last[:, None]
        self.keep(rows.gather(1, alive), ids.take_along_dim(alive[..., None], 1), totals.gather(1, alive), cache)
        return told(ids, totals, ended)

    def keep(self, rows: Tensor, ids: Tensor, totals: Tensor, cache: Cache) -> None:
        """Goes on with these rows; a source's beams share its memory, so only their own past is put in order."""
        order = rows.flatten()
        self.ids, self.totals = ids.flatten(0, 1), totals
        self.past = [LayerCache(KeyValue(own.key[order], own.value[order]), cross) for own, cross in cache]


def told(ids: Tensor, totals: Tensor, chosen: Tensor) -> list[tuple[int, list[int], float]]:
    """(source, ids without the start, log-probability) of the chosen candidates that are possible at all."""
    places = (chosen & totals.isfinite()).nonzero().tolist()
    return [(row, ids[row, at, 1:].tolist(), totals[row, at].item()) for row, at in places]


def beam(
    model: EncoderDecoder, source: Tensor, mask: Tensor | None, *, num_beams: int = 5, length_penalty: float = 1.0
) -> list[list[int]]:
    """The best hypothesis of each source, without the end token: a Search for `translate`."""
    new = longest(source, mask, most=model.max_length - 1)
    found = beam_search(model, source, mask, num_beams=num_beams, max_new=new, length_penalty=length_penalty)
    return [until_end(hypotheses[0].ids) for hypotheses in found]
