"""The passes of TVM that kernels go through: they leave what TVM's own pipeline leaves, and each is needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import tvm
import tvm_ffi
from quantized_graphs import quantized_graph, together
from tvm import tirx

from paring.backends.build import build, emit, kernel_name
from paring.backends.codegen import PASSES, lower, write_object
from paring.backends.families import lower_region
from paring.backends.kernel import tvm_target
from paring.backends.memory import plan
from paring.backends.targets import TARGETS, Target
from paring.ir import Graph, Input, Node
from paring.ir.errors import InternalError
from paring.ir.ops import OPS
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline, pipeline

# It writes down again what two simplifications leave differently: seen in few kernels.
SELDOM = {"s_tir.StmtSimplify"}


def lowered(target: Target, seeds: Sequence[int]) -> Graph:
    graph = together([quantized_graph(np.random.default_rng((7, seed)), 3)[0] for seed in seeds])
    return run_pipeline(graph, parse_pipeline(pipeline(target.pipeline, target.pipeline_options()))).graph


def kernels(target: Target, seeds: Sequence[int]) -> dict[str, tirx.PrimFunc]:
    """Those of random networks on 8 bits, of which each also has kernels on floats."""
    steps = {kernel_name(step, target): step for step in plan(lowered(target, seeds)).order}
    return {name: emit(step, target, name) for name, step in steps.items()}


def by_tvm(name: str, function: tirx.PrimFunc, machine: tvm.target.Target) -> tvm.IRModule:
    """A kernel through all passes of TVM's own pipeline but the one that merges buffers, its checks taken out."""
    passes, finalize, _ = tirx.get_default_tir_pipeline(machine)
    bound = tirx.transform.BindTarget(machine.with_host(machine))(tvm.IRModule({name: function}))
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        return finalize()(tirx.transform.SkipAssert()(passes(bound)))


@pytest.mark.parametrize("name", ["x86-vnni", "x86-avx2", "arm-neon"])
def test_the_passes_leave_what_the_pipeline_of_tvm_leaves(name: str) -> None:
    target = TARGETS[name]
    machine = tvm_target(target)
    for kernel, function in kernels(target, range(5)).items():
        assert tvm_ffi.structural_equal(lower(kernel, function, machine), by_tvm(kernel, function, machine)), kernel


def test_the_passes_leave_what_the_pipeline_leaves_of_every_operator() -> None:
    target = TARGETS["x86-vnni"]
    machine, rng = tvm_target(target), np.random.default_rng(0)
    for name in sorted(set(OPS) - {"input", "const", "region"}):
        op, types = OPS[name].samples(rng)[-1]
        inputs = tuple(Node(Input(f"a{i}", t.dtype, t.shape)) for i, t in enumerate(types))
        function = lower_region(Graph(inputs, (Node(op, inputs),)), target, name)
        assert tvm_ffi.structural_equal(lower(name, function, machine), by_tvm(name, function, machine)), name


def test_a_list_without_one_of_the_passes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["x86-vnni"]
    machine = tvm_target(target)
    functions = kernels(target, range(8))
    wanted = {kernel: lower(kernel, function, machine) for kernel, function in functions.items()}

    def changes(kernel: str, function: tirx.PrimFunc) -> bool:
        try:
            return not tvm_ffi.structural_equal(lower(kernel, function, machine), wanted[kernel])
        except (RuntimeError, ValueError):
            return True

    for left_out in PASSES:
        monkeypatch.setattr("paring.backends.codegen.PASSES", tuple(p for p in PASSES if p is not left_out))
        found = any(changes(kernel, function) for kernel, function in functions.items())
        assert found or left_out.info.name in SELDOM, left_out.info.name


def test_of_kernels_in_one_module_the_one_at_fault_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["x86-avx2"]
    graph = lowered(target, range(1))
    fault = sorted(kernel_name(step, target) for step in plan(graph).order)[1]

    def refuse(modules: list[tvm.IRModule], machine: tvm.target.Target, path: str) -> None:
        if any(fault in variable.name_hint for module in modules for variable in module.functions):
            raise RuntimeError("LLVM says no")
        write_object(modules, machine, path)

    monkeypatch.setattr("paring.backends.build.MODULES", 1)
    monkeypatch.setattr("paring.backends.build.write_object", refuse)
    with pytest.raises(InternalError, match=f"the kernel {fault} cannot be compiled"):
        build(graph, target)
