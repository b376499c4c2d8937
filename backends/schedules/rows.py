"""Softmaxes, norms and reductions, with the elementwise ops before and behind them, in one kernel.

Two ways. Along: what is reduced is contiguous; a row is summed in vectors of neighbouring elements, their lanes at the end.
Across: dimensions behind the reduced ones are kept; a vector holds neighbours of those, each lane a reduction of its own.
A row that is read more than once is copied to scratch memory, where it has neither gaps nor a ragged end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx

from paring.backends import vecmath as vm
from paring.backends.kernel import Index, Kernel, Lanes, Scalar, Value, as_int, constant, splat, unflatten
from paring.backends.lowerings.loops import CHAIN, accumulator, greater, horizontal, lesser
from paring.backends.lowerings.reduce import inverse_deviation
from paring.backends.scalar import SCALARS
from paring.backends.schedules.elementwise import mergeable, pieces, work_ns
from paring.backends.targets import Target
from paring.backends.vecmath import bind, cast, full
from paring.ir.graph import Graph, Node
from paring.ir.ops import norm, reduce, shape
from paring.ir.ops.core import Const, Input

NORMS = (norm.LayerNorm, norm.RmsNorm, norm.GroupNorm)
SOFTMAXES = (norm.Softmax,)
REDUCTIONS = (reduce.Sum, reduce.Mean, reduce.Max, reduce.Min)
ANCHORS = (*NORMS, *SOFTMAXES, *REDUCTIONS, reduce.ArgMax)
# Scratch memory of a row, bytes; longer rows are read again from their source.
ROW_BYTES = 256 * 1024
INF = float("inf")


@dataclass(frozen=True)
class RowsKnobs:
    """`lanes`: elements of a vector. `unroll`: vectors combined among themselves before they join the running value."""

    lanes: int
    unroll: int = 4


@dataclass(frozen=True)
class View:
    """A tensor as (outer, segments, length, trailing): the middle two are reduced, the first and the last are kept.

    Rows along memory have no trailing dimension; `length` is their contiguous part, `segments` what cannot be merged with it.
    """

    sizes: tuple[int, ...]
    outer: int  # number of leading dimensions that are kept
    reduced: int  # number of dimensions that are reduced
    merged: int  # of these, so many at the end are run as one
    trailing: int  # number of dimensions behind, run as one

    @property
    def outer_sizes(self) -> tuple[int, ...]:
        return self.sizes[: self.outer]

    @property
    def segments(self) -> tuple[int, ...]:
        return self.sizes[self.outer : self.outer + self.reduced - self.merged]

    @property
    def length(self) -> int:
        return prod(self.sizes[self.outer + self.reduced - self.merged : self.outer + self.reduced])

    @property
    def width(self) -> int:
        return prod(self.sizes[self.outer + self.reduced :])

    @property
    def count(self) -> int:
        return prod(self.segments) * self.length

    def index(self, outer: Sequence[Scalar], segment: Sequence[Scalar], at: Any, lane: Any = None) -> Index:
        """The full index of an element; merged dimensions carry their one position where it does not change the offset."""
        last = self.outer + self.reduced
        middle = _spread(at, self.sizes[last - self.merged : last])
        return (*outer, *segment, *middle, *_spread(lane, self.sizes[last:]))


def _spread(position: Any, sizes: Sequence[int]) -> list[Any]:
    place = max((d for d, s in enumerate(sizes) if s > 1), default=0)
    return [position if d == place else 0 for d in range(len(sizes))]


def find(body: Graph, target: Target) -> Node | None:
    anchors = [n for n in body.nodes() if isinstance(n.op, ANCHORS)]
    if len(anchors) != 1:
        return None
    (anchor,) = anchors
    x, output = anchor.inputs[0], body.outputs[0]
    others = [n for n in body.nodes() if n is not anchor]
    allowed = all(type(n.op) in SCALARS or isinstance(n.op, Input | Const | shape.Broadcast) for n in others)
    if not allowed or x.type.dtype not in ("float32", "float16") or 0 in x.type.shape or output.type.shape != anchor.type.shape:
        return None
    behind = {anchor}
    for n in body.nodes():
        if not behind.isdisjoint(n.inputs):
            if isinstance(n.op, shape.Broadcast):
                return None
            behind.add(n)
    view = view_of(anchor)
    if view is None or output not in behind or (view.width > 1 and view.count * target.lanes * 4 > ROW_BYTES):
        return None
    return anchor


def knobs(anchor: Node, target: Target) -> RowsKnobs:
    return RowsKnobs(target.lanes)


def view_of(anchor: Node) -> View | None:
    """How the anchor's operand is cut; None where the reduced dimensions are not neighbours."""
    op, x = anchor.op, anchor.inputs[0]
    sizes, rank = x.type.shape, x.type.rank
    if isinstance(op, norm.GroupNorm):
        grouped = (sizes[0], op.groups, sizes[1] // op.groups, *sizes[2:])
        return View(grouped, 2, rank - 1, rank - 2, 0) if rank > 2 else None
    if isinstance(op, norm.LayerNorm | norm.RmsNorm):
        axes: tuple[int, ...] = tuple(range(rank - anchor.inputs[1].type.rank, rank))
    else:
        axes = op.axes if isinstance(op, reduce.Reduction) else (op.axis,)
    if not axes or axes != tuple(range(axes[0], axes[-1] + 1)):
        return None
    return View(sizes, axes[0], len(axes), len(axes), rank - 1 - axes[-1])


def emit(kernel: Kernel, anchor: Node, settings: RowsKnobs) -> None:
    view = view_of(anchor)
    assert view is not None
    nodes = kernel.body.nodes()
    free = mergeable(nodes, anchor.inputs[0].type.rank)
    start = view.outer + (1 if isinstance(anchor.op, norm.GroupNorm) else 0)
    Rows(kernel, anchor, _unmerged(view, len(view.sizes) - start <= free), settings, work_ns(nodes)).emit()


def _unmerged(view: View, mergeable: bool) -> View:
    """The same view with every reduced dimension but the last a loop of its own, unless they may be run as one."""
    return view if mergeable else View(view.sizes, view.outer, view.reduced, min(view.merged, 1), view.trailing)
