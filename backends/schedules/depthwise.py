"""Convolution of narrow groups on blocked channels: NCHW{b}c in and out, weights OIHW{g}i{b}o, g channels in and out of a group.

A block holds whole groups; with g = 1 (depthwise) each channel is on its own. A register tile is some columns of one channel
block. For each of the g inputs of a group, an input vector is loaded once for a kernel row, its lanes brought to all outputs of
their group, and multiplied by all the taps that read it. Borders as in `conv`: no tap runs outside the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from paring.backends.kernel import Kernel, Lanes, Scalar, Value, constant
from paring.backends.schedules.conv import Shape, kernel_rows, rows_of_padding
from paring.backends.schedules.dot import Dot
from paring.backends.schedules.tiles import (
    Accumulators,
    Block,
    Run,
    balanced,
    dispatch,
    duration,
    finish,
    only_anchor,
    runs,
    tile_count,
    tile_height,
)
from paring.backends.targets import Target
from paring.backends.vecmath import cast, lanes_in
from paring.ir import layout as lay
from paring.ir.graph import Graph, Node
from paring.ir.ops.conv import Conv2d


@dataclass(frozen=True)
class DepthwiseKnobs:
    """At most `columns` vectors in a register tile."""

    columns: int


def find(body: Graph, target: Target) -> Node | None:
    """The convolution of narrow groups of a region that this family runs, or None."""
    node = only_anchor(body, Conv2d)
    if node is None:
        return None
    op, b = node.op, target.block
    assert isinstance(op, Conv2d)
    tail = lay.weight_tail(op.weight_layout)
    if (lay.channel_block(op.layout), lay.channel_block(op.out_layout), tail[1:]) != (b, b, (b,)):
        return None
    blocks, inputs = node.inputs[1].type.shape[:2]
    return node if inputs == 1 and op.groups * tail[0] == blocks * b and b % tail[0] == 0 else None


def knobs(node: Node, target: Target) -> DepthwiseKnobs:
    """The default settings: half of the registers, so that one tile starts while another is written."""
    return DepthwiseKnobs(tile_height(target, target.block, 2))


def emit(kernel: Kernel, anchor: Node, knobs: DepthwiseKnobs) -> None:
    """Write the loops of a region around that convolution."""
    shape = Shape.of(anchor)
    blocks = anchor.type.shape[1]
    columns = runs(balanced(shape.out_width, knobs.columns), shape.taps)
    extents = (shape.images, shape.out_height, blocks, tile_count(columns))
    with kernel.parallel(extents, duration(anchor)) as (n, y, block, column):

        def at_column(x: Scalar, tile: Run) -> None:
            _tile(kernel, anchor, shape, (n, block, y, x), tile)

        dispatch(kernel, column, columns, at_column)


def _tile(kernel: Kernel, anchor: Node, shape: Shape, at: tuple[Scalar, ...], tile: Run) -> None:
    """One register tile: `tile.width` columns from x of row y of one channel block; at = (n, block, y, x)."""
    n, block, y, x = at
    lanes, dtype, op = shape.block, anchor.type.dtype, anchor.op
    assert isinstance(op, Conv2d)
    sums = Accumulators(kernel, tile.width, [lanes], Dot(dtype=dtype))
    bias = anchor.inputs[2:]
    sums.start(0, kernel.value(bias[0], (Lanes(block * lanes, lanes),)) if bias else None)
    low, high = kernel_rows(kernel, shape, y)
    image, weight = (kernel.buffers[operand] for operand in anchor.inputs[:2])
    padding = constant(op.pad_value, dtype, lanes) if op.pad_value else None
    group = shape.block_in

    def taps(kh: Scalar, member: int) -> list[Value]:
        first = kernel.bind((block * shape.kernel[0] + kh) * shape.kernel[1] * group * lanes + member * lanes)
        places = (Lanes(first + tap * group * lanes, lanes) for tap in range(shape.kernel[1]))
        return [kernel.bind(cast(kernel.load(weight, place), dtype)) for place in places]

    with kernel.loop(high, start=low) as kh:
        row = y * shape.stride[0] - shape.top + kh * shape.dilation[0]
        plane = n * anchor.type.shape[1] + block
        origin = kernel.bind(((plane * shape.height + row) * shape.width + x * shape.stride[1] - shape.left) * lanes)
        for member in range(group):
            weights = taps(kh, member)
            for column, uses in _uses(shape, tile).items():
                pixels = cast(kernel.load(image, Lanes(origin + column * lanes, lanes)), dtype)
                pixel = kernel.bind(_spread(pixels, group, member))
                for i, tap in uses:
                    sums.add(i, 0, pixel, weights[tap])
            if padding is not None:
                _pad(sums, padding, weights, tile.kind)
    if padding is not None:
        for start, stop in rows_of_padding(shape, (low, high)):
            with kernel.loop(stop, start=start) as kh:
                for member in range(group):
                    _pad(sums, padding, taps(kh, member), [range(0)] * shape.kernel[1])
    finish(kernel, anchor, Block(tile.width, [lanes], sums.value, lambda i, _: (n, block, y, x + i, Lanes(0, lanes))))


def _spread(pixels: Value, group: int, member: int) -> Value:
    """One channel of each group of neighbouring lanes, in all lanes of its group."""
    if group == 1:
        return pixels
    lanes = range(lanes_in(pixels))
    return tirx.Shuffle([pixels], [tirx.const(lane // group * group + member, "int32") for lane in lanes])


def _pad(sums: Accumulators, padding: Value, weights: Sequence[Value], kind: Sequence[range]) -> None:
    """Add the products of the taps that lie in the padding."""
    for weight, reached in zip(weights, kind, strict=True):
        for i in range(len(sums.registers)):
            if i not in reached:
                sums.add(i, 0, padding, weight)


def _uses(shape: Shape, tile: Run) -> dict[int, list[tuple[int, int]]]:
    """For each input column of a tile, counted from the first one that a tap could reach, the (output column, tap) pairs."""
    uses: dict[int, list[tuple[int, int]]] = {}
    for tap, reached in enumerate(tile.kind):
        for i in reached:
            uses.setdefault(i * shape.stride[1] + tap * shape.dilation[1], []).append((i, tap))
    return dict(sorted(uses.items()))
