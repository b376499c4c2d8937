"""Winograd's convolution on 8-bit integers (see `ir/ops/winograd.py`): tiles of pixels become 36 small matrix products.

A work item is some rows and columns of tiles and a part of the output blocks. Its pixels are transformed first, one block of
channels after another, into `pixels` (36, tiles, channels); then for two output blocks at a time come the products, position
by position, into `sums` (36, tiles, 2, block), and the results with their epilogue. All of it stays in the second cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tvm.script.ir_builder import tirx as T

from paring.backends import wrapping
from paring.backends.kernel import Index, Kernel, Lanes, Scalar, Value, constant
from paring.backends.schedules.dot import PAIRS, Pairs
from paring.backends.schedules.tiles import (
    CHAINS,
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
from paring.backends.vecmath import full
from paring.ir import layout as lay
from paring.ir.graph import Graph, Node
from paring.ir.ops.winograd import NINTH, PIXELS, POSITIONS, RESULTS, SHIFT, WinogradConv2d

# Output blocks whose products are taken together.
TOGETHER = 2


@dataclass(frozen=True)
class WinogradKnobs:
    """A work item is at most `rows` x `columns` tiles and one of `parts` of the output blocks."""

    rows: int
    columns: int
    parts: int = 1


@dataclass(frozen=True)
class Sizes:
    """One layer as its loops see it. Blocks are those of channels, `read` the input channels rounded up to pairs."""

    images: int
    in_blocks: int
    read: int
    out_blocks: int
    block: int
    height: int
    width: int
    out_height: int
    out_width: int
    top: int
    left: int
    fill: int

    @staticmethod
    def of(node: Node) -> Sizes:
        op = node.op
        assert isinstance(op, WinogradConv2d)
        n, in_blocks, height, width, block = node.inputs[0].type.shape
        _, out_blocks, out_height, out_width, _ = node.type.shape
        read, ((top, _), (left, _)) = 2 * node.inputs[1].type.shape[2], op.padding
        return Sizes(n, in_blocks, read, out_blocks, block, height, width, out_height, out_width, top, left, op.pad_value)

    @property
    def tile_rows(self) -> int:
        return -(-self.out_height // RESULTS)

    @property
    def tile_columns(self) -> int:
        return -(-self.out_width // RESULTS)


def find(body: Graph, target: Target) -> Node | None:
    """The layer of a region that this family runs, or None."""
    node = only_anchor(body, WinogradConv2d)
    if node is None or target.dot not in PAIRS:
        return None
    assert isinstance(node.op, WinogradConv2d)
    return node if lay.channel_block(node.op.layout) == target.block else None


def knobs(node: Node, target: Target) -> WinogradKnobs:
    """The default settings: what keeps all threads busy and registers full, and transforms few pixels twice."""
    s = Sizes.of(node)
    height = tile_height(target, s.block, min(TOGETHER, s.out_blocks))
    scratch = POSITIONS * (2 * s.in_blocks + 4 * TOGETHER) * s.block
    most = max(1, min(max(height, MOST_TILES), target.l2 // 2 // scratch))
    columns = max(balanced(s.tile_columns, min(s.tile_columns, most)))
    found = [
        WinogradKnobs(rows, columns, parts)
        for rows in range(max(1, min(s.tile_rows, most // columns)), 0, -1)
        for parts in sorted({1, min(target.cores, s.out_blocks)})
    ]
    return min(found, key=lambda each: _time(s, each, target))


def _time(s: Sizes, knobs: WinogradKnobs, target: Target) -> float:
    """About what the slowest thread takes."""
    items = s.images * knobs.parts * -(-s.tile_rows // knobs.rows) * -(-s.tile_columns // knobs.columns)
    tiles, blocks = knobs.rows * knobs.columns, -(-s.out_blocks // knobs.parts)
    # Too few sums at once leave the units waiting.
    together = min(tiles, tile_height(target, s.block, TOGETHER)) * min(TOGETHER, blocks)
    again = TRANSFORMED_AGAIN if knobs.parts > 1 else 1.0
    return -(-items // target.cores) * tiles * blocks * max(1.0, CHAINS / together) * again


# Tiles of an item, so that weights are read a few times only.
MOST_TILES = 16
# What it takes to transform the pixels once more for each part of the output blocks.
TRANSFORMED_AGAIN = 1.05


def emit(kernel: Kernel, anchor: Node, knobs: WinogradKnobs) -> None:
    """Write the loops of a region around that layer."""
    s = Sizes.of(anchor)
    parts = runs(balanced(s.out_blocks, -(-s.out_blocks // knobs.parts)))
    rows = runs(balanced(s.tile_rows, knobs.rows))
    columns = runs(balanced(s.tile_columns, knobs.columns), partial(reached, s.left, s.width, s.out_width))
    extents = (s.images, tile_count(parts), tile_count(rows), tile_count(columns))
    with kernel.parallel(extents, duration(anchor)) as (n, part, row, column):

        def at_part(block: Scalar, blocks: Run) -> None:
            def at_rows(y: Scalar, height: Run) -> None:
                def at_columns(x: Scalar, width: Run) -> None:
                    _Item(kernel, anchor, s, (n, block, y, x), blocks.width, height.width, width).emit()

                dispatch(kernel, column, columns, at_columns)

            dispatch(kernel, row, rows, at_rows)

        dispatch(kernel, part, parts, at_part)


Reached = tuple[range, int]


def reached(before: int, size: int, results: int, start: int, tiles: int) -> Reached:
    """Of neighbouring tiles along one dimension: which of their pixels lie inside the image, and how many results are kept."""
    first = start * RESULTS - before
    count = tiles * RESULTS + PIXELS - RESULTS
    low, high = (min(max(edge - first, 0), count) for edge in (0, size))
    return range(low, max(low, high)), min(tiles * RESULTS, results - start * RESULTS)


@dataclass
class _Item:
    """One work item: `blocks` output blocks, `height` x `width.width` tiles; at = (n, first block, tile row, tile column)."""

    kernel: Kernel
    anchor: Node
    sizes: Sizes
    at: tuple[Scalar, ...]
    blocks: int
    height: int
    width: Run

    def emit(self) -> None:
        k, s = self.kernel, self.sizes
        self.tiles, self.channels = self.height * self.width.width, s.in_blocks * s.block
        self.dot: Pairs = PAIRS[k.target.dot]
        self.pixels = k.local(POSITIONS * self.tiles * self.channels, "int16")
        self.columns = self.width.width * RESULTS + PIXELS - RESULTS
        self.row = k.local(PIXELS * self.columns * s.block, "int16")
        self.sums = k.local(POSITIONS * self.tiles * min(TOGETHER, self.blocks) * s.block, "int32")
        with k.loop(self.height) as row:
            tile_row = k.bind(self.at[2] + row)
            inside = runs([1] * s.tile_rows, lambda start, tiles: reached(s.top, s.height, s.out_height, start, tiles)[0])
            with k.loop(s.in_blocks) as block:
                dispatch(k, tile_row, inside, lambda y, run: self._columns(block, y, run.kind))
                self._rows(block, row)
        for pair in runs(balanced(self.blocks, TOGETHER)):
            with k.loop(pair.count) as number:
                first = k.bind(self.at[1] + pair.start + number * pair.width)
                self._products(first, pair.width)
                self._results(first, pair.width)

    def _columns(self, block: Scalar, tile_row: Scalar, inside: range) -> None:
        """The pixels of a row of tiles, transformed along their columns: of its six rows those `inside` lie in the image."""
        k, s = self.kernel, self.sizes
        n, _, _, tile_column = self.at
        x = k.buffers[self.anchor.inputs[0]]
        columns, (across, _) = self.columns, self.width.kind
        top, left = tile_row * RESULTS - s.top, tile_column * RESULTS - s.left
        fill = constant(s.fill, "int16", s.block)
        origin = k.bind((((n * s.in_blocks + block) * s.height + top) * s.width + left) * s.block)

        def stored(column: Scalar, given: Sequence[Value]) -> None:
            for i, value in enumerate(_of_pixels(k, given)):
                k.store(self.row, Lanes((i * columns + column) * s.block, s.block), value)

        with k.loop(len(across)) as number:
            column = number + across.start
            given = []
            for i in range(PIXELS):
                pixel = k.load(x, Lanes(origin + (i * s.width + column) * s.block, s.block))
                given.append(k.bind(pixel.astype(f"int16x{s.block}")) if i in inside else fill)
            stored(column, given)
        for column in (*range(across.start), *range(across.stop, columns)):
            stored(column, [fill] * PIXELS)

    def _rows(self, block: Scalar, row: Scalar) -> None:
        """What these have become, transformed along the rows."""
        k, s = self.kernel, self.sizes
        with k.loop(self.width.width) as tile, k.loop(PIXELS) as i:
            start = k.bind((i * self.columns + tile * RESULTS) * s.block)
            given = [k.bind(k.load(self.row, Lanes(start + j * s.block, s.block))) for j in range(PIXELS)]
            place = k.bind((i * PIXELS * self.tiles + row * self.width.width + tile) * self.channels + block * s.block)
            for j, value in enumerate(_of_pixels(k, given)):
                k.store(self.pixels, Lanes(place + j * self.tiles * self.channels, s.block), value)

    def _products(self, first: Scalar, blocks: int) -> None:
        """At each position the pixels of all tiles times the weights of some output blocks."""
        k, s = self.kernel, self.sizes
        tiles = runs(balanced(self.tiles, tile_height(k.target, s.block, blocks)))
        with k.loop(POSITIONS) as position:
            for run in tiles:
                with k.loop(run.count) as number:
                    tile = k.bind(position * self.tiles + run.start + number * run.width)
                    self._product(first, blocks, position, tile, run.width)

    def _product(self, first: Scalar, blocks: int, position: Scalar, tile: Scalar, width: int) -> None:
        """One register tile of them: `width` tiles, of which the first is number `tile` of all positions'."""
        k, s, dot = self.kernel, self.sizes, self.dot
        weights, pairs = k.buffers[self.anchor.inputs[1]], s.read // dot.depth
        sums = Accumulators(k, width, [s.block] * blocks, dot)
        for j in range(blocks):
            sums.start(j)
        with k.loop(pairs) as pair:
            slab = POSITIONS * pairs * s.block * dot.depth
            where = k.bind(first * slab + (position * pairs + pair) * s.block * dot.depth)
            vectors = [dot.weights(k, weights, where + j * slab, s.block) for j in range(blocks)]
            pixel = k.bind(tile * self.channels + pair * dot.depth)
            for i in range(width):
                value = dot.pixel(k, self.pixels, pixel + i * self.channels, dot.depth)
                for j, vector in enumerate(vectors):
                    sums.add(i, j, value, vector)
        for i in range(width):
            for j in range(blocks):
                k.store(self.sums, Lanes(((tile + i) * blocks + j) * s.block, s.block), sums.value(i, j))

    def _results(self, first: Scalar, blocks: int) -> None:
        """The results of all tiles in some output blocks."""
        k, kept = self.kernel, self.width.kind[1]
        whole, rest = divmod(kept, RESULTS)
        with k.loop(self.height) as row, k.loop(blocks) as j:
            for columns, tiles in ((RESULTS, range(whole)), (rest, range(whole, whole + 1))):
                if columns and len(tiles):
                    with k.loop(len(tiles)) as tile:
                        self._tile(first, blocks, j, row, tile + tiles.start, columns)

    def _tile(self, first: Scalar, blocks: int, j: Scalar, row: Scalar, tile: Scalar, columns: int) -> None:
        """Those of one tile in one output block; `columns` of its four are kept."""
        k, s = self.kernel, self.sizes
        n, _, tile_row, tile_column = self.at
        block = k.bind(first + j)
        start = k.bind(((row * self.width.width + tile) * blocks + j) * s.block)

        def load(position: int) -> Value:
            return k.bind(k.load(self.sums, Lanes(start + position * self.tiles * blocks * s.block, s.block)))

        across = [_of_sums(k, [load(i * PIXELS + column) for column in range(PIXELS)]) for i in range(PIXELS)]
        bias = self.anchor.inputs[2:]
        offset = k.value(bias[0], (Lanes(block * s.block, s.block),)) if bias else None
        results = [_of_sums(k, [across[i][column] for i in range(PIXELS)]) for column in range(columns)]
        y, x = k.bind((tile_row + row) * RESULTS), k.bind((tile_column + tile) * RESULTS)

        def value(i: int, column: int) -> Value:
            scaled = results[column][i]
            settled = wrapping.mul(scaled, full(scaled, NINTH)) >> full(scaled, SHIFT)
            return settled if offset is None else wrapping.add(settled, offset)

        for i in range(RESULTS):

            def index(column: Scalar, _: int, i: int = i) -> Index:
                return (n, block, y + i, x + column, Lanes(0, s.block))

            written = Block(columns, [s.block], lambda column, _, i=i: value(i, column), index)
            if s.out_height % RESULTS:
                with T.If(y + i < s.out_height), T.Then(), k.scope():
                    finish(k, self.anchor, written)
            else:
                finish(k, self.anchor, written)


def _times(value: Value, power: int) -> Value:
    """value * 2^power."""
    return value << full(value, power)


def _of_pixels(k: Kernel, d: Sequence[Value]) -> list[Value]:
    """OF_PIXELS times six vectors of int16."""
    a, b = k.bind(d[4] - _times(d[2], 2)), k.bind(d[3] - _times(d[1], 2))
    c, e = k.bind(d[4] - d[2]), k.bind(_times(d[3] - d[1], 1))
    return [_times(d[0] - d[2], 2) + c, a + b, a - b, c + e, c - e, d[5] - d[3] - _times(e, 1)]


def _of_sums(k: Kernel, m: Sequence[Value]) -> list[Value]:
    """OF_SUMS times six vectors of int32, modulo 2^32."""
    add, sub = wrapping.add, wrapping.sub
    p, q, r, s = (k.bind(op(m[i], m[i + 1])) for i in (1, 3) for op in (add, sub))
    four = k.bind(_times(q, 2))
    rows = [
        add(add(_times(m[0], 1), _times(p, 2)), r),
        add(four, _times(s, 1)),
        _times(add(p, r), 2),
        add(four, _times(add(s, m[5]), 3)),
    ]
    return [k.bind(row) for row in rows]
