"""Ops that only move elements, as arithmetic on indices."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Index, Kernel, Lanes, Value, as_int, constant, flatten, lanes_of, splat
from paring.backends.lowerings.loops import (
    Straddles,
    as_index,
    by_lane,
    choose,
    clamp,
    plus,
    scalar_only,
    split,
    within,
)
from paring.backends.tables import look_up
from paring.backends.vecmath import bind, cast, full
from paring.ir import layout as lay
from paring.ir.graph import Node
from paring.ir.ops import index as idx
from paring.ir.ops import pack, quantized, shape
from paring.ir.types import BYTES


def broadcast(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,) = node.inputs
    inner = index[len(index) - x.type.rank :]
    taken = tuple(0 if size == 1 else i for i, size in zip(inner, x.type.shape, strict=True))
    return splat(kernel.value(x, taken), lanes_of(index))


@by_lane
def reshape(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,) = node.inputs
    if x in kernel.buffers:
        return kernel.load(kernel.buffers[x], flatten(index, node.type.shape))
    return splat(kernel.value(x, reshaped(index, node.type.shape, x.type.shape)), lanes_of(index))


def reshaped(index: Index, source: tuple[int, ...], target: tuple[int, ...]) -> Index:
    """The same element's index in another shape, by groups of dimensions whose sizes multiply to the same."""
    if 0 in source:
        return (0,) * len(target)
    result: list[Any] = []
    s = t = 0
    while s < len(source) or t < len(target):
        low_s, low_t = s, t
        left = right = 1
        while left != right or (low_s == s and low_t == t):
            if t == len(target) or (left <= right and s < len(source)):
                left, s = left * source[s], s + 1
            else:
                right, t = right * target[t], t + 1
        if source[low_s:s] == target[low_t:t]:
            result.extend(index[low_s:s])
        else:
            result.extend(_unflatten(flatten(index[low_s:s], source[low_s:s]), target[low_t:t]))
    return tuple(result)


def _unflatten(flat: Any, extents: tuple[int, ...]) -> list[Any]:
    components: list[Any] = []
    for d in range(len(extents) - 1, -1, -1):
        if extents[d] == 1:
            components.append(0)
        elif all(e == 1 for e in extents[:d]):
            components.append(flat)
            flat = 0
        else:
            flat, inner = split(flat, extents[d])
            components.append(inner)
    return components[::-1]


def transpose(kernel: Kernel, node: Node, index: Index) -> Value:
    taken: list[Any] = [0] * len(index)
    for d, p in enumerate(node.op.perm):
        taken[p] = index[d]
    return kernel.value(node.inputs[0], tuple(taken))


@by_lane
def concat(kernel: Kernel, node: Node, index: Index) -> Value:
    """By branches, so that only the operand an element comes from is computed."""
    axis = node.op.axis
    ends = [int(e) for e in np.cumsum([x.type.shape[axis] for x in node.inputs])]
    parts = [(x, end) for x, end in zip(node.inputs, ends, strict=True) if x.type.shape[axis]]
    position = index[axis]
    if len(parts) == 1:
        return kernel.value(parts[0][0], index)
    scalar_only((position,))

    def read(part: int) -> Value:
        x, end = parts[part]
        return kernel.value(x, (*index[:axis], position - (end - x.type.shape[axis]), *index[axis + 1 :]))

    if isinstance(position, int):
        return read(next(i for i, (_, end) in enumerate(parts) if position < end))
    lanes = lanes_of(index)
    register, where = kernel.local(lanes, node.type.dtype), Lanes(0, lanes) if lanes > 1 else 0

    def branch(part: int) -> None:
        with kernel.scope():
            if part == len(parts) - 1:
                kernel.store(register, where, read(part))
                return
            with T.If(position < as_int(parts[part][1])):
                with T.Then(), kernel.scope():
                    kernel.store(register, where, read(part))
                with T.Else():
                    branch(part + 1)

    branch(0)
    return kernel.load(register, where)


def slice_(kernel: Kernel, node: Node, index: Index) -> Value:
    op = node.op
    return kernel.value(
        node.inputs[0], tuple(i * step + start for i, start, step in zip(index, op.starts, op.steps, strict=True))
    )


def flip(kernel: Kernel, node: Node, index: Index) -> Value:
    shape_, axes = node.type.shape, node.op.axes
    return kernel.value(node.inputs[0], tuple(i * -1 + (shape_[d] - 1) if d in axes else i for d, i in enumerate(index)))


@by_lane
def roll(kernel: Kernel, node: Node, index: Index) -> Value:
    taken = list(index)
    for shift, axis in zip(node.op.shifts, node.op.axes, strict=True):
        size = node.type.shape[axis]
        if size and shift % size:
            scalar_only((taken[axis],))
            taken[axis] = (taken[axis] + (size - shift % size)) % size
    return kernel.value(node.inputs[0], tuple(taken))


@by_lane
def pad(kernel: Kernel, node: Node, index: Index) -> Value:
    (x,), op = node.inputs, node.op
    taken, inside = [], tirx.const(True, "bool")
    for i, (before, after), size in zip(index, op.padding, x.type.shape, strict=True):
        if before == after == 0:
            taken.append(i)
            continue
        scalar_only((i,))
        position = as_int(i - before)
        if op.mode == "constant":
            inside = tirx.And(inside, within(position, size))
        elif op.mode == "reflect":
            position = (size - 1) - tirx.abs((size - 1) - tirx.abs(position))
        taken.append(clamp(position, size))
    if op.mode != "constant":
        return kernel.value(x, tuple(taken))
    fill = constant(np.asarray(op.value).astype(x.type.dtype).item(), x.type.dtype)
    if x.type.size == 0:
        return splat(fill, lanes_of(index))
    return choose(inside, kernel.value(x, tuple(taken)), fill)


