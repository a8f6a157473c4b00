"""What a translation model is trained for, against torch's own functions and gradients."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from model.objective import SlicedHead, initialise, smoothed, translation_loss
from model.pairs import EncodedPairs, Ragged
from model.transformer import EncoderDecoder
from tests.tiny_translation import CONFIG, tiny_translator


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_torch(smoothing: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(50, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
    targets = torch.randint(33, (50,))
    sliced = SlicedHead.apply(x, w, targets, partial(smoothed, smoothing=smoothing), 16)  # three slices and a rest
    expected = F.cross_entropy(x @ w.T, targets, label_smoothing=smoothing)
    torch.testing.assert_close(sliced, expected)
    ours, theirs = (torch.autograd.grad(3 * loss, (x, w)) for loss in (sliced, expected))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_bfloat16_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(50, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
    targets, criterion = torch.randint(33, (50,)), partial(smoothed, smoothing=0.1)
    exact = SlicedHead.apply(x, w, targets, criterion, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = SlicedHead.apply(x.bfloat16(), w, targets, criterion, 16)
        assert criterion(torch.randn(2, 33).bfloat16(), targets[:2])[1].dtype == torch.bfloat16
    torch.testing.assert_close(rough, exact, atol=0.0, rtol=0.01)
    for ours, theirs in zip(torch.autograd.grad(rough, (x, w)), torch.autograd.grad(exact, (x, w)), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_padding_takes_no_part() -> None:
    model = tiny_translator().eval()
    pairs = EncodedPairs(Ragged.of([[5, 6, 2], [7, 2]]), Ragged.of([[8, 2], [9, 10, 11, 2]]))
    together = translation_loss(model, pairs.batch([0, 1], start_id=1, pad_id=0), pad_id=0, smoothing=0.1)
    alone = [translation_loss(model, pairs.batch([i], start_id=1, pad_id=0), pad_id=0, smoothing=0.1) for i in (0, 1)]
    torch.testing.assert_close(together, (2 * alone[0] + 4 * alone[1]) / 6)


def test_loss_is_that_of_the_model_s_logits() -> None:
    model = tiny_translator().eval()
    batch = EncodedPairs(Ragged.of([[5, 6, 2]]), Ragged.of([[8, 9, 2]])).batch([0], start_id=1, pad_id=0)
    expected = F.cross_entropy(model(batch.source, batch.inputs)[0], batch.targets[0], label_smoothing=0.1)
    torch.testing.assert_close(translation_loss(model, batch, pad_id=0, smoothing=0.1), expected)


def test_the_first_predictions_are_nearly_uniform() -> None:
    torch.manual_seed(0)
    model = EncoderDecoder(CONFIG)
    initialise(model)
    logits = model(torch.randint(3, 40, (8, 12)), torch.randint(3, 40, (8, 12)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(3, 40, (96,)))
    assert abs(loss.item() - math.log(CONFIG.vocab_size)) < 1.0
    assert model.head.weight is model.encoder.stack.embedding.token.weight
