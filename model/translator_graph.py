"""An encoder-decoder as three ONNX graphs for serving: encode a source once, decode a token a step, tell attention.

Owns the graphs' form; the weights stand in one file that `translator_weights` has written, and all three graphs point
into it. Reads the original transformer (Vaswani et al. 2017) with its norms moved before the branches: LayerNorm,
biases, ReLU, sinusoidal positions, one matrix for both embeddings and the head.

- `encode`: `ids` (B, S), sources of one length -> `memory` (B, S, M): of each token, the keys (H, D) for decoder layer
  0, the values, the keys for layer 1 and so on.
- `decode`: `ids` (B, 1); `lengths` (B), target tokens that each row's own memory holds, which is this token's position;
  `longest`, the greatest of these plus one; `source_lengths` (B), source tokens minus one; `longest_source`, the
  greatest of these plus one; past_key.i and past_value.i (B, H, T, D); past_cross_key.i and past_cross_value.i (B, H,
  S, D) -> `logits` (B, 1, V); present_key.i and present_value.i. Bind each present to the memory of its past:
  GroupQueryAttention then writes in place. It takes each row at its own length, reads nothing behind it, and mixes no
  rows.
- `attention`: `ids` (1, S) and `target_ids` (1, T); `keep` (K), the target positions whose logits are wanted, none
  included, for the runtime computes every output, fetched or not -> `logits` (1, K, V) and the weights of every
  attention, encoder_attention.i (1, H, S, S), decoder_attention.i (1, H, T, T), cross_attention.i (1, H, T, S), written
  out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from model.config import ModelConfig
from model.graph_parts import Graph, check_supported, embed, finished
from service.worker.weights.packing import Place

SUPPORTED = {
    "kind": "encoder-decoder",
    "norm": "layer",
    "norm_order": "pre",
    "positions": "sinusoidal",
    "relative_buckets": 0,
    "activation": "relu",
    "has_bias": True,
    "has_embedding_norm": False,
    "scale_embeddings": True,
    "tie_embeddings": True,
}
Attend = Callable[[int, str], str]  # layer, a norm's output or queries (B, T, W) -> (B, T, W)
Interface = tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]


@dataclass(frozen=True)
class Layers:
    """The model's layers as nodes of a graph; all matrices are of one precision, "float32" or "int8"."""

    graph: Graph
    config: ModelConfig
    precision: str

    def linear(self, name: str, x: str) -> str:
        """x (B, T, K) -> (B, T, N).

        In integers, the step from one to the next is a constant of the matrix, and sums are exact: a row comes out the
        same whatever rows stand beside it.
        """
        graph = self.graph
        bias = graph.weight(f"{name}.bias") if f"{name}.bias" in graph.places else ""
        if self.precision == "float32":
            product = graph.node("MatMul", [x, graph.weight(f"{name}.weight")], f"{name}.product" if bias else name)
            return graph.node("Add", [product, bias], name) if bias else product
        rows, step, middle = self.row_codes(name, x)
        codes, scale = graph.weight(f"{name}.codes"), graph.weight(f"{name}.scale")
        inputs = [rows, codes, step, scale, middle, "", bias]
        return graph.node("MatMulIntegerToFloat", inputs, name, contrib=True)

    def row_codes(self, name: str, x: str) -> tuple[str, str, str]:
        """x as the matrix `name` reads it, a code's step, and the code of zero."""
        step, middle = self.graph.weight(f"{name}.step"), self.graph.weight(f"{name}.middle")
        return self.graph.node("QuantizeLinear", [x, step, middle], f"{name}.row_codes"), step, middle

    def mixed(self, at: str, x: str) -> str:
        """Attention of all of x (B, T, W) to all of it, its projections included, in one node."""
        graph, qkv = self.graph, f"{at}.qkv"
        bias, sizes = graph.weight(f"{qkv}.bias"), {"num_heads": self.config.num_heads}
        if self.precision == "float32":
            inputs = [x, graph.weight(f"{qkv}.weight"), bias]
            return graph.node("Attention", inputs, f"{at}.mixed", contrib=True, **sizes)
        rows, step, middle = self.row_codes(qkv, x)
        codes, scale = graph.weight(f"{qkv}.codes"), graph.weight(f"{qkv}.scale")
        inputs = [rows, codes, bias, step, scale, "", middle]
        return graph.node("QAttention", inputs, f"{at}.mixed", contrib=True, **sizes)

    def norm(self, name: str, x: str) -> str:
        inputs = [x, self.graph.weight(f"{name}.weight"), self.graph.weight(f"{name}.bias")]
        return self.graph.node("LayerNormalization", inputs, name, epsilon=self.config.norm_eps, axis=-1)

    def add(self, name: str, x: str, branch: str) -> str:
        return self.graph.node("Add", [x, branch], f"{name}.sum")

    def feed_forward(self, at: str, x: str) -> str:
        """x plus its branch: down(relu(up))."""
        up = self.linear(f"{at}.up", self.norm(f"{at}.feed_forward_norm", x))
        rectified = self.graph.node("Relu", [up], f"{at}.rectified")
        return self.add(f"{at}.feed_forward", x, self.linear(f"{at}.down", rectified))

    def attention(self, at: str, x: str, attended: str) -> str:
        return self.add(f"{at}.attention", x, self.linear(f"{at}.output", attended))

    def encoder(self, ids: str, attend: Attend) -> str:
        """The memory (B, S, W)."""
        x = self.embedded_from_start("encoder", ids)
        for layer in range(self.config.num_layers):
            at = f"encoder.{layer}"
            attended = attend(layer, self.norm(f"{at}.attention_norm", x))
            x = self.feed_forward(at, self.attention(at, x, attended))
        return self.norm("encoder.norm", x)

    def decoder(self, x: str, attend: Attend, attend_memory: Attend, *, keep: str | None = None) -> str:
        """Embedded target tokens (B, T, W) -> logits (B, T, V), or (B, K, V) of the positions in `keep` (K)."""
        layers = range(num_decoder_layers(self.config))
        for layer in layers:
            at, cross = f"decoder.{layer}", f"decoder.{layer}.cross"
            x = self.attention(at, x, attend(layer, self.norm(f"{at}.attention_norm", x)))
            query = self.linear(f"{cross}.query", self.norm(f"{cross}.attention_norm", x))
            x = self.attention(cross, x, attend_memory(layer, query))
            if keep is not None and layer == layers[-1]:  # from here on no position looks at another
                x = self.graph.node("Gather", [x, keep], "kept", axis=1)
            x = self.feed_forward(at, x)
        return self.linear("logits", self.norm("decoder.norm", x))

    def embed(self, name: str, ids: str) -> str:
        """ids (B, T) -> (B, T, W)."""
        return embed(self.graph, "float32" if self.precision == "float32" else "blocks8", ids=ids, name=name)

    def embedded_from_start(self, name: str, ids: str) -> str:
        """ids (B, T) at positions 0 to T-1 -> (B, T, W)."""
        graph = self.graph
        length = graph.node("Shape", [ids], f"{name}.length", start=1, end=2)
        bounds = [graph.constant("zero", np.array([0])), length]
        positions = graph.node("Slice", [graph.weight("positions"), *bounds], f"{name}.positions")  # (T, W)
        tokens = self.embed(f"{name}.tokens", ids)
        return graph.node("Add", [tokens, positions], f"{name}.embedded")

    def embedded_at(self, lengths: str) -> str:
        """ids (B, 1), each row at the position that its length says -> (B, 1, W)."""
        graph = self.graph
        stored = graph.places["positions"].shape
        table = graph.weight("positions", shape=(stored[0], 1, stored[1]))
        positions = graph.node("Gather", [table, lengths], "decoder.positions")
        return graph.node("Add", [self.embed("decoder.tokens", "ids"), positions], "decoder.embedded")

    def memory(self, ids: str, attend: Attend) -> str:
        """What cross-attention reads, the keys and values of all decoder layers in one product: (B, S, M)."""
        return self.linear("memory", self.encoder(ids, attend))

    def thirds(self, name: str, qkv: str) -> list[str]:
        """(B, T, 3W) -> queries, keys and values, each (B, T, W)."""
        parts = [f"{name}.{part}" for part in "qkv"]
        self.graph.node("Split", [qkv], *parts, axis=-1, num_outputs=3)
        return parts

    def heads(self, name: str, x: str, num_heads: int) -> str:
        """(B, T, N * D) -> (B, N, T, D)."""
        split = self.graph.constant(f"heads.{num_heads}", np.array([0, 0, num_heads, self.config.head_width]))
        apart = self.graph.node("Reshape", [x, split], f"{name}.apart")
        return self.graph.node("Transpose", [apart], f"{name}.heads", perm=[0, 2, 1, 3])

    def attend_openly(self, name: str, q: str, k: str, v: str, *, mask: str | None = None) -> str:
        """softmax(q k^T / sqrt(D)) v of (B, H, T or S, D), written out; the weights (B, H, T, S) are called `name`."""
        graph = self.graph
        turned = graph.node("Transpose", [k], f"{name}.turned", perm=[0, 1, 3, 2])
        scale = graph.constant("scale", np.float32(self.config.head_width**-0.5))
        scores = graph.node("Mul", [graph.node("MatMul", [q, turned], f"{name}.products"), scale], f"{name}.scores")
        if mask is not None:
            never = graph.constant("never", np.float32(-np.inf))
            scores = graph.node("Where", [mask, scores, never], f"{name}.masked")
        mixed = graph.node("MatMul", [graph.node("Softmax", [scores], name, axis=-1), v], f"{name}.mixed")
        rows = graph.node("Transpose", [mixed], f"{name}.rows", perm=[0, 2, 1, 3])
        return graph.node(
            "Reshape", [rows, graph.constant("width", np.array([0, 0, self.config.width]))], f"{name}.joined"
        )


