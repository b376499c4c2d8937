"""Pooling and resampling."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from paring.backends.kernel import Index, Kernel, Scalar, Value, as_int, constant, lanes_of
from paring.backends.lowerings.loops import by_lane, choose, clamp, fold, greater, number, scalar_only, sum_type, total, within
from paring.backends.vecmath import bind, cast, fma, full, limit
from paring.ir.graph import Node
from paring.ir.ops import pool, resize


def _window(kernel: Kernel, node: Node, index: Index, tap: tuple[Any, ...], fill: float) -> Value:
    """The element under one kernel position, `fill` where that lies outside."""
    (x,), op = node.inputs, node.op
    taken, inside = [], []
    for d in (0, 1):
        size = x.type.shape[2 + d]
        position = as_int(index[2 + d] * op.stride[d] + tap[d] * op.dilation[d] - op.padding[d])
        inside.append(within(position, size))
        taken.append(clamp(position, size))
    value = kernel.value(x, (*index[:2], *taken, *index[4:]))
    if not any(op.padding) and not op.ceil_mode:
        return value
    return choose(tirx.And(*inside), value, full(value, fill))


@by_lane
def max_pool2d(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index[2:4])
    dtype, is_float = node.type.dtype, node.type.is_float
    least = -np.inf if is_float else int(np.iinfo(dtype).min)

    def step(state: tuple[Value, ...], tap: tuple[Any, ...]) -> list[Value]:
        return [greater(bind(_window(kernel, node, index, tap, least)), state[0], is_float)]

    return fold(kernel, node.op.kernel, [(dtype, constant(least, dtype, lanes_of(index)))], step)[0]


@by_lane
def avg_pool2d(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index[2:4])
    op, dtype = node.op, sum_type(node.type.dtype)
    whole = total(kernel, op.kernel, lanes_of(index), dtype, lambda tap: cast(_window(kernel, node, index, tap, 0.0), dtype))
    counts = [_count(op, d, index[2 + d], node.inputs[0].type.shape[2 + d]) for d in (0, 1)]
    if all(isinstance(c, int) for c in counts):
        divisor: Scalar = max(counts[0] * counts[1], 1)
    else:
        divisor = tirx.max(as_int(counts[0]) * as_int(counts[1]), as_int(1))
    return cast(whole / full_count(whole, divisor, lanes_of(index)), node.type.dtype)


def full_count(like: Value, count: Scalar, lanes: int) -> Value:
    if isinstance(count, int):
        return full(like, count)
    scalar = number(constant(0.0, str(like.ty.dtype).split("x")[0]), count)
    return scalar if lanes == 1 else tirx.Broadcast(scalar, lanes)


def _count(op: pool.AvgPool2d, d: int, position: Scalar, size: int) -> Scalar:
    """How many elements of a window count in the divisor, along one dimension."""
    k, s, p = op.kernel[d], op.stride[d], op.padding[d]
    if not op.ceil_mode and (p == 0 or op.count_include_pad):
        return k
    start = as_int(position * s - p)
    end = tirx.min(start + k, as_int(size + p))
    if op.count_include_pad:
        return end - start
    return tirx.min(end, as_int(size)) - tirx.max(start, as_int(0))


@by_lane
def adaptive_avg_pool2d(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index[2:4])
    (x,), dtype = node.inputs, sum_type(node.type.dtype)
    starts, counts = [], []
    for d in (0, 1):
        size, out = x.type.shape[2 + d], node.op.size[d]
        i = index[2 + d]
        starts.append(i * size // out)
        counts.append(size // out if size % out == 0 else bind(as_int(((i + 1) * size + out - 1) // out - i * size // out)))

    def read(p: tuple[Any, ...]) -> Value:
        taken = [clamp(as_int(start + i), x.type.shape[2 + d]) for d, (start, i) in enumerate(zip(starts, p, strict=True))]
        return cast(kernel.value(x, (*index[:2], *taken, *index[4:])), dtype)

    value = total(kernel, counts, lanes_of(index), dtype, read)
    area = counts[0] * counts[1]
    return cast(value / full_count(value, area, lanes_of(index)), node.type.dtype)


def _taps(op: resize.Resize, position: Scalar, size: int, out: int, scale: float) -> tuple[Value, Value, Value]:
    """`Resize.taps` for one position: the same float32 arithmetic, rounded at the same places."""
    at = cast(as_int(position), "float32")
    ratio = np.float32(scale or size / out)
    if op.mode == "nearest":
        low = bind(clamp(cast(tirx.floor(at * full(at, float(ratio))), "int32"), size))
        return low, low, full(at, 0.0)
    # LLVM would fuse a product with the subtraction behind it, and round once: a limit in between, which changes nothing.
    if op.align_corners:
        source = limit(at * full(at, float(np.float32((size - 1) / (out - 1) if out > 1 else 0.0))), -1.0, size - 1.0)
    else:
        middle = bind(at + full(at, 0.5))
        source = bind(limit(middle * full(at, float(ratio)), 0.25, float(2 * size)) - full(at, 0.5))
        source = tirx.Select(source < full(at, 0.0), full(at, 0.0), source)
    source = bind(source)
    low = bind(clamp(cast(source, "int32"), size))
    rest = bind(source - cast(low, "float32"))
    share = tirx.Select(rest > full(at, 1.0), full(at, 1.0), tirx.Select(rest < full(at, 0.0), full(at, 0.0), rest))
    return low, clamp(low + 1, size), bind(share)


@by_lane
def resample(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index[2:4])
    (x,), op, dtype = node.inputs, node.op, sum_type(node.type.dtype)
    rows, columns = (_taps(op, index[2 + d], x.type.shape[2 + d], op.size[d], op.scales[d]) for d in (0, 1))
    if op.mode == "nearest":
        return kernel.value(x, (*index[:2], rows[0], columns[0]))

    def mix(a: Value, b: Value, share: Value) -> Value:
        lanes = lanes_of(index)
        share = share if lanes == 1 else tirx.Broadcast(share, lanes)
        return fma(a, full(share, 1.0) - share, b * share)

    def row(y: Value) -> Value:
        low, high = (cast(kernel.value(x, (*index[:2], y, z)), dtype) for z in columns[:2])
        return bind(mix(low, high, cast(columns[2], dtype)))

    # Rows are mixed first in the reference; the four products are the same.
    return cast(mix(row(rows[0]), row(rows[1]), cast(rows[2], dtype)), node.type.dtype)


IMAGES = {
    pool.MaxPool2d: max_pool2d,
    pool.AvgPool2d: avg_pool2d,
    pool.AdaptiveAvgPool2d: adaptive_avg_pool2d,
    resize.Resize: resample,
}
