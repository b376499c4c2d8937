"""Convolutions, matrix products and attention, one element at a time: right everywhere, fast nowhere."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from paring.backends import vecmath as vm
from paring.backends.kernel import Index, Kernel, Lanes, Value, as_int, constant, lanes_of, splat
from paring.backends.lowerings.loops import (
    Straddles,
    as_index,
    by_lane,
    choose,
    clamp,
    fold,
    plus,
    scalar_only,
    split,
    sum_type,
    total,
    within,
)
from paring.backends.lowerings.reduce import exp_of
from paring.backends.quantized import weight_place, weight_share
from paring.backends.vecmath import bind, cast, fma, full
from paring.ir import layout as lay
from paring.ir.graph import Node
from paring.ir.ops import attention, conv, linear
from paring.ir.ops.attention import MOST_SUM


def read_channel(kernel: Kernel, x: Node, layout: str, n: Any, c: Any, y: Any, z: Any) -> Value:
    """An element of an image in any layout."""
    block = lay.channel_block(layout)
    if block is None:
        return kernel.value(x, (n, c, y, z))
    outer, inner = split(c, block)
    return kernel.value(x, (n, outer, y, z, inner))


def _weight(kernel: Kernel, w: Node, layout: str, o: Any, i: Any, r: Any, s: Any) -> Value:
    blocks = lay.weight_blocks(layout)
    if blocks is None:
        return kernel.value(w, (o, i, r, s))
    (oo, oi), (io, ii) = split(o, blocks[1]), split(i, blocks[0])
    group = lay.weight_tail(layout)[2:]
    if not group:
        return kernel.value(w, (oo, io, r, s, ii, oi))
    outer, inner = split(ii, group[0])
    return kernel.value(w, (oo, io, r, s, outer, oi, inner))


def _group_of(channel: Any, size: int, groups: int) -> Any:
    """The group of an output channel; lanes must stay within one, or have one each."""
    if groups == 1:
        return 0
    return channel if size == 1 else split(channel, size)[0]


@by_lane
def conv2d(kernel: Kernel, node: Node, index: Index) -> Value:
    x, w = node.inputs[:2]
    op, dtype, lanes = node.op, sum_type(node.type.dtype), lanes_of(index)
    blocks = lay.weight_blocks(op.weight_layout)
    out_channels = w.type.shape[0] * (blocks[1] if blocks else 1)
    in_group = w.type.shape[1] * (blocks[0] if blocks else 1)
    kh, kw = w.type.shape[2:4]
    n, channel, y, z = index[:4]
    block = lay.channel_block(op.out_layout)
    if block:
        channel = plus(channel * block, index[4])
    scalar_only((n, y, z))
    group = _group_of(channel, out_channels // op.groups, op.groups)
    if isinstance(group, Lanes) and in_group != 1:
        raise Straddles
    height, width = x.type.shape[2:4]

    def term(position: tuple[Any, ...]) -> Value:
        i, r, s = position
        row = y * op.stride[0] + r * op.dilation[0] - op.padding[0][0]
        column = z * op.stride[1] + s * op.dilation[1] - op.padding[1][0]
        taken = (plus(i, group * in_group), clamp(as_int(row), height), clamp(as_int(column), width))
        value = cast(read_channel(kernel, x, op.layout, n, *taken), dtype)
        if any(map(any, op.padding)):
            inside = tirx.And(within(row, height), within(column, width))
            value = choose(inside, value, full(value, op.pad_value))
        return splat(value, lanes) * splat(cast(_weight(kernel, w, op.weight_layout, channel, i, r, s), dtype), lanes)

    result = total(kernel, (op.in_channels or in_group, kh, kw), lanes, dtype, term)
    if len(node.inputs) == 3:
        result = result + splat(cast(kernel.value(node.inputs[2], (channel,)), dtype), lanes)
    if op.out_channels:
        place = as_index(channel)
        result = choose(place < full(place, op.out_channels), result, full(result, 0))
    return cast(result, node.type.dtype)


@by_lane
def conv_transpose2d(kernel: Kernel, node: Node, index: Index) -> Value:
    """Gathers: the elements of x that a result element gets a share of."""
    x, w = node.inputs[:2]
    op, dtype = node.op, sum_type(node.type.dtype)
    n, channel, *place = index
    scalar_only(index)
    out_group, in_group = w.type.shape[1], w.type.shape[0] // op.groups
    group, inner = channel // out_group, channel % out_group

    def term(position: tuple[Any, ...]) -> Value:
        i, *turns = position
        reached = [_source(op, d, place[d], turns[d], x.type.shape[2 + d], w.type.shape[2 + d]) for d in (0, 1)]
        (rows, r, row), (columns, s, column) = reached
        value = cast(kernel.value(x, (n, group * in_group + i, row, column)), dtype)
        weight = cast(kernel.value(w, (group * in_group + i, inner, r, s)), dtype)
        return tirx.Select(tirx.And(rows, columns), value * weight, constant(0.0, dtype))

    turns = [_turns(op, d, w.type.shape[2 + d]) for d in (0, 1)]
    result = total(kernel, (in_group, *turns), 1, dtype, term)
    if len(node.inputs) == 3:
        result = result + cast(kernel.value(node.inputs[2], (channel,)), dtype)
    return cast(result, node.type.dtype)


def _turns(op: conv.ConvTranspose2d, d: int, taps: int) -> int:
    """How many taps of the kernel can reach one result element: with a stride, one in so many."""
    return -(-taps // op.stride[d]) if op.dilation[d] == 1 else taps


def _source(op: conv.ConvTranspose2d, d: int, at: Any, turn: Any, size: int, taps: int) -> tuple[Value, Value, Value]:
    """For one of those taps: whether it reaches an element of x, the tap, and the element's position; both made harmless."""
    at, stride = as_int(at + op.padding[d]), op.stride[d]
    tap = as_int(at % stride + turn * stride if op.dilation[d] == 1 else turn)
    source = at - tap * op.dilation[d]
    inside = tirx.And(within(source, (size - 1) * stride + 1), tirx.EQ(source % stride, 0))
    return tirx.And(inside, tap < taps), clamp(tap, taps), clamp(source // stride, size)


@by_lane
def linear_(kernel: Kernel, node: Node, index: Index) -> Value:
    x, w = node.inputs[:2]
    dtype, lanes = sum_type(node.type.dtype), lanes_of(index)
    layout, out = node.op.weight_layout, index[-1]
    block, group = lay.linear_block(layout), lay.linear_group(layout)
    outer, inner = split(out, block) if block else (out, 0)

    def term(position: tuple[Any, ...]) -> Value:
        (i,) = position
        blocked = (outer, i // group, inner, i % group) if group > 1 else (outer, i, inner)
        weight = kernel.value(w, blocked[: w.type.rank] if block else (out, i))
        value = kernel.value(x, (*index[:-1], i))
        return splat(cast(value, dtype), lanes) * splat(cast(weight, dtype), lanes)

    result = total(kernel, (x.type.shape[-1],), lanes, dtype, term)
    if len(node.inputs) == 3:
        result = result + splat(cast(kernel.value(node.inputs[2], (out,)), dtype), lanes)
    return cast(result, node.type.dtype)


def matmul(kernel: Kernel, node: Node, index: Index) -> Value:
    x, y = node.inputs
    dtype, lanes = sum_type(node.type.dtype), lanes_of(index)
    *batch, row, column = index

    def term(position: tuple[Any, ...]) -> Value:
        (k,) = position
        left, right = (cast(kernel.value(operand, i), dtype) for operand, i in ((x, (*batch, row, k)), (y, (*batch, k, column))))
        if dtype == "int32":
            left, right = left - full(left, node.op.x_zero), right - full(right, node.op.y_zero)
        return splat(left, lanes) * splat(right, lanes)

    return cast(total(kernel, (x.type.shape[-1],), lanes, dtype, term), node.type.dtype)


@by_lane
def attend(kernel: Kernel, node: Node, index: Index) -> Value:
    """Scores are computed twice: for their greatest one, and for the weighted sum."""
    q, k, v = node.inputs[:3]
    dtype, lanes = sum_type(node.type.dtype), lanes_of(index)
    b, h, row, column = index
    scalar_only((b, h, row))
    if dtype == "float64":
        scalar_only(index)
    keys = k.type.shape[2]

    def score(s: Any) -> Value:
        def term(p: tuple[Any, ...]) -> Value:
            return cast(kernel.value(q, (b, h, row, p[0])), dtype) * cast(kernel.value(k, (b, h, s, p[0])), dtype)

        dot = total(kernel, (q.type.shape[3],), 1, dtype, term)
        return masked(kernel, node, bind(dot * constant(node.op.scale_for(q.type.shape[3]), dtype)), (b, h, row, s))

    def largest(state: tuple[Value, ...], p: tuple[Any, ...]) -> list[Value]:
        value = bind(score(p[0]))
        return [tirx.Select(value > state[0], value, state[0])]

    low = constant(float("-inf"), dtype)
    (top,) = fold(kernel, (keys,), [(dtype, low)], largest)
    # A row without keys has no greatest score; anything finite makes its weights exp(-inf) = 0.
    top = bind(tirx.Select(tirx.EQ(top, low), constant(0.0, dtype), top))

    def weigh(state: tuple[Value, ...], p: tuple[Any, ...]) -> list[Value]:
        share = bind(exp_of(bind(score(p[0])) - top))
        value = splat(cast(kernel.value(v, (b, h, p[0], column)), dtype), lanes)
        return [state[0] + share, fma(splat(share, lanes), value, state[1])]

    whole, mixed = fold(kernel, (keys,), [(dtype, constant(0.0, dtype)), (dtype, constant(0.0, dtype, lanes))], weigh)
    empty = tirx.EQ(whole, constant(0.0, dtype))
    safe = bind(tirx.Select(empty, constant(1.0, dtype), whole))
    # Weights of zero still carry a NaN or an infinity of v, as in the reference.
    return cast(mixed / splat(safe, lanes), node.type.dtype)


@by_lane
def attend_on_integers(kernel: Kernel, node: Node, index: Index) -> Value:
    """Scores are computed twice, as in `attend`."""
    q, k, v, table = node.inputs[:4]
    b, h, row, column = index
    scalar_only((b, h, row))
    lanes, op = lanes_of(index), node.op
    out = constant(-MOST_SUM, "int32")

    def score(s: Any) -> Value:
        def term(p: tuple[Any, ...]) -> Value:
            left, right = (cast(kernel.value(x, (b, h, at, p[0])), "int32") for x, at in ((q, row), (k, s)))
            return (left - op.q_zero) * right

        return masked(kernel, node, bind(total(kernel, (q.type.shape[3],), 1, "int32", term)), (b, h, row, s), -MOST_SUM)

    def largest(state: tuple[Value, ...], p: tuple[Any, ...]) -> list[Value]:
        return [tirx.max(state[0], score(p[0]))]

    def weigh(state: tuple[Value, ...], p: tuple[Any, ...]) -> list[Value]:
        found = bind(score(p[0]))
        weight = cast(kernel.value(table, (bind(weight_place(op, top - found)),)), "int32")
        weight = bind(tirx.Select(found > out, weight, full(weight, 0)))
        value = cast(kernel.value(v, (b, h, p[0], column)), "int32")
        value = splat(value, lanes) - constant(op.v_zero, "int32", lanes)
        return [state[0] + weight, state[1] + splat(weight, lanes) * value]

    (top,) = fold(kernel, (k.type.shape[2],), [("int32", constant(-(2**31), "int32"))], largest)
    zeros = [("int32", constant(0, "int32")), ("int32", constant(0, "int32", lanes))]
    whole, mixed = fold(kernel, (k.type.shape[2],), zeros, weigh)
    return cast(mixed, "float32") * splat(weight_share(op, whole), lanes)


def masked(kernel: Kernel, node: Node, score: Value, index: Index, lowest: float = float("-inf")) -> Value:
    """A score after the causal mask and the mask operand, `lowest` where it does not count; the last component of the index may
    be lanes.
    """
    low = full(score, lowest)
    key = index[3].expand() if isinstance(index[3], Lanes) else as_int(index[3])
    if node.op.causal:
        score = bind(choose(key <= splat(as_int(index[2]), vm.lanes_in(key)), score, low))
    if len(node.inputs) == node.op.arity[1]:
        mask = kernel.value(node.inputs[-1], index)
        score = choose(mask, score, low) if vm.dtype_of(mask) == "bool" else score + cast(mask, vm.dtype_of(score))
    return score


PRODUCTS = {
    conv.Conv2d: conv2d,
    conv.ConvTranspose2d: conv_transpose2d,
    linear.Linear: linear_,
    linear.Matmul: matmul,
    attention.ScaledDotProductAttention: attend,
    attention.IntegerAttention: attend_on_integers,
}
