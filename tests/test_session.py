"""service.worker.session: interface checks, providers, threads and quotas, on a graph of one operator."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.errors import BundleError, ConfigError
from service.worker import session as session_module
from service.worker.bundle import GraphSpec, TensorSpec
from service.worker.machine import available_threads, cores_for, has_vnni
from service.worker.session import Session, available_provider, runtime_facts

SPEC = GraphSpec(
    file="double.onnx",
    inputs=(TensorSpec(name="x", dtype="float32", axes=("rows", 2)),),
    outputs=(TensorSpec(name="y", dtype="float32", axes=("rows", 2)),),
)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = x + x."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 2]) for name in ("x", "y"))
    made = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    path = tmp_path / SPEC.file
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def spec_with(side: str, **changes: Any) -> GraphSpec:
    tensor = TensorSpec(
        **({"name": "x" if side == "inputs" else "y", "dtype": "float32", "axes": ("rows", 2)} | changes)
    )
    sides = {"inputs": SPEC.inputs, "outputs": SPEC.outputs} | {side: (tensor,)}
    return GraphSpec(file=SPEC.file, **sides)


def test_runs_any_number_of_rows(graph: Path) -> None:
    session = Session(graph, SPEC)
    for num_rows in (1, 3):
        x = np.arange(2 * num_rows, dtype=np.float32).reshape(num_rows, 2)
        (y,) = session.run({"x": x})
        np.testing.assert_array_equal(y, x + x)


def test_the_caller_says_which_outputs_to_fetch(graph: Path) -> None:
    x = np.ones((1, 2), np.float32)
    assert len(Session(graph, SPEC).run({"x": x}, ["y"])) == 1
    assert len(Session(graph, SPEC).run({"x": x}, ["y", "y"])) == 2


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "z"}, r"\['z'\]"),
        ({"dtype": "int64"}, "is float32, expected int64"),
        ({"axes": ("rows", 3)}, r"has axes \['rows', 2\], expected \['rows', 3\]"),
        ({"axes": (8, 2)}, r"expected \[8, 2\]"),
        ({"axes": ("rows",)}, r"expected \['rows'\]"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    graph: Path, side: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        Session(graph, spec_with(side, **changes))


def test_a_broken_graph_is_a_bundle_error_that_names_it(graph: Path) -> None:
    graph.write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"double.onnx cannot be loaded by ONNX Runtime"):
        Session(graph, SPEC)


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(ConfigError, match="provider is 'tpu', it must be one of cpu, cuda"):
        available_provider("tpu", fallback=True)


def test_a_provider_that_is_not_installed_is_refused_unless_fallback_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError, match="provider 'cuda' is not in the installed onnxruntime"):
        available_provider("cuda", fallback=False)
    assert available_provider("cuda", fallback=True) == "cpu"
    assert available_provider("cpu", fallback=False) == "cpu"


def test_a_provider_that_cannot_start_is_refused_unless_fallback_is_allowed(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists CUDA as soon as it is compiled in, and quietly runs on the CPU where there is no driver."""
    monkeypatch.setattr(session_module.ort, "get_available_providers", lambda: list(session_module.PROVIDERS.values()))
    monkeypatch.setattr(session_module, "_with_cpu", lambda provider: ["CPUExecutionProvider"])
    with pytest.raises(ConfigError, match="provider 'cuda' could not start"):
        Session(graph, SPEC, provider="cuda")
    assert Session(graph, SPEC, provider="cuda", fallback=True).provider == "cpu"


def test_norms_are_not_fused_with_additions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimizer makes of a residual and its norm, read back: fused they would be seven times slower."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 8])
    ones = onnx.numpy_helper.from_array(np.ones(8, np.float32), "ones")
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Add", ["x", "r"], ["sum"])]
    nodes.append(helper.make_node("LayerNormalization", ["sum", "ones", "ones"], ["y"]))
    graph = helper.make_graph(nodes, "residual", [x], [y], [ones])
    path = tmp_path / "residual.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    axes: tuple[int | str, ...] = ("batch", "length", 8)
    inputs, outputs = ((TensorSpec(name=name, dtype="float32", axes=axes),) for name in ("x", "y"))
    options = session_module._options(1, spin=False, saturates=False)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    monkeypatch.setattr(session_module, "_options", lambda *_, **__: options)
    Session(path, GraphSpec(file=path.name, inputs=inputs, outputs=outputs))
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert operators == {"Relu", "Add", "LayerNormalization"}


