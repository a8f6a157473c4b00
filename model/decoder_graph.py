"""A decoder of the Llama kind as an ONNX graph for serving: K/V in place, integer matrices, logits only where wanted.

Owns the graph's form; the weights stand in a file that `service.worker.weights.packing` has written, and the graph only
points into it. Reads pre-norm RMSNorm, rotary positions, SwiGLU, no biases.

One graph serves prefill (1, T) and decode (B, 1). Inputs: `ids` (B, T); `lengths` (B), tokens of each row after this
step minus one; `longest`, the greatest of these plus one; `keep` (K), the positions within T whose logits are wanted,
K = 0 included; past_key.i and past_value.i (B, G, S, D). Outputs: `logits` (B, K, V); present_key.i and
present_value.i. Bind each present to the memory of its past: GroupQueryAttention then writes in place, and rows of any
length decode together.
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.config import ModelConfig
from model.graph_parts import Graph, check_supported, embed, finished, matrix
from service.worker.weights.packing import Kinds, Place, shares_table

SUPPORTED = {
    "kind": "decoder",
    "norm": "rms",
    "norm_order": "pre",
    "positions": "rotary",
    "activation": "swiglu",
    "has_bias": False,
    "has_embedding_norm": False,
    "scale_embeddings": False,
}
Attend = Callable[[Graph, int, str, ModelConfig], str]  # layer, projections (B, T, (H + 2G) * D) -> (B, T, W)


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
    return matrix(graph, f"down.{layer}", graph.node("Mul", [swish, up], f"gated.{layer}"), kinds.down_of(layer))


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


def body(graph: Graph, config: ModelConfig, kinds: Kinds, attend: Attend) -> str:
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


def write(graph: Graph, config: ModelConfig, kinds: Kinds, attend: Attend, *, max_length: int) -> None:
    """The whole model: ids (B, T) -> logits (B, K, V) of the positions `keep`. Raises ValueError as `build_decoder`."""
    check_supported(config, SUPPORTED)
    graph.constant("last", np.array([-1]))
    rotary_tables(graph, config, max_length)
    hidden = graph.node("Gather", [body(graph, config, kinds, attend), "keep"], "hidden", axis=1)
    head = "embedding" if shares_table(kinds, is_tied=config.tie_embeddings) else "head"
    graph.node("Identity", [matrix(graph, "head", hidden, kinds.head, stored=head)], "logits")


def build_decoder(
    config: ModelConfig, kinds: Kinds, *, places: Mapping[str, Place], file: str, max_length: int
) -> onnx.ModelProto:
    """The graph of one step, for contexts of up to `max_length` tokens, whose weights are at `places` in `file`.

    Raises ValueError for a model that it cannot compute.
    """
    graph = Graph(places, file)
    write(graph, config, kinds, attend, max_length=max_length)
    inputs, outputs = interface(config)
    return finished(graph, "decoder", inputs, outputs)
