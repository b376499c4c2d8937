"""Attention: for each head and block of query rows, scores by register tiles, a softmax in scratch memory, times the values.

Keys are packed transposed, once for each head and chunk of its rows, so that a vector of scores is a vector of neighbouring
keys. Operands are read through whatever movements the region holds, so splitting and merging heads costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from paring.backends import vecmath as vm
from paring.backends.kernel import Kernel, Lanes, Scalar, Value, as_int, constant, splat
from paring.backends.lowerings.loops import accumulator, horizontal
from paring.backends.lowerings.product import masked
from paring.backends.schedules.elementwise import pieces
from paring.backends.schedules.tiles import Accumulators, Run, balanced, dispatch, runs, tile_count
from paring.backends.targets import Target
from paring.backends.vecmath import bind
from paring.ir.graph import Graph, Node
from paring.ir.op import Op
from paring.ir.ops import ELEMENTWISE, POINTWISE, index, shape
from paring.ir.ops.attention import ScaledDotProductAttention
from paring.ir.ops.core import Const, Input

INF = float("inf")
MOVES = (
    *(shape.Broadcast, shape.Reshape, shape.Transpose, shape.Slice, shape.Flip, shape.Roll, shape.Pad, index.Tril),
    *(Input, Const),
)


@dataclass(frozen=True)
class AttentionKnobs:
    """Register tiles of `rows` queries by `vectors` vectors of keys, or of values; each head's rows are in `chunks` tasks."""

    rows: int
    vectors: int
    chunks: int


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    queries: int
    keys: int
    inner: int
    outer: int  # elements of a value
    lanes: int

    @staticmethod
    def of(anchor: Node, target: Target) -> Sizes:
        q, k, v = (i.type.shape for i in anchor.inputs[:3])
        return Sizes(q[0], q[1], q[2], k[2], q[3], v[3], target.lanes)

    @property
    def key_vectors(self) -> int:
        return -(-self.keys // self.lanes)

    @property
    def value_vectors(self) -> int:
        return -(-self.outer // self.lanes)


def find(body: Graph, target: Target) -> Node | None:
    return only_attention(body, ScaledDotProductAttention)


def only_attention(body: Graph, op: type[Op]) -> Node | None:
    """The one node of that op, giving float32, of a region that is it, movements before it and elementwise ops behind it.

    The result may be transposed at last.
    """
    anchors = [n for n in body.nodes() if isinstance(n.op, op)]
    if len(anchors) != 1:
        return None
    (anchor,) = anchors
    if anchor.type.dtype != "float32" or any(0 in i.type.shape for i in anchor.inputs):
        return None
    behind, before = {anchor}, set(Graph((), anchor.inputs).nodes())
    for n in body.nodes():
        if n is anchor or n in before:
            if n in before and not isinstance(n.op, (*MOVES, *ELEMENTWISE)):
                return None
        elif behind.isdisjoint(n.inputs):
            if not isinstance(n.op, (*MOVES, *ELEMENTWISE)):
                return None
        elif isinstance(n.op, POINTWISE) and n.type.shape == anchor.type.shape:
            behind.add(n)
        elif n is not body.outputs[0] or not isinstance(n.op, shape.Transpose):
            return None
    output = body.outputs[0]
    return anchor if output in behind or not behind.isdisjoint(output.inputs) else None


def knobs(anchor: Node, target: Target) -> AttentionKnobs:
    sizes = Sizes.of(anchor, target)
    rows, vectors = (6, 4) if target.registers >= 32 else (4, 2)
    tiles = -(-sizes.queries // rows)
    heads = sizes.batch * sizes.heads
    # Each chunk packs its keys again, so chunks are long; but every core should have some.
    wanted = -(-2 * target.cores // heads) if heads % target.cores else 1
    # No more rows than the widest tile has.
    rows = -(-sizes.queries // tiles)
    return AttentionKnobs(rows, vectors, max(1, min(wanted, tiles // 4)))


def emit(kernel: Kernel, anchor: Node, settings: AttentionKnobs) -> None:
    each_head(kernel, anchor, settings, Head, anchor.macs // 20)


def each_head(kernel: Kernel, anchor: Node, settings: AttentionKnobs, make: Callable[..., Any], work: int) -> None:
    """Pack each head once for each chunk of its rows, and compute these tile by tile.

    `make(kernel, anchor, sizes, settings, b, h)` is a head, with `pack()` and `rows(first row, tile)`; `work` as in
    `Kernel.parallel`.
    """
    sizes = Sizes.of(anchor, kernel.target)
    tiles = runs(balanced(sizes.queries, settings.rows))
    chunks = min(settings.chunks, tile_count(tiles))
    each = -(-tile_count(tiles) // chunks)
    with kernel.parallel((sizes.batch, sizes.heads, chunks), work) as (b, h, chunk):
        head = make(kernel, anchor, sizes, settings, b, h)
        head.pack()
        left = tile_count(tiles) - chunk * each
        count = each if chunks == 1 else tirx.max(tirx.min(as_int(left), as_int(each)), as_int(0))
        with kernel.loop(count) as turn:
            dispatch(kernel, chunk * each + turn, tiles, head.rows)


class Head:
    """One head of one sample, with its packed keys and values."""

    def __init__(self, kernel: Kernel, anchor: Node, sizes: Sizes, settings: AttentionKnobs, b: Scalar, h: Scalar) -> None:
        self.kernel, self.anchor, self.sizes, self.settings = kernel, anchor, sizes, settings
        self.at = (b, h)
        lanes = sizes.lanes
        self.padded = sizes.key_vectors * lanes
        self.keys = kernel.local(self.padded * sizes.inner, "float32")
        self.values = kernel.local(sizes.keys * sizes.value_vectors * lanes, "float32")
        self.scores = kernel.local(settings.rows * self.padded, "float32")
        self.inverses = kernel.local(settings.rows, "float32")

    def pack(self) -> None:
        """Keys as [vector of keys][inner][lane], values as [key][padded]."""
        kernel, sizes, lanes = self.kernel, self.sizes, self.sizes.lanes
        for start, width, count in pieces(sizes.keys, lanes):
            with kernel.loop(count) as turn, kernel.loop(sizes.inner) as e:
                at = start + turn * width
                vector, first = (at // lanes, at % lanes) if width < lanes else (turn, 0)
                value = kernel.value(self.anchor.inputs[1], (*self.at, Lanes(at, width), e))
                kernel.store(self.keys, Lanes((vector * sizes.inner + e) * lanes + first, width), value)
        with kernel.loop(sizes.keys) as s:
            for start, width, count in pieces(sizes.outer, lanes):
                with kernel.loop(count) as turn:
                    at = start + turn * width
                    value = kernel.value(self.anchor.inputs[2], (*self.at, s, Lanes(at, width)))
                    kernel.store(self.values, Lanes(s * (sizes.value_vectors * lanes) + at, width), value)

    def rows(self, start: Scalar, run: Run) -> None:
        """All of a tile of query rows."""
        tiles = runs(balanced(self.sizes.key_vectors, self.settings.vectors))
        first = 0
        for part in tiles:
            begin = first
            with self.kernel.loop(part.count) as turn:
                self._scores(start, run.width, begin + turn * part.width, part.width)
            first += part.count * part.width
        with self.kernel.loop(run.width) as row:
            self._softmax(start + row, row)
        column = 0
        for width in balanced(self.sizes.value_vectors, self.settings.vectors):
            self._mix(start, run.width, column, width)
            column += width

    def _scores(self, start: Scalar, rows: int, vector: Scalar, vectors: int) -> None:
        kernel, sizes, lanes = self.kernel, self.sizes, self.sizes.lanes
        sums = Accumulators(kernel, rows, [lanes] * vectors)
        for v in range(vectors):
            sums.start(v)
        with kernel.loop(sizes.inner) as e:
            keys = [kernel.load(self.keys, Lanes(((vector + v) * sizes.inner + e) * lanes, lanes)) for v in range(vectors)]
            for r in range(rows):
                q = kernel.value(self.anchor.inputs[0], (*self.at, start + r, e))
                for v in range(vectors):
                    sums.add(r, v, q, keys[v])
        for r in range(rows):
            for v in range(vectors):
                kernel.store(self.scores, Lanes(r * self.padded + (vector + v) * lanes, lanes), sums.value(r, v))

    def _softmax(self, query: Scalar, row: Scalar) -> None:
        """Exponentials of one row's scores in place, and the inverse of their sum aside."""
        kernel, sizes, lanes = self.kernel, self.sizes, self.sizes.lanes
        top, where = accumulator(kernel, lanes, "float32", constant(-INF, "float32", lanes))
        whole, rest = divmod(sizes.keys, lanes)

        def adjust(at: Scalar, width: int) -> Value:
            score = kernel.load(self.scores, Lanes(row * self.padded + at, width))
            score = score * constant(self.anchor.op.scale_for(sizes.inner), "float32", width)
            position = Lanes(at, width) if width > 1 else at
            return bind(masked(kernel, self.anchor, bind(score), (*self.at, query, position)))

        def join(at: Scalar, value: Value) -> None:
            kernel.store(self.scores, Lanes(row * self.padded + at, lanes), value)
            old = kernel.load(top, where)
            kernel.store(top, where, tirx.Select(value > old, value, old))

        if whole:
            with kernel.loop(whole) as i:
                join(i * lanes, adjust(i * lanes, lanes))
        if rest:
            register, _ = accumulator(kernel, lanes, "float32", constant(-INF, "float32", lanes))
            for first, width, count in pieces(rest, lanes):
                for turn in range(count):
                    at = first + turn * width
                    kernel.store(register, Lanes(at, width), adjust(whole * lanes + at, width))
            join(whole * lanes, kernel.load(register, where))
        self._powers(row, bind(horizontal(kernel.load(top, where), lambda x, y: tirx.Select(x > y, x, y))))

    def _powers(self, row: Scalar, top: Value) -> None:
        kernel, lanes = self.kernel, self.sizes.lanes
        # A row without keys has no greatest score; with anything finite its weights are exp(-inf) = 0.
        low = constant(-INF, "float32")
        top = splat(bind(tirx.Select(tirx.EQ(top, low), constant(0.0, "float32"), top)), lanes)
        total, where = accumulator(kernel, lanes, "float32", constant(0.0, "float32", lanes))
        with kernel.loop(self.sizes.key_vectors) as i:
            place = Lanes(row * self.padded + i * lanes, lanes)
            power = bind(vm.exp_negative(kernel.load(self.scores, place) - top))
            kernel.store(self.scores, place, power)
            kernel.store(total, where, kernel.load(total, where) + power)
        whole = bind(horizontal(kernel.load(total, where), lambda x, y: x + y))
        zero, one = constant(0.0, "float32"), constant(1.0, "float32")
        kernel.store(self.inverses, row, tirx.Select(tirx.EQ(whole, zero), one, one / whole))

    def _mix(self, start: Scalar, rows: int, column: int, vectors: int) -> None:
        """A tile of the result: weights times values, and the region's epilogue."""
        kernel, sizes, lanes = self.kernel, self.sizes, self.sizes.lanes
        sums = Accumulators(kernel, rows, [lanes] * vectors)
        for v in range(vectors):
            sums.start(v)
        with kernel.loop(sizes.keys) as s:
            base = s * (sizes.value_vectors * lanes) + column * lanes
            values = [kernel.load(self.values, Lanes(base + v * lanes, lanes)) for v in range(vectors)]
            for r in range(rows):
                share = kernel.load(self.scores, r * self.padded + s)
                for v in range(vectors):
                    sums.add(r, v, share, values[v])
        for r in range(rows):
            for v in range(vectors):
                self._write(sums.registers[r][v], start + r, kernel.load(self.inverses, r), (column + v) * lanes)

    def _write(self, register: Any, query: Scalar, inverse: Value, column: int) -> None:
        kernel, lanes = self.kernel, self.sizes.lanes
        for first, width, count in pieces(min(lanes, self.sizes.outer - column), lanes):
            for turn in range(count):
                at = first + turn * width
                value = bind(kernel.load(register, Lanes(at, width)) * splat(inverse, width))
                position = Lanes(column + at, width) if width > 1 else column + at
                with kernel.scope():
                    kernel.anchors[self.anchor] = lambda _, value=value: value
                    kernel.finish((*self.at, query, position))
