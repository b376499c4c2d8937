"""From a lowered graph to a library: each distinct kernel once, and a Relax VM function `main` that follows the plan.

`main(inputs..., weights...)` takes flat tensors and returns a tuple of flat tensors. Its bytecode is written directly:
one arena for all that is in between, allocated from TVM's pool, and a tensor of that arena for each kernel's result.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import tvm
from tvm import relax, tirx
from tvm.relax import vm_build
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.support import cc

from paring.backends.codegen import lower, write_object
from paring.backends.families import lower_region
from paring.backends.kernel import tvm_target
from paring.backends.memory import Plan, Step, plan, storage_bytes
from paring.backends.targets import Target
from paring.ir.errors import InternalError, ParingError, TargetError
from paring.ir.graph import Graph, Node
from paring.ir.liveness import root
from paring.ir.text import show
from paring.ir.types import TensorType

Progress = Callable[[int, int, str], None]

COMPILERS = ("c++", "g++", "clang++")
# Kernels are dealt out to so many modules of LLVM: a module takes 10 ms on top of its kernels, but is compiled by one thread.
# The same number on each machine, so that the library has the same bytes.
MODULES = 32


@dataclass(frozen=True, eq=False)
class Built:
    """A compiled network: its library as bytes, with the plan that says what goes in and what comes out."""

    target: Target
    plan: Plan
    library: bytes

    @property
    def graph(self) -> Graph:
        return self.plan.graph


def build(graph: Graph, target: Target, progress: Progress | None = None) -> Built:
    """Compile a lowered graph (Input, Const, Reshape, and one kernel for each Region or other op).

    `progress(done, total, name)` is called as kernels are emitted and compiled. Raises TargetError without a linker.
    """
    linker = find_linker(target)
    planned = plan(graph)
    kernels = {kernel_name(step, target): step for step in planned.order}
    report = _Reporter(progress, 2 * len(kernels))
    functions: dict[str, tirx.PrimFunc] = {}
    for name, step in kernels.items():
        functions[name] = emit(step, target, name)
        report(name)
    with tempfile.TemporaryDirectory(prefix="paring-build-") as folder:
        objects = _compile(functions, kernels, target, Path(folder), report)
        library = _link(_Main(planned, target).write(), objects, target, linker, Path(folder))
        return Built(target, planned, library.read_bytes())


@contextmanager
def _blamed(name: str, step: Step) -> Iterator[None]:
    """What TVM throws over a kernel is our mistake; the message has the kernel with it."""
    try:
        yield
    except ParingError:
        raise
    except Exception as error:
        raise InternalError(
            f"the kernel {name} cannot be compiled",
            where=str(step.node.loc or ""),
            why=str(error)[-2000:],
            hint=f"please report it, with the kernel:\n{show(step.body)}",
        ) from error


class _Reporter:
    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, name: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, name)


def kernel_name(step: Step, target: Target) -> str:
    """A name for people that starts with the region's kind and ends in the digest of body and target."""
    kind = getattr(step.node.op, "kind", step.node.op.name)
    # Where the code runs and who links it changes nothing in the kernel itself.
    machine = replace(target, name="", device="", linker="", linker_package="", pipeline="")
    text = f"{show(step.body, locs=False)}{machine}{step.in_place}"
    readable = re.sub(r"\W+", "_", kind, flags=re.ASCII)[:40]
    return f"{readable}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def emit(step: Step, target: Target, name: str) -> tirx.PrimFunc:
    """The kernel of one step as a PrimFunc over flat buffers."""
    with _blamed(name, step):
        function = lower_region(step.body, target, name)
    return function.with_attr("tirx.noalias", False) if step.in_place else function


def find_linker(target: Target) -> str:
    """The compiler driver that links for the target. Raises TargetError where there is none."""
    for name in (target.linker,) if target.linker else COMPILERS:
        path = shutil.which(name)
        if path:
            return path
    wanted, package = (target.linker, target.linker_package) if target.linker else ("C++ compiler", "g++")
    raise TargetError(
        f"no {wanted} on this host to link code for {target.name}",
        hint=f"install it (Debian: apt install {package})",
    )


def buffer_shape(type: TensorType) -> tuple[int]:
    """The flat buffer that holds a value: kernels take at least one element."""
    return (max(type.size, 1),)


