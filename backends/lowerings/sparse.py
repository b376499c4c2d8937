"""Sparse layers, one element at a time: the lists of its output channel, entry by entry."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from paring.backends.kernel import Index, Kernel, Value, as_int, constant
from paring.backends.lowerings.loops import accumulator, by_lane, choose, clamp, plus, scalar_only, split, sum_type, within
from paring.backends.lowerings.product import read_channel
from paring.backends.vecmath import bind, cast
from paring.ir import layout as lay
from paring.ir.graph import Node
from paring.ir.ops.sparse import Lists, SparseConv2d, SparseLinear

Read = Callable[[Value, Value], Value]


@by_lane
def sparse_conv2d(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index)
    op, x = node.op, node.inputs[0]
    assert isinstance(op, SparseConv2d)
    n, channel, y, z = index[:4]
    block = lay.channel_block(op.out_layout)
    channel = bind(as_int(plus(channel * block, index[4]) if block else channel))
    height, width = x.type.shape[2:4]

    def read(tap: Value, place: Value) -> Value:
        row = y * op.stride[0] + tap // op.kernel[1] * op.dilation[0] - op.padding[0][0]
        column = z * op.stride[1] + tap % op.kernel[1] * op.dilation[1] - op.padding[1][0]
        value = read_channel(kernel, x, op.layout, n, place, clamp(as_int(row), height), clamp(as_int(column), width))
        inside = tirx.And(within(row, height), within(column, width))
        return choose(inside, value, constant(op.pad_value, x.type.dtype))

    # What fills up the last block is zero: channels behind the last one are computed as the last one, and dropped.
    real = channel < op.out_channels
    total = _sum(kernel, node, op.lists_of(x.type), tirx.min(channel, op.out_channels - 1), read)
    return tirx.Select(real, total, constant(0, node.type.dtype))


@by_lane
def sparse_linear(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index)
    assert isinstance(node.op, SparseLinear)
    x = node.inputs[0]
    return _sum(kernel, node, node.op.lists_of(x.type), index[-1], lambda tap, place: kernel.value(x, (*index[:-1], place)))


def _sum(kernel: Kernel, node: Node, cut: Lists, channel: Value, read: Read) -> Value:
    """The entries of an output channel times what they multiply: `read(kernel position, input channel)`; and its bias."""
    values, places, starts, *bias = node.inputs[1:]
    dtype = sum_type(node.type.dtype)
    block, lane = split(channel, cut.block)
    register, where = accumulator(kernel, 1, dtype, constant(0, dtype))
    with kernel.loop(cut.taps) as tap, kernel.loop(cut.spans) as span:
        number = (tap * cut.spans + span) * cut.blocks + block
        first, last = (kernel.bind(kernel.value(starts, (number + end,))) for end in (0, 1))
        with kernel.loop(last, start=first) as entry:
            place = kernel.bind(kernel.value(places, (entry,)))
            for member in range(cut.group):
                # What fills up the last group counts for nothing: there the last channel is read instead.
                read_at = place + member
                weight = cast(kernel.value(values, (entry, lane * cut.group + member)), dtype)
                if cut.inputs % cut.group:
                    weight = tirx.Select(read_at < cut.inputs, weight, constant(0, dtype))
                    read_at = tirx.min(read_at, cut.inputs - 1)
                product = weight * cast(read(tap, read_at), dtype)
                kernel.store(register, where, kernel.load(register, where) + product)
    total = kernel.load(register, where)
    if bias:
        total = total + cast(kernel.value(bias[0], (channel,)), dtype)
    return cast(total, node.type.dtype)


SPARSE = {SparseConv2d: sparse_conv2d, SparseLinear: sparse_linear}
