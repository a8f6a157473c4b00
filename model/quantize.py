"""A float32 graph -> an int8 one that is bit-equal for every batch and right on every processor.

Weights: a scale per output channel, 7 bits (-63..63), because processors without VNNI add two products in 16 bits, and
2 * 255 * 63 still fits. Activations: unsigned 8 bits with a constant scale and zero point, measured on sample texts. A
constant does not depend on a request's neighbours, as the usual dynamic range of a batch does, and costs nothing to
compute. (A range for each row would be as independent, but was 18 % slower and not more accurate.)

What makes constants accurate is smoothing (Xiao et al. 2022): a few channels of a transformer's activations are ten
times as large as the rest. They are divided by a vector first, and the rows of the weight are multiplied by it. What
makes 7 bits enough is that the rounding error of one weight is made up for by the next ones (Frantar et al. 2022).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

LEVELS = 63  # largest weight
SMOOTHING = (0.5, 0.65, 0.8, 0.9)  # candidates: how much of a channel's size moves into the weights
CLIPPING = (1.0, 0.9, 0.8, 0.7)  # candidates: share of the measured range that is kept
KEPT = [0.9**power for power in range(20)]  # candidates: share of the largest weight that one scale for all can hold
SILENT = 1e-3  # what share of the largest channel the smallest ones count as, lest they be blown up
SILENT_TO_ONE_SCALE = 0.05  # the same where a channel that is blown up takes levels from the others
SAMPLE_EVERY = 4  # of this many rows of activations one is kept
TRIAL_EVERY = 4  # of this many kept rows one is used to choose among the candidates
DAMPING = 0.01  # added to the diagonal of the second moments, relative to its mean: some channels never vary
CONTRIB = "com.microsoft"

Batch = Mapping[str, Tensor]  # the inputs of the packed model
Arrays = dict[str, NDArray[np.generic]]


class Activations:
    """What went into one linear layer: each channel's range over all rows, and a sample of rows."""

    def __init__(self, num_channels: int) -> None:
        self.low, self.high = torch.zeros(num_channels), torch.zeros(num_channels)
        self.rows: list[Tensor] = []

    def see(self, x: Tensor) -> None:
        """x: (rows, channels)."""
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.rows.append(x[::SAMPLE_EVERY].clone())

    def sample(self) -> Tensor:
        return torch.cat(self.rows)


@dataclass(frozen=True)
class Int8Layer:
    """One linear layer: y = (quantize(x * smooth) - zero_point) @ weight * scale * weight_scale."""

    smooth: Tensor  # (inputs,)
    scale: float
    zero_point: int
    weight: Tensor  # (inputs, outputs), whole numbers
    weight_scale: Tensor  # (outputs,), or (1,) for all of them


class Range(NamedTuple):
    scale: float
    zero_point: int

    def rounded(self, x: Tensor) -> Tensor:
        """x as uint8 can hold it, in the scale of x."""
        whole = torch.clamp(torch.round(x / self.scale) + self.zero_point, 0, 255)
        return (whole - self.zero_point) * self.scale


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Activations]:
    """Runs `batches` through the packed model; what went into each linear layer of its blocks, by the layer's name."""
    layers = token_layers(model)
    seen = {name: Activations(layer.in_features) for name, layer in layers.items()}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, to=seen[name]: to.see(args[0]))
        for name, layer in layers.items()
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def token_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that see every token. Pooler and head see one row a sequence: small, they stay exact."""
    blocks = model.get_submodule("blocks").named_modules(prefix="blocks")
    return {name: layer for name, layer in blocks if isinstance(layer, nn.Linear)}


def quantize_layer(weight: Tensor, seen: Activations, *, one_scale: bool = False) -> Int8Layer:
    """weight: (inputs, outputs). `one_scale`: one for all outputs, for which large weights may be clipped."""
    smooth, chosen = best_smoothing(weight, seen, SILENT_TO_ONE_SCALE if one_scale else SILENT)
    scaled = weight / smooth[:, None]
    weight_scale = clipped_scale(scaled) if one_scale else weight_scales(scaled)
    whole = rounded_in_turn(scaled, weight_scale, chosen.rounded(seen.sample() * smooth))
    return Int8Layer(smooth, *chosen, whole, weight_scale)


def best_smoothing(weight: Tensor, seen: Activations, silent: float) -> tuple[Tensor, Range]:
    """The smoothing and the clipping that change the layer's output least."""
    x = seen.sample()[::TRIAL_EVERY]
    exact = x @ weight
    found = []
    for share in SMOOTHING:
        smooth = smoothing(seen, weight, share, silent)
        scale = weight_scales(weight / smooth[:, None])
        trial = torch.round(weight / smooth[:, None] / scale) * scale
        for keep in CLIPPING:
            chosen = activation_range(seen, smooth, keep)
            error = (chosen.rounded(x * smooth) @ trial - exact).square().sum().item()
            found.append((error, smooth, chosen))
    _, smooth, chosen = min(found, key=lambda candidate: candidate[0])
    return smooth, chosen


def smoothing(seen: Activations, weight: Tensor, share: float, silent: float) -> Tensor:
    """(inputs,): what to multiply the activations with, so that large channels lose a `share` of their size."""
    sizes = not_tiny(torch.maximum(-seen.low, seen.high), silent)
    strengths = not_tiny(weight.abs().amax(1), silent)
    return strengths ** (1 - share) / sizes**share


def not_tiny(x: Tensor, silent: float) -> Tensor:
    """Channels that are as good as silent must not be blown up."""
    return x.clamp(min=silent * x.max().item() + 1e-12)


