"""aten reductions, scans, softmaxes and look-ups by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from paring.frontends.aten_builder import (
    Builder,
    Converted,
    Converter,
    DataDependent,
    Missing,
    Operand,
    Table,
    Unsupported,
    axes_of,
    axis_of,
    promote,
)
from paring.frontends.aten_elementwise import ADD, DIV, MUL, SUB
from paring.ir import Node
from paring.ir.ops import binary as bi
from paring.ir.ops import index as ix
from paring.ir.ops import norm as nm
from paring.ir.ops import reduce as rd
from paring.ir.ops import unary as un
from paring.ir.ops.scan import CumSum

Axes = int | Sequence[int] | None
Reductions = type[rd.Reduction]


def reduction(op: Reductions, b: Builder, x: Node, axes: Axes = None, keepdim: bool = False, *_: object) -> Node:
    """One IR reduction, in the dtype that torch gives the result."""
    return b.node(op(axes_of(axes, x.type.rank), bool(keepdim)), b.cast(x, b.type.dtype))


def reduce_all(op: Reductions, b: Builder, x: Node, *_: object) -> Node:
    return reduction(op, b, x)


def extreme(op: Reductions, b: Builder, x: Node, axes: Axes = None, keepdim: bool = False) -> Node:
    """Greatest or least, on bool by way of integers."""
    if x.type.dtype != "bool":
        return b.node(op(axes_of(axes, x.type.rank), keepdim), x)
    return b.cast(b.node(op(axes_of(axes, x.type.rank), keepdim), b.cast(x, "int32")), "bool")


def truth(op: Reductions, b: Builder, x: Node, axes: Axes = None, keepdim: bool = False) -> Node:
    """any and all; over nothing, any is false and all is true."""
    x, axes = b.cast(x, "bool"), axes_of(axes, x.type.rank)
    if not all(x.type.shape[a] for a in axes):
        return b.full(b.type.shape, op is rd.Min, b.type.dtype)
    return b.cast(extreme(op, b, x, axes, keepdim), b.type.dtype)


def arg_extreme(sign: int, b: Builder, x: Node, axis: int | None = None, keepdim: bool = False) -> Node:
    """argmax, and argmin as argmax of the negated."""
    flat = b.reshape(x, (x.type.size,)) if axis is None or not x.type.rank else x
    flat = b.cast(flat, "int32") if flat.type.dtype in ("bool", "uint8") else flat
    flat = _reversed(b, flat) if sign < 0 else flat
    axis = 0 if axis is None else axis_of(axis, flat.type.rank)
    found = b.node(rd.ArgMax(axis, keepdim and flat.type.rank == x.type.rank), flat)
    return b.reshape(found, b.type.shape)


def _reversed(b: Builder, x: Node) -> Node:
    """In the opposite order; -x - 1 for integers, since the least one has no negative."""
    negative = b.node(un.Neg(), x)
    return negative if x.type.is_float else b.node(bi.Sub(), negative, b.full(x.type.shape, 1, x.type.dtype))


def extreme_with_index(sign: int, b: Builder, x: Node, axis: int, keepdim: bool = False) -> tuple[Node, Node]:
    shape = b.type.shape
    values = b.reshape(extreme(rd.Max if sign > 0 else rd.Min, b, x, axis, keepdim), shape)
    return values, arg_extreme(sign, b, x, axis, keepdim)


def topk(b: Builder, x: Node, count: int, axis: int = -1, largest: bool = True, *_: object) -> tuple[Node, Node]:
    if count != 1 or not x.type.rank:
        raise Unsupported("topk is supported for k = 1 only")
    return extreme_with_index(1 if largest else -1, b, x, axis, True)


def variance(b: Builder, x: Node, axes: Axes = None, correction: float | None = None, keepdim: bool = False) -> tuple[Node, Node]:
    """(variance, mean): the mean of squared distances, rescaled by the correction (Bessel's by default)."""
    where = axes_of(axes, x.type.rank)
    count = prod(x.type.shape[a] for a in where)
    left = max(0.0, count - (1.0 if correction is None else correction))
    mean = b.node(rd.Mean(where, True), x)
    apart = b.apply(SUB, x, mean)
    squares = b.node(rd.Sum(where, keepdim), b.node(MUL, apart, apart))
    return b.apply(DIV, squares, float(left)), b.reshape(mean, squares.type.shape)


def var(b: Builder, x: Node, axes: Axes = None, correction: float | None = None, keepdim: bool = False) -> Node:
    return variance(b, x, axes, correction, keepdim)[0]


def std(b: Builder, x: Node, axes: Axes = None, correction: float | None = None, keepdim: bool = False) -> Node:
    return b.node(un.Sqrt(), var(b, x, axes, correction, keepdim))


def std_mean(b: Builder, x: Node, axes: Axes = None, correction: float | None = None, keepdim: bool = False) -> tuple[Node, Node]:
    found, mean = variance(b, x, axes, correction, keepdim)
    return b.node(un.Sqrt(), found), mean


def unbiased(whole: bool, convert: Converter, b: Builder, x: Node, *args: Any) -> Converted:
    """The older overloads: (x, unbiased) of everything, and (x, axes, unbiased, keepdim)."""
    axes, flag, keepdim = (None, *args, False) if whole else args
    return convert(b, x, axes, float(flag), keepdim)


def product(b: Builder, x: Node, axis: int | None = None, keepdim: bool = False, *_: object) -> Node:
    """Halves multiplied with each other until one element is left."""
    shape, dtype = b.type.shape, b.type.dtype
    x = b.cast(x, dtype)
    x = b.reshape(x, (x.type.size,)) if axis is None or not x.type.rank else x
    axis = axis_of(axis or 0, x.type.rank)
    if not x.type.shape[axis]:
        return b.full(shape, 1, dtype)
    while (size := x.type.shape[axis]) > 1:
        half = size // 2
        both = b.node(MUL, b.slice(x, axis, 0, half), b.slice(x, axis, half, 2 * half))
        x = b.concat([both, b.slice(x, axis, 2 * half, size)], axis) if size % 2 else both
    return b.reshape(x, shape)


def vector_norm(b: Builder, x: Node, order: float = 2, axes: Axes = None, keepdim: bool = False, *_: object) -> Node:
    where = axes_of(axes, x.type.rank)
    size = b.node(un.Abs(), b.cast(x, b.type.dtype))
    if order in (math.inf, -math.inf):
        return b.node((rd.Max if order > 0 else rd.Min)(where, keepdim), size)
    if order == 0:
        return b.node(rd.Sum(where, keepdim), b.cast(b.apply(bi.NotEqual(), size, 0.0), b.type.dtype))
    if order == 1:
        return b.node(rd.Sum(where, keepdim), size)
    if order == 2:
        return b.node(un.Sqrt(), b.node(rd.Sum(where, keepdim), b.node(MUL, size, size)))
    total = b.node(rd.Sum(where, keepdim), b.apply(bi.Pow(), size, float(order)))
    return b.apply(bi.Pow(), total, 1.0 / order)


def norm(b: Builder, x: Node, order: float | None = 2, axes: Axes = None, keepdim: bool = False, *_: object) -> Node:
    return vector_norm(b, x, 2 if order is None else order, axes, keepdim)


def logsumexp(b: Builder, x: Node, axes: Axes, keepdim: bool = False) -> Node:
    """top + log(sum(exp(x - top))), where an infinite top is left out of the difference."""
    where, x = axes_of(axes, x.type.rank), b.cast(x, b.type.dtype)
    top = b.node(rd.Max(where, True), x)
    infinite = b.apply(bi.Equal(), b.node(un.Abs(), top), math.inf)
    top = b.where(infinite, 0.0, top, dtype=x.type.dtype)
    total = b.node(rd.Sum(where, True), b.node(un.Exp(), b.apply(SUB, x, top)))
    return b.reshape(b.node(ADD, top, b.node(un.Log(), total)), b.type.shape)


def softmax(op: type[nm.Softmax], b: Builder, x: Node, axis: int, *_: object) -> Node:
    x = b.cast(x, b.type.dtype)
    if not x.type.rank:
        return b.reshape(b.node(op(0), b.reshape(x, (1,))), ())
    return b.node(op(axis_of(axis, x.type.rank)), x)


def safe_softmax(b: Builder, x: Node, axis: int, *_: object) -> Node:
    """softmax, with zeros where a row is all minus infinity."""
    axis = axis_of(axis, x.type.rank)
    empty = b.apply(bi.Equal(), b.node(rd.Max((axis,), True), x), -math.inf)
    return b.where(empty, 0.0, softmax(nm.Softmax, b, x, axis), dtype=x.type.dtype)


def cumsum(b: Builder, x: Node, axis: int, *_: object) -> Node:
    x = b.cast(x, b.type.dtype)
    return b.node(CumSum(axis_of(axis, x.type.rank)), x) if x.type.rank else x


def count_nonzero(b: Builder, x: Node, axes: Axes = None) -> Node:
    return b.node(rd.Sum(axes_of(axes, x.type.rank)), b.cast(b.cast(x, "bool"), "int64"))


def wrapped(b: Builder, indices: Node, size: int) -> Node:
    """Indices counted from the end made non-negative."""
    indices = b.cast(indices, "int64") if indices.type.dtype not in ("int32", "int64") else indices
    value = b.known(indices)
    if value is not None and (not value.size or (value.min() >= 0 and value.max() < size)):
        return indices
    if value is not None and (value.min() < -size or value.max() >= size):
        raise Unsupported(f"a constant index is out of range for size {size}")
    negative = b.apply(bi.Less(), indices, 0)
    return b.where(negative, b.apply(ADD, indices, size), indices, dtype=indices.type.dtype)


def embedding(b: Builder, weight: Node, indices: Node, *_: object) -> Node:
    return b.node(ix.Gather(0), weight, indices)


def index_select(b: Builder, x: Node, axis: int, indices: Node) -> Node:
    if not x.type.rank:
        return x
    indices = b.reshape(indices, (indices.type.size,))
    return b.node(ix.Gather(axis_of(axis, x.type.rank)), x, indices)


def gather(b: Builder, x: Node, axis: int, indices: Node, *_: object) -> Node:
    indices = indices if indices.type.dtype == "int32" else b.cast(indices, "int64")
    if not indices.type.rank or not x.type.rank:
        flat = b.reshape(x, (x.type.size,))
        return b.reshape(b.node(ix.Gather(0), flat, b.reshape(indices, (indices.type.size,))), b.type.shape)
    return b.node(ix.GatherElements(axis_of(axis, x.type.rank)), x, indices)


def take(b: Builder, x: Node, indices: Node) -> Node:
    return b.node(ix.Gather(0), b.reshape(x, (x.type.size,)), wrapped(b, indices, x.type.size))


def index(b: Builder, x: Node, indices: Sequence[Node | None]) -> Node:
    """Advanced indexing: the indexed dimensions become one, and their indices one position in it."""
    listed = _without_masks(b, list(indices))
    where = [d for d, i in enumerate(listed) if i is not None]
    chosen = [wrapped(b, i, x.type.shape[d]) for d, i in enumerate(listed) if i is not None]
    if not chosen:
        return x
    adjacent = where == list(range(where[0], where[0] + len(where)))
    front = where[0] if adjacent else 0
    if not adjacent:
        x = b.transpose(x, [*where, *(d for d in range(x.type.rank) if d not in where)])
    sizes = x.type.shape[front : front + len(where)]
    position = chosen[0]
    for size, other in zip(sizes[1:], chosen[1:], strict=True):
        position = b.apply(ADD, b.apply(MUL, position, size), other, dtype="int64")
    return b.node(ix.Gather(front), b.flattened(x, front, front + len(where)), position)


def _without_masks(b: Builder, indices: list[Node | None]) -> list[Node | None]:
    """Constant bool masks as the indices of their true elements."""
    listed: list[Node | None] = []
    for node in indices:
        if node is None or node.type.dtype not in ("bool", "uint8"):
            listed.append(node)
            continue
        mask = b.known(node)
        if mask is None:
            raise DataDependent("indexing with a bool mask gives a result whose size depends on values")
        listed.extend(b.parameter(np.ascontiguousarray(i), b.loc) for i in mask.nonzero())
    return listed


def isin(b: Builder, elements: Operand, tests: Operand, assume_unique: bool = False, invert: bool = False) -> Node:
    """Each element against each test."""
    dtype = promote(elements, tests)
    left, right = b.operand(elements, dtype), b.operand(tests, dtype)
    if not right.type.size:
        return b.full(b.type.shape, invert, "bool")
    pairs = b.apply(bi.Equal(), b.unsqueezed(left, [left.type.rank]), b.reshape(right, (right.type.size,)))
    found = extreme(rd.Max, b, pairs, -1)
    return b.node(un.LogicalNot(), found) if invert else found


def data_dependent(what: str, *_: object) -> Missing:
    raise DataDependent(what)


_SIZED = "gives a result whose size depends on values"

TABLE: Table = {
    "aten.sum.default": partial(reduce_all, rd.Sum),
    "aten.sum.dim_IntList": partial(reduction, rd.Sum),
    "aten.mean.default": partial(reduce_all, rd.Mean),
    "aten.mean.dim": partial(reduction, rd.Mean),
    "aten.amax.default": partial(extreme, rd.Max),
    "aten.amin.default": partial(extreme, rd.Min),
    "aten.max.default": partial(extreme, rd.Max),
    "aten.min.default": partial(extreme, rd.Min),
    "aten.max.dim": partial(extreme_with_index, 1),
    "aten.min.dim": partial(extreme_with_index, -1),
    "aten.argmax.default": partial(arg_extreme, 1),
    "aten.argmin.default": partial(arg_extreme, -1),
    "aten.topk.default": topk,
    **{f"aten.any.{overload}": partial(truth, rd.Max) for overload in ("default", "dim", "dims")},
    **{f"aten.all.{overload}": partial(truth, rd.Min) for overload in ("default", "dim", "dims")},
    "aten.var.correction": var,
    "aten.std.correction": std,
    "aten.var_mean.correction": variance,
    **{
        f"aten.{name}.{overload}": partial(unbiased, overload == "default", convert)
        for name, convert in (("var", var), ("std", std), ("var_mean", variance), ("std_mean", std_mean))
        for overload in ("default", "dim")
    },
    "aten.prod.default": product,
    "aten.prod.dim_int": product,
    "aten.std_mean.correction": std_mean,
    "aten.linalg_vector_norm.default": vector_norm,
    "aten.norm.ScalarOpt_dim": norm,
    "aten.norm.Scalar": norm,
    "aten.logsumexp.default": logsumexp,
    "aten.softmax.int": partial(softmax, nm.Softmax),
    "aten._softmax.default": partial(softmax, nm.Softmax),
    "aten._safe_softmax.default": safe_softmax,
    "aten.log_softmax.int": partial(softmax, nm.LogSoftmax),
    "aten._log_softmax.default": partial(softmax, nm.LogSoftmax),
    "aten.cumsum.default": cumsum,
    "aten.count_nonzero.default": count_nonzero,
    "aten.count_nonzero.dim_IntList": count_nonzero,
    "aten.embedding.default": embedding,
    "aten.index_select.default": index_select,
    "aten.gather.default": gather,
    "aten.take.default": take,
    "aten.index.Tensor": index,
    "aten._unsafe_index.Tensor": index,
    **{f"aten.isin.{overload}": isin for overload in ("Tensor_Tensor", "Tensor_Scalar", "Scalar_Tensor")},
    "aten.nonzero.default": partial(data_dependent, f"nonzero {_SIZED}"),
    "aten.masked_select.default": partial(data_dependent, f"masked_select {_SIZED}"),
    "aten._unique2.default": partial(data_dependent, f"unique {_SIZED}"),
    "aten._local_scalar_dense.default": partial(data_dependent, "item() takes a number out of a tensor"),
    "aten.item.default": partial(data_dependent, "item() takes a number out of a tensor"),
}
