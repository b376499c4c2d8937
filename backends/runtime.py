"""Runs what was built: on this host through TVM's virtual machine, or on a device of the target's kind.

TVM keeps a thread pool for each thread that calls it and never frees one. So calls are made on the main thread or on a
single thread of ours, which all other threads hand their calls to; there are at most two pools, however many threads come.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import psutil
import tvm
import tvm.rpc
import tvm_ffi
from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from paring.backends.artifact import load
from paring.backends.build import Built, buffer_shape, kernel_name
from paring.backends.emulator import Emulator, EmulatorError
from paring.backends.kernel import tvm_target
from paring.backends.memory import ALIGNMENT, Plan, Slot, Step, root
from paring.backends.targets import Target, missing_flags
from paring.ir.errors import ArgumentError, InputError, TargetError
from paring.ir.graph import Loc, Node
from paring.ir.op import Array
from paring.ir.ops.core import Input
from paring.ir.types import TensorType

R = TypeVar("R")


@dataclass(frozen=True)
class KernelTime:
    """One kernel call of a network: `bytes` counts operands read and result written once, `ns` is the median."""

    name: str
    kind: str
    loc: Loc | None
    macs: int
    bytes: int
    ns: float


class Threads:
    """How many threads kernels use, in the whole process, and on which thread calls are made.

    TVM sizes a pool when a thread first calls it, so room for all CPUs is asked for beforehand (TVM_NUM_THREADS).
    """

    def __init__(self) -> None:
        given = os.environ.get("TVM_NUM_THREADS", "")
        cores = min(psutil.cpu_count(logical=False) or 1, len(os.sched_getaffinity(0)))
        self.count = int(given) if given.isdecimal() and int(given) else cores
        self.most = max(os.cpu_count() or 1, self.count)
        self.local = threading.local()
        self.lock = threading.Lock()
        self.helper: ThreadPoolExecutor | None = None
        os.environ["TVM_NUM_THREADS"] = str(self.most)
        # Workers tied to cores would wait for whatever else runs there, the other pool's workers first of all.
        os.environ.setdefault("TVM_BIND_THREADS", "0")

    def run(self, work: Callable[[], R]) -> R:
        """`work()` on a thread that may call TVM, with the pool set up."""
        if threading.current_thread() is threading.main_thread() or getattr(self.local, "helper", False):
            return self._configured(work)
        with self.lock:
            if self.helper is None:
                self.helper = ThreadPoolExecutor(1, "paring", initializer=lambda: setattr(self.local, "helper", True))
        return self.helper.submit(self._configured, work).result()

    def _configured(self, work: Callable[[], R]) -> R:
        if getattr(self.local, "count", 0) != self.count:
            self.local.count = self.count
            # Mode 1: on the fastest cores of the machine.
            tvm.get_global_func("runtime.config_threadpool")(1, self.count)
        return work()


THREADS = Threads()


def set_num_threads(count: int) -> None:
    """How many threads kernels use from the next call on, in this process. Raises ArgumentError out of range."""
    if type(count) is not int or not 1 <= count <= THREADS.most:
        raise ArgumentError(f"the number of threads is an int from 1 to {THREADS.most}, not {count!r}")
    THREADS.count = count


def get_num_threads() -> int:
    """How many threads kernels use; at first one for each physical core."""
    return THREADS.count


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
                raise InputError(f"{self._label(position)} is a {type(array).__name__}", hint="give a numpy array")
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
        self._weights = [_tensor(op.value) for op in built.plan.weights]
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
        macs = node.op.macs(node.type, *(operand.type for operand in node.inputs))
        kind = getattr(node.op, "kind", node.op.name)
        return KernelTime(kernel_name(step, self.built.target), kind, node.loc, macs, moved, ns)

    def _steps(self, inputs: Sequence[Array]) -> Iterator[tuple[Step, list[Any], Callable[[], Any]]]:
        """Each step with its tensors (operands, then the result) in an arena of its own, and the call of its kernel."""
        planned = self.built.plan
        self._check(inputs)
        self._check_open()
        arena = np.from_dlpack(tvm.runtime.empty((planned.peak_bytes + 1,), "uint8"))
        fixed = {"weight": self._weights, "input": [_tensor(array) for array in inputs]}
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
            kernel = self._module.get_function(kernel_name(step, self.built.target), query_imports=True)
            yield step, tensors, functools.partial(kernel, *tensors)


def load_library(library: bytes) -> Any:
    """Load these very bytes: from a folder that nobody else can write, whose name is gone once they are mapped."""
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        path = Path(folder) / "lib.so"
        path.write_bytes(library)
        # Not kept alive by TVM itself: the library is unmapped with the last reference.
        return tvm_ffi.load_module(path, keep_module_alive=False)


def _tensor(array: Array) -> Any:
    """A flat copy of an array, aligned as kernels want it."""
    tensor = tvm.runtime.empty((max(array.size, 1),), array.dtype.name)
    np.copyto(np.from_dlpack(tensor)[: array.size].reshape(array.shape), array)
    return tensor


class RemoteExecutable(Network):
    """A network on a device of another kind; `device` loads a library there and runs flat numpy arrays through its `main`."""

    def __init__(self, built: Built, device: Device) -> None:
        super().__init__(built)
        self._device = device
        self._weights = [np.resize(op.value, max(op.value.size, 1)) for op in built.plan.weights]
        with tempfile.TemporaryDirectory(prefix="paring-") as folder:
            path = Path(folder) / "lib.so"
            path.write_bytes(built.library)
            self._remote = _on_device(lambda: device.load(path))

    def _call(self, inputs: Sequence[Array]) -> list[Array]:
        # np.resize flattens and gives an empty array the one element that its buffer has.
        flat = [np.resize(array, buffer_shape(n.type)) for array, n in zip(inputs, self.built.graph.inputs, strict=True)]
        return _on_device(lambda: self._remote.run([*flat, *self._weights]))

    def _release(self) -> None:
        del self._remote, self._device
        self._weights = []


class Loaded(Protocol):
    def run(self, inputs: Sequence[Array]) -> list[Array]: ...


class Device(Protocol):
    """What runs libraries of another machine: `Emulator`, or `RpcDevice`."""

    def load(self, library: Path) -> Loaded: ...


class RpcDevice:
    """A machine that runs TVM's RPC server. The server executes whatever it is sent: reach it through a tunnel only."""

    def __init__(self, host: str, port: int) -> None:
        self.session = tvm.rpc.connect(host, port)
        self.loaded = 0

    def load(self, library: Path) -> Loaded:
        self.loaded += 1
        name = f"paring{self.loaded}.so"
        self.session.upload(str(library), target=name)
        return _RpcModule(self.session, name)


