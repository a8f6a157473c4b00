"""A decoder's second graph, which tells attention weights: the same weights and operators, over a whole text at once.

Owns how the weights get out; all else is `decoder_graph`'s. Inputs: `ids` (1, T); `keep` (K), the positions whose
logits are wanted, none included; `told` (L), for each layer whether its weights are wanted, 1 or 0. Outputs: `logits`
(1, K, V) and decoder_attention.i (1, H, T, T), rows are queries, empty for a layer that is not told.

The operator that computes a step keeps no weights, and the one that keeps them rounds otherwise, which integer matrices
behind it would not forgive. So the first carries the text on, with the bits of a prompt that is read, and the second
looks at the same queries and keys beside it; for told layers only, since the runtime computes and keeps every output
of a graph, fetched or not.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.config import ModelConfig
from model.decoder_graph import write
from model.graph_parts import CONTRIB, Graph, finished
from service.worker.weights.packing import Kinds, Place

AFTER_SOFTMAX = 2  # of GroupQueryAttention's qk_output


def attend(graph: Graph, layer: int, qkv: str, config: ModelConfig) -> str:
    """(1, T, W), and beside it decoder_attention.i."""
    inputs = [qkv, "", "", "", "", "lengths", "longest", "cos", "sin"]
    sizes = {"num_heads": config.num_heads, "kv_num_heads": config.kv_heads, "do_rotary": 1}
    is_told = graph.node("Gather", ["is_told", graph.constant(f"layer.{layer}", np.int64(layer))], f"is_told.{layer}")
    branches = {
        "then_branch": weights(f"told.{layer}", inputs, sizes),
        "else_branch": nothing(f"untold.{layer}", config),
    }
    graph.node("If", [is_told], f"decoder_attention.{layer}", **branches)
    outputs = [f"{part}.{layer}" for part in ("attention", "key", "value")]
    return graph.node("GroupQueryAttention", inputs, *outputs, contrib=True, **sizes)


def weights(name: str, inputs: list[str], sizes: Mapping[str, int]) -> onnx.GraphProto:
    outputs = [f"{name}.{part}" for part in ("attention", "key", "value", "weights")]
    node = helper.make_node("GroupQueryAttention", inputs, outputs, domain=CONTRIB, qk_output=AFTER_SOFTMAX, **sizes)
    return branch(name, node)


def nothing(name: str, config: ModelConfig) -> onnx.GraphProto:
    empty = helper.make_tensor(f"{name}.value", TensorProto.FLOAT, [1, config.num_heads, 0, 0], [])
    return branch(name, helper.make_node("Constant", [], [f"{name}.weights"], value=empty))


def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
    """Its last output is the branch's."""
    return helper.make_graph(
        [node], name, [], [helper.make_tensor_value_info(node.output[-1], TensorProto.FLOAT, None)]
    )


def lengths(graph: Graph) -> None:
    """From the shape of the ids what GroupQueryAttention wants to know: `lengths` (1), T - 1, and `longest` (), T."""
    shape = graph.node("Shape", ["ids"], "shape", start=1, end=2)
    length = graph.node("Cast", [shape], "length", to=TensorProto.INT32)
    graph.node("Sub", [length, graph.constant("one_less", np.array([1], np.int32))], "lengths")
    graph.node("Squeeze", [length], "longest")


def interface(config: ModelConfig) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    value = helper.make_tensor_value_info
    inputs = [value("ids", TensorProto.INT64, [1, "T"]), value("keep", TensorProto.INT64, ["K"])]
    inputs.append(value("told", TensorProto.INT64, [config.num_layers]))
    outputs = [value("logits", TensorProto.FLOAT, [1, "K", config.vocab_size])]
    for layer in range(config.num_layers):
        outputs.append(value(f"decoder_attention.{layer}", TensorProto.FLOAT, [1, config.num_heads, "queries", "keys"]))
    return inputs, outputs


def build_attention(
    config: ModelConfig, kinds: Kinds, *, places: Mapping[str, Place], file: str, max_length: int
) -> onnx.ModelProto:
    """For texts of up to `max_length` tokens, with the weights at `places` in `file`.

    Raises ValueError for a model that it cannot compute.
    """
    graph = Graph(places, file)
    lengths(graph)
    graph.node("Cast", ["told"], "is_told", to=TensorProto.BOOL)
    write(graph, config, kinds, attend, max_length=max_length)
    inputs, outputs = interface(config)
    return finished(graph, "attention", inputs, outputs)
