"""A decoder of the Llama kind as an ONNX graph for serving: K/V in place, integer matrices, logits only where wanted.

Owns the graph's form; the weights stand in a file that `service.worker.weights.packing` has written, and the graph only
points into it. Reads pre-norm RMSNorm, rotary positions, SwiGLU, no biases.

One graph serves prefill (1, T) and decode (B, 1). Inputs: `ids` (B, T); `lengths` (B), tokens of each row after this
step minus one; `longest`, the greatest of these plus one; `keep` (K), the positions within T whose logits are wanted,
K = 0 included; past_key.i and past_value.i (B, G, S, D). Outputs: `logits` (B, K, V); present_key.i and
present_value.i. Bind each present to the memory of its past: GroupQueryAttention then writes in place, and rows of any
length decode together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model.config import ModelConfig
from service.worker.weights.packing import BLOCK, Kind, Kinds, Place, shares_table

CONTRIB = "com.microsoft"
OPSET = 21
IR_VERSION = 10
DTYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8}


def check_supported(config: ModelConfig) -> None:
    """Raises ValueError for a decoder that this graph does not compute."""
    needed = {
        "kind": "decoder",
        "norm": "rms",
        "norm_order": "pre",
        "positions": "rotary",
        "activation": "swiglu",
        "has_bias": False,
        "has_embedding_norm": False,
        "scale_embeddings": False,
    }
    found = {name: getattr(config, name) for name in needed}
    wrong = [f"{name} is {found[name]!r}, not {value!r}" for name, value in needed.items() if found[name] != value]
    if wrong:
        raise ValueError(f"the decoder graph cannot compute this model: {'; '.join(wrong)}")


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


def blocks8(graph: Graph, name: str, x: str, *, stored: str) -> str:
    """accuracy_level 4: the operator quantises x itself, each row's blocks of 32 for themselves, and sums integers."""
    scales = graph.places[f"{stored}.scales"].shape  # (N, K / 32)
    rows, blocks = scales
    codes = graph.weight(f"{name}.codes", stored=f"{stored}.codes", shape=(rows, blocks, BLOCK))
    inputs = [x, codes, graph.weight(f"{name}.scales", stored=f"{stored}.scales")]
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


def embed(graph: Graph, kind: Kind) -> str:
    if kind == "float32":
        return graph.node("Gather", [graph.weight("embedding.weight"), "ids"], "embedded")
    inputs = [graph.weight("embedding.codes"), "ids", graph.weight("embedding.scales")]
    layout = {"bits": 8, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    return graph.node("GatherBlockQuantized", inputs, "embedded", contrib=True, **layout)


def add_and_norm(graph: Graph, name: str, x: str, branch: str | None, eps: float) -> tuple[str, str]:
    """The residual sum and its RMSNorm; without a branch the sum is x."""
    total = x if branch is None else graph.node("Add", [x, branch], f"{name}.sum")
    return total, graph.node(
        "SimplifiedLayerNormalization", [total, graph.weight(f"{name}.weight")], name, epsilon=eps, axis=-1
    )


def attend(graph: Graph, layer: int, qkv: str, config: ModelConfig) -> str:
    inputs = [qkv, "", "", f"past_key.{layer}", f"past_value.{layer}", "lengths", "longest", "cos", "sin"]
    outputs = [f"attention.{layer}", f"present_key.{layer}", f"present_value.{layer}"]
    heads = {"num_heads": config.num_heads, "kv_num_heads": config.kv_heads}
    return graph.node("GroupQueryAttention", inputs, *outputs, contrib=True, do_rotary=1, **heads)


def feed_forward(graph: Graph, layer: int, h: str, kinds: Kinds) -> str:
    """down(silu(gate) * up)."""
    both = matrix(graph, f"gate_up.{layer}", h, kinds.gate_up)
    gate, up = f"gate.{layer}", f"up.{layer}"
    graph.node("Split", [both], gate, up, axis=-1, num_outputs=2)
    swish = graph.node("QuickGelu", [gate], f"swish.{layer}", contrib=True, alpha=1.0)
    return matrix(graph, f"down.{layer}", graph.node("Mul", [swish, up], f"gated.{layer}"), kinds.down)


def rotary_tables(graph: Graph, config: ModelConfig, max_length: int) -> None:
    """cos and sin of every angle, (max_length, D / 2). The runtime computes them once, when it loads the graph."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
    frequencies = np.array([config.rope_theta ** -float(one) for one in exponents], np.float32)
    bounds = [graph.constant(name, np.int64(value)) for name, value in (("first", 0), ("end", max_length), ("one", 1))]
    positions = graph.node("Cast", [graph.node("Range", bounds, "range")], "positions", to=TensorProto.FLOAT)
    column = graph.node("Unsqueeze", [positions, "last"], "position_column")
    angles = graph.node("Mul", [column, graph.constant("frequencies", frequencies)], "angles")
    graph.node("Cos", [angles], "cos")
    graph.node("Sin", [angles], "sin")


def body(graph: Graph, config: ModelConfig, kinds: Kinds) -> str:
    """Embedding and blocks -> normed hidden states (B, T, W)."""
    x, branch = embed(graph, kinds.embedding), None
    for layer in range(config.num_layers):
        x, h = add_and_norm(graph, f"attention_norm.{layer}", x, branch, config.norm_eps)
        qkv = matrix(graph, f"qkv.{layer}", h, kinds.qkv)
        branch = matrix(graph, f"output.{layer}", attend(graph, layer, qkv, config), kinds.output)
        x, h = add_and_norm(graph, f"feed_forward_norm.{layer}", x, branch, config.norm_eps)
        branch = feed_forward(graph, layer, h, kinds)
    return add_and_norm(graph, "norm", x, branch, config.norm_eps)[1]


def interface(config: ModelConfig) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    kept = ["B", config.kv_heads, "S", config.head_width]
    value = helper.make_tensor_value_info
    inputs = [value("ids", TensorProto.INT64, ["B", "T"]), value("lengths", TensorProto.INT32, ["B"])]
    inputs += [value("longest", TensorProto.INT32, []), value("keep", TensorProto.INT64, ["K"])]
    outputs = [value("logits", TensorProto.FLOAT, ["B", "K", config.vocab_size])]
    for layer in range(config.num_layers):
        for part in ("key", "value"):
            inputs.append(value(f"past_{part}.{layer}", TensorProto.FLOAT, kept))
            outputs.append(value(f"present_{part}.{layer}", TensorProto.FLOAT, kept))
    return inputs, outputs


def build_decoder(
    config: ModelConfig, kinds: Kinds, *, places: Mapping[str, Place], file: str, max_length: int
) -> onnx.ModelProto:
    """The graph of one step, for contexts of up to `max_length` tokens, whose weights are at `places` in `file`.

    Raises ValueError for a model that it cannot compute.
    """
    check_supported(config)
    graph = Graph(places, file)
    graph.constant("last", np.array([-1]))
    rotary_tables(graph, config, max_length)
    hidden = graph.node("Gather", [body(graph, config, kinds), "keep"], "hidden", axis=1)
    head = "embedding" if shares_table(kinds, is_tied=config.tie_embeddings) else "head"
    graph.node("Identity", [matrix(graph, "head", hidden, kinds.head, stored=head)], "logits")
    inputs, outputs = interface(config)
    proto = helper.make_graph(graph.nodes, "decoder", inputs, outputs, list(graph.constants.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="attnd")