class _RpcModule:
    def __init__(self, session: Any, name: str) -> None:
        self.device = session.cpu(0)
        self.machine = relax.VirtualMachine(session.load_module(name), self.device)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.machine.set_input("main", *[tvm.runtime.tensor(array, self.device) for array in inputs])
        self.machine.invoke_stateful("main")
        return [tensor.numpy() for tensor in self.machine.get_outputs("main")]


def _on_device(work: Callable[[], R]) -> R:
    try:
        return work()
    except (EmulatorError, RuntimeError, OSError) as error:
        raise TargetError("the device failed", why=str(error)) from error


def open_executable(source: Built | str | Path, target: Target | None = None, device: str | Device | None = None) -> Network:
    """Load a built network, or a saved one, where it is to run.

    `device` is "host", "emulator", "rpc://HOST:PORT" or an object that loads libraries; by default what the target names.
    Raises TargetError where the target cannot run, ArgumentError for an unknown device, ArtifactError for a bad artifact.
    """
    built = source if isinstance(source, Built) else load(source).built
    target = target or built.target
    if device is None:
        device = target.device
    if not isinstance(device, str):
        return RemoteExecutable(built, device)
    if device == "host":
        missing = missing_flags(target)
        if missing:
            raise TargetError(f"this host cannot run code for {target.name}", why=f"it lacks {', '.join(missing)}", hint=_FOREIGN)
        return Executable(built)
    if device == "emulator":
        return RemoteExecutable(built, _on_device(Emulator))
    if device == "":
        raise TargetError(f"a network for {target.name} does not run on this host", hint=_FOREIGN)
    match = re.fullmatch(r"rpc://(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", device)
    if not match:
        raise ArgumentError(f"unknown device {device!r}", hint='"host", "emulator" or "rpc://HOST:PORT"')
    return RemoteExecutable(built, _on_device(lambda: RpcDevice(match[1].strip("[]"), int(match[2]))))


