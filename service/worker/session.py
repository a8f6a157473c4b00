"""The only file that imports onnxruntime: opens a graph, checks its interface, runs it.

Every choice about the runtime is made here: threads, execution provider, optimizer, memory. Knows nothing of what a
graph computes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from service.errors import BundleError, ConfigError
from service.worker.bundle import GraphSpec, TensorSpec
from service.worker.machine import has_vnni

_log = logging.getLogger("attnd.session")

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
DTYPES = {"tensor(float)": "float32", "tensor(int32)": "int32", "tensor(int64)": "int64"}
# The optimizer makes SkipLayerNormalization of Add and LayerNormalization, and on the CPU that one operator takes seven
# times as long as the two (measured with onnxruntime 1.31: a quarter of an encoder's time).
SPIN_US = "1000"
DISABLED_OPTIMIZERS = ("SkipLayerNormFusion",)


class Session:
    """One graph, ready to run. Thread-safe: with `threads=1` each caller's thread computes its own run.

    Raises BundleError if the graph cannot be loaded or is not what `spec` says, ConfigError if `provider` is not
    available and `fallback` (to the CPU) is not allowed. `seven_bits`: no int8 weight of the graph is beyond -64 to 63.
    `arena`: keep the memory of a run for the next, as much as the largest took; for graphs whose inputs are bounded.
    """

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        *,
        threads: int = 1,
        provider: str = "cpu",
        fallback: bool = False,
        spin: bool = False,
        seven_bits: bool = False,
        arena: bool = False,
    ) -> None:
        self.threads = threads
        self.provider = available_provider(provider, fallback=fallback)
        self._outputs = [tensor.name for tensor in spec.outputs]
        try:
            self._session = ort.InferenceSession(
                str(path),
                _options(threads, spin=spin, saturates=not (seven_bits or has_vnni()), arena=arena),
                providers=_with_cpu(self.provider),
                disabled_optimizers=list(DISABLED_OPTIMIZERS),
            )
        except Exception as error:  # the binding has no common base class
            raise BundleError(f"{path} cannot be loaded by ONNX Runtime {ort.__version__}: {error}") from error
        self._check_provider(fallback=fallback)
        problems = [
            *differences("input", spec.inputs, self._session.get_inputs()),
            *differences("output", spec.outputs, self._session.get_outputs()),
        ]
        if problems:
            raise BundleError(f"{path} is not what its manifest says: {'; '.join(problems)}")

    def run(self, feeds: Mapping[str, NDArray[Any]], fetch: Sequence[str] | None = None) -> list[NDArray[Any]]:
        """The outputs named by `fetch`, or all in the order of the spec. Releases the GIL while it computes.

        An output that is not fetched is computed all the same, and not copied out.
        """
        outputs: list[NDArray[Any]] = self._session.run(self._outputs if fetch is None else list(fetch), dict(feeds))
        return outputs

    def bind(self) -> "Binding":
        return Binding(self._session)

    def _check_provider(self, *, fallback: bool) -> None:
        """ONNX Runtime itself falls back with no more than a line in its log, for instance when a driver is missing."""
        active = self._session.get_providers()[0]
        if active == PROVIDERS[self.provider]:
            return
        if not fallback:
            raise ConfigError(
                f"provider {self.provider!r} could not start, ONNX Runtime chose {active}", param="provider"
            )
        _log.warning("provider %s could not start; running on the CPU", self.provider)
        self.provider = "cpu"


class Binding:
    """A graph's inputs and outputs as places in memory, bound once and run any number of times. One thread at a time.

    An output may be bound to the memory of an input, for operators that write in place. All memory is the CPU's.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._kept: dict[str, NDArray[Any]] = {}  # what is bound must not be freed

    def bind_input(self, name: str, array: NDArray[Any]) -> None:
        """`array` is contiguous; its content is read when the graph runs. A name bound before is bound anew.

        Raises ValueError for an array that has gaps.
        """
        self._binding.bind_input(*self._place(name, array))

    def bind_output(self, name: str, array: NDArray[Any]) -> None:
        """`array` is contiguous, of the very shape that the run will give, and overwritten by it."""
        self._binding.bind_output(*self._place(name, array))

    def run(self) -> None:
        """Releases the GIL while it computes. Raises what the runtime raises."""
        self._session.run_with_iobinding(self._binding)

    def _place(self, name: str, array: NDArray[Any]) -> tuple[Any, ...]:
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: only contiguous memory can be bound")
        self._kept[name] = array
        return name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


def available_provider(wanted: str, *, fallback: bool) -> str:
    """`wanted`, or "cpu" where the installed onnxruntime lacks it and `fallback` is true. Raises ConfigError."""
    if wanted not in PROVIDERS:
        raise ConfigError(f"provider is {wanted!r}, it must be one of {', '.join(PROVIDERS)}", param="provider")
    installed = ort.get_available_providers()
    if PROVIDERS[wanted] in installed:
        return wanted
    if not fallback:
        raise ConfigError(
            f"provider {wanted!r} is not in the installed onnxruntime: {', '.join(installed)}", param="provider"
        )
    _log.warning("provider %s is not installed; running on the CPU", wanted)
    return "cpu"


def _with_cpu(provider: str) -> list[str]:
    """Operators that an accelerator lacks run on the CPU, so that provider always stands last."""
    return list(dict.fromkeys((PROVIDERS[provider], PROVIDERS["cpu"])))


def _options(threads: int, *, spin: bool, saturates: bool, arena: bool = False) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    # A spinning thread waits for its next share of work by burning a core that the gateway could use. Long enough to
    # bridge the gaps between a graph's nodes, and no longer.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    # x86 without VNNI adds two products of uint8 and int8 in 16 bits. With this the weights become uint8: exact, but
    # two and a half times as slow where there is VNNI (onnxruntime 1.31), which the runtime does not look for.
    options.add_session_config_entry("session.x64quantprecision", "1" if saturates else "0")
    # In the graph's own order. By default what only leads to a second output runs last, and all layers' attention
    # weights are kept until then (measured: a fifth more time for 512 tokens, in fresh memory).
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    # Memory plans are kept for every new shape, and packed batches are of all shapes. The arena keeps what the largest
    # run took; without it the system takes back what a run has freed and hands out new pages in the next.
    options.enable_cpu_mem_arena = arena
    options.enable_mem_pattern = False
    return options


def differences(side: str, specs: Sequence[TensorSpec], actual: Sequence[Any]) -> list[str]:
    """In words, how the graph's inputs or outputs differ from the manifest's: names, order, types, axes."""
    expected = [tensor.name for tensor in specs]
    found = [tensor.name for tensor in actual]
    if expected != found:
        return [f"{side}s are {found}, expected {expected}"]
    return [
        problem
        for spec, tensor in zip(specs, actual, strict=True)
        for problem in _tensor_differences(side, spec, tensor)
    ]


def _tensor_differences(side: str, spec: TensorSpec, actual: Any) -> Iterator[str]:
    if (dtype := DTYPES.get(actual.type, actual.type)) != spec.dtype:
        yield f"{side} {spec.name} is {dtype}, expected {spec.dtype}"
    if tuple(actual.shape) != spec.axes:
        yield f"{side} {spec.name} has axes {list(actual.shape)}, expected {list(spec.axes)}"


def runtime_facts() -> dict[str, str]:
    """For build information: the runtime's version and what it can run on."""
    return {
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "providers": ",".join(ort.get_available_providers()),
    }
