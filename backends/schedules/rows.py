"""Softmaxes, norms and reductions, with the elementwise ops before and behind them, in one kernel.

Two ways. Along: what is reduced is contiguous; a row is combined in vectors of neighbouring elements, their lanes at the end.
Across: dimensions behind the reduced ones are kept; a vector holds neighbours of those, each lane a reduction of its own.
A row that is read more than once is copied to scratch memory, where it has no ragged end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from tvm import tirx

from paring.backends import vecmath as vm
from paring.backends.kernel import Index, Kernel, Lanes, Scalar, Value, as_int, constant, splat
from paring.backends.lowerings.loops import CHAIN, accumulator, greater, horizontal, lesser
from paring.backends.lowerings.reduce import inverse_deviation
from paring.backends.schedules.elementwise import mergeable, pieces, work_ns
from paring.backends.targets import Target
from paring.backends.vecmath import bind, cast, full
from paring.ir.graph import Graph, Node
from paring.ir.ops import POINTWISE, norm, pool, reduce, scan, shape
from paring.ir.ops.core import Const, Input

NORMS = (norm.LayerNorm, norm.RmsNorm, norm.GroupNorm)
REDUCTIONS = (reduce.Sum, reduce.Mean, reduce.Max, reduce.Min, pool.AdaptiveAvgPool2d)
ANCHORS = (*NORMS, norm.Softmax, *REDUCTIONS, reduce.ArgMax, scan.CumSum)
# Scratch memory of a row, bytes; longer rows are read again from their source.
ROW_BYTES = 128 * 1024
INF = float("inf")

Combine = Callable[[Value, Value], Value]


@dataclass(frozen=True)
class RowsKnobs:
    """`lanes`: elements of a vector. `unroll`: vectors combined among themselves before they join the running value."""

    lanes: int
    unroll: int = 4


@dataclass(frozen=True)
class View:
    """The sizes of an operand as outer | segments, row | trailing: the middle ones are reduced, the others are kept.

    `row` and `trailing` are contiguous and run as one dimension each; segments are loops of their own.
    """

    outer: tuple[int, ...]
    segments: tuple[int, ...]
    row: tuple[int, ...]
    trailing: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return prod(self.row)

    @property
    def width(self) -> int:
        return prod(self.trailing)

    @property
    def count(self) -> int:
        return prod(self.segments) * self.length

    def index(self, outer: Sequence[Scalar], segment: Sequence[Scalar], at: Any, lane: Any) -> Index:
        return (*outer, *segment, *_spread(at, self.row), *_spread(lane, self.trailing))


def _spread(position: Any, sizes: Sequence[int]) -> list[Any]:
    """One position over dimensions run as one: it counts along the last that is not 1, so the offset comes out right."""
    place = max((d for d, s in enumerate(sizes) if s > 1), default=0)
    return [position if d == place else 0 for d in range(len(sizes))]


def find(body: Graph, target: Target) -> Node | None:
    anchors = [n for n in body.nodes() if isinstance(n.op, ANCHORS)]
    if len(anchors) != 1:
        return None
    (anchor,) = anchors
    x, output = anchor.inputs[0], body.outputs[0]
    if x.type.dtype not in ("float32", "float16") or 0 in x.type.shape or output.type.shape != anchor.type.shape:
        return None
    behind = {anchor}
    for n in body.nodes():
        if n is anchor:
            continue
        if not isinstance(n.op, (*POINTWISE, Input, Const, shape.Broadcast)):
            return None
        if not behind.isdisjoint(n.inputs):
            if isinstance(n.op, shape.Broadcast):
                return None
            behind.add(n)
    return anchor if output in behind and view_of(body, anchor) is not None else None


def knobs(anchor: Node, target: Target) -> RowsKnobs:
    return RowsKnobs(target.lanes)


def view_of(body: Graph, anchor: Node) -> View | None:
    """How the anchor's operand is cut; None where the reduced dimensions are not neighbours or its kept ones not one."""
    op, x = anchor.op, anchor.inputs[0]
    sizes, rank = x.type.shape, x.type.rank
    before = Graph((), anchor.inputs).nodes()
    free = mergeable(before, rank)
    behind = [n for n in body.nodes() if n is not anchor and n not in set(before)]
    free_behind = mergeable(behind, anchor.type.rank)
    if isinstance(op, norm.GroupNorm):
        merged = rank - 2 if min(free, free_behind) >= rank - 2 else 1
        inner = (sizes[1] // op.groups, *sizes[2:])
        cut = len(inner) - merged
        return View((sizes[0], op.groups), inner[:cut], inner[cut:]) if rank > 2 else None
    axes = _axes(anchor)
    if not axes or axes != tuple(range(axes[0], axes[-1] + 1)):
        return None
    first, last = axes[0], axes[-1] + 1
    if rank - last > 1 and min(free, free_behind) < rank - last:
        return None
    whole = free >= rank - first and (isinstance(op, (*REDUCTIONS, reduce.ArgMax)) or free_behind >= rank - first)
    cut = first if whole else last - 1
    return View(sizes[:first], sizes[first:cut], sizes[cut:last], sizes[last:])


def _axes(anchor: Node) -> tuple[int, ...]:
    op, rank = anchor.op, anchor.inputs[0].type.rank
    if isinstance(op, pool.AdaptiveAvgPool2d):
        return (2, 3) if op.size == (1, 1) else ()
    if isinstance(op, norm.LayerNorm | norm.RmsNorm):
        return tuple(range(rank - anchor.inputs[1].type.rank, rank))
    return op.axes if isinstance(op, reduce.Reduction) else (op.axis,)


def emit(kernel: Kernel, anchor: Node, settings: RowsKnobs) -> None:
    view = view_of(kernel.body, anchor)
    assert view is not None
    # The operand is read from memory once and from the cache after that; a reduction's generic cost does not apply.
    work = work_ns([n for n in kernel.body.nodes() if n is not anchor]) + anchor.inputs[0].type.size // 2
    if not view.trailing or view.width == 1:
        if isinstance(anchor.op, scan.CumSum):
            settings = replace(settings, lanes=1)
        with kernel.parallel(view.outer, work) as outer:
            _emit_row(Row(kernel, anchor, replace(view, row=(*view.row, *view.trailing), trailing=()), outer, settings))
        return
    for start, width, count in pieces(view.width, settings.lanes):
        few = prod(view.outer) < 4 * kernel.target.cores
        with kernel.parallel((*view.outer, count) if few else view.outer, work) as position:
            outer = position[: len(view.outer)]
            with kernel.loop(1 if few else count) as turn:
                at = (position[-1] if few else turn) * width + start
                _emit_row(Row(kernel, anchor, view, outer, replace(settings, lanes=width), Lanes(at, width)))


def _emit_row(row: Row) -> None:
    op = row.anchor.op
    if isinstance(op, NORMS):
        _norm(row)
    elif isinstance(op, norm.Softmax):
        _softmax(row)
    elif isinstance(op, reduce.ArgMax):
        _argmax(row)
    elif isinstance(op, scan.CumSum):
        _scan(row)
    else:
        _reduction(row)


class Row:
    """One row of a view, along memory, or `lane.count` rows side by side, across it.

    A row is seen as `prod(segments)` times `vectors` vectors; the last one of each segment may be ragged.
    """

    def __init__(
        self, kernel: Kernel, anchor: Node, view: View, outer: Index, settings: RowsKnobs, lane: Lanes | None = None
    ) -> None:
        self.kernel, self.anchor, self.view, self.outer, self.lane = kernel, anchor, view, outer, lane
        self.lanes, self.unroll = settings.lanes, settings.unroll
        step = 1 if lane else self.lanes
        self.whole, self.rest = divmod(view.length, step)
        self.step, self.vectors = step, self.whole + bool(self.rest)
        self.scratch: Any = None

    def keep(self) -> None:
        """Have the row in scratch memory from its first reading on, if it fits."""
        elements = prod(self.view.segments) * self.vectors * self.lanes
        if elements * 4 <= ROW_BYTES:
            self.scratch = self.kernel.local(elements, "float32")

    def index(self, segment: Index, i: Scalar, start: int = 0, width: int | None = None) -> Index:
        """The operand's index of vector `i` of a segment, or of `width` of its lanes from `start` on."""
        if self.lane is not None:
            return self._of_operand(self.view.index(self.outer, segment, i, self.lane))
        width = self.lanes if width is None else width
        at = i * self.lanes + start
        return self._of_operand(self.view.index(self.outer, segment, Lanes(at, width) if width > 1 else at, 0))

    def _of_operand(self, index: Index) -> Index:
        if not isinstance(self.anchor.op, norm.GroupNorm):
            return index
        return (index[0], index[1] * (self.anchor.type.shape[1] // self.anchor.op.groups) + index[2], *index[3:])

    def source(self, index: Index, width: int) -> Value:
        return splat(cast(self.kernel.value(self.anchor.inputs[0], index), "float32"), width)

    def read(self, segment: Index, i: Scalar, ragged: bool, fill: float) -> Value:
        """A vector of the operand, with `fill` behind its end; kept if that was asked for."""
        kernel = self.kernel
        if not ragged:
            value = bind(self.source(self.index(segment, i), self.lanes))
            if self.scratch is not None:
                kernel.store(self.scratch, self.place(segment, i), value)
            return value
        register = kernel.local(self.lanes, "float32")
        kernel.store(register, Lanes(0, self.lanes), constant(fill, "float32"))
        for start, width, count in pieces(self.rest, self.lanes):
            for turn in range(count):
                at = start + turn * width
                kernel.store(register, Lanes(at, width), self.source(self.index(segment, i, at, width), width))
        value = kernel.load(register, Lanes(0, self.lanes))
        if self.scratch is not None:
            kernel.store(self.scratch, self.place(segment, i), value)
        return value

    def again(self, segment: Index, i: Scalar, ragged: bool, fill: float) -> Value:
        """A vector that has been read before."""
        if self.scratch is None:
            return self.read(segment, i, ragged, fill)
        return self.kernel.load(self.scratch, self.place(segment, i))

    def place(self, segment: Index, i: Scalar, start: int = 0, width: int | None = None) -> Lanes:
        flat: Scalar = 0
        for component, size in zip(segment, self.view.segments, strict=True):
            flat = flat * size + component
        return Lanes((flat * self.vectors + i) * self.lanes + start, self.lanes if width is None else width)

    def sweep(self, visit: Callable[[Index, Scalar, bool], Value], combine: Combine, start: float) -> Value:
        """All vectors of the row combined: `visit(segment, i, whether it is the ragged one)` gives each; one value a row."""
        kernel = self.kernel
        register, where = accumulator(kernel, self.lanes, "float32", constant(start, "float32", self.lanes))

        def join(value: Value) -> None:
            kernel.store(register, where, combine(kernel.load(register, where), bind(value)))

        with kernel.loop(prod(self.view.segments)) as flat:
            segment = self.kernel.components(flat, self.view.segments)
            groups = self.whole // self.unroll
            if groups:
                join(self._chain(groups, lambda i: self._group(segment, i, visit, combine), combine, start))
            for i in range(groups * self.unroll, self.whole):
                join(visit(segment, i, False))
            if self.rest:
                join(visit(segment, self.whole, True))
        value = kernel.load(register, where)
        return bind(value if self.lane is not None else horizontal(value, combine))

    def _group(self, segment: Index, i: Scalar, visit: Callable[[Index, Scalar, bool], Value], combine: Combine) -> Value:
        """Neighbouring vectors combined by pairs, so that few of the combinations wait for one another."""
        values = [bind(visit(segment, i * self.unroll + u, False)) for u in range(self.unroll)]
        while len(values) > 1:
            values = [bind(combine(*values[j : j + 2])) if j + 1 < len(values) else values[j] for j in range(0, len(values), 2)]
        return values[0]

    def _chain(self, count: int, term: Callable[[Scalar], Value], combine: Combine, start: float) -> Value:
        """`count` terms combined, in parts of at most CHAIN."""
        register, where = accumulator(self.kernel, self.lanes, "float32", constant(start, "float32", self.lanes))

        def join(value: Value) -> None:
            self.kernel.store(register, where, combine(self.kernel.load(register, where), bind(value)))

        if count <= CHAIN:
            with self.kernel.loop(count) as i:
                join(term(i))
            return self.kernel.load(register, where)
        parts, rest = divmod(count, CHAIN)
        with self.kernel.loop(parts) as part:
            join(self._chain(CHAIN, lambda i: term(part * CHAIN + i), combine, start))
        if rest:
            join(self._chain(rest, lambda i: term(i + parts * CHAIN), combine, start))
        return self.kernel.load(register, where)

    def finish(self, result: Callable[[Index, Value], Value], fill: float = 0.0) -> None:
        """Write the anchor's elements: `result(index, element of the row)` gives each vector."""
        kernel = self.kernel
        with kernel.loop(prod(self.view.segments)) as flat:
            segment = self.kernel.components(flat, self.view.segments)
            if self.whole:
                with kernel.loop(self.whole) as i:
                    self.write(self.index(segment, i), result, bind(self.again(segment, i, False, fill)))
            if not self.rest:
                return
            for start, width, count in pieces(self.rest, self.lanes):
                for turn in range(count):
                    at = start + turn * width
                    index = self.index(segment, self.whole, at, width)
                    if self.scratch is None:
                        value = self.source(index, width)
                    else:
                        value = kernel.load(self.scratch, self.place(segment, self.whole, at, width))
                    self.write(index, result, bind(value))

    def write(self, index: Index, result: Callable[[Index, Value], Value], value: Value) -> None:
        kernel, anchor = self.kernel, self.anchor
        with kernel.scope():
            final = bind(cast(result(index, value), anchor.type.dtype))
            kernel.anchors[anchor] = lambda _: final
            kernel.finish(index)


def _add(x: Value, y: Value) -> Value:
    return x + y


def _greater_number(x: Value, best: Value) -> Value:
    # A NaN comes back through the exponential.
    return tirx.Select(x > best, x, best)


def _norm(row: Row) -> None:
    op, lanes, count = row.anchor.op, row.lanes, row.view.count
    centred = not isinstance(op, norm.RmsNorm)
    row.keep()
    mean: Value = None
    if centred:
        whole = row.sweep(lambda s, i, ragged: row.read(s, i, ragged, 0.0), _add, 0.0)
        mean = bind(whole / full(whole, count))

    def square(segment: Index, i: Scalar, ragged: bool) -> Value:
        if not centred:
            value = bind(row.read(segment, i, ragged, 0.0))
            return value * value
        shifted = bind(row.again(segment, i, ragged, 0.0) - splat(mean, lanes))
        if not ragged:
            return shifted * shifted
        inside = Lanes(0, lanes).expand() < splat(as_int(row.rest), lanes)
        return tirx.Select(inside, shifted * shifted, full(shifted, 0.0))

    variance = row.sweep(square, _add, 0.0)
    inverse = bind(inverse_deviation(variance / full(variance, count), op.eps))
    row.finish(lambda index, value: _scaled(row, index, value, mean, inverse))


def _scaled(row: Row, index: Index, value: Value, mean: Value, inverse: Value) -> Value:
    """(value - mean) * inverse * weight + bias."""
    kernel, (_, weight, *bias) = row.kernel, row.anchor.inputs
    lanes = vm.lanes_in(value)
    where = (index[1],) if isinstance(row.anchor.op, norm.GroupNorm) else index[len(index) - weight.type.rank :]
    if mean is not None:
        value = value - splat(mean, lanes)
    unit = value * splat(inverse, lanes)
    weights = splat(cast(kernel.value(weight, where), "float32"), lanes)
    if not bias:
        return unit * weights
    return vm.fma(unit, weights, splat(cast(kernel.value(bias[0], where), "float32"), lanes))


def _softmax(row: Row) -> None:
    logarithmic = isinstance(row.anchor.op, norm.LogSoftmax)
    row.keep()
    top = row.sweep(lambda s, i, ragged: row.read(s, i, ragged, -INF), _greater_number, -INF)

    def power(value: Value) -> Value:
        return vm.exp_negative(value - splat(top, vm.lanes_in(value)))

    def weigh(segment: Index, i: Scalar, ragged: bool) -> Value:
        share = bind(power(row.again(segment, i, ragged, -INF)))
        if row.scratch is not None and not logarithmic:
            row.kernel.store(row.scratch, row.place(segment, i), share)
        return share

    whole = row.sweep(weigh, _add, 0.0)
    if logarithmic:
        rest = bind(vm.log(whole))
        row.finish(lambda _, value: value - splat(top, vm.lanes_in(value)) - splat(rest, vm.lanes_in(value)))
        return
    inverse = bind(full(whole, 1.0) / whole)
    kept = row.scratch is not None
    row.finish(lambda _, value: (value if kept else power(value)) * splat(inverse, vm.lanes_in(value)))


def _reduction(row: Row) -> None:
    op = row.anchor.op
    if isinstance(op, reduce.Max | reduce.Min):
        choose, start = (greater, -INF) if isinstance(op, reduce.Max) else (lesser, INF)
        value = row.sweep(lambda s, i, ragged: row.read(s, i, ragged, start), lambda x, y: choose(x, y, True), start)
    else:
        value = row.sweep(lambda s, i, ragged: row.read(s, i, ragged, 0.0), _add, 0.0)
        if isinstance(op, reduce.Mean | pool.AdaptiveAvgPool2d):
            value = value / full(value, row.view.count)
    row.write(_reduced_index(row), lambda _, v: v, value)


def _scan(row: Row) -> None:
    kernel = row.kernel
    total, where = accumulator(kernel, row.lanes, "float32", constant(0.0, "float32", row.lanes))
    with kernel.loop(row.whole) as i:
        kernel.store(total, where, kernel.load(total, where) + row.read((), i, False, 0.0))
        row.write(row.index((), i), lambda _, v: v, kernel.load(total, where))


def _reduced_index(row: Row) -> Index:
    """Where the result of a reduction goes: reduced dimensions that are kept have the position 0."""
    trailing = _spread(row.lane, row.view.trailing)
    return (*row.outer, *((0,) * (row.anchor.type.rank - len(row.outer) - len(trailing))), *trailing)


def _argmax(row: Row) -> None:
    kernel, lanes = row.kernel, row.lanes
    best, where = accumulator(kernel, lanes, "float32", constant(-INF, "float32", lanes))
    found, _ = accumulator(kernel, lanes, "int32", constant(0, "int32", lanes))

    def step(i: Scalar, ragged: bool) -> None:
        value, old = bind(row.read((), i, ragged, -INF)), kernel.load(best, where)
        wins = bind(tirx.Or(value > old, tirx.And(tirx.isnan(value), tirx.Not(tirx.isnan(old)))))
        position = splat(as_int(i), lanes) if row.lane is not None else Lanes(i * lanes, lanes).expand()
        kernel.store(found, where, tirx.Select(wins, position, kernel.load(found, where)))
        kernel.store(best, where, tirx.Select(wins, value, old))

    with kernel.loop(row.whole) as i:
        step(i, False)
    if row.rest:
        step(row.whole, True)
    position = kernel.load(found, where) if row.lane is not None else _first_best(kernel, best, found, lanes)
    row.write(_reduced_index(row), lambda _, v: v, bind(cast(position, "int64")))


def _first_best(kernel: Kernel, best: Any, found: Any, lanes: int) -> Value:
    """The least position among the lanes that hold the greatest value, or a NaN."""
    top, _ = accumulator(kernel, 1, "float32", kernel.load(best, 0))
    first, _ = accumulator(kernel, 1, "int32", kernel.load(found, 0))
    with kernel.loop(lanes - 1) as turn:
        value, position = kernel.load(best, turn + 1), kernel.load(found, turn + 1)
        old, place = kernel.load(top, 0), kernel.load(first, 0)
        both = tirx.And(tirx.isnan(value), tirx.isnan(old))
        greater_one = tirx.Or(value > old, tirx.And(tirx.isnan(value), tirx.Not(tirx.isnan(old))))
        alike = tirx.Or(tirx.EQ(value, old), both)
        wins = bind(tirx.Or(greater_one, tirx.And(alike, position < place)))
        kernel.store(first, 0, tirx.Select(wins, position, place))
        kernel.store(top, 0, tirx.Select(wins, value, old))
    return kernel.load(first, 0)