class _Main:
    """Writes the bytecode of `main`: allocate, call the kernels in the order of the plan, return the outputs."""

    def __init__(self, planned: Plan, target: Target) -> None:
        self.planned, self.target = planned, target
        self.builder = relax.ExecBuilder()
        self.parameters = len(planned.graph.inputs) + len(planned.weights)
        self.taken = self.parameters
        self.tensors: dict[Node, int] = {}

    def write(self) -> relax.ExecBuilder:
        builder, planned = self.builder, self.planned
        with builder.function("main", self.parameters, [f"p{i}" for i in range(self.parameters)]):
            self.arena = self.storage(planned.peak_bytes) if planned.peak_bytes else -1
            for step in planned.order:
                arguments = [self.register(node) for node in (*step.operands, step.node)]
                builder.emit_call(kernel_name(step, self.target), [builder.r(a) for a in arguments])
            results = [builder.r(self.register(node)) for node in planned.results]
            builder.emit_call("vm.builtin.make_tuple", results, builder.r(self.new()))
            builder.emit_ret(builder.r(self.taken - 1))
        return builder

    def new(self) -> int:
        self.taken += 1
        return self.taken - 1

    def register(self, node: Node) -> int:
        """The register that holds a value, allocated when first asked for."""
        node = root(node)
        slot = self.planned.slots[node]
        if slot.space == "input":
            return slot.position
        if slot.space == "weight":
            return len(self.planned.graph.inputs) + slot.position
        if node not in self.tensors:
            in_arena = slot.space == "arena"
            storage = self.arena if in_arena else self.storage(storage_bytes(node))
            self.tensors[node] = self.tensor(storage, slot.position if in_arena else 0, node.type)
        return self.tensors[node]

    def storage(self, size: int) -> int:
        builder, register = self.builder, self.new()
        arguments = [builder.vm_state(), (size,), builder.imm(0), tvm.DataType("uint8"), builder.convert_constant("global")]
        builder.emit_call("vm.builtin.alloc_storage", arguments, builder.r(register))
        return register

    def tensor(self, storage: int, offset: int, type: TensorType) -> int:
        builder, register = self.builder, self.new()
        place = [builder.r(storage), builder.imm(offset), buffer_shape(type), tvm.DataType(type.dtype)]
        builder.emit_call("vm.builtin.alloc_tensor", place, builder.r(register))
        if offset:
            # alloc_tensor keeps the offset beside the pointer, where no kernel looks; this makes a view with a moved pointer.
            builder.emit_call("vm.builtin.ensure_zero_offset", [builder.r(register)], builder.r(register))
        return register


def _compile(
    functions: dict[str, tirx.PrimFunc], steps: dict[str, Step], target: Target, folder: Path, report: _Reporter
) -> list[str]:
    """Object files with all kernels, compiled side by side (TVM lets go of the GIL), in the order of their names."""
    machine = tvm_target(target)

    def compile_kernels(names: Sequence[str]) -> str:
        path = str(folder / f"{names[0]}.o")
        lowered = []
        for name in names:
            with _blamed(name, steps[name]):
                lowered.append(lower(name, functions[name], machine))
        try:
            write_object(lowered, machine, path)
        except Exception:
            # Compiled alone, the one at fault is named.
            for name, module in zip(names, lowered, strict=True):
                with _blamed(name, steps[name]):
                    write_object([module], machine, path)
            raise
        return path

    objects = []
    names = sorted(functions)
    groups = [names[first::MODULES] for first in range(min(MODULES, len(names)))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for group, path in zip(groups, pool.map(compile_kernels, groups), strict=True):
            objects.append(path)
            for name in group:
                report(name)
    return objects


def _link(builder: relax.ExecBuilder, objects: Sequence[str], target: Target, linker: str, folder: Path) -> Path:
    """The bytecode and the kernels as one library."""
    # The executable wants an LLVM module of its own to know that it lies in a library; the kernels are objects beside it.
    executable = vm_build._vmlink(builder, tvm_target(target), tvm.IRModule({"nothing": _nothing()}))
    library = folder / "lib.so"
    try:
        compiler = cc.cross_compiler(linker)
        executable.export_library(str(library), fcompile=compiler, addons=list(objects), workspace_dir=str(folder))
    except (RuntimeError, OSError) as error:
        raise TargetError(f"{linker} cannot link code for {target.name}", why=str(error)[-2000:]) from error
    return library


def _nothing() -> tirx.PrimFunc:
    with IRBuilder() as builder, T.prim_func():
        T.func_name("nothing")
        T.func_attr({"global_symbol": "nothing"})
        T.evaluate(0)
    return builder.get()