def num_decoder_layers(config: ModelConfig) -> int:
    return config.num_decoder_layers or config.num_layers


def per_layer(pattern: str, config: ModelConfig) -> list[str]:
    """The names of each decoder layer's keys and values: key.0, value.0, key.1, ..."""
    return [
        pattern.format(f"{part}.{layer}") for layer in range(num_decoder_layers(config)) for part in ("key", "value")
    ]


def encode(layers: Layers) -> None:
    layers.memory("ids", lambda layer, x: layers.mixed(f"encoder.{layer}", x))


def decode(layers: Layers) -> None:
    graph, heads = layers.graph, layers.config.num_heads
    x = layers.embedded_at("lengths")
    # What attends to a memory adds nothing to it: its new keys and values are (B, 0, W).
    bounds = [graph.constant(name, np.array([value])) for name, value in (("start", 0), ("end", 0), ("axis", 1))]
    nothing = graph.node("Slice", [x, *bounds], "nothing")

    def attend(name: str, inputs: list[str], *present: str) -> str:
        sizes = {"num_heads": heads, "kv_num_heads": heads}
        return graph.node("GroupQueryAttention", inputs, name, *present, contrib=True, **sizes)

    def attend_own(layer: int, x: str) -> str:
        qkv = layers.linear(f"decoder.{layer}.qkv", x)
        past, present = ([f"{side}_{part}.{layer}" for part in ("key", "value")] for side in ("past", "present"))
        return attend(f"decoder.{layer}.mixed", [qkv, "", "", *past, "lengths", "longest"], *present)

    def attend_memory(layer: int, query: str) -> str:
        past = [f"past_cross_{part}.{layer}" for part in ("key", "value")]
        inputs = [query, nothing, nothing, *past, "source_lengths", "longest_source"]
        return attend(f"decoder.{layer}.cross.mixed", inputs)

    layers.decoder(x, attend_own, attend_memory)


