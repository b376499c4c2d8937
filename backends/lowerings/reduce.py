"""Reductions, normalisations, softmaxes and running sums: loops that leave their value in a register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from paring.backends import vecmath as vm
from paring.backends.kernel import Index, Kernel, Lanes, Value, as_int, constant, lanes_of, splat
from paring.backends.lowerings.loops import by_lane, fold, greater, horizontal, lesser, scalar_only, sum_type, total
from paring.backends.scalar import libm
from paring.backends.vecmath import bind, cast, full
from paring.ir.graph import Node
from paring.ir.ops import norm, reduce, scan


def _spread(index: Index, axes: tuple[int, ...], rank: int, keepdims: bool) -> list[Any]:
    """The index of the operand, with None along the reduced dimensions."""
    kept = iter(index if not keepdims else [i for d, i in enumerate(index) if d not in axes])
    return [None if d in axes else next(kept) for d in range(rank)]


def _place(spread: list[Any], position: tuple[Any, ...]) -> Index:
    filling = iter(position)
    return tuple(next(filling) if i is None else i for i in spread)


def sum_over(kernel: Kernel, x: Node, spread: list[Any], term: Callable[[Value], Value] = lambda v: v) -> Value:
    """The sum of `term` over the dimensions that are None, in the type that sums have."""
    dtype = sum_type(x.type.dtype)
    lanes = lanes_of(tuple(i for i in spread if i is not None))
    extents = [x.type.shape[d] for d, i in enumerate(spread) if i is None]

    def read(position: tuple[Any, ...]) -> Value:
        return term(cast(kernel.value(x, _place(spread, position)), dtype))

    width = kernel.target.lanes
    if lanes > 1 or not extents or spread[-1] is not None or extents[-1] < 2 * width:
        return splat(total(kernel, extents, lanes, dtype, read), lanes)
    # Along a contiguous dimension: `width` sums side by side.
    *outer, last = extents
    turns = last // width
    vector = total(kernel, [*outer, turns], width, dtype, lambda p: read((*p[:-1], Lanes(p[-1] * width, width))))
    value = horizontal(vector, lambda a, b: a + b)
    if last % width:
        done = turns * width
        value = bind(value) + total(kernel, [*outer, last - done], 1, dtype, lambda p: read((*p[:-1], p[-1] + done)))
    return value


def count_of(x: Node, spread: list[Any]) -> int:
    return int(np.prod([x.type.shape[d] for d, i in enumerate(spread) if i is None]))


def sum_(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,) = node.inputs
    spread = _spread(index, node.op.axes, x.type.rank, node.op.keepdims)
    value = sum_over(kernel, x, spread)
    if isinstance(node.op, reduce.Mean):
        # The mean of nothing is NaN: a division that TVM must not see through.
        count = count_of(x, spread)
        value = value / full(value, count) if count else full(value, np.nan)
    return cast(value, node.type.dtype)


def extreme(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,) = node.inputs
    spread = _spread(index, node.op.axes, x.type.rank, node.op.keepdims)
    combine = greater if isinstance(node.op, reduce.Max) else lesser
    return best_over(kernel, x, spread, combine)


def best_over(kernel: Kernel, x: Node, spread: list[Any], combine: Callable[[Value, Value, bool], Value]) -> Value:
    """The greatest or least element over the dimensions that are None, none of which is empty."""
    lanes = lanes_of(tuple(i for i in spread if i is not None))
    extents = [x.type.shape[d] for d, i in enumerate(spread) if i is None]
    first = bind(splat(kernel.value(x, _place(spread, (0,) * len(extents))), lanes))

    def step(state: tuple[Value, ...], position: tuple[Any, ...]) -> list[Value]:
        return [combine(bind(splat(kernel.value(x, _place(spread, position)), lanes)), state[0], x.type.is_float)]

    return fold(kernel, extents, [(x.type.dtype, first)], step)[0]


def argmax(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,) = node.inputs
    spread = _spread(index, (node.op.axis,), x.type.rank, node.op.keepdims)
    lanes = lanes_of(index)
    first = bind(splat(kernel.value(x, _place(spread, (0,))), lanes))

    def step(state: tuple[Value, ...], position: tuple[Any, ...]) -> list[Value]:
        best, where = state
        value = bind(splat(kernel.value(x, _place(spread, position)), lanes))
        wins = value > best
        if x.type.is_float:
            wins = tirx.Or(wins, tirx.And(tirx.isnan(value), tirx.Not(tirx.isnan(best))))
        wins = bind(wins)
        here = splat(cast(as_int(position[0]), "int64"), lanes)
        return [tirx.Select(wins, value, best), tirx.Select(wins, here, where)]

    start = [(x.type.dtype, first), ("int64", constant(0, "int64", lanes))]
    return fold(kernel, [x.type.shape[node.op.axis]], start, step)[1]


def inverse_deviation(mean_square: Value, eps: float) -> Value:
    """1 / sqrt(mean square + eps)."""
    return full(mean_square, 1.0) / tirx.sqrt(mean_square + full(mean_square, eps))


def _normalised(kernel: Kernel, x: Node, spread: list[Any], index: Index, eps: float, centred: bool) -> Value:
    """(x - mean) / deviation at an index, mean and deviation over the dimensions that are None."""
    lanes = lanes_of(tuple(i for i in spread if i is not None))
    value = cast(kernel.value(x, index), sum_type(x.type.dtype))
    count = count_of(x, spread)
    mean = full(value, 0.0)
    if centred:
        mean = bind(sum_over(kernel, x, spread))
        mean = bind(mean / full(mean, count))

    def square(v: Value) -> Value:
        v = bind(v - splat(mean, vm.lanes_in(v))) if centred else v
        return v * v

    variance = sum_over(kernel, x, spread, square)
    inverse = bind(inverse_deviation(variance / full(variance, count), eps))
    wide = lanes_of(index)
    assert lanes in (1, wide)
    return (value - splat(mean, wide)) * splat(inverse, wide) if centred else value * splat(inverse, wide)


def _trailing(kernel: Kernel, node: Node, index: Index, centred: bool) -> Value:
    """Normalised over the dimensions of the weight, which are the last ones."""
    x, weight = node.inputs[:2]
    first = x.type.rank - weight.type.rank
    spread = [*index[:first], *([None] * weight.type.rank)]
    if lanes_of(index[first:]) > 1:
        scalar_only(index)
    y = bind(_normalised(kernel, x, spread, index, node.op.eps, centred))
    weight_value, *bias = (splat(cast(kernel.value(p, index[first:]), vm.dtype_of(y)), lanes_of(index)) for p in node.inputs[1:])
    y = vm.fma(y, weight_value, bias[0]) if bias else y * weight_value
    return cast(y, node.type.dtype)


@by_lane
def layer_norm(kernel: Kernel, node: Node, index: Index) -> Value:
    return _trailing(kernel, node, index, True)


@by_lane
def rms_norm(kernel: Kernel, node: Node, index: Index) -> Value:
    return _trailing(kernel, node, index, False)


@by_lane
def group_norm(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index)
    x, weight, bias = node.inputs
    dtype = sum_type(x.type.dtype)
    size = x.type.shape[1] // node.op.groups
    first = index[1] // size * size
    grouped = _Grouped(kernel, x, index[0], first, size)
    mean = bind(grouped.sum(lambda v: v) / constant(grouped.count, dtype))

    def square(v: Value) -> Value:
        v = bind(v - mean)
        return v * v

    inverse = bind(inverse_deviation(grouped.sum(square) / constant(grouped.count, dtype), node.op.eps))
    w, b = (cast(kernel.value(p, (index[1],)), dtype) for p in (weight, bias))
    return cast((cast(kernel.value(x, index), dtype) - mean) * inverse * w + b, node.type.dtype)


class _Grouped:
    """The elements of one group of channels of one sample."""

    def __init__(self, kernel: Kernel, x: Node, sample: Any, first: Any, size: int) -> None:
        self.kernel, self.x, self.sample, self.first = kernel, x, sample, first
        self.extents = (size, *x.type.shape[2:])
        self.count = int(np.prod(self.extents))

    def sum(self, term: Callable[[Value], Value]) -> Value:
        dtype = sum_type(self.x.type.dtype)

        def read(p: tuple[Any, ...]) -> Value:
            return term(cast(self.kernel.value(self.x, (self.sample, p[0] + self.first, *p[1:])), dtype))

        return total(self.kernel, self.extents, 1, dtype, read)


def batch_norm(kernel: Kernel, node: Node, index: Index) -> Value:
    x = node.inputs[0]
    dtype = sum_type(x.type.dtype)
    lanes = lanes_of(index)
    weight, bias, mean, var = (cast(kernel.value(p, (index[1],)), dtype) for p in node.inputs[1:])
    inverse = inverse_deviation(var, node.op.eps)
    y = (cast(kernel.value(x, index), dtype) - splat(mean, lanes)) * splat(inverse, lanes)
    return cast(vm.fma(y, splat(weight, lanes), splat(bias, lanes)), node.type.dtype)


def exp_of(value: Value) -> Value:
    return vm.exp(value) if vm.dtype_of(value) == "float32" else libm("exp", value)


def log_of(value: Value) -> Value:
    return vm.log(value) if vm.dtype_of(value) == "float32" else libm("log", value)


@by_lane
def softmax(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,), axis = node.inputs, node.op.axis
    scalar_only((index[axis],))
    if x.type.dtype == "float64":
        scalar_only(index)
    spread = [None if d == axis else i for d, i in enumerate(index)]
    top = bind(cast(best_over(kernel, x, spread, _greater_number), sum_type(x.type.dtype)))
    own = bind(cast(kernel.value(x, index), vm.dtype_of(top)) - splat(top, lanes_of(index)))
    rest = bind(sum_over(kernel, x, spread, lambda v: exp_of(v - splat(top, vm.lanes_in(v)))))
    y = own - log_of(rest) if isinstance(node.op, norm.LogSoftmax) else exp_of(own) / rest
    return cast(y, node.type.dtype)


def _greater_number(x: Value, best: Value, is_float: bool) -> Value:
    # A NaN comes back through the exponential.
    return tirx.Select(x > best, x, best)


@by_lane
def cumsum(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,), axis = node.inputs, node.op.axis
    scalar_only((index[axis],))
    dtype = sum_type(x.type.dtype)

    def read(position: tuple[Any, ...]) -> Value:
        return cast(kernel.value(x, (*index[:axis], position[0], *index[axis + 1 :])), dtype)

    return cast(total(kernel, [index[axis] + 1], lanes_of(index), dtype, read), node.type.dtype)


REDUCTIONS = {
    reduce.Sum: sum_,
    reduce.Mean: sum_,
    reduce.Max: extreme,
    reduce.Min: extreme,
    reduce.ArgMax: argmax,
    norm.LayerNorm: layer_norm,
    norm.RmsNorm: rms_norm,
    norm.GroupNorm: group_norm,
    norm.BatchNorm: batch_norm,
    norm.Softmax: softmax,
    norm.LogSoftmax: softmax,
    scan.CumSum: cumsum,
}
