"""Runs what was built, on this host, through TVM's virtual machine."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from paring.backends.build import Built, buffer_shape, kernel_name
from paring.backends.manifest import REBUILD
from paring.backends.memory import ALIGNMENT, Plan, Slot, Step
from paring.backends.threads import THREADS
from paring.ir.errors import ArgumentError, ArtifactError, InputError, a_kind
from paring.ir.graph import Loc, Node
from paring.ir.liveness import root
from paring.ir.op import Array
from paring.ir.ops.core import Input
from paring.ir.types import TensorType
from paring.ir.work import integer_macs


@dataclass(frozen=True)
class KernelTime:
    """One kernel call of a network: `bytes` counts operands read and result written once, `ns` is the median.

    `integer_macs`: those of its multiply-adds that are of 8-bit integers.
    """

    name: str
    kind: str
    loc: Loc | None
    macs: int
    bytes: int
    ns: float
    integer_macs: int = 0


@dataclass(frozen=True)
class _Output:
    """How an output is made of the buffer it is found in; `fresh` where nobody else holds that."""

    slot: Slot
    fresh: bool
    type: TensorType
    elements: int

    def place(self, value: Array) -> Array:
        value = value if self.fresh else np.array(value, self.type.dtype, order="C")
        return value.ravel()[: self.elements].reshape(self.type.shape)


def _outputs(planned: Plan) -> list[_Output]:
    slots = planned.outputs
    fresh = [slot.space == "output" and slot not in slots[:position] for position, slot in enumerate(slots)]
    return [_Output(slot, f, n.type, n.type.size) for slot, f, n in zip(slots, fresh, planned.graph.outputs, strict=True)]


class Network:
    """What can be called: checks inputs, takes turns, refuses after `close`. Subclasses run the flat tensors."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self._inputs = [(np.dtype(n.type.dtype), n.type.shape) for n in built.graph.inputs]
        self._constants = [op.value for op in built.plan.weights]
        self._outputs = _outputs(built.plan)
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Outputs for inputs, as fresh arrays. Calls from several threads take turns.

        Raises InputError for arrays that do not match, and after `close`.
        """
        self._check(inputs)
        with self._lock:
            self._check_open()
            results = self._call(inputs)
        spaces = {"input": inputs, "weight": self._constants, "output": results}
        return [out.place(spaces[out.slot.space][out.slot.position]) for out in self._outputs]

    def _check(self, arrays: Sequence[Array]) -> None:
        """Raise InputError unless the arrays match in number, kind, dtype and shape; byte order and strides may be any."""
        if len(arrays) != len(self._inputs):
            raise InputError(f"expected {len(self._inputs)} inputs, got {len(arrays)}")
        for position, (wanted, array) in enumerate(zip(self._inputs, arrays, strict=True)):
            if not isinstance(array, np.ndarray):
                raise InputError(f"{self._label(position)} is {a_kind(array)}", hint="give a numpy array")
            if array.shape != wanted[1] or (array.dtype != wanted[0] and array.dtype.newbyteorder("=") != wanted[0]):
                found = f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
                raise InputError(f"{self._label(position)} is {found}, expected {self.built.graph.inputs[position].type}")

    def _label(self, position: int) -> str:
        op = self.built.graph.inputs[position].op
        return f"input {position} ({op.label})" if isinstance(op, Input) else f"input {position}"

    def _call(self, inputs: Sequence[Array]) -> list[Array]:
        """The computed outputs, flat, in the order of the plan's results."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back code and weights. Safe to call twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._release()

    def _release(self) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the network is closed", hint="compile or load it again")
        if self._pid != os.getpid():
            raise InputError(
                "this network belongs to the process that this one was forked from",
                why="threads do not survive a fork",
                hint="load the saved network in the child, or start it with the 'spawn' method",
            )

    def __reduce__(self) -> NoReturn:
        raise ArgumentError("a compiled network cannot be pickled", hint="save it with .save() and load the artifact")

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Executable(Network):
    """A network loaded into this process."""

    def __init__(self, built: Built) -> None:
        super().__init__(built)
        self._module = load_library(built.library)
        self._machine = relax.VirtualMachine(self._module, tvm.cpu(0))
        self._main = self._machine["main"]
        self._weights = [flat_tensor(op.value) for op in built.plan.weights]
        self._staging: dict[int, tuple[Any, Array]] = {}

    def _call(self, inputs: Sequence[Array]) -> list[Array]:
        arguments = [self._argument(position, array) for position, array in enumerate(inputs)]
        results = THREADS.run(lambda: self._main(*arguments, *self._weights))
        return [np.from_dlpack(tensor) for tensor in results]

    def _argument(self, position: int, array: Array) -> Any:
        """The array's own memory where kernels can read it as it lies, else a copy in a buffer that is kept for this input."""
        if array.size and array.flags.carray and array.dtype.isnative and array.ctypes.data % ALIGNMENT == 0:
            return tvm.runtime.from_dlpack(array.ravel())
        if position not in self._staging:
            type = self.built.graph.inputs[position].type
            tensor = tvm.runtime.empty(buffer_shape(type), type.dtype)
            self._staging[position] = tensor, np.from_dlpack(tensor)[: type.size].reshape(type.shape)
        tensor, view = self._staging[position]
        np.copyto(view, array)
        return tensor

    def _release(self) -> None:
        del self._main, self._machine, self._module
        self._weights, self._staging = [], {}
        # What the machine allocated stays in a pool of the process: give back what nobody holds.
        tvm.get_global_func("vm.builtin.memory_manager.clear")()

    def trace(self, inputs: Sequence[Array]) -> Iterator[tuple[Step, Array]]:
        """Run kernel by kernel: each step of the plan with its result, as a fresh array."""
        for step, tensors, call in self._steps(inputs):
            THREADS.run(call)
            flat = np.from_dlpack(tensors[-1])[: step.node.type.size]
            yield step, flat.reshape(step.node.type.shape).copy()

    def profile(self, inputs: Sequence[Array], repeats: int = 10) -> list[KernelTime]:
        """Median times of the kernels, called one by one in the order of the plan on the network's own data."""
        if type(repeats) is not int or repeats < 1:
            raise ArgumentError(f"the number of repeats is a positive int, not {repeats!r}")
        steps = list(self._steps(inputs))

        def measure() -> list[list[int]]:
            times: list[list[int]] = [[] for _ in steps]
            for turn in range(repeats + 1):
                for (_, _, call), found in zip(steps, times, strict=True):
                    start = time.perf_counter_ns()
                    call()
                    if turn:
                        found.append(time.perf_counter_ns() - start)
            return times

        with self._lock:
            self._check_open()
            times = THREADS.run(measure)
        return [self._kernel_time(step, median(found)) for (step, _, _), found in zip(steps, times, strict=True)]

    def _kernel_time(self, step: Step, ns: float) -> KernelTime:
        node = step.node
        operands = {root(operand) for operand in step.operands}
        moved = node.type.bytes + sum(operand.type.bytes for operand in operands)
        macs = node.macs
        kind = getattr(node.op, "kind", node.op.name)
        return KernelTime(kernel_name(step, self.built.target), kind, node.loc, macs, moved, ns, integer_macs(node))

    def _steps(self, inputs: Sequence[Array]) -> Iterator[tuple[Step, list[Any], Callable[[], Any]]]:
        """Each step with its tensors (operands, then the result) in an arena of its own, and the call of its kernel."""
        planned = self.built.plan
        self._check(inputs)
        self._check_open()
        arena = np.from_dlpack(tvm.runtime.empty((planned.peak_bytes + 1,), "uint8"))
        fixed = {"weight": self._weights, "input": [flat_tensor(array) for array in inputs]}
        made: dict[Node, Any] = {}

        def tensor(node: Node) -> Any:
            node, slot = root(node), planned.slots[node]
            if slot.space in fixed:
                return fixed[slot.space][slot.position]
            if node not in made:
                (count,), dtype = buffer_shape(node.type), node.type.dtype
                made[node] = tvm.runtime.empty((count,), dtype)
                if slot.space == "arena":
                    view = np.frombuffer(arena, dtype, count, slot.position)
                    made[node] = tvm.runtime.from_dlpack(view)
            return made[node]

        for step in planned.order:
            tensors = [tensor(node) for node in (*step.operands, step.node)]
            try:
                kernel = self._module.get_function(kernel_name(step, self.built.target), query_imports=True)
            except AttributeError as error:
                raise ArtifactError("the kernels have names of another version of paring", hint=REBUILD) from error
            yield step, tensors, functools.partial(kernel, *tensors)


def load_library(library: bytes) -> Any:
    """Load these very bytes: from a folder that nobody else can write, whose name is gone once they are mapped."""
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        path = Path(folder) / "lib.so"
        path.write_bytes(library)
        # Not kept alive by TVM itself: the library is unmapped with the last reference.
        return tvm_ffi.load_module(path, keep_module_alive=False)


def flat_tensor(array: Array) -> Any:
    """A flat copy of an array, aligned as kernels want it."""
    tensor = tvm.runtime.empty((max(array.size, 1),), array.dtype.name)
    np.copyto(np.from_dlpack(tensor)[: array.size].reshape(array.shape), array)
    return tensor
