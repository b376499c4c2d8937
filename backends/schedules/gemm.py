"""Matrix products: `Linear` with packed weights OI{b}o, and batched `Matmul` of two row-major operands.

A register tile is some rows of x times some vectors of output columns; all of the reduction runs inside it. The columns of one
tile are the outer loop, so their weights are read from memory once and stay in the cache for all rows. The last vector may be
narrower than the others: it is computed in full where the weights are padded, and only its columns are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from paring.backends.kernel import Index, Kernel, Lanes, Scalar, Value, unflatten
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
    narrowed,
    only_anchor,
    overlaps,
    runs,
    tile_count,
    tile_height,
    widened,
)
from paring.backends.targets import Target
from paring.ir import layout as lay
from paring.ir.graph import Graph, Node
from paring.ir.ops.linear import Linear, Matmul


@dataclass(frozen=True)
class GemmKnobs:
    """A register tile of at most `rows` x `vectors`, each sum in `steps` parts."""

    rows: int
    vectors: int
    steps: int = 1


@dataclass(frozen=True)
class Shape:
    """The sizes of one product: `batch` times (rows x depth) by (depth x columns), in vectors of `lanes` columns.

    `group` neighbours along the depth are multiplied in one step.
    """

    batch: int
    rows: int
    depth: int
    columns: int
    lanes: int
    packed: bool
    group: int = 1

    @staticmethod
    def of(node: Node, target: Target) -> Shape:
        x, columns = node.inputs[0].type.shape, node.type.shape[-1]
        if isinstance(node.op, Linear):
            group = lay.linear_group(node.op.weight_layout)
            return Shape(1, prod(x[:-1]), x[-1], columns, target.block, True, group)
        return Shape(prod(x[:-2]), x[-2], x[-1], columns, min(target.lanes, columns), False)

    @property
    def positions(self) -> int:
        """Steps along the depth; the last one may have fewer than `group` neighbours."""
        return -(-self.depth // self.group)

    @property
    def vectors(self) -> int:
        return -(-self.columns // self.lanes)

    def column_runs(self, most: int) -> tuple[Run, ...]:
        """Tiles of at most `most` vectors; their kind is the number of columns of a narrower last vector, or 0."""
        tail = self.columns % self.lanes
        return runs(balanced(self.vectors, most), lambda start, width: tail if start + width == self.vectors else 0)


def find(body: Graph, target: Target) -> Node | None:
    """The matrix product of a region that this family runs, or None."""
    node = only_anchor(body, (Linear, Matmul))
    if node is None:
        return None
    assert isinstance(node.op, Linear | Matmul)
    dot = dot_for(node.inputs[0].type.dtype, target)
    if node.inputs[0].type.size == 0 or dot is None:
        return None
    if isinstance(node.op, Matmul):
        return node if dot.depth == 1 else None
    layout = node.op.weight_layout
    return node if (lay.linear_block(layout), lay.linear_group(layout)) == (target.block, dot.depth) else None


def knobs(node: Node, target: Target) -> GemmKnobs:
    """The default settings: nearly square in registers, or a flat tile of half of them where the reduction is short."""
    shape = Shape.of(node, target)
    if shape.rows == 1:
        vectors = min(4, shape.vectors)
        return GemmKnobs(1, vectors, max(1, CHAINS // vectors))
    if overlaps(target, shape.positions):
        return GemmKnobs(tile_height(target, shape.lanes, 2), 1)
    vectors = min(4 if shape.rows <= 4 else 3, shape.vectors)
    return GemmKnobs(max(1, tile_height(target, shape.lanes, vectors) - dot_of(node, target).uniform), vectors)


def emit(kernel: Kernel, anchor: Node, knobs: GemmKnobs) -> None:
    """Write the loops of a region around that product."""
    shape = Shape.of(anchor, kernel.target)
    rows, columns = runs(balanced(shape.rows, knobs.rows)), shape.column_runs(knobs.vectors)
    turns = tile_count(rows)
    with kernel.parallel((shape.batch, tile_count(columns), turns), duration(anchor)) as (batch, column, row):

        def at_column(first: Scalar, vectors: Run) -> None:
            def at_row(m: Scalar, tile: Run) -> None:
                _Tile(kernel, anchor, shape, knobs.steps, (batch, first, m), vectors, tile.width, row, turns).emit()

            dispatch(kernel, row, rows, at_row)

        dispatch(kernel, column, columns, at_column)


# Positions of the reduction between two requests for weights to come.
CHUNK = 16


@dataclass
class _Tile:
    """One register tile: `height` rows, `vectors.width` vectors of columns; at = (batch, first vector, first row).

    It is number `turn` of the `turns` tiles that use the same weights.
    """

    kernel: Kernel
    anchor: Node
    shape: Shape
    steps: int
    at: tuple[Scalar, ...]
    vectors: Run
    height: int
    turn: Scalar
    turns: int

    def emit(self) -> None:
        k, s = self.kernel, self.shape
        self.batch, self.first, self.m = self.at
        dot = dot_of(self.anchor, k.target)
        self.dot, self.excess = dot, self.height * self.steps
        self.sums = Accumulators(k, self.excess + dot.uniform, [s.lanes] * self.vectors.width, dot, s.batch * s.rows)
        for j in range(self.vectors.width):
            self.sums.start(j, zero_from=self.height, value=self._bias(j))
        self.row = k.bind(self.batch * s.rows + self.m)
        self._reduce()
        widths = [self._width(j) for j in range(self.vectors.width)]
        finish(k, self.anchor, Block(self.height, widths, self._total, self._index))

    def _index(self, i: Scalar, j: int) -> Index:
        """Of one vector of the tile in the anchor's result."""
        leading = self.anchor.type.shape[:-1]
        row = unflatten(self.m + i, leading) if self.shape.packed else (*unflatten(self.batch, leading[:-1]), self.m + i)
        return (*row, Lanes(self._column(j), self._width(j)))

    def _column(self, j: int) -> Scalar:
        return (self.first + j) * self.shape.lanes

    def _width(self, j: int) -> int:
        """Columns of vector j that are stored."""
        return self.vectors.kind or self.shape.lanes if j == self.vectors.width - 1 else self.shape.lanes

    def _bias(self, j: int) -> Value | None:
        k, lanes, width = self.kernel, self.shape.lanes, self._width(j)
        if len(self.anchor.inputs) < 3:
            return None
        bias = k.value(self.anchor.inputs[2], (Lanes(self._column(j), width),))
        return widened(k, bias, width, lanes, self.dot.dtype)

    def _reduce(self) -> None:
        """Add the products along the whole depth, `steps` at a time."""
        k, s, width = self.kernel, self.shape, self.vectors.width
        whole, part = divmod(s.depth, s.group)
        chunks, rest = divmod(whole, CHUNK) if s.packed else (0, whole)
        if chunks:
            slab = s.positions * s.lanes * s.group
            weights = self.anchor.inputs[1]
            ahead = Ahead.of(k, weights, (self.first + width) * slab, width * slab, self.turns * chunks)

            def chunk(number: Scalar) -> None:
                ahead.step(self.turn * chunks + number)
                self._stretch(number * CHUNK, CHUNK)

            self.sums.reduce(chunks, CHUNK // self.steps, chunk)
        self._stretch(chunks * CHUNK, rest)
        if part:
            with k.scope():
                self._add(whole, 0, part)

    def _stretch(self, start: Scalar, length: int) -> None:
        """Add the products of `length` positions of the depth."""
        whole, rest = divmod(length, self.steps)
        if whole:
            with self.kernel.loop(whole) as turn:
                for step in range(self.steps):
                    self._add(start + turn * self.steps + step, step, self.shape.group)
        for step in range(rest):
            with self.kernel.scope():
                self._add(start + whole * self.steps + step, step, self.shape.group)

    def _add(self, position: Scalar, step: int, count: int) -> None:
        """The products of one position of the depth: `count` neighbours."""
        k, s, dot = self.kernel, self.shape, self.dot
        x, w = (k.buffers[operand] for operand in self.anchor.inputs[:2])
        weights = [dot.weights(k, w, self._weights(j, position), s.lanes) for j in range(self.vectors.width)]
        for i in range(self.height):
            pixel = dot.pixel(k, x, self.row * s.depth + i * s.depth + position * s.group, count)
            for j, weight in enumerate(weights):
                self.sums.add(step * self.height + i, j, pixel, weight)
        if dot.uniform:
            for j, weight in enumerate(weights):
                self.sums.add(self.excess, j, dot.fill(0, count), weight)

    def _weights(self, j: int, position: Scalar) -> Scalar:
        """Where the weights of vector j begin."""
        s = self.shape
        if s.packed:
            return ((self.first + j) * s.positions + position) * (s.lanes * s.group)
        # A narrower last vector is read from further left: nothing lies behind the last row.
        column = self._column(j) - (s.lanes - self._width(j))
        return (self.batch * s.depth + position) * s.columns + column

    def _total(self, i: int, j: int) -> Value:
        """The sum of row i, vector j: the columns to be stored."""
        k, lanes, width = self.kernel, self.shape.lanes, self._width(j)
        total = self.sums.value(i, j)
        for step in range(1, self.steps):
            total = total + self.sums.value(step * self.height + i, j)
        if self.dot.uniform:
            total = total - self.sums.value(self.excess, j)
        return narrowed(k, total, Lanes(0 if self.shape.packed else lanes - width, width), lanes, self.dot.dtype)
