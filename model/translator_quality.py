"""What the serving engine writes, greedily and by beam search: its BLEU beside that of the PyTorch model.

Knows no bundle and no files.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.evaluate import bleu
from model.pairs import Pair
from model.search import Hypothesis, beam
from model.subwords import END_ID
from model.transformer import EncoderDecoder
from model.translate import greedy, longest, translate, until_end
from service.worker.generation.beam_search import BeamSearch, Rated
from service.worker.generation.likeliest import Likeliest
from service.worker.generation.translator import TranslatorEngine

NUM_BEAMS = 5

Ids = Sequence[int]
Logits = NDArray[np.float32]
Sets = Mapping[str, Sequence[Pair]]  # by name


class Written(NamedTuple):
    """A translation: its tokens, the end token included, and the logits (T, V) that chose them."""

    ids: list[int]
    logits: list[Logits]


def write(engine: TranslatorEngine, sources: Sequence[Ids], limits: Sequence[int]) -> list[Written]:
    """Greedy translations of up to `limits` tokens, side by side.

    Who has ended reads its last token, at the same place in every step, until the others have ended, too.
    """
    found = []
    for slot, source in enumerate(sources):
        logits = engine.prefill(slot, source, 0, keep="last")[0]
        found.append(Written([int(logits.argmax())], [logits]))
    while True:
        is_open = [one.ids[-1] != END_ID and len(one.ids) < limit for one, limit in zip(found, limits, strict=True)]
        if not any(is_open):
            return found
        lengths = [len(source) + len(one.ids) - 1 for source, one in zip(sources, found, strict=True)]
        rows = engine.decode([one.ids[-1] for one in found], lengths)
        for row in np.flatnonzero(is_open):
            found[row].ids.append(int(rows[row].argmax()))
            found[row].logits.append(rows[row].copy())


def asked(engine: TranslatorEngine, source: Tensor, mask: Tensor | None) -> list[tuple[list[int], int]]:
    """Each source as it is without padding, and how many tokens may be written of it."""
    lengths = [source.size(1)] * len(source) if mask is None else mask.bool().sum(1).tolist()
    sources = [ids[:length].tolist() for ids, length in zip(source, lengths, strict=True)]
    return list(zip(sources, longest(source, mask, most=engine.max_tokens - 1), strict=True))


def served(engine: TranslatorEngine, _: EncoderDecoder, source: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The engine as a Search of `translate`."""
    sources, limits = zip(*asked(engine, source, mask), strict=True)
    return [until_end(one.ids) for one in write(engine, sources, limits)]


def search(engine: TranslatorEngine, likeliest: Likeliest, source: Ids, limit: int, **options: Any) -> list[Hypothesis]:
    """The best translations of up to `limit` tokens, by the search that serves; `options` as of model.search."""
    num_beams, penalty = options["num_beams"], options.get("length_penalty", 1.0)
    searched = BeamSearch(
        num_beams=num_beams,
        end_ids={END_ID},
        min_tokens=0,
        max_tokens=limit,
        length_penalty=penalty,
        describe=lambda logits, token: None,
    )
    logits = np.repeat(engine.prefill(0, source, 0, keep="last"), num_beams, axis=0)
    for slot in range(1, num_beams):
        engine.move(0, slot, 0, len(source))
    for length in count(len(source)):
        searched.step(list(map(Rated, logits, likeliest.of(logits, searched.num_likely, stays=True))))
        if searched.is_finished:
            return [Hypothesis([token for token, _ in one.written], searched.score(one)) for one in searched.best]
        for slot, (parent, _) in enumerate(searched.continuations):
            engine.move(parent, slot, 0, length)
        logits = engine.decode([token for _, token in searched.continuations], [length] * num_beams)
    raise AssertionError("a search ends at its limit")


def found(engine: TranslatorEngine, _: EncoderDecoder, source: Tensor, mask: Tensor | None) -> list[list[int]]:
    """As `served`, by beam search."""
    likeliest = Likeliest()
    return [
        until_end(search(engine, likeliest, ids, limit, num_beams=NUM_BEAMS)[0].ids)
        for ids, limit in asked(engine, source, mask)
    ]


SEARCHES = {"greedy": (served, greedy), f"{NUM_BEAMS} beams": (found, partial(beam, num_beams=NUM_BEAMS))}


def quality(engine: TranslatorEngine, model: EncoderDecoder, tokenizer: Tokenizer, sets: Sets) -> dict[str, Any]:
    """Of each set and search the BLEU of the engine's and the model's translations, and how many are the same text."""
    measured: dict[str, Any] = {}
    for name, pairs in sets.items():
        sources, references = zip(*pairs, strict=True)
        measured[name] = {"sentences": len(pairs)}
        for kind, (ours, theirs) in SEARCHES.items():
            written = translate(model, tokenizer, sources, search=partial(ours, engine), batch_size=engine.num_slots)
            expected = translate(model, tokenizer, sources, search=theirs)
            score, other = bleu(written, references), bleu(expected, references)
            measured[name][kind] = {
                "bleu": round(score.value, 2),
                "bleu_of_checkpoint": round(other.value, 2),
                "same": round(float(np.mean([a == b for a, b in zip(written, expected, strict=True)])), 4),
            }
            measured[name]["signature"] = score.signature
    return measured
