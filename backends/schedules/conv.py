"""Direct convolution on blocked channels: NCHW{b}c or plain NCHW in, NCHW{b}c out, weights OIHW{i}i{b}o.

A register tile is some columns x some output channel blocks; all of the reduction runs inside it. Tiles at the left and right
border are emitted on their own, without the taps that fall into the padding, and the range of kernel rows follows the row, so
padding costs nothing and needs no copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

from tvm import tirx

from paring.backends.kernel import Kernel, Lanes, Scalar, Value, constant, flatten
from paring.backends.schedules.dot import dot_for, dot_of
from paring.backends.schedules.tiles import (
    CHAINS,
    Accumulators,
    Ahead,
    Block,
    Run,
    balanced,
    dispatch,
    duration,
    finish,
    only_anchor,
    overlaps,
    runs,
    tile_count,
    tile_height,
)
from paring.backends.targets import Target
from paring.ir import layout as lay
from paring.ir.graph import Graph, Node
from paring.ir.ops.conv import Conv2d

# No vector has fewer lanes.
NARROW = 4

Pair = tuple[int, int]
Taps = tuple[range, ...]  # for each kernel column the columns of a tile that it reaches inside the image


@dataclass(frozen=True)
class ConvKnobs:
    """A register tile of at most `columns` x `blocks` vectors; with `pixels_first` all channels of a tile's pixels in turn."""

    columns: int
    blocks: int
    pixels_first: bool = False


@dataclass(frozen=True)
class Shape:
    """The sizes of one convolution as its loops see them; a pointwise one sees its image as a single row."""

    images: int
    groups: int
    in_channels: int  # of one group, padding left out
    in_blocks: int  # of one group
    out_channels: int  # of one group, padding left out
    out_blocks: int  # of one group
    block_in: int
    block: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int

    @staticmethod
    def of(node: Node) -> Shape:
        op = node.op
        assert isinstance(op, Conv2d)
        w, b = node.inputs[1].type.shape, node.type.shape[4]
        block_in, _ = lay.weight_blocks(op.weight_layout) or (1, 1)
        blocks = node.type.shape[1] // op.groups
        inputs, outputs = (op.in_channels or w[1] * block_in, w[1], block_in), (op.out_channels or blocks * b, blocks)
        return Shape.around(node, op.groups, inputs, outputs, (w[2], w[3]))

    @staticmethod
    def around(node: Node, groups: int, inputs: tuple[int, int, int], outputs: Pair, kernel: Pair) -> Shape:
        """The sizes of a node with the window of a convolution.

        Of one group: `inputs` (channels, blocks, block) and `outputs` (channels, blocks).
        """
        op: Any = node.op
        n, _, oh, ow, b = node.type.shape
        height, width = node.inputs[0].type.shape[2:4]
        if kernel == (1, 1) and op.stride == (1, 1) and (oh, ow) == (height, width):
            oh, ow, height, width = 1, oh * ow, 1, height * width
        counts, size = (inputs[0], inputs[1], outputs[0], outputs[1], inputs[2], b), (height, width, oh, ow, kernel)
        return Shape(n, groups, *counts, *size, op.stride, op.dilation, op.padding[0][0], op.padding[1][0])

    @property
    def padded_rows(self) -> bool:
        """Whether some tap of some output row lies above or below the image."""
        last = (self.out_height - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] - self.top
        return self.top > 0 or last >= self.height

    def used(self, first: int, blocks: int) -> tuple[int, ...]:
        """How many lanes of some output blocks are not padding."""
        return tuple(min(self.block, self.out_channels - block * self.block) for block in range(first, first + blocks))

    def taps(self, start: int, width: int) -> Taps:
        """For a tile of `width` output columns from `start`."""

        def inside(column: int, tap: int) -> bool:
            return 0 <= (start + column) * self.stride[1] - self.left + tap * self.dilation[1] < self.width

        found = []
        for tap in range(self.kernel[1]):
            columns = [c for c in range(width) if inside(c, tap)]
            found.append(range(columns[0], columns[-1] + 1) if columns else range(0))
        return tuple(found)


