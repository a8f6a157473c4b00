"""The graph that finds the likeliest tokens of some rows: `python -m model.likeliest_graph` writes the service's copy.

logits (B, V), count (1) -> values, ids, log_probabilities (B, count): a row's greatest logits, in order, of equal ones
the lowest token first. It has no weights and serves every vocabulary.
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from model.graph_parts import IR_VERSION, OPSET
from service.worker.generation import likeliest


def build_likeliest() -> onnx.ModelProto:
    floats, integers = TensorProto.FLOAT, TensorProto.INT64
    nodes = [
        helper.make_node("TopK", ["logits", "count"], ["values", "ids"], axis=-1),
        helper.make_node("LogSoftmax", ["logits"], ["all_log_probabilities"], axis=-1),
        helper.make_node("GatherElements", ["all_log_probabilities", "ids"], ["log_probabilities"], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "likeliest",
        [
            helper.make_tensor_value_info("logits", floats, ["B", "V"]),
            helper.make_tensor_value_info("count", integers, [1]),
        ],
        [
            helper.make_tensor_value_info("values", floats, ["B", "K"]),
            helper.make_tensor_value_info("ids", integers, ["B", "K"]),
            helper.make_tensor_value_info("log_probabilities", floats, ["B", "K"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    Path(likeliest.GRAPH).write_bytes(build_likeliest().SerializeToString())


if __name__ == "__main__":
    main()