def attention(layers: Layers) -> None:
    graph, config = layers.graph, layers.config

    def attend(part: str, layer: int, x: str, mask: str | None = None) -> str:
        name, qkv = f"{part}_attention.{layer}", layers.linear(f"{part}.{layer}.qkv", x)
        q, k, v = (layers.heads(third, third, config.num_heads) for third in layers.thirds(name, qkv))
        return layers.attend_openly(name, q, k, v, mask=mask)

    def attend_memory(layer: int, query: str) -> str:
        name = f"cross_attention.{layer}"
        q = layers.heads(name, query, config.num_heads)
        return layers.attend_openly(name, q, f"cross_key.{layer}", f"cross_value.{layer}")

    memory, parts = layers.memory("ids", lambda layer, x: attend("encoder", layer, x)), per_layer("cross_{}", config)
    heads = layers.heads("memory", memory, len(parts) * config.num_heads)
    graph.node("Split", [heads], *parts, axis=1, num_outputs=len(parts))
    x = layers.embedded_from_start("decoder", "target_ids")
    mask = causal(graph, "decoder.length")
    layers.decoder(x, lambda layer, x: attend("decoder", layer, x, mask), attend_memory, keep="keep")


def causal(graph: Graph, length: str) -> str:
    """length (1), T -> (T, T), true where the key is not later than the query."""
    first, one = graph.constant("first", np.int64(0)), graph.constant("one", np.int64(1))
    keys = graph.node("Range", [first, graph.node("Squeeze", [length], "causal.end"), one], "causal.keys")
    queries = graph.node("Unsqueeze", [keys, graph.constant("last", np.array([-1]))], "causal.queries")
    return graph.node("LessOrEqual", [keys, queries], "causal")