def weight_scales(weight: Tensor) -> Tensor:
    """(inputs, outputs) -> (outputs,): what one level is worth."""
    return weight.abs().amax(0).clamp(min=1e-12) / LEVELS


def clipped_scale(weight: Tensor) -> Tensor:
    """(inputs, outputs) -> (1,): what one level is worth, where rounding and clipping together cost least."""
    largest = weight.abs().max().clamp(min=1e-12) / LEVELS

    def error(scale: Tensor) -> float:
        whole = torch.round(weight / scale).clamp(-LEVELS, LEVELS)
        return (whole * scale - weight).square().sum().item()

    return min((largest * keep for keep in KEPT), key=error).reshape(1)


def rounded_in_turn(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """(inputs, outputs) in whole levels. Inputs are rounded one after the other, and each one's error is taken off the
    ones that follow, as far as they move together in x (rows, inputs): Frantar et al. 2022, algorithm 1.
    """
    moments = (x.T @ x).double()
    moments.diagonal().add_(DAMPING * moments.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    shares = torch.linalg.cholesky(inverse, upper=True).float()
    rest, whole = weight.clone(), torch.empty_like(weight)
    for at in range(len(weight)):
        whole[at] = torch.round(rest[at] / scale).clamp(-LEVELS, LEVELS)
        error = (rest[at] - whole[at] * scale) / shares[at, at]
        rest[at + 1 :] -= shares[at, at + 1 :, None] * error
    return whole


def activation_range(seen: Activations, smooth: Tensor, keep: float) -> Range:
    """The scale and zero point that spread uint8 over `keep` of what was seen, smoothed; zero is always inside."""
    low, high = (seen.low * smooth).min().item() * keep, (seen.high * smooth).max().item() * keep + 1e-12
    scale = float(np.float32((high - low) / 255))
    return Range(scale, round(-low / scale))


def quantize(model: onnx.ModelProto, activations: Mapping[str, Activations]) -> onnx.ModelProto:
    """Rewrites the linear layers named by `activations`, and the token embedding; everything else stays float32."""
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        layer = node.input[1].removesuffix(".weight") if node.op_type == "Gemm" else None
        if layer in activations:
            quantized = quantize_layer(torch.from_numpy(weights.pop(f"{layer}.weight").T.copy()), activations[layer])
            nodes += linear_nodes(node, layer, quantized, weights)
        elif node.op_type == "Gather" and node.input[0] == "embedding.token.weight":
            nodes += embedding_nodes(node, weights)
        else:
            nodes.append(node)
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        model.graph.input,
        model.graph.output,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [*model.opset_import, helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)


def linear_nodes(node: onnx.NodeProto, name: str, layer: Int8Layer, weights: Arrays) -> Iterator[onnx.NodeProto]:
    """Gemm -> Mul (smoothing), QuantizeLinear, MatMulIntegerToFloat, which adds the bias, too, if there is one."""
    added = {
        f"{name}.smooth": layer.smooth.numpy(),
        f"{name}.scale": np.float32(layer.scale),
        f"{name}.zero_point": np.uint8(layer.zero_point),
        f"{name}.weight": layer.weight.numpy().astype(np.int8),
        f"{name}.weight_scale": layer.weight_scale.numpy(),
        f"{name}.weight_zero_point": np.zeros(len(layer.weight_scale), np.int8),
    }
    smooth, scale, zero_point, weight, weight_scale, weight_zero_point = added
    weights.update((key, np.asarray(value)) for key, value in added.items())
    yield helper.make_node("Mul", [node.input[0], smooth], [f"{name}.smoothed"])
    yield helper.make_node("QuantizeLinear", [f"{name}.smoothed", scale, zero_point], [f"{name}.quantized"])
    inputs = [f"{name}.quantized", weight, scale, weight_scale, zero_point, weight_zero_point, *node.input[2:]]
    yield helper.make_node("MatMulIntegerToFloat", inputs, node.output, domain=CONTRIB)


def rounding_error(stored: Mapping[str, NDArray[Any]], name: str, weight: NDArray[np.float32]) -> float:
    """How far the graph's weight `name` is from `weight` at most: in levels if it is int8, else in itself."""
    found = stored[name]
    if found.dtype != np.int8:
        return float(np.abs(found - weight).max())
    level, smooth = stored[f"{name}_scale"], stored.get(f"{name.removesuffix('.weight')}.smooth")
    if smooth is not None:  # a linear layer, (inputs, outputs), and not the embedding
        weight, level = weight.T, smooth[:, None] * level
    return float(np.abs(found - weight / level).max())


def embedding_nodes(node: onnx.NodeProto, weights: Arrays) -> Iterator[onnx.NodeProto]:
    """The table in 8 bits with a scale per row: the largest part of a small model, and only looked up."""
    table, ids = node.input
    values = weights[table]
    scale = np.maximum(np.abs(values).max(1, keepdims=True), 1e-12) / 127
    weights[table] = np.rint(values / scale).astype(np.int8)
    weights[f"{table}_scale"] = scale.astype(np.float32)
    yield helper.make_node("Gather", [table, ids], [f"{table}.rows"], axis=0)
    yield helper.make_node("Cast", [f"{table}.rows"], [f"{table}.floats"], to=TensorProto.FLOAT)
    yield helper.make_node("Gather", [f"{table}_scale", ids], [f"{table}.scales"], axis=0)
    yield helper.make_node("Mul", [f"{table}.floats", f"{table}.scales"], node.output)
