"""What the converters of the aten table build with: typed nodes, broadcasting, casts, and folding of small constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch

from paring.ir import DTYPES, Const, Loc, Node, Op, TensorType
from paring.ir.interpreter import evaluate
from paring.ir.ops import shape as sh
from paring.ir.ops.binary import Where
from paring.ir.ops.unary import Cast

FOLD_LIMIT = 1_000_000
HALF = (torch.float16, torch.bfloat16)
Scalar = bool | int | float
Operand = Node | Scalar
Converted = Any  # a Node, or a tuple of Nodes, Nones and Missings, as the aten operator returns
Converter = Callable[..., Converted]
Table = dict[str, Converter]


class Unsupported(Exception):
    """Raised by a converter for a use of an operator that the IR cannot say; the message is the reason."""


class DataDependent(Exception):
    """Raised by a converter where a shape or a branch depends on values; the message says which."""


@dataclass(frozen=True)
class Missing:
    """Stands for a result that was not converted, so that the rest of the program can still be looked at."""

    reason: str = ""


def dtype_name(dtype: torch.dtype) -> str:
    """The IR's name of a torch dtype; raises Unsupported for those the IR does not have."""
    name = str(dtype).removeprefix("torch.")
    if dtype in HALF:
        raise Unsupported("16-bit floats are not supported yet")
    if name not in DTYPES:
        raise Unsupported(f"dtype {name} is not supported")
    return name


def axis_of(axis: int, rank: int) -> int:
    """A non-negative axis; torch counts a 0-d tensor as having one."""
    return axis % max(rank, 1)


