"""Measures a decoder's activations and chooses the scales that move their peaks into weights (SmoothQuant).

Xiao et al. 2022, equation 4: an input channel's scale is (its greatest activation)^alpha / (the greatest weight that
reads it)^(1 - alpha). Only places where a scale folds away at no cost: the inputs of q/k/v and of gate/up, made by a
norm, and those of down, made by up. `service.worker.weights.packing` folds them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from model.transformer import Block, LanguageModel
from service.worker.weights.packing import Floats, Smoothing

ALPHAS = (0.7, 0.7, 0.5)  # in the order of Smoothing's fields; how they were chosen is in model/LOG.md
FLOOR = 1e-4  # of the greatest activation: a channel that was silent in the samples may speak later
SMALLEST_WEIGHT = 1e-3


@contextmanager
def peaks_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The greatest magnitude of each input channel, gathered while the model runs inside the block."""
    peaks = [torch.zeros(())] * len(modules)

    def watch(at: int) -> object:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peaks[at] = torch.maximum(peaks[at], inputs[0].abs().flatten(0, -2).amax(0))

        return modules[at].register_forward_pre_hook(note)

    hooks = [watch(at) for at in range(len(modules))]
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]


def readers(block: Block) -> tuple[list[nn.Linear], ...]:
    """The linear layers that read each of Smoothing's places."""
    attention, feed_forward = block.attention, block.feed_forward
    assert feed_forward.gate is not None
    return (
        [attention.query, attention.key, attention.value],
        [feed_forward.gate, feed_forward.up],
        [feed_forward.down],
    )


def scales(peaks: Tensor, layers: Sequence[nn.Linear], alpha: float) -> Floats:
    """One scale an input channel; their geometric mean is 1."""
    activation = peaks.double().clamp(min=float(peaks.max()) * FLOOR)
    weight = torch.stack([layer.weight.detach().abs().amax(0) for layer in layers]).amax(0).double()
    raw = (activation**alpha / weight.clamp(min=SMALLEST_WEIGHT) ** (1 - alpha)).numpy()
    return (raw / np.exp(np.log(raw).mean())).astype(np.float32)


@torch.no_grad()
def calibrate(model: LanguageModel, sequences: Sequence[Sequence[int]]) -> list[Smoothing]:
    """The scales of every block, from what `sequences` of token ids do inside the model."""
    if not sequences:
        raise ValueError("smoothing needs sample texts to measure activations on")
    places = [place for block in model.decoder.stack.blocks for place in zip(readers(block), ALPHAS, strict=True)]
    with peaks_of([layers[0] for layers, _ in places]) as peaks:
        for ids in sequences:
            model(torch.tensor([list(ids)]))
    found = [scales(one, layers, alpha) for one, (layers, alpha) in zip(peaks, places, strict=True)]
    return [Smoothing(*found[at : at + 3]) for at in range(0, len(found), 3)]
