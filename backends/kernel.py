"""One kernel under construction: reads region nodes at an index, emits loops and stores through TVM's IR builder.

A region is pulled from its output: `Kernel.value(node, index)` gives the expression of one element, or of one vector of
elements when the last component of the index is a `Lanes`. Schedule families decide which loops run around that, and bind
the anchor's value where they have computed it in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from paring.backends.targets import Target
from paring.ir.errors import InternalError, TargetError
from paring.ir.graph import Graph, Node
from paring.ir.ops.core import Const
from paring.ir.ops.shape import Transpose

Value = Any  # a TVM expression, scalar or vector
Scalar = Any  # a TVM expression of one lane, or an int


@dataclass(frozen=True)
class Lanes:
    """`count` neighbouring positions along one dimension, from `base`; `stride` in elements of that dimension."""

    base: Scalar
    count: int
    stride: int = 1

    def __add__(self, offset: Scalar) -> Lanes:
        return Lanes(self.base + offset, self.count, self.stride)

    def __sub__(self, offset: Scalar) -> Lanes:
        return Lanes(self.base - offset, self.count, self.stride)

    def __mul__(self, factor: int) -> Lanes:
        return Lanes(self.base * factor, self.count, self.stride * factor)

    def expand(self) -> Value:
        """As a TVM vector expression; a single lane is a scalar."""
        if self.count == 1:
            return as_int(self.base)
        base = as_int(self.base)
        return tirx.Ramp(base, self.stride, self.count) if self.stride else tirx.Broadcast(base, self.count)


Index = tuple[Any, ...]  # of Scalar, at most one of Lanes
Lowering = Callable[["Kernel", Node, Index], Value]


def as_int(value: Scalar) -> Value:
    """A Python int as an int32 constant; anything else as it is."""
    return tirx.const(int(value), "int32") if isinstance(value, int | np.integer) else value


def lanes_of(index: Index) -> int:
    return next((i.count for i in index if isinstance(i, Lanes)), 1)


def splat(value: Value, lanes: int) -> Value:
    """A scalar expression in every lane; vectors of that width stay."""
    return value if lanes == 1 or is_vector(value) else tirx.Broadcast(value, lanes)


def is_vector(value: Value) -> bool:
    return not value.ty.is_scalar()


def constant(value: float | int | bool, dtype: str, lanes: int = 1) -> Value:
    """An immediate of that dtype, in all lanes."""
    return splat(tirx.const(value, dtype), lanes)


def strides_of(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * shape[d + 1]
    return strides


def flatten(index: Index, shape: Sequence[int]) -> Any:
    """Row-major offset of an index: a Scalar, or Lanes with a stride."""
    offset: Scalar = 0
    lanes: Lanes | None = None
    for component, stride in zip(index, strides_of(shape), strict=True):
        if isinstance(component, Lanes):
            if lanes is not None:
                raise InternalError("an index has at most one vector component")
            lanes, component = component * stride, component.base
        offset = offset + component * stride
    return offset if lanes is None else Lanes(offset, lanes.count, lanes.stride)


class Kernel:
    """The state of one PrimFunc while a schedule family emits it."""

    def __init__(self, body: Graph, target: Target, lowerings: dict[type, Lowering]) -> None:
        self.body = body
        self.target = target
        self.lowerings = lowerings
        self.buffers: dict[Node, Any] = {}
        self.result: Any = None
        self.bound: list[dict[tuple[Any, ...], Value]] = [{}]
        self.anchors: dict[Node, Callable[[Index], Value]] = {}
        self.uses = body.use_counts()

    @property
    def output(self) -> Node:
        return self.body.outputs[0]

    def load(self, buffer: Any, offset: Any) -> Value:
        """Elements of a flat buffer at an offset or at Lanes."""
        if isinstance(offset, Lanes):
            return buffer[offset.expand()]
        return buffer[as_int(offset)]

    def store(self, buffer: Any, offset: Any, value: Value) -> None:
        where = offset.expand() if isinstance(offset, Lanes) else as_int(offset)
        T.buffer_store(buffer, splat(value, offset.count) if isinstance(offset, Lanes) else value, [where])

    def prefetch(self, buffer: Any, offset: Scalar) -> None:
        """Ask for the cache line at an offset of a flat buffer to be brought to the second level; any offset is harmless."""
        place = tirx.address_of(buffer[as_int(offset)])
        # To be read (0), kept at the second level (2), data (1).
        T.evaluate(tirx.call_intrin("void", "tirx.prefetch", place, *(as_int(v) for v in (0, 2, 1))))

    def store_output(self, index: Index, value: Value) -> None:
        """Write the region's result at an index of its shape."""
        self.store(self.result, flatten(index, self.output.type.shape), value)

    def finish(self, index: Index) -> None:
        """Compute the region's result where an anchor's index ends up, from whatever anchors are bound, and write it."""
        if isinstance(self.output.op, Transpose) and self.anchors:
            index = tuple(index[d] for d in self.output.op.perm)
        self.store_output(index, self.value(self.output, index))

    def value(self, node: Node, index: Index) -> Value:
        """The element (or vector of elements) of a node of the body; computed once in each scope."""
        key = (node, *(i if isinstance(i, int | Lanes) else id(i) for i in index))
        for scope in reversed(self.bound):
            if key in scope:
                return scope[key][0]
        value = self._compute(node, index)
        # The index expressions are kept with the value, so that their identities stay taken.
        self.bound[-1][key] = (value, index)
        return value

    def _compute(self, node: Node, index: Index) -> Value:
        lanes = lanes_of(index)
        if node in self.anchors:
            return self.anchors[node](index)
        if isinstance(node.op, Const) and node not in self.buffers:
            return constant(node.op.value.item(), node.type.dtype, lanes)
        if node in self.buffers:
            return splat(self.load(self.buffers[node], flatten(index, node.type.shape)), lanes)
        lowering = self.lowerings.get(type(node.op))
        if lowering is None:
            raise InternalError(f"no lowering for {node.op.name}", hint="paring.backends.lowering.LOWERINGS names each op")
        value = lowering(self, node, index)
        return self.bind(value) if self.uses[node] > 1 else value

    def bind(self, value: Value) -> Value:
        """Name an expression, so that using it twice does not write it out twice.

        TVM writes its own bindings of floats out again, and its analyzer refuses bound vectors: these go through a local
        buffer, which LLVM turns back into a register.
        """
        if isinstance(value, int):
            return value
        lanes = value.ty.dtype.lanes if is_vector(value) else 1
        dtype = str(value.ty.dtype).rsplit("x", 1)[0] if lanes > 1 else str(value.ty.dtype)
        if lanes == 1 and not dtype.startswith("float"):
            return T.bind(value)
        register, where = self.local(lanes, dtype), Lanes(0, lanes)
        self.store(register, where, value)
        return self.load(register, where)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is computed inside is forgotten at the end: it does not dominate what follows."""
        self.bound.append({})
        try:
            yield
        finally:
            self.bound.pop()

    @contextmanager
    def loop(self, extent: Scalar, kind: str = "serial", start: Scalar = 0) -> Iterator[Any]:
        """A loop over [start, extent); kind: serial, parallel. A single static turn emits no loop."""
        if isinstance(extent, int) and isinstance(start, int) and extent - start == 1:
            with self.scope():
                yield start
            return
        make = {"serial": T.serial, "parallel": T.parallel}[kind]
        with make(start, extent) as variable, self.scope():
            yield variable

    @contextmanager
    def parallel(self, extents: Sequence[int], work: int) -> Iterator[tuple[Any, ...]]:
        """One loop over all combinations, on all threads where `work` (about nanoseconds) is worth waking them."""
        total = int(np.prod(extents)) if len(extents) else 1
        kind = "parallel" if work >= SERIAL_BELOW_NS and total > 1 else "serial"
        with self.loop(total, kind) as flat:
            yield self.components(flat, extents)

    def components(self, flat: Scalar, extents: Sequence[int]) -> tuple[Scalar, ...]:
        """The components of a row-major position, safe to compute indices with."""
        return tuple(self.opaque(component) for component in unflatten(flat, extents))

    def opaque(self, value: Scalar) -> Scalar:
        """An index that TVM's simplifier cannot look into: LLVM turns it back into a register.

        Given `v % 16 // 8` beside `(v % 8 + 1) % 2`, tvm 0.27 writes `(v + 1) % 16 // 8` for the former.
        """
        if isinstance(value, int):
            return value
        flipped = T.call_llvm_pure_intrin("int32", "llvm.bitreverse", value)
        return T.bind(T.call_llvm_pure_intrin("int32", "llvm.bitreverse", flipped))

    def local(self, elements: int, dtype: str) -> Any:
        """Scratch memory of this thread: registers when every offset is constant, else the stack; the heap from 1 KiB on."""
        # TVM puts no scope but "global" on the stack: "local" becomes a heap allocation for each use.
        return T.alloc_buffer((elements,), dtype, scope="global")


# A parallel region costs about 4 us; below this the threads are not woken.
SERIAL_BELOW_NS = 10_000


def unflatten(flat: Scalar, extents: Sequence[int]) -> tuple[Any, ...]:
    """The components of a row-major position; components of extent 1 are the int 0."""
    components: list[Any] = []
    for extent in reversed(extents):
        if extent == 1:
            components.append(0)
        elif isinstance(flat, int):
            components.append(flat % extent)
            flat //= extent
        else:
            components.append(flat % extent)
            flat = flat // extent
    return tuple(reversed(components))


def build_primfunc(
    body: Graph, target: Target, name: str, lowerings: dict[type, Lowering], emit: Callable[[Kernel], None]
) -> tirx.PrimFunc:
    """A PrimFunc over flat buffers, one for each input of the body in order, then the output."""
    largest = max((node.type for node in (*body.inputs, *body.outputs)), key=lambda t: t.size)
    if largest.size >= 1 << 31:
        raise TargetError(f"a tensor {largest} has 2^31 elements or more", why="kernels count in 32 bits", hint="split it")
    kernel = Kernel(body, target, lowerings)
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        for position, node in enumerate(body.inputs):
            kernel.buffers[node] = T.arg(f"a{position}", T.Buffer((max(node.type.size, 1),), node.type.dtype))
        result = body.outputs[0].type
        kernel.result = T.arg("result", T.Buffer((max(result.size, 1),), result.dtype))
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        emit(kernel)
    return builder.get()


def tvm_target(target: Target) -> tvm.target.Target:
    """The target as TVM's LLVM code generator takes it."""
    spec: dict[str, Any] = {"kind": "llvm", "mtriple": target.triple, "num-cores": target.cores}
    if target.cpu:
        spec["mcpu"] = target.cpu
    if target.features:
        spec["mattr"] = list(target.features)
    return tvm.target.Target(spec)