@by_lane
def pixel_shuffle(kernel: Kernel, node: Node, index: Index) -> Value:
    r = node.op.factor
    n, c, y, x = index
    (y, dy), (x, dx) = split(y, r), split(x, r)
    return kernel.value(node.inputs[0], (n, plus(c * (r * r), plus(dx, dy * r)), y, x))


@by_lane
def layout_transform(kernel: Kernel, node: Node, index: Index) -> Value:
    op = node.op
    src, dst = lay.channel_block(op.src), lay.channel_block(op.dst)
    n, c, y, x = index[:4]
    padded = node.type.shape[1] * dst > op.channels if dst else False
    if dst:
        if isinstance(c, Lanes):
            raise Straddles
        c = plus(c * dst, index[4])
    if padded:
        scalar_only((c,))
        inside = as_int(c) < op.channels
        c = clamp(as_int(c), op.channels)
    if src:
        outer, inner = split(c, src)
        value = kernel.value(node.inputs[0], (n, outer, y, x, inner))
    else:
        value = kernel.value(node.inputs[0], (n, c, y, x))
    return choose(inside, value, full(value, 0)) if padded else value


@by_lane
def pack_conv_weight(kernel: Kernel, node: Node, index: Index) -> Value:
    blocks = lay.weight_blocks(node.op.layout)
    assert blocks is not None
    oo, io, r, s, outer, oi, *rest = index
    inner = plus(outer * node.type.shape[6], rest[0]) if rest else outer
    return _padded(kernel, node.inputs[0], (plus(oo * blocks[1], oi), plus(io * blocks[0], inner), r, s))


@by_lane
def pack_linear_weight(kernel: Kernel, node: Node, index: Index) -> Value:
    outer, i, inner, *rest = index
    i = plus(i * node.type.shape[3], rest[0]) if rest else i
    return _padded(kernel, node.inputs[0], (plus(outer * node.type.shape[2], inner), i))


def _padded(kernel: Kernel, w: Node, index: Index) -> Value:
    """An element of a weight, zero beyond its first two dimensions."""
    scalar_only(index[:2])
    inside = [within(i, size) for i, size in zip(index[:2], w.type.shape[:2], strict=True)]
    taken = [clamp(as_int(i), size) for i, size in zip(index[:2], w.type.shape[:2], strict=True)]
    value = kernel.value(w, (*taken, *index[2:]))
    return choose(tirx.And(*inside), value, full(value, 0))


def _lookup(kernel: Kernel, indices: Node, index: Index, size: int) -> Value:
    """One index read from a tensor, clamped."""
    return cast(clamp(kernel.value(indices, index), size), "int32")


@by_lane
def gather(kernel: Kernel, node: Node, index: Index) -> Value:
    x, indices = node.inputs
    axis, rank = node.op.axis, indices.type.rank
    where = index[axis : axis + rank]
    scalar_only(where)
    if x.type.shape[axis] == 0:
        return constant(0, x.type.dtype, lanes_of(index))
    taken = _lookup(kernel, indices, where, x.type.shape[axis])
    return kernel.value(x, (*index[:axis], taken, *index[axis + rank :]))


@by_lane
def gather_elements(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index)
    x, indices = node.inputs
    axis = node.op.axis
    taken = _lookup(kernel, indices, index, x.type.shape[axis])
    return kernel.value(x, (*index[:axis], taken, *index[axis + 1 :]))


@by_lane
def lookup(kernel: Kernel, node: Node, index: Index) -> Value:
    q, table = node.inputs
    if table.type.dtype not in BYTES or table not in kernel.buffers:
        scalar_only(index)
    place = cast(kernel.value(q, index), "int32")
    place = place - full(place, quantized.limits(q.type.dtype)[0])
    if lanes_of(index) == 1:
        return kernel.value(table, (place,))
    return look_up(kernel, kernel.buffers[table], table.type.dtype, bind(place))


def dequantize_channels(kernel: Kernel, node: Node, index: Index) -> Value:
    q, scale = (kernel.value(operand, i) for operand, i in zip(node.inputs, (index, (index[node.op.axis],)), strict=True))
    return splat(cast(q, "float32"), lanes_of(index)) * splat(scale, lanes_of(index))


def triangle(kernel: Kernel, node: Node, index: Index) -> Value:
    row, column = (as_index(i) for i in index[-2:])
    lanes = lanes_of(index)
    distance = splat(column, lanes) - splat(row, lanes)
    diagonal = splat(tirx.const(node.op.diagonal, "int32"), lanes)
    kept = distance >= diagonal if isinstance(node.op, idx.Triu) else distance <= diagonal
    value = kernel.value(node.inputs[0], index)
    return choose(kept, value, full(value, 0))


MOVEMENT = {
    shape.Broadcast: broadcast,
    shape.Reshape: reshape,
    shape.Transpose: transpose,
    shape.Concat: concat,
    shape.Slice: slice_,
    shape.Flip: flip,
    shape.Roll: roll,
    shape.Pad: pad,
    shape.PixelShuffle: pixel_shuffle,
    shape.LayoutTransform: layout_transform,
    pack.PackConvWeight: pack_conv_weight,
    pack.PackLinearWeight: pack_linear_weight,
    idx.Gather: gather,
    idx.GatherElements: gather_elements,
    quantized.Lookup: lookup,
    quantized.DequantizeChannels: dequantize_channels,
    idx.Tril: triangle,
    idx.Triu: triangle,
}
