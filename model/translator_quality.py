"""What the serving engine writes, greedily, and how good it is: its BLEU beside that of the PyTorch model.

Knows no bundle and no files.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from model.evaluate import bleu
from model.pairs import Pair
from model.subwords import END_ID
from model.transformer import EncoderDecoder
from model.translate import longest, translate, until_end
from service.worker.generation.translator import TranslatorEngine

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


def served(engine: TranslatorEngine, _: EncoderDecoder, source: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The engine as a Search of `translate`."""
    lengths = [source.size(1)] * len(source) if mask is None else mask.bool().sum(1).tolist()
    sources = [ids[:length].tolist() for ids, length in zip(source, lengths, strict=True)]
    limits = [min(limit, engine.max_tokens - 1) for limit in longest(source, mask)]
    return [until_end(one.ids) for one in write(engine, sources, limits)]


def quality(engine: TranslatorEngine, model: EncoderDecoder, tokenizer: Tokenizer, sets: Sets) -> dict[str, Any]:
    """BLEU of greedy translations of each set, the engine's and the model's, and how many are the same text."""
    measured = {}
    for name, pairs in sets.items():
        sources, references = zip(*pairs, strict=True)
        search = partial(served, engine)
        ours = translate(model, tokenizer, sources, search=search, batch_size=engine.num_slots)
        theirs = translate(model, tokenizer, sources)
        score, other = bleu(ours, references), bleu(theirs, references)
        measured[name] = {
            "sentences": len(pairs),
            "bleu": round(score.value, 2),
            "bleu_of_checkpoint": round(other.value, 2),
            "same": round(float(np.mean([a == b for a, b in zip(ours, theirs, strict=True)])), 4),
            "signature": score.signature,
        }
    return measured
