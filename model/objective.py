"""What a translation model is trained for, and where its weights begin."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.pairs import PairBatch
from model.transformer import EncoderDecoder

Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # log_p, targets -> loss, d loss / d logits


def initialise(model: EncoderDecoder) -> None:
    """Embeddings small enough that tied logits begin near zero; matrices after Glorot and Bengio 2010."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.head:
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.embedding_dim))


class SlicedHead(torch.autograd.Function):
    """criterion(softmax(x w^T), targets) / N, and both gradients, a slice of the N rows at a time.

    A slice of the logits stays in the processor's cache, where all rows (N x V numbers) would go to memory and back for
    each of softmax, logarithm, loss and gradient. So `criterion` gives its gradient itself: see `smoothed`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, targets: Tensor, criterion: Criterion, rows: int = 128) -> Tensor:
        """x (P, N, W) of P passes over the same targets (N), w (V, W); matrices are multiplied in the type of x."""
        gradient_x, gradient_w = torch.empty_like(x), torch.zeros_like(w)
        loss, w = torch.zeros(()), w.to(x.dtype)
        for start in range(0, len(targets), rows):
            part = x[:, start : start + rows]  # (P, rows, W)
            value, slope = criterion((part @ w.T).float().log_softmax(-1), targets[start : start + rows])
            slope = slope.div_(len(targets)).to(x.dtype)  # (P, rows, V)
            gradient_x[:, start : start + rows] = slope @ w
            gradient_w += slope.flatten(0, 1).T @ part.flatten(0, 1)
            loss += value
        ctx.save_for_backward(gradient_x, gradient_w)
        return loss / len(targets)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradient_x, gradient_w = ctx.saved_tensors
        return gradient_x * outer.to(gradient_x.dtype), gradient_w * outer, None, None, None


def smoothed(log_p: Tensor, targets: Tensor, *, smoothing: float, consistency: float = 0.0) -> tuple[Tensor, Tensor]:
    """The cross-entropy, a share of each target spread over the vocabulary (Szegedy et al. 2016): the mean over the P
    passes of log_p (P, rows, V), summed over the rows, and its gradient for the logits (P, rows, V).

    With `consistency`, of two passes p and q, also consistency / 4 times KL(p, q) + KL(q, p) (R-Drop, Liang et al.
    2021).
    """
    passes, share = len(log_p), smoothing / log_p.size(-1)
    at = targets.expand(passes, -1)[..., None]
    loss = -((1 - smoothing) * log_p.gather(2, at).sum() + share * log_p.sum()) / passes
    p = log_p.exp()
    slope = ((p - share) / passes).scatter_add_(2, at, log_p.new_full(at.shape, (smoothing - 1) / passes))
    if consistency:
        apart = log_p - log_p.flip(0)  # log p - log q, and the other way round
        pull = p - p.flip(0)
        loss += consistency / 8 * (pull * apart).sum()  # both passes count it
        slope += consistency / 4 * (p * (apart - (p * apart).sum(-1, keepdim=True)) + pull)
    return loss, slope


def translation_loss(
    model: nn.Module, batch: PairBatch, *, pad_id: int, smoothing: float, consistency: float = 0.0
) -> Tensor:
    """See `smoothed`; a batch goes through the model twice if the passes are to be consistent.

    Only positions that are asked for something take part: padding costs no softmax.
    """
    assert isinstance(model, EncoderDecoder)
    is_real = batch.targets != pad_id
    targets = batch.targets[is_real]
    if consistency:
        batch, is_real = twice(batch), is_real.repeat(2, 1)
    memory = model.encode(batch.source, batch.source_mask)
    hidden, _ = model.decoder(batch.inputs, memory=memory, memory_mask=batch.source_mask)
    x = hidden[is_real].view(-1, len(targets), hidden.size(-1))  # (1 or 2, N, W)
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    criterion = partial(smoothed, smoothing=smoothing, consistency=consistency)
    return SlicedHead.apply(x, model.head.weight, targets, criterion)


def twice(batch: PairBatch) -> PairBatch:
    return PairBatch(*(None if part is None else torch.cat((part, part)) for part in batch))