def find(body: Graph, target: Target) -> Node | None:
    """The convolution of a region that this family runs, or None."""
    node = only_anchor(body, Conv2d)
    if node is None:
        return None
    op, dot = node.op, dot_for(node.inputs[0].type.dtype, target)
    assert isinstance(op, Conv2d)
    b = lay.channel_block(op.out_layout)
    blocks, block_in = lay.weight_blocks(op.weight_layout), lay.channel_block(op.layout)
    if blocks is None or dot is None:
        return None
    if (
        b is None
        or b not in (target.block, target.block // 2)
        or blocks != (block_in or 1, b)
        or block_in not in (None, dot.depth, b)
    ):
        return None
    if dot.depth > 1 and (b != target.block or lay.weight_tail(op.weight_layout)[2:] != (dot.depth,)):
        return None
    weight = node.inputs[1].type.shape
    return node if weight[1] and weight[0] % op.groups == 0 else None


def knobs(node: Node, target: Target) -> ConvKnobs:
    """The default settings: two channel blocks where the reduction is long and twice their weights fit the cache."""
    shape, dot = Shape.of(node), dot_of(node, target)
    depth = -(-shape.in_channels // dot.depth) * shape.kernel[0] * shape.kernel[1]
    # Of bytes each pixel is loaded and repeated by an instruction of its own, which two blocks share.
    if overlaps(target, depth) and dot.depth == 1:
        columns, blocks = tile_height(target, shape.block, 2), 1
    else:
        blocks = 2 if 2 * 2 * depth * shape.block * 4 <= target.l2 // 2 else 1
        columns = max(1, tile_height(target, shape.block, blocks) - dot.uniform)
    columns = min(columns, shape.out_width)
    # An image of a few pixels gives too few sums of its own.
    blocks = max(blocks, -(-CHAINS // columns)) if columns * 2 <= CHAINS else blocks
    # Where the weights stay in the cache, each thread takes rows of the image with all channels: what the kernel before it
    # left in the cache of this core is read there, and an image larger than the cache is read once.
    image, weight = (operand.type.bytes for operand in node.inputs[:2])
    pixels_first = weight <= target.l2 // 2 and image + node.type.bytes > weight and shape.images == 1
    return ConvKnobs(columns, min(blocks, shape.out_blocks), pixels_first)


def emit(kernel: Kernel, anchor: Node, knobs: ConvKnobs) -> None:
    """Write the loops of a region around that convolution."""
    shape = Shape.of(anchor)
    columns = runs(balanced(shape.out_width, knobs.columns), shape.taps)
    channels = runs(balanced(shape.out_blocks, knobs.blocks), shape.used)
    # Channels before pixels: the weights of a tile stay in the cache while they are used. Large ones serve all images at once.
    order = (1, 2, 0, 3, 4) if anchor.inputs[1].type.size * shape.images > anchor.inputs[0].type.size else (0, 1, 2, 3, 4)
    order = (0, 1, 3, 4, 2) if knobs.pixels_first else order
    extents = (shape.images, shape.groups, tile_count(channels), shape.out_height, tile_count(columns))
    inner = order.index(2) + 1
    with kernel.parallel([extents[i] for i in order], duration(anchor)) as position:
        n, group, channel, y, column = (position[order.index(i)] for i in range(5))
        turns = [extents[i] for i in order[inner:]]
        turn = flatten(position[inner:], turns)

        def at_channel(first: Scalar, blocks: Run) -> None:
            def at_column(x: Scalar, tile: Run) -> None:
                _Tile(kernel, anchor, shape, (n, group, first, y, x), blocks.kind, tile, turn, prod(turns)).emit()

            dispatch(kernel, column, columns, at_column)

        dispatch(kernel, channel, channels, at_channel)


def computed(used: int, block: int) -> int:
    """Lanes to compute of a block: half of them where half is padding, and so on."""
    while block % 2 == 0 and block // 2 >= max(used, NARROW):
        block //= 2
    return block


def kernel_rows(kernel: Kernel, shape: Shape, y: Scalar) -> tuple[Scalar, Scalar]:
    """The range [low, high) of kernel rows that meet the image in output row y; 0 <= low <= high <= kernel rows, always."""
    if not shape.padded_rows:
        return 0, shape.kernel[0]
    step, origin = shape.dilation[0], y * shape.stride[0] - shape.top
    low, high = (step - 1 - origin) // step, (shape.height - 1 - origin) // step + 1
    # Padding may be larger than the kernel, so that all of it lies above the image, or below.
    if isinstance(y, int):
        low = min(max(0, low), shape.kernel[0])
        return low, max(low, min(shape.kernel[0], high))
    low = kernel.bind(tirx.min(tirx.max(0, low), shape.kernel[0]))
    return low, kernel.bind(tirx.max(low, tirx.min(shape.kernel[0], high)))


def rows_of_padding(shape: Shape, rows: tuple[Scalar, Scalar]) -> tuple[tuple[Scalar, Scalar], ...]:
    """The ranges of kernel rows that lie in the padding where `rows` meet the image: above it and below."""
    low, high = rows
    return ((0, low), (high, shape.kernel[0])) if shape.padded_rows else ()


@dataclass(frozen=True)
class _Step:
    """`count` channels from `channel` on of input block `ci`, at row `kh` and tap `first` + `tap` of the kernel.

    Steps may run on from the last channel of a tap into the next tap: there the next pixel and its weights lie.
    """

    ci: Scalar
    kh: Scalar
    first: int
    tap: Scalar
    channel: Scalar
    count: int


@dataclass
class _Tile:
    """One register tile: `tile.width` columns, channel blocks of `used` lanes; at = (n, group, first block, y, x).

    It is number `turn` of the `turns` tiles that use the same weights.
    """

    kernel: Kernel
    anchor: Node
    shape: Shape
    at: tuple[Scalar, ...]
    used: tuple[int, ...]
    tile: Run
    turn: Scalar
    turns: int

    def emit(self) -> None:
        k, s = self.kernel, self.shape
        self.n, self.group, first, self.y, self.x = self.at
        self.widths = tuple(computed(lanes, s.block) for lanes in self.used)
        op = self.anchor.op
        assert isinstance(op, Conv2d)
        dot = dot_of(self.anchor, k.target)
        self.dot, self.padding = dot, op.pad_value if op.pad_value or dot.uniform else None
        pixels = s.images * s.out_height * s.out_width
        self.sums = Accumulators(k, self.tile.width + dot.uniform, self.widths, dot, pixels)
        self.channel = k.bind(self.group * s.out_blocks + first)
        bias = self.anchor.inputs[2:]
        for j, lanes in enumerate(self.widths):
            value = k.value(bias[0], (Lanes((self.channel + j) * s.block, lanes),)) if bias else None
            self.sums.start(j, value, zero_from=self.tile.width)
        low, high = kernel_rows(k, s, self.y)
        slab = s.in_blocks * s.kernel[0] * s.kernel[1] * s.block_in * s.block
        blocks = len(self.widths)
        share = slab * blocks if self.turns > 1 else 0
        ahead = Ahead.of(k, self.anchor.inputs[1], (self.channel + blocks) * slab, share, self.turns * s.in_blocks)
        whole, rest = divmod(s.in_channels, s.block_in)
        if whole:

            def block(ci: Scalar) -> None:
                ahead.step(self.turn * s.in_blocks + ci)
                self._accumulate(ci, low, high, s.block_in)

            self.sums.reduce(whole, s.block_in * prod(s.kernel), block)
        if rest:
            self._accumulate(whole, low, high, rest)
        finish(k, self.anchor, Block(self.tile.width, [s.block] * blocks, self._sum, self._index))

    def _sum(self, i: int, j: int) -> Value:
        """One vector of the result, zeros where its block is padding."""
        value, lanes = self.sums.value(i, j), self.widths[j]
        if self.dot.uniform:
            value = value - self.sums.value(self.tile.width, j)
        block, used = self.shape.block, self.used[j]
        if used == block:
            return value
        # Lanes from `lanes` on are zeros of the second operand: those of the padding take the first of them.
        zeros = constant(0, self.sums.dtype, max(block - lanes, NARROW))
        return tirx.Shuffle([value, zeros], [tirx.const(i if i < used else lanes, "int32") for i in range(block)])

    def _accumulate(self, ci: Scalar, low: Scalar, high: Scalar, channels: int) -> None:
        """All taps of the kernel rows [low, high) over the first `channels` of a block of input channels."""
        k, s = self.kernel, self.shape
        if s.block_in == 1:
            # The rows are innermost: their number is not static, so LLVM does not unroll the taps and spill what they share.
            for taps, reached in self._strips():
                with k.loop(len(taps)) as tap, k.loop(high, start=low) as kh:
                    self._multiply(_Step(ci, kh, taps.start, tap, 0, 1), reached)
            return
        for taps, reached in self._strips():
            self._taps(ci, (low, high), taps, reached, channels)
        if self.padding is not None:
            for rows in rows_of_padding(s, (low, high)):
                self._taps(ci, rows, range(s.kernel[1]), range(0), channels)

    def _taps(self, ci: Scalar, rows: tuple[Scalar, Scalar], taps: range, reached: range, channels: int) -> None:
        """Neighbouring taps of some kernel rows."""
        k, s, depth = self.kernel, self.shape, self.dot.depth
        (low, high), (whole, rest) = rows, divmod(channels, depth)
        # Neighbouring taps read neighbouring pixels and weights, so without dilation one loop runs over all of them.
        if whole and s.dilation[1] == 1 and channels == s.block_in and (len(taps) > 1 or depth == 1):
            with k.loop(high, start=low) as kh, k.loop(whole * len(taps)) as step:
                self._multiply(_Step(ci, kh, taps.start, 0, step * depth, depth), reached)
            return
        # Otherwise a loop has few turns, which LLVM would unroll: the rows are innermost, their number is not static.
        if whole:
            with k.loop(len(taps)) as tap, k.loop(whole) as step, k.loop(high, start=low) as kh:
                self._multiply(_Step(ci, kh, taps.start, tap, step * depth, depth), reached)
        if rest:
            with k.loop(len(taps)) as tap, k.loop(high, start=low) as kh:
                self._multiply(_Step(ci, kh, taps.start, tap, whole * depth, rest), reached)

    def _strips(self) -> list[tuple[range, range]]:
        """Neighbouring taps that reach the same columns of the tile, with these columns."""
        strips, tap = [], 0
        for reached, same in groupby(self.tile.kind):
            taps = range(tap, tap + len(list(same)))
            tap = taps.stop
            if reached or self.padding is not None:
                strips.append((taps, reached))
        return strips

    def _multiply(self, step: _Step, reached: range) -> None:
        """One step of the reduction, in the columns that it reaches; padding counts where it is not zero."""
        k, s, dot = self.kernel, self.shape, self.dot
        x, w = (k.buffers[operand] for operand in self.anchor.inputs[:2])
        row = self.y * s.stride[0] - s.top + step.kh * s.dilation[0]
        plane = (self.n * s.groups + self.group) * s.in_blocks + step.ci
        column = self.x * s.stride[1] + step.tap * s.dilation[1]
        origin = k.bind(((plane * s.height + row) * s.width + column) * s.block_in + step.channel)
        position = ((self.channel * s.in_blocks + step.ci) * s.kernel[0] + step.kh) * s.kernel[1] + step.first + step.tap
        weights = k.bind((position * s.block_in + step.channel) * s.block)
        between = s.in_blocks * s.kernel[0] * s.kernel[1] * s.block_in * s.block
        vectors = [dot.weights(k, w, weights + j * between, lanes) for j, lanes in enumerate(self.widths)]
        for i in range(self.tile.width):
            if i in reached:
                offset = origin + (i * s.stride[1] - s.left + step.first * s.dilation[1]) * s.block_in
                pixel = dot.pixel(k, x, offset, step.count)
            elif self.padding is not None:
                pixel = dot.fill(self.padding, step.count)
            else:
                continue
            for j, vector in enumerate(vectors):
                self.sums.add(i, j, pixel, vector)
        if dot.uniform:
            for j, vector in enumerate(vectors):
                self.sums.add(self.tile.width, j, dot.fill(0, step.count), vector)

    def _index(self, i: Scalar, j: int) -> tuple[object, ...]:
        """Of one vector of the tile in the anchor's result."""
        s, x = self.shape, self.x + i
        _, _, _, width, _ = self.anchor.type.shape
        y, x = (x // width, x % width) if s.out_width != width else (self.y, x)
        return (self.n, self.channel + j, y, x, Lanes(0, s.block))