_FOREIGN = 'give a device ("emulator", "rpc://HOST:PORT"), or save the network and run it on a machine of that kind'


@functools.cache
def peak_flops(target: Target, threads: int) -> float:
    """Float32 operations a second that chains of multiply-adds reach here: two for each, on `threads` threads."""
    lanes, chains, turns = target.lanes, max(8, target.registers // 2), 1 << 16
    with IRBuilder() as builder, T.prim_func():
        T.func_name("peak")
        given = T.arg("given", T.Buffer((2 * lanes,), "float32"))
        result = T.arg("result", T.Buffer((threads * chains * lanes,), "float32"))
        all_lanes = tirx.Ramp(tirx.const(0, "int32"), 1, lanes)
        with T.parallel(0, threads) as thread:
            # A buffer each, of scope "global": small ones of that scope lie on the stack, where LLVM makes registers of them.
            sums = [T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(chains)]
            factor, term = (T.alloc_buffer((lanes,), "float32", scope="global") for _ in range(2))
            for position, register in enumerate((factor, term, *sums)):
                start = position % 2 * lanes
                T.buffer_store(register, given[tirx.Ramp(tirx.const(start, "int32"), 1, lanes)], [all_lanes])
            with T.serial(0, turns):
                for register in sums:
                    T.buffer_store(register, register[all_lanes] * factor[all_lanes] + term[all_lanes], [all_lanes])
            for position, register in enumerate(sums):
                where = tirx.Ramp((thread * chains + position) * lanes, 1, lanes)
                T.buffer_store(result, register[all_lanes], [where])
    arrays = [np.full(2 * lanes, 0.5, "float32"), np.zeros(threads * chains * lanes, "float32")]
    return 2.0 * lanes * chains * turns * threads / _fastest(builder.get(), target, threads, arrays)


@functools.cache
def bandwidth(target: Target, threads: int) -> float:
    """Bytes a second, read and written together, that a copy of arrays larger than any cache reaches here."""
    elements = 1 << 24
    each = elements // threads // target.lanes
    with IRBuilder() as builder, T.prim_func():
        T.func_name("copy")
        source = T.arg("source", T.Buffer((elements,), "float32"))
        result = T.arg("result", T.Buffer((elements,), "float32"))
        with T.parallel(0, threads) as thread, T.serial(0, each) as i:
            where = tirx.Ramp((thread * each + i) * target.lanes, 1, target.lanes)
            T.buffer_store(result, source[where], [where])
    moved = 2.0 * 4 * threads * each * target.lanes
    return moved / _fastest(builder.get(), target, threads, [np.zeros(elements, "float32"), np.zeros(elements, "float32")])


def _fastest(function: tirx.PrimFunc, target: Target, threads: int, arrays: Sequence[Array]) -> float:
    """Seconds of the fastest of some calls on this host, with that many threads."""
    name = str(function.attrs["global_symbol"])
    call = tvm.compile(tvm.IRModule({name: function}), target=tvm_target(target))[name]
    tensors = [_tensor(array) for array in arrays]

    def measure() -> float:
        times = []
        for _ in range(20):
            start = time.perf_counter()
            call(*tensors)
            times.append(time.perf_counter() - start)
        return min(times)

    before = get_num_threads()
    set_num_threads(threads)
    try:
        return THREADS.run(measure)
    finally:
        set_num_threads(before)
