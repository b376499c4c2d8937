"""Winograd's convolution, one element at a time: its tile's products, channel by channel, as far as this element needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from paring.backends import wrapping
from paring.backends.kernel import Index, Kernel, Scalar, Value, as_int, constant
from paring.backends.lowerings.loops import accumulator, by_lane, choose, clamp, scalar_only, within
from paring.backends.lowerings.product import read_channel
from paring.backends.vecmath import bind, cast
from paring.ir.graph import Node
from paring.ir.ops.winograd import NINTH, OF_PIXELS, OF_SUMS, PIXELS, RESULTS, SHIFT, WinogradConv2d

MODULO = (1 << 32) - 1


@by_lane
def winograd_conv2d(kernel: Kernel, node: Node, index: Index) -> Value:
    scalar_only(index)
    op, weight = node.op, node.inputs[1]
    assert isinstance(op, WinogradConv2d)
    n, block, *place, lane = index
    tile, inside = zip(*((bind(as_int(p // RESULTS)), bind(as_int(p % RESULTS))) for p in place), strict=True)
    down, across = ([_entry(OF_SUMS[:, p], where) for p in range(PIXELS)] for where in inside)
    # Products of 16 bits times at most 64, and thousands of them, fit 64 bits.
    register, where = accumulator(kernel, 1, "int64", constant(0, "int64"))
    with kernel.loop(2 * weight.type.shape[2]) as channel:
        pixels = _pixels(kernel, node, (n, channel), tile)
        total = kernel.load(register, where)
        for i in range(PIXELS):
            for j in range(PIXELS):
                factor = cast(kernel.value(weight, (block, i * PIXELS + j, channel // 2, lane, channel % 2)), "int64")
                total = total + cast(down[i] * across[j] * pixels[i][j], "int64") * factor
        kernel.store(register, where, total)
    ninth = (kernel.load(register, where) & constant(MODULO, "int64")) * constant(NINTH, "int64")
    result = cast(ninth, "int32") >> constant(SHIFT, "int32")
    for bias in node.inputs[2:]:
        result = wrapping.add(result, kernel.value(bias, (block * node.type.shape[4] + lane,)))
    return result


def _entry(column: Sequence[int], position: Scalar) -> Value:
    """One entry of a column of numbers, chosen at run time."""
    value = constant(int(column[0]), "int32")
    for i, entry in enumerate(column[1:], 1):
        value = tirx.Select(position == i, constant(int(entry), "int32"), value)
    return bind(value)


def _pixels(kernel: Kernel, node: Node, channel: tuple[Any, Any], tile: Sequence[Value]) -> list[list[Value]]:
    """The transformed pixels of a tile, (6, 6), in one channel of an image."""
    op, x = node.op, node.inputs[0]
    assert isinstance(op, WinogradConv2d)
    n, c = channel
    height, width = x.type.shape[2:4]

    def pixel(i: int, j: int) -> Value:
        row, column = (tile[d] * RESULTS + (i, j)[d] - op.padding[d][0] for d in (0, 1))
        read = read_channel(kernel, x, op.layout, n, c, clamp(row, height), clamp(column, width))
        inside = tirx.And(within(row, height), within(column, width))
        return bind(choose(inside, cast(read, "int32"), constant(op.pad_value, "int32")))

    rows = [_times(OF_PIXELS, [pixel(i, j) for i in range(PIXELS)]) for j in range(PIXELS)]
    return [_times(OF_PIXELS, [rows[j][i] for j in range(PIXELS)]) for i in range(PIXELS)]


def _times(matrix: np.ndarray[Any, Any], vector: Sequence[Value]) -> list[Value]:
    """A constant matrix times a vector of expressions."""
    return [
        bind(sum((value * constant(int(f), "int32") for f, value in zip(row, vector, strict=True) if f), constant(0, "int32")))
        for row in matrix
    ]


WINOGRAD = {WinogradConv2d: winograd_conv2d}