def limited(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V1 = {"proc/self/cgroup": "4:memory:/\n3:cpu,cpuacct:/docker/abc\n"}
QUOTAS = {
    "none": ({}, 8),
    "v2 without limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
    "v2 three": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
    "v2 two and a half": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
    "v2 half": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
    "v2 limit of a parent": (
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
        },
        2,
    ),
    "v2 seen from inside": ({"proc/self/cgroup": "0::/pod/box\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
    "v1 two": (
        V1
        | {
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "v1 without limit": (
        V1 | {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
        8,
    ),
    "more than the affinity": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_threads_are_the_affinity_cut_to_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    files, expected = QUOTAS[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert available_threads(limited(tmp_path, files)) == expected


@pytest.mark.parametrize(
    ("num_threads", "pid", "expected"),
    [
        (3, 6, [{2}, {5}, {7}]),
        (3, 7, [{5}, {7}, {2}]),
        (2, 6, [{2, 5, 7}] * 2),
        (4, 6, [{2, 5, 7}] * 4),
    ],
)
def test_threads_have_cores_of_their_own_where_they_are_as_many(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, pid: int, expected: list[set[int]]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7, 2, 5})
    monkeypatch.setattr(os, "getpid", lambda: pid)
    assert cores_for(num_threads) == expected


def test_threads_of_this_machine_are_at_least_one() -> None:
    assert 1 <= available_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", True),
        ("flags\t\t: fpu avx2 avx_vnni", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: avx512_vnni", False),
    ],
)
def test_vnni_is_what_the_processor_says(tmp_path: Path, line: str, expected: bool) -> None:
    assert has_vnni(limited(tmp_path, {"proc/cpuinfo": f"processor\t: 0\n{line}\n"})) is expected


def test_without_a_word_of_the_system_there_is_no_vnni(tmp_path: Path) -> None:
    assert not has_vnni(tmp_path)


@pytest.mark.parametrize("vnni", [has_vnni(), False], ids=["this processor", "without VNNI"])
def test_products_of_bytes_are_summed_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool) -> None:
    """The greatest there are, which saturate in 16 bits; "without VNNI" shows that the other way is right, too."""
    monkeypatch.setattr(session_module, "has_vnni", lambda: vnni)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 32])
    constants = [
        numpy_helper.from_array(np.full((64, 32), 127, np.int8), "weight"),
        numpy_helper.from_array(np.float32(1), "step"),
        numpy_helper.from_array(np.uint8(0), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["codes"]),
        helper.make_node(
            "MatMulIntegerToFloat", ["codes", "weight", "step", "step", "zero"], ["y"], domain="com.microsoft"
        ),
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "product", [x], [y], constants)
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), tmp_path / "product.onnx")
    spec = GraphSpec(
        file="product.onnx",
        inputs=(TensorSpec(name="x", dtype="float32", axes=("rows", 64)),),
        outputs=(TensorSpec(name="y", dtype="float32", axes=("rows", 32)),),
    )
    for num_rows in (1, 3, 16):
        (product,) = Session(tmp_path / "product.onnx", spec).run({"x": np.full((num_rows, 64), 255, np.float32)})
        np.testing.assert_array_equal(product, np.full((num_rows, 32), 64 * 255 * 127, np.float32))


def test_runtime_facts_name_the_version() -> None:
    assert runtime_facts()["onnxruntime"] == session_module.ort.__version__


def test_a_binding_reads_and_writes_the_memory_that_it_was_given(graph: Path) -> None:
    binding = Session(graph, SPEC).bind()
    x, y = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    binding.bind_input("x", x)
    binding.bind_output("y", y)
    for value in (1.0, 5.0):
        x[:] = value
        binding.run()
        assert (y == 2 * value).all()
    shorter, written = np.full((1, 2), 7, np.float32), np.zeros((1, 2), np.float32)
    binding.bind_input("x", shorter)  # bound anew
    binding.bind_output("y", written)
    binding.run()
    assert written.tolist() == [[14, 14]]
    assert (y == 10).all()


def test_a_binding_keeps_what_it_is_bound_to(graph: Path) -> None:
    binding = Session(graph, SPEC).bind()
    binding.bind_input("x", np.full((1000, 2), 3, np.float32))
    y = np.zeros((1000, 2), np.float32)
    binding.bind_output("y", y)
    _others = [np.zeros((1000, 2), np.float32) for _ in range(20)]  # would take the place of what was freed
    binding.run()
    assert (y == 6).all()


def test_memory_with_gaps_cannot_be_bound(graph: Path) -> None:
    with pytest.raises(ValueError, match="x: only contiguous memory"):
        Session(graph, SPEC).bind().bind_input("x", np.zeros((4, 4), np.float32)[:, :2])
