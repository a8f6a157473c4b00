"""model.quantize: how much of a layer survives 8 bits, and that no processor can overflow."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import GRAPH_FILE

from model.quantize import (
    LEVELS,
    Activations,
    Int8Layer,
    Range,
    activation_range,
    clipped_scale,
    quantize_layer,
    rounded_in_turn,
    weight_scales,
)


@pytest.fixture
def x() -> torch.Tensor:
    """Activations as transformers have them: correlated, and one channel thirty times as large as the others."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(2000, 8, generator=draw) @ torch.randn(8, 32, generator=draw) / 3
    x = shared + 0.3 * torch.randn(2000, 32, generator=draw)
    x[:, 3] *= 30
    return x


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(1))


def seen_of(x: torch.Tensor) -> Activations:
    seen = Activations(x.size(1))
    for part in x.split(500):
        seen.see(part)
    return seen


def output_of(layer: Int8Layer, x: torch.Tensor) -> torch.Tensor:
    chosen = Range(layer.scale, layer.zero_point)
    return chosen.rounded(x * layer.smooth) @ (layer.weight * layer.weight_scale)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def test_a_layer_keeps_its_output(x: torch.Tensor, weight: torch.Tensor) -> None:
    assert relative_error(output_of(quantize_layer(weight, seen_of(x)), x), x @ weight) < 0.03


def test_smoothing_is_what_keeps_it(x: torch.Tensor, weight: torch.Tensor) -> None:
    plain = activation_range(seen_of(x), torch.ones(32), 1.0)
    scale = weight_scales(weight)
    unsmoothed = plain.rounded(x) @ (torch.round(weight / scale) * scale)
    smoothed = output_of(quantize_layer(weight, seen_of(x)), x)
    exact = x @ weight
    assert relative_error(smoothed, exact) < 0.6 * relative_error(unsmoothed, exact)


def test_rounding_in_turn_beats_rounding_each(x: torch.Tensor, weight: torch.Tensor) -> None:
    scale = weight_scales(weight)
    each = torch.round(weight / scale)
    in_turn = rounded_in_turn(weight, scale, x)
    exact = x @ weight
    assert relative_error(x @ (in_turn * scale), exact) < 0.7 * relative_error(x @ (each * scale), exact)
    assert in_turn.abs().max() <= LEVELS


def test_a_layer_of_one_scale_keeps_its_output(x: torch.Tensor, weight: torch.Tensor) -> None:
    weight[:, 3] *= 3
    layer = quantize_layer(weight, seen_of(x), one_scale=True)
    assert layer.weight_scale.shape == (1,)
    assert layer.weight.abs().max() <= LEVELS
    found, exact = output_of(layer, x), x @ weight
    assert max(relative_error(found[:, at], exact[:, at]) for at in range(weight.size(1))) < 0.1


def test_one_weight_does_not_take_all_levels() -> None:
    weight = torch.randn(400, 200, generator=torch.Generator().manual_seed(3))
    weight[0, 0] = 8

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (torch.round(weight / scale).clamp(-LEVELS, LEVELS) * scale - weight).square().sum()

    assert error(clipped_scale(weight)) < 0.7 * error(weight.abs().max() / LEVELS)


def test_for_one_scale_silent_channels_are_blown_up_less(weight: torch.Tensor) -> None:
    """The matrix that makes them has their factors in its weights."""
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(2))
    x[:, 5] = 1e-6
    one, each = (quantize_layer(weight, seen_of(x), one_scale=one_scale).smooth for one_scale in (True, False))
    assert one[5] / one.median() < 20
    assert each[5] / each.median() > 100


def test_silent_channels_do_no_harm(weight: torch.Tensor) -> None:
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(2))
    x[:, 5:] = 0
    layer = quantize_layer(weight, seen_of(x))
    assert torch.isfinite(layer.smooth).all()
    assert relative_error(output_of(layer, x), x @ weight) < 0.03


def test_zero_is_exact_and_inside_the_range() -> None:
    for low, high in ((0.5, 2.0), (-2.0, -0.5), (-0.17, 9.0), (0.0, 0.0)):
        chosen = activation_range(seen_of(torch.tensor([[low], [high]] * 4)), torch.ones(1), 1.0)
        assert 0 <= chosen.zero_point <= 255
        assert chosen.scale > 0
        assert chosen.rounded(torch.zeros(1)).item() == 0.0


def test_no_pair_of_products_overflows_16_bits(tiny_bundles: dict[str, Path]) -> None:
    """Processors without VNNI add two products of uint8 and int8 in 16 bits, with saturation."""
    graph = onnx.load(tiny_bundles["int8"] / GRAPH_FILE).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 2 * 4
    for node in products:
        weight = arrays[node.input[1]]
        assert weight.dtype == np.int8
        assert 2 * 255 * int(np.abs(weight.astype(int)).max()) <= np.iinfo(np.int16).max


def test_no_scale_is_measured_while_serving(tiny_bundles: dict[str, Path]) -> None:
    """A range taken from the batch would make a sequence's result depend on its neighbours."""
    graph = onnx.load(tiny_bundles["int8"] / GRAPH_FILE).graph
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        assert not node.op_type.startswith("DynamicQuantize")
        if node.op_type == "QuantizeLinear":
            assert set(node.input[1:]) <= constants
