"""What a translation model is trained for, and where its weights begin."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.pairs import PairBatch
from model.transformer import EncoderDecoder

Criterion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits, targets -> loss, d loss / d logits


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
    """criterion(x w^T, targets) / N, and both gradients, a slice of the N rows at a time.

    A slice of the logits stays in the processor's cache, where all rows (N x V numbers) would go to memory and back for
    each of softmax, logarithm, loss and gradient. So `criterion` gives its gradient itself: see `smoothed`.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # which would take the softmax to float32
    def forward(ctx: Any, x: Tensor, w: Tensor, targets: Tensor, criterion: Criterion, rows: int = 512) -> Tensor:
        """x (N, W), w (V, W), targets (N); matrices are multiplied in the type of x."""
        gradient_x, gradient_w = torch.empty_like(x), torch.zeros_like(w)
        loss, w = torch.zeros(()), w.to(x.dtype)
        for start in range(0, len(targets), rows):
            part = x[start : start + rows]
            value, slope = criterion(part @ w.T, targets[start : start + rows])  # slope (rows, V)
            gradient_x[start : start + rows] = slope @ w
            gradient_w += slope.T @ part
            loss += value
        ctx.save_for_backward(gradient_x.div_(len(targets)), gradient_w.div_(len(targets)))
        return loss / len(targets)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradient_x, gradient_w = ctx.saved_tensors
        return gradient_x * outer.to(gradient_x.dtype), gradient_w * outer, None, None, None


def smoothed(logits: Tensor, targets: Tensor, *, smoothing: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy, a share of each target spread over the vocabulary (Szegedy et al. 2016), of logits (rows, V),
    summed over the rows, and its gradient for the logits.

    Whatever is as large as the logits has their type: half the bytes to move if that is bfloat16.
    """
    at = targets[:, None]
    p = logits.softmax(-1)
    asked, tiny = logits.gather(1, at).float(), torch.finfo(torch.float32).tiny
    log_sum = asked - p.gather(1, at).float().clamp(min=tiny).log()  # of the exponentials of a row's logits
    loss = (log_sum - (1 - smoothing) * asked - smoothing * logits.mean(-1, keepdim=True)).sum()
    return loss, (p - smoothing / p.size(-1)).scatter_add_(1, at, p.new_full(at.shape, smoothing - 1))


def translation_loss(model: nn.Module, batch: PairBatch, *, pad_id: int, smoothing: float) -> Tensor:
    """See `smoothed`. Only positions that are asked for something take part: padding costs no softmax."""
    assert isinstance(model, EncoderDecoder)
    is_real = batch.targets != pad_id
    memory = model.encode(batch.source, batch.source_mask)
    hidden, _ = model.decoder(batch.inputs, memory=memory, memory_mask=batch.source_mask)
    x = hidden[is_real]  # (N, W)
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    return SlicedHead.apply(x, model.head.weight, batch.targets[is_real], partial(smoothed, smoothing=smoothing))