def axes_of(axes: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Sorted non-negative axes; None or an empty list means all of them."""
    if axes is None or (not isinstance(axes, int) and not axes):
        return tuple(range(rank))
    if rank == 0:
        return ()
    listed = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted({axis_of(a, rank) for a in listed}))


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Two ints from an int or from a list of one or two."""
    listed = [value] if isinstance(value, int) else list(value)
    return (int(listed[0]), int(listed[-1]))


@lru_cache(maxsize=4096)
def _promoted(operands: tuple[tuple[str, bool] | type, ...]) -> str:
    stand_ins = [
        kind(1) if isinstance(kind, type) else torch.empty((1,) * kind[1], dtype=getattr(torch, kind[0]), device="meta")
        for kind in operands
    ]
    result: Any = stand_ins[0]
    for other in stand_ins[1:]:
        dtype = torch.result_type(result, other)
        # A rank of one outranks scalars in torch's rules: keep the greatest seen so far.
        rank = max(s.dim() if isinstance(s, torch.Tensor) else 0 for s in (result, other))
        result = torch.empty((1,) * rank, dtype=dtype, device="meta")
    return str(torch.result_type(result, result)).removeprefix("torch.")


def promote(*operands: Operand) -> str:
    """The common dtype of tensors and Python numbers by torch's promotion rules."""
    return _promoted(tuple((o.type.dtype, o.type.rank > 0) if isinstance(o, Node) else type(o) for o in operands))


@dataclass
class Builder:
    """Builds the nodes of one graph.

    `loc` and `types` belong to the operator being converted: where it comes from, and what torch says its result is.
    A node whose operands are all small constants is evaluated at once; a uniform result is kept as a broadcast scalar.
    `weights` of the model are left to const-fold: the imported program has each of them by its name, in its shape.
    """

    loc: Loc | None = None
    types: tuple[TensorType | None, ...] = ()
    values: dict[Node, np.ndarray] = field(default_factory=dict)
    weights: set[Node] = field(default_factory=set)
    _scalars: dict[tuple[str, bytes], Node] = field(default_factory=dict)

    @property
    def type(self) -> TensorType:
        """The type of the (first) result according to torch."""
        first = self.types[0] if self.types else None
        if first is None:
            raise Unsupported("its result has no static type")
        return first

    def node(self, op: Op, *inputs: Node) -> Node:
        """One node, folded where its operands are small constants."""
        node = Node(op, inputs, self.loc)
        stays = any(i not in self.values or i in self.weights or i.type.size > FOLD_LIMIT for i in inputs)
        if node.type.size > FOLD_LIMIT or stays:
            return node
        value = evaluate(node, [self.values[i] for i in inputs])
        if isinstance(op, sh.Broadcast):
            self.values[node] = value
            return node
        return self.constant(value)

    def constant(self, array: np.ndarray) -> Node:
        """A computed constant; a uniform one becomes a broadcast scalar."""
        if array.ndim and array.size and array.tobytes() == array.flat[0].tobytes() * array.size:
            return self.full(array.shape, array.flat[0], array.dtype.name)
        if not array.ndim:
            return self.scalar(array, array.dtype.name)
        return self.parameter(array, self.loc)

    def parameter(self, array: np.ndarray, loc: Loc | None) -> Node:
        """A constant kept exactly as it is."""
        node = Node(Const(array), (), loc)
        self.values[node] = node.op.value  # type: ignore[attr-defined]
        return node

    def scalar(self, value: Any, dtype: str) -> Node:
        """A 0-d constant, one node for equal ones."""
        with np.errstate(all="ignore"):
            array = np.asarray(value).astype(dtype)
        key = (dtype, array.tobytes())
        if key not in self._scalars:
            self._scalars[key] = self.parameter(array, None)
        return self._scalars[key]

    def full(self, shape: Sequence[int], value: Any, dtype: str) -> Node:
        return self.broadcast(self.scalar(value, dtype), shape)

    def known(self, x: Node) -> np.ndarray | None:
        """The value of a constant node, None for others."""
        return self.values.get(x)

    def cast(self, x: Node, dtype: str) -> Node:
        return x if x.type.dtype == dtype else self.node(Cast(dtype), x)

    def broadcast(self, x: Node, shape: Sequence[int]) -> Node:
        shape = tuple(shape)
        return x if x.type.shape == shape else self.node(sh.Broadcast(shape), x)

    def reshape(self, x: Node, shape: Sequence[int]) -> Node:
        shape = tuple(shape)
        return x if x.type.shape == shape else self.node(sh.Reshape(shape), x)

    def transpose(self, x: Node, perm: Sequence[int]) -> Node:
        perm = tuple(perm)
        return x if perm == tuple(range(len(perm))) else self.node(sh.Transpose(perm), x)

    def swap(self, x: Node, a: int, b: int) -> Node:
        """Two axes exchanged."""
        perm = list(range(x.type.rank))
        if perm:
            a, b = axis_of(a, len(perm)), axis_of(b, len(perm))
            perm[a], perm[b] = perm[b], perm[a]
        return self.transpose(x, perm)

    def slice(self, x: Node, axis: int, start: int, stop: int, step: int = 1) -> Node:
        """x[start:stop:step] along one axis, with bounds as Python treats them."""
        axis = axis_of(axis, x.type.rank)
        size = x.type.shape[axis]
        start, stop, step = slice(start, stop, step).indices(size)
        stop = max(start, stop)
        if (start, stop, step) == (0, size, 1):
            return x
        full = [(0, s, 1) for s in x.type.shape]
        full[axis] = (start, stop, step)
        starts, stops, steps = zip(*full, strict=True)
        return self.node(sh.Slice(starts, stops, steps), x)

    def concat(self, parts: Sequence[Node], axis: int) -> Node:
        return parts[0] if len(parts) == 1 else self.node(sh.Concat(axis), *parts)

    def operand(self, x: Operand, dtype: str) -> Node:
        """A tensor of the dtype, from a tensor or a Python number."""
        return self.cast(x, dtype) if isinstance(x, Node) else self.scalar(x, dtype)

    def together(self, *operands: Operand, dtype: str | None = None) -> list[Node]:
        """Operands of an elementwise operator: promoted to one dtype (or the given one) and broadcast to one shape."""
        dtype = dtype or promote(*operands)
        nodes = [self.operand(o, dtype) for o in operands]
        shape = np.broadcast_shapes(*(n.type.shape for n in nodes))
        return [self.broadcast(n, shape) for n in nodes]

    def apply(self, op: Op, *operands: Operand, dtype: str | None = None) -> Node:
        """An elementwise operator on promoted and broadcast operands."""
        return self.node(op, *self.together(*operands, dtype=dtype))

    def where(self, condition: Node, x: Operand, y: Operand, dtype: str | None = None) -> Node:
        """x where the condition holds, else y; promoted and broadcast."""
        x, y = self.together(x, y, dtype=dtype)
        nodes = (self.cast(condition, "bool"), x, y)
        shape = np.broadcast_shapes(*(n.type.shape for n in nodes))
        return self.node(Where(), *(self.broadcast(n, shape) for n in nodes))

    def optional(self, x: Node | None, value: float, like: TensorType) -> Node:
        """A parameter that may be absent: constant `value` in its place."""
        return self.parameter(np.full(like.shape, value, like.dtype), self.loc) if x is None else self.cast(x, like.dtype)

    def unsqueezed(self, x: Node, axes: Sequence[int]) -> Node:
        """With dimensions of size 1 so that they stand at `axes` of the result."""
        shape = list(x.type.shape)
        for axis in sorted(axes):
            shape.insert(axis, 1)
        return self.reshape(x, shape)

    def flattened(self, x: Node, first: int, last: int) -> Node:
        """Dimensions first..last (exclusive) as one."""
        shape = x.type.shape
        return self.reshape(x, (*shape[:first], prod(shape[first:last]), *shape[last:]))
