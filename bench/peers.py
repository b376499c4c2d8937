"""The systems that are timed, as data. Each prepares a model once and then runs one inference per call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Inputs = tuple[torch.Tensor, ...]

Run = Callable[[], object]


@dataclass(frozen=True)
class Compiled:
    """A network of ours, ready to run."""

    net: Any
    inputs: Inputs

    def __call__(self) -> object:
        return self.net(*self.inputs)

    @property
    def macs(self) -> int:
        """Multiply-adds of one run."""
        return int(self.net.ledger.entries[-1].after.macs)


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[torch.nn.Module, Inputs, int], Run]
    settings: str
    precision: str = "float32"


def fastest(candidates: Iterator[Run], seconds: float = 0.5) -> Run:
    """The quickest by its best time: on a shared machine a minimum is stable where a median is not."""
    ranked: list[tuple[float, int, Run]] = []
    for run in candidates:
        run()
        best, stop = float("inf"), perf_counter() + seconds
        while perf_counter() < stop or best == float("inf"):
            start = perf_counter()
            run()
            best = min(best, perf_counter() - start)
        ranked.append((best, len(ranked), run))
    return min(ranked)[2]


def layouts(model: torch.nn.Module, inputs: Inputs) -> Iterator[tuple[torch.nn.Module, Inputs]]:
    """The model as it is and, where it takes images, in channels_last."""
    import torch

    yield model, inputs
    if inputs[0].ndim == 4:
        last = torch.channels_last
        # nn.Module.to lacks an overload for memory_format alone
        moved: Any = deepcopy(model)
        yield moved.to(memory_format=last), tuple(x.to(memory_format=last) for x in inputs)


def eager(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)

    def bind(module: torch.nn.Module, arguments: Inputs) -> Run:
        def run() -> object:
            with torch.inference_mode():
                return module(*arguments)

        return run

    return fastest(bind(module, arguments) for module, arguments in layouts(model, inputs))


def inductor(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    import torch

    config: Any = import_module("torch._inductor.config")
    torch.set_num_threads(threads)

    def bind(module: torch.nn.Module, arguments: Inputs) -> Run:
        torch.compiler.reset()
        # freezing is read from the global config while tracing, so torch.compile(options=...) would not do
        with config.patch(freezing=True, cpp_wrapper=True), torch.no_grad():
            compiled = torch.compile(module, fullgraph=True)
            compiled(*arguments)

        def run() -> object:
            with torch.no_grad():
                return compiled(*arguments)

        return run

    return fastest(bind(module, arguments) for module, arguments in layouts(model, inputs))


def ort(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    import torch

    program: Any = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    return ort_sessions(program.model_proto.SerializeToString(), inputs, threads)


def ort_sessions(content: bytes, inputs: Inputs, threads: int) -> Run:
    """An ONNX model in ONNX Runtime, its threads spinning or not."""
    runtime: Any = import_module("onnxruntime")

    def bind(spinning: str) -> Run:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", spinning)
        session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        feeds = {spec.name: x.numpy() for spec, x in zip(session.get_inputs(), inputs, strict=True)}
        return lambda: session.run(None, feeds)

    return fastest(bind(spinning) for spinning in ("1", "0"))


def openvino(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    import torch

    ov: Any = import_module("openvino")
    return openvino_request(ov.convert_model(torch.export.export(model, inputs)), inputs, threads)


def openvino_request(converted: Any, inputs: Inputs, threads: int) -> Run:
    """An OpenVINO model on the CPU, inputs and outputs shared with it."""
    ov: Any = import_module("openvino")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()
    for index, x in enumerate(inputs):
        request.set_input_tensor(index, ov.Tensor(x.numpy(), shared_memory=True))
    return lambda: list(request.infer(share_outputs=True).values())


def tvm_default(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    import torch

    tvm: Any = import_module("tvm")
    relax: Any = import_module("tvm.relax")
    importer: Any = import_module("tvm.relax.frontend.torch")
    with torch.no_grad():
        imported = importer.from_exported_program(torch.export.export(model, inputs))
    host = tvm.get_global_func("target.llvm_get_system_cpu")()
    target = tvm.target.Target({"kind": "llvm", "mcpu": host, "num-cores": threads})
    machine = relax.VirtualMachine(tvm.compile(imported, target=target), tvm.cpu())
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    main, arguments = machine["main"], [tvm.runtime.tensor(x.numpy()) for x in inputs]
    return lambda: list(main(*arguments))


def paring(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
    product: Any = import_module("paring")
    if not hasattr(product, "compile"):
        raise ImportError("paring is not importable as a product here: it has no 'compile'")
    product.set_num_threads(threads)
    return Compiled(product.compile(model, inputs, target="native"), inputs)


_TABLE = (
    Peer("paring", paring, "target native, no tuning"),
    Peer("eager", eager, "inference_mode; contiguous or channels_last, whichever is faster"),
    Peer("inductor", inductor, "freezing, cpp_wrapper; contiguous or channels_last, whichever is faster"),
    Peer("ort", ort, "torch.onnx.export, all graph optimisations; spinning on or off, whichever is faster"),
    Peer("openvino", openvino, "from torch.export; LATENCY, f32, INFERENCE_NUM_THREADS; shared inputs and outputs"),
    Peer("tvm-default", tvm_default, "Relax's own pipeline, LLVM for the host's CPU, no tuning"),
)

PEERS: dict[str, Peer] = {peer.name: peer for peer in _TABLE}
