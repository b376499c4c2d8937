"""Sparse layers whose lists store whole vectors of output channels: the dense schedule, with lists for its reduction.

A register tile is some columns x one block of output channels, as in `conv`. Each entry of a list is one step of `dot`: a vector
of weights, and the input channel, or the group of 8-bit ones, that it multiplies in all columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from paring.backends.kernel import Kernel, Scalar
from paring.backends.schedules.conv import Shape, kernel_rows, rows_of_padding
from paring.backends.schedules.dot import dot_of
from paring.backends.schedules.sparse import Results, each_entry, find_anchor, lists_of, shape_of
from paring.backends.schedules.tiles import (
    CHAINS,
    Accumulators,
    Block,
    Run,
    balanced,
    dispatch,
    duration,
    finish,
    overlaps,
    runs,
    tile_count,
    tile_height,
)
from paring.backends.targets import Target
from paring.ir.graph import Graph, Node
from paring.ir.ops.sparse import SparseConv2d
from paring.ir.types import DTYPES


@dataclass(frozen=True)
class VectorKnobs:
    """A register tile of at most `columns`, each sum in `steps` parts; with `pixels_first` all channels of its pixels in turn."""

    columns: int
    steps: int = 1
    pixels_first: bool = False


def find(body: Graph, target: Target) -> Node | None:
    """The sparse layer of a region that this family runs, or None."""
    node = find_anchor(body, target)
    if node is None:
        return None
    cut, shape = lists_of(node), shape_of(node, target)
    readable = shape.block_in in (1, target.block) or shape.in_blocks == 1
    return node if cut.block == target.block and cut.spans == 1 and readable else None


def knobs(node: Node, target: Target) -> VectorKnobs:
    """The default settings: all registers, or half of them where lists are short; of few pixels, several sums for each."""
    shape, values = shape_of(node, target), node.inputs[1].type
    entries = values.shape[0] // shape.out_blocks
    most = max(1, tile_height(target, shape.block, 2 if overlaps(target, entries) else 1) - dot_of(node, target).uniform)
    columns = min(most, shape.out_width, _in_cache(node, shape, target))
    image = node.inputs[0].type.bytes + node.type.bytes
    pixels_first = values.bytes <= target.l2 // 2 and image > values.bytes and shape.images == 1
    return VectorKnobs(columns, max(1, CHAINS // columns), pixels_first)


def _in_cache(node: Node, shape: Shape, target: Target) -> int:
    """How many pixels stay in the first cache while one channel after another is read of them.

    Where their distance has a large power of two as a factor, they share few sets of the cache.
    """
    way, x = target.l1 // WAYS, node.inputs[0].type
    return WAYS * way // gcd(way, shape.stride[1] * shape.block_in * DTYPES[x.dtype].bytes)


# Lines of a set of the first cache.
WAYS = 8


def emit(kernel: Kernel, anchor: Node, knobs: VectorKnobs) -> None:
    """Write the loops of a region around that layer."""
    shape = shape_of(anchor, kernel.target)
    columns = runs(balanced(shape.out_width, knobs.columns), shape.taps)
    channels = runs([1] * shape.out_blocks, lambda first, count: shape.used(first, count)[0])
    order = (0, 2, 3, 1) if knobs.pixels_first else (0, 1, 2, 3)
    extents = (shape.images, tile_count(channels), shape.out_height, tile_count(columns))
    with kernel.parallel([extents[i] for i in order], duration(anchor)) as position:
        n, channel, y, column = (position[order.index(i)] for i in range(4))

        def at_channel(block: Scalar, run: Run) -> None:
            def at_column(x: Scalar, tile: Run) -> None:
                _Tile(kernel, anchor, shape, knobs.steps, (n, block, y, x), run.kind, tile).emit()

            dispatch(kernel, column, columns, at_column)

        dispatch(kernel, channel, channels, at_channel)


@dataclass
class _Tile:
    """One register tile: `tile.width` columns, `used` lanes of one block of output channels; at = (n, block, y, x)."""

    kernel: Kernel
    anchor: Node
    shape: Shape
    steps: int
    at: tuple[Scalar, ...]
    used: int
    tile: Run

    def emit(self) -> None:
        k, s, width = self.kernel, self.shape, self.tile.width
        n, block, y, x = self.at
        self.dot = dot = dot_of(self.anchor, k.target)
        pad_value = self.anchor.op.pad_value if isinstance(self.anchor.op, SparseConv2d) else 0
        self.padding = pad_value if pad_value or dot.uniform else None
        self.excess = width * self.steps
        self.sums = Accumulators(k, self.excess + dot.uniform, [s.block], dot)
        results = Results(k, self.anchor, s)
        self.sums.start(0, results.bias(block, self.used), zero_from=width)
        low, high = kernel_rows(k, s, y)
        self._rows(low, high, self.tile.kind)
        # Rows of zeros go through no step, so nothing has to be taken off for them.
        if pad_value:
            for rows in rows_of_padding(s, (low, high)):
                self._rows(*rows, [range(0)] * s.kernel[1])

        def value(i: int, j: int) -> object:
            total = self.sums.value(i, 0)
            for step in range(1, self.steps):
                total = total + self.sums.value(step * width + i, 0)
            if dot.uniform:
                total = total - self.sums.value(self.excess, 0)
            return results.stored(total, self.used)

        written = Block(width, [results.width(self.used)], value, lambda i, j: results.index(n, block, y, x + i, self.used))
        finish(k, self.anchor, written)

    def _rows(self, low: Scalar, high: Scalar, taps: Sequence[range]) -> None:
        """Add the products of the kernel rows [low, high); `taps`: the columns in which each kernel column meets the image."""
        with self.kernel.loop(high, start=low) as row:
            for column, reached in enumerate(taps):
                if reached or self.padding is not None:
                    with self.kernel.scope():
                        self._list(row, column, reached)

    def _list(self, row: Scalar, column: int, reached: range) -> None:
        """Add the products of one kernel position; padding counts where it is not zero."""
        number = (row * self.shape.kernel[1] + column) * self.shape.out_blocks + self.at[1]
        pixel = self._pixel(row, column)
        lists = number, number + 1
        each_entry(self.kernel, self.anchor, lists, self.steps, lambda entry, step: self._entry(entry, pixel, step, reached))

    def _pixel(self, row: Scalar, column: int) -> Scalar:
        """Where the first input channel of the tile's first pixel lies, for one kernel position."""
        k, s = self.kernel, self.shape
        n, _, y, x = self.at
        iy = y * s.stride[0] - s.top + row * s.dilation[0]
        ix = x * s.stride[1] - s.left + column * s.dilation[1]
        return k.bind(((n * s.in_blocks * s.height + iy) * s.width + ix) * s.block_in)

    def _entry(self, entry: Scalar, pixel: Scalar, step: int, reached: range) -> None:
        """One stored vector times its input channels of each pixel."""
        k, s, dot, width = self.kernel, self.shape, self.dot, self.tile.width
        x, values, places = (k.buffers[operand] for operand in self.anchor.inputs[:3])
        origin = k.bind(pixel + self._channel(k.bind(k.load(places, entry))))
        weights = dot.weights(k, values, entry * (s.block * dot.depth), s.block)
        for i in range(width) if self.padding is not None else reached:
            if i in reached:
                value = dot.pixel(k, x, origin + i * s.stride[1] * s.block_in, dot.depth)
            else:
                assert self.padding is not None
                value = dot.fill(self.padding, dot.depth)
            self.sums.add(step * width + i, 0, value, weights)
        if dot.uniform:
            self.sums.add(self.excess, 0, dot.fill(0, dot.depth), weights)

    def _channel(self, place: Scalar) -> Scalar:
        """How far an input channel lies from the first one."""
        s = self.shape
        if s.in_blocks == 1:
            return place
        # Places are not negative, which TVM does not know: a division would be corrected for its sign.
        shift = s.block_in.bit_length() - 1
        return (place >> shift) * (s.height * s.width * s.block_in) + (place & (s.block_in - 1))
