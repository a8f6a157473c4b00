"""Scores a classifier (accuracy, loss) or translations (BLEU, chrF); owns no data and no training."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.data import Examples


@torch.no_grad()
def predict(
    model: nn.Module, examples: Examples, *, pad_id: int, batch_size: int = 64, precision: torch.dtype = torch.float32
) -> Tensor:
    """Logits (number of examples, labels), computed in evaluation mode over batches of similar length."""
    was_training = model.training
    model.eval()
    lengths = examples.lengths()
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    rows = []
    for start in range(0, len(order), batch_size):
        batch = examples.batch(order[start : start + batch_size], pad_id)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            rows.append(model(batch.ids, batch.mask).float())
    model.train(was_training)
    return torch.cat(rows)[torch.tensor(order).argsort()]


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """The share of rows whose highest score is the label of highest probability."""
    return (logits.argmax(-1) == targets.argmax(-1)).float().mean().item()


def mean_loss(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits, targets).item()


def standard_error(share: float, count: int) -> float:
    """Of an accuracy measured on `count` independent examples."""
    return math.sqrt(share * (1 - share) / count)


class Score(NamedTuple):
    """A figure and the signature that says how it was computed."""

    value: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> Score:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu (Post 2018); `tokenize` is "none" for text already in tokens."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenize, force=True)
    return Score(metric.corpus_score(list(hypotheses), [list(references)]).score, str(metric.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    """Character F-score (Popovic 2015) by sacrebleu."""
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    return Score(metric.corpus_score(list(hypotheses), [list(references)]).score, str(metric.get_signature()))


def moses_tokens(texts: Sequence[str], language: str) -> list[str]:
    """Lower-cased, punctuation normalised, in tokens, as the Moses scripts do: the form in which Multi30k is scored."""
    from sacremoses import MosesPunctNormalizer, MosesTokenizer

    normalizer, tokenizer = MosesPunctNormalizer(language), MosesTokenizer(language)
    return [tokenizer.tokenize(normalizer.normalize(text.lower()), return_str=True) for text in texts]
