"""What graphs that are written node by node are made of: nodes and constants by name, matrices, tables, the model.

Owns how a packed matrix is read (its kinds are `service.worker.weights.packing`'s). Knows no architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model.config import ModelConfig
from service.worker.weights.packing import BLOCK, Kind, Place

CONTRIB = "com.microsoft"
OPSET = 21
IR_VERSION = 10
DTYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8}


def check_supported(config: ModelConfig, needed: Mapping[str, Any]) -> None:
    """Raises ValueError for a model whose config is not `needed`, the values that a graph is written for."""
    found = {name: getattr(config, name) for name in needed}
    wrong = [f"{name} is {found[name]!r}, not {value!r}" for name, value in needed.items() if found[name] != value]
    if wrong:
        raise ValueError(f"the graph cannot compute this model: {'; '.join(wrong)}")


@dataclass
class Graph:
    """Nodes and constants as they are added; every value is known by its name."""

    places: Mapping[str, Place]
    file: str  # that the places are in
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def constant(self, name: str, value: Any) -> str:
        """A small constant in the graph itself; the first of a name stays, so that shared ones may be named again."""
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name: str, *, stored: str | None = None, shape: tuple[int, ...] | None = None) -> str:
        """A weight in the file, found there under the name `stored` and read in another `shape` if given."""
        place = self.places[stored or name]
        tensor = TensorProto(name=name, data_type=DTYPES[place.dtype], dims=shape or place.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.file), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=key, value=str(value))
        self.constants.setdefault(name, tensor)
        return name

    def node(self, operator: str, inputs: list[str], *outputs: str, contrib: bool = False, **attributes: Any) -> str:
        """Adds a node and returns the name of its first output."""
        domain = CONTRIB if contrib else ""
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]


def blocks8(graph: Graph, name: str, x: str, *, stored: str, bias: str | None = None) -> str:
    """accuracy_level 4: the operator quantises x itself, each row's blocks of 32 for themselves, and sums integers."""
    scales = graph.places[f"{stored}.scales"].shape  # (N, K / 32)
    rows, blocks = scales
    codes = graph.weight(f"{name}.codes", stored=f"{stored}.codes", shape=(rows, blocks, BLOCK))
    inputs = [x, codes, graph.weight(f"{name}.scales", stored=f"{stored}.scales")]
    inputs += [] if bias is None else ["", "", bias]
    sizes = {"N": rows, "K": blocks * BLOCK, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    return graph.node("MatMulNBits", inputs, name, contrib=True, **sizes)


def quantise_rows(graph: Graph, name: str, x: str) -> tuple[str, str]:
    """x -> uint8 codes around 128 in units of 1/127 of the row's greatest magnitude, and that magnitude (B, T, 1).

    A row of zeros divides zero by zero; whatever codes come of it are finite and are multiplied by its magnitude, zero.
    """
    magnitude = graph.node("Abs", [x], f"{name}.abs")
    greatest = graph.node("ReduceMax", [magnitude, graph.constant("last", np.array([-1]))], f"{name}.max", keepdims=1)
    units = graph.node("Div", [x, greatest], f"{name}.units")
    step, middle = graph.constant("step", np.float32(1 / 127)), graph.constant("middle", np.uint8(128))
    return graph.node("QuantizeLinear", [units, step, middle], f"{name}.row_codes"), greatest


def rows8(graph: Graph, name: str, x: str) -> str:
    """Integers are summed exactly, so only row-wise float work is left and no row can touch another.

    The session must turn on `session.x64quantprecision`: without it, int8 weights saturate on x86 without VNNI.
    """
    row_codes, greatest = quantise_rows(graph, name, x)
    inputs = [row_codes, graph.weight(f"{name}.codes"), "step", graph.weight(f"{name}.scales"), "middle"]
    product = graph.node("MatMulIntegerToFloat", inputs, f"{name}.product", contrib=True)
    return graph.node("Mul", [product, greatest], name)


def matrix(graph: Graph, name: str, x: str, kind: Kind, *, stored: str | None = None) -> str:
    """x (B, T, K) -> (B, T, N)."""
    if kind == "float32":
        return graph.node("MatMul", [x, graph.weight(f"{name}.weight")], name)
    return rows8(graph, name, x) if kind == "rows8" else blocks8(graph, name, x, stored=stored or name)


def embed(graph: Graph, kind: Kind, *, ids: str = "ids", name: str = "embedded") -> str:
    """ids (B, T) -> (B, T, W)."""
    if kind == "float32":
        return graph.node("Gather", [graph.weight("embedding.weight"), ids], name)
    inputs = [graph.weight("embedding.codes"), ids, graph.weight("embedding.scales")]
    layout = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    return graph.node("GatherBlockQuantized", inputs, name, contrib=True, **layout)


def finished(
    graph: Graph, name: str, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    proto = helper.make_graph(graph.nodes, name, inputs, outputs, list(graph.constants.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="attnd")