GRAPHS: Mapping[str, Callable[[Layers], None]] = {"encode": encode, "decode": decode, "attention": attention}


def ints(name: str, *axes: int | str, dtype: int = TensorProto.INT64) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, axes)


def floats(name: str, *axes: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, axes)


def interfaces(config: ModelConfig, num_written: int) -> dict[str, Interface]:
    """Inputs and outputs of each graph. There are logits of the first `num_written` tokens only, V of them."""
    heads, width, int32 = config.num_heads, config.head_width, TensorProto.INT32
    decode = [ints("ids", "B", 1)]
    for prefix, suffix in (("", ""), ("source_", "_source")):
        decode += [ints(f"{prefix}lengths", "B", dtype=int32), ints(f"longest{suffix}", dtype=int32)]
    decode += [floats(name, "B", heads, "T", width) for name in per_layer("past_{}", config)]
    decode += [floats(name, "B", heads, "S", width) for name in per_layer("past_cross_{}", config)]
    present = [floats(name, "B", heads, "T", width) for name in per_layer("present_{}", config)]
    weights = {"encoder": ("S", "S", config.num_layers)} | {
        part: ("T", keys, num_decoder_layers(config)) for part, keys in (("decoder", "T"), ("cross", "S"))
    }
    maps = [
        floats(f"{part}_attention.{layer}", 1, heads, queries, keys)
        for part, (queries, keys, num_layers) in weights.items()
        for layer in range(num_layers)
    ]
    memory = floats("memory", "B", "S", len(per_layer("{}", config)) * heads * width)
    return {
        "encode": ([ints("ids", "B", "S")], [memory]),
        "decode": (decode, [floats("logits", "B", 1, num_written), *present]),
        "attention": (
            [ints("ids", 1, "S"), ints("target_ids", 1, "T"), ints("keep", "K")],
            [floats("logits", 1, "K", num_written), *maps],
        ),
    }


def build_translator(
    config: ModelConfig, precision: str, *, places: Mapping[str, Place], file: str, num_written: int
) -> dict[str, onnx.ModelProto]:
    """The graphs by name, whose weights are at `places` in `file`. Raises ValueError for a model of another form."""
    check_supported(config, SUPPORTED)
    built = {}
    for name, (inputs, outputs) in interfaces(config, num_written).items():
        graph = Graph(places, file)
        GRAPHS[name](Layers(graph, config, precision))
        built[name] = finished(graph, name, inputs, outputs)
    return built
