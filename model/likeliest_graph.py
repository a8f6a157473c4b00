"""The graph that finds the likeliest tokens of some rows: `python -m model.likeliest_graph` writes the service's copy.

logits (B, V), count (1) -> values, ids, log_probabilities (B, count): a row's greatest logits, in order, of equal ones
the lowest token first. It has no weights and serves every vocabulary.

The same logits come a second time as `blocks` (B, N, M), and the numbers of all tokens as `tokens` (N, M). The `count`
greatest logits are in the `count` blocks with the greatest maxima (`num_blocks` (1), if there are as many), and maxima
are found several times as fast as TopK goes through a whole row. Equals included: of equal maxima TopK takes the first
blocks, and these, put in order again, hold as many of the equals as are wanted.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from model.graph_parts import IR_VERSION, OPSET
from service.worker.generation import likeliest


def build_likeliest() -> onnx.ModelProto:
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("ReduceMax", ["blocks", "last"], ["maxima"]),  # (B, N, 1)
        node("TopK", ["maxima", "num_blocks"], ["greatest", "unordered"], axis=1),
        node("TopK", ["unordered", "num_blocks"], ["chosen", "order"], axis=1, largest=0),
        node("GatherND", ["blocks", "chosen"], ["chosen_blocks"], batch_dims=1),  # (B, num_blocks, M)
        node("Reshape", ["chosen_blocks", "flat"], ["candidates"]),
        node("TopK", ["candidates", "count"], ["values", "places"], axis=-1),
        node("GatherND", ["tokens", "chosen"], ["chosen_tokens"]),
        node("Reshape", ["chosen_tokens", "flat"], ["candidate_tokens"]),
        node("GatherElements", ["candidate_tokens", "places"], ["ids"], axis=-1),
        node("LogSoftmax", ["logits"], ["all_log_probabilities"], axis=-1),
        node("GatherElements", ["all_log_probabilities", "ids"], ["log_probabilities"], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "likeliest",
        [
            value("logits", floats, ["B", "V"]),
            value("blocks", floats, ["B", "N", "M"]),
            value("tokens", integers, ["N", "M"]),
            value("count", integers, [1]),
            value("num_blocks", integers, [1]),
        ],
        [
            value("values", floats, ["B", "K"]),
            value("ids", integers, ["B", "K"]),
            value("log_probabilities", floats, ["B", "K"]),
        ],
        [
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([0, -1]), "flat"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    Path(likeliest.GRAPH).write_bytes(build_likeliest().SerializeToString())


if __name__ == "__main__":
    main()
