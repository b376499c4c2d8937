"""canonicalize: one form for what can be written in several, and nothing where nothing is done."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from paring.ir.graph import Node
from paring.ir.ops import attention, binary, linear, reduce, shape, unary
from paring.passes.base import Pass
from paring.passes.contract import Close, Exact
from paring.passes.pattern import Match, Pattern, Rule, any_, op
from paring.passes.util import splat_value

X = any_("x")


def drop_identity(m: Match) -> Node | None:
    """reshape, transpose, broadcast, slice, pad, cast, concat, flip, roll that change nothing -> x"""
    (x,) = m.root.inputs if len(m.root.inputs) == 1 else (None,)
    if x is None or x.type != m.root.type:
        return None
    match m.root.op:
        case shape.Transpose(perm=perm):
            return x if perm == tuple(range(x.type.rank)) else None
        case shape.Slice(steps=steps):
            return x if all(s == 1 or d <= 1 for s, d in zip(steps, x.type.shape, strict=True)) else None
        case shape.Flip(axes=axes):
            return x if all(x.type.shape[a] <= 1 for a in axes) else None
        case shape.Roll(shifts=shifts, axes=axes):
            return x if all(x.type.shape[a] == 0 or s % x.type.shape[a] == 0 for s, a in zip(shifts, axes, strict=True)) else None
    return x


def merge_reshapes(m: Match) -> Node | None:
    """reshape(reshape(x)) -> reshape(x)"""
    return m.make(m.root.op, m["x"])


def merge_transposes(m: Match) -> Node | None:
    """transpose(transpose(x, p), q) -> transpose(x, p o q)"""
    outer, inner = m.root.op, m["inner"].op
    assert isinstance(outer, shape.Transpose)
    assert isinstance(inner, shape.Transpose)
    return m.make(shape.Transpose(tuple(inner.perm[d] for d in outer.perm)), m["x"])


def merge_broadcasts(m: Match) -> Node | None:
    """broadcast(broadcast(x)) -> broadcast(x)"""
    return m.make(m.root.op, m["x"])


def transpose_to_reshape(m: Match) -> Node | None:
    """transpose(x) that only moves dimensions of size 1 -> reshape(x)"""
    perm = m.root.op.perm if isinstance(m.root.op, shape.Transpose) else ()
    kept = [d for d in perm if m["x"].type.shape[d] != 1]
    return m.make(shape.Reshape(m.root.type.shape), m["x"]) if kept == sorted(kept) else None


def layout_to_reshape(m: Match) -> Node | None:
    """layout_transform(x) of whole blocks of single pixels -> reshape(x)"""
    op, x = m.root.op, m["x"]
    assert isinstance(op, shape.LayoutTransform)
    if x.type.shape[2:4] != (1, 1):
        return m.decline("the image is larger than one pixel")
    if x.type.size != op.channels * x.type.shape[0] or m.root.type.size != x.type.size:
        return m.decline("the channels do not fill their blocks")
    return m.make(shape.Reshape(m.root.type.shape), x)


def broadcast_to_reshape(m: Match) -> Node | None:
    """broadcast(x) that repeats nothing -> reshape(x)"""
    return m.make(shape.Reshape(m.root.type.shape), m["x"]) if m["x"].type.size == m.root.type.size else None


def merge_slices(m: Match) -> Node | None:
    """slice(slice(x)) -> slice(x)"""
    outer, inner = m.root.op, m["inner"].op
    assert isinstance(outer, shape.Slice)
    assert isinstance(inner, shape.Slice)
    starts = tuple(i + o * s for i, o, s in zip(inner.starts, outer.starts, inner.steps, strict=True))
    steps = tuple(i * o for i, o in zip(inner.steps, outer.steps, strict=True))
    counts = m.root.type.shape
    # An empty range may start past the end of x.
    starts = tuple(a if n else 0 for a, n in zip(starts, counts, strict=True))
    stops = tuple(a + (n - 1) * s + 1 if n else 0 for a, n, s in zip(starts, counts, steps, strict=True))
    return m.make(shape.Slice(starts, stops, steps), m["x"])


def slice_of_transpose(m: Match) -> Node | None:
    """slice(transpose(x)) -> transpose(slice(x))"""
    cut, perm = m.root.op, m["transpose"].op.perm if isinstance(m["transpose"].op, shape.Transpose) else ()
    assert isinstance(cut, shape.Slice)
    back = sorted(range(len(perm)), key=perm.__getitem__)
    moved = (tuple(values[d] for d in back) for values in (cut.starts, cut.stops, cut.steps))
    return m.make(m["transpose"].op, m.make(shape.Slice(*moved), m["x"]))


def slice_of_reshape(m: Match) -> Node | None:
    """slice(reshape(x)) of one range of whole rows -> reshape(slice(x)), where a dimension of x was split there"""
    cut, x, whole = m.root.op, m["x"], m["reshape"].type.shape
    assert isinstance(cut, shape.Slice)
    changed = [d for d in range(len(whole)) if (cut.starts[d], cut.stops[d]) != (0, whole[d])]
    if len(changed) != 1 or any(s != 1 for s in cut.steps):
        return m.decline("more than one dimension is cut, or in steps")
    (d,) = changed
    inner = math.prod(whole[d + 1 :])
    for axis, size in enumerate(x.type.shape):
        after = math.prod(x.type.shape[axis + 1 :])
        # Dimension d of the reshaped tensor counts runs of `unit` elements of this dimension of x.
        if after and inner % after == 0 and size * after == inner * whole[d]:
            unit = inner // after
            starts = tuple(cut.starts[d] * unit if a == axis else 0 for a in range(x.type.rank))
            stops = tuple(cut.stops[d] * unit if a == axis else s for a, s in enumerate(x.type.shape))
            part = m.make(shape.Slice(starts, stops, (1,) * x.type.rank), x)
            return m.make(shape.Reshape(m.root.type.shape), part)
    return m.decline("the dimension that is cut is not the first part of one dimension of x")


def _outputs_cut(node: Node) -> tuple[int, int] | None:
    """The range of the last dimension that a slice takes, all others being whole; None for any other node."""
    cut, given = node.op, node.inputs[0].type.shape if node.inputs else ()
    if not isinstance(cut, shape.Slice) or not given or any(step != 1 for step in cut.steps):
        return None
    whole = cut.starts[:-1] == (0,) * (len(given) - 1) and cut.stops[:-1] == given[:-1]
    return (cut.starts[-1], cut.stops[-1]) if whole else None


def slice_of_linear(m: Match) -> Node | None:
    """slice(linear(x, w, b)) of some outputs -> linear(x, those rows of w and b), where the slices share it out"""
    layer = m["layer"]
    rows = _outputs_cut(m.root)
    if rows is None or rows[0] == rows[1]:
        return m.decline("the slice cuts more than outputs")
    parts = [_outputs_cut(reader) for reader in m.users[layer]]
    known = sorted(part for part in parts if part is not None)
    disjoint = all(before[1] <= after[0] for before, after in itertools.pairwise(known))
    if len(known) != m.uses[layer] or not disjoint:
        return m.decline("the slices do not share out the outputs, so some would be computed twice")
    weight, *bias = layer.inputs[1:]
    part = m.make(shape.Slice((rows[0], 0), (rows[1], weight.type.shape[1]), (1, 1)), weight, loc=weight.loc)
    biases = [m.make(shape.Slice(rows[:1], rows[1:], (1,)), b, loc=b.loc) for b in bias]
    return m.make(layer.op, layer.inputs[0], part, *biases, loc=layer.loc)


def reshape_of_transpose(m: Match) -> Node | None:
    """reshape(transpose(x)) that only drops dimensions of size 1 -> transpose(reshape(x))"""
    turn, x, result = m["transpose"].op, m["x"], m.root.type.shape
    assert isinstance(turn, shape.Transpose)
    kept: list[int] = []
    for d in turn.perm:
        if len(kept) < len(result) and x.type.shape[d] == result[len(kept)]:
            kept.append(d)
        elif x.type.shape[d] != 1:
            return None
    if len(kept) != len(result) or len(kept) == x.type.rank:
        return None
    order = sorted(kept)
    squeezed = m.make(shape.Reshape(tuple(x.type.shape[d] for d in order)), x)
    return m.make(shape.Transpose(tuple(order.index(d) for d in kept)), squeezed)


def keep_image_dims(m: Match) -> Node | None:
    """reduce(x, rows and columns) -> reshape(reduce(x, rows and columns, dimensions kept))"""
    reduction = m.root.op
    assert isinstance(reduction, reduce.Reduction)
    if reduction.axes != (2, 3) or m["x"].type.rank != 4 or reduction.keepdims:
        return None
    return m.make(shape.Reshape(m.root.type.shape), m.make(dataclasses.replace(reduction, keepdims=True), m["x"]))


def clamp_to_relu(m: Match) -> Node | None:
    """clamp(x, 0, inf) -> relu(x)"""
    low, high = _range(m.root)
    return m.make(unary.Relu(), m["x"]) if low == 0 and high == math.inf and not math.copysign(1, low) < 0 else None


def merge_clamps(m: Match) -> Node | None:
    """clamp(relu or clamp(x)) -> one clamp, where the ranges overlap"""
    (low, high), (inner_low, inner_high) = _range(m.root), _range(m["inner"])
    # Of two equal bounds the inner one's zero is the one that comes out: 0.0 and -0.0 differ.
    low, high = max(inner_low, low), min(inner_high, high)
    if low > high:
        return m.decline("the ranges do not overlap")
    return m.make(unary.Clamp(low, high), m["x"])


def _range(node: Node) -> tuple[float, float]:
    return (node.op.low, node.op.high) if isinstance(node.op, unary.Clamp) else (0.0, math.inf)


def double_negation(m: Match) -> Node | None:
    """neg(neg(x)) -> x"""
    return m["x"]


def _is(value: float) -> Pattern:
    # The sign of a zero matters: x - 0.0 is x, x - (-0.0) turns -0.0 into 0.0.
    def same(node: Node) -> bool:
        found = splat_value(node)
        return found == value and found is not None and math.copysign(1, found) == math.copysign(1, value)

    return any_("neutral", same)


def times_one(m: Match) -> Node | None:
    """x * 1 -> x"""
    return m["x"]


def divided_by_one(m: Match) -> Node | None:
    """x / 1 -> x"""
    return m["x"]


def minus_zero(m: Match) -> Node | None:
    """x - 0.0 -> x"""
    return m["x"]


def x_times_sigmoid(m: Match) -> Node | None:
    """x * sigmoid(x) -> silu(x)"""
    return m.make(unary.Silu(), m["x"])


def drop_mask(m: Match) -> Node | None:
    """attention(q, k, v, true) -> attention(q, k, v)"""
    q, k, v, *mask = m.root.inputs
    keeps_all = mask and mask[0].type.dtype == "bool" and splat_value(mask[0]) == 1.0
    return m.make(m.root.op, q, k, v) if keeps_all else None


def matmul_to_linear(m: Match) -> Node | None:
    """matmul(x, w), w a constant matrix, batched by broadcasting or not -> linear(x, transpose(w))"""
    y = m["y"]
    w = y.inputs[0] if isinstance(y.op, shape.Broadcast) else y
    while isinstance(w.op, shape.Reshape) and w.type.shape[-2:] == w.inputs[0].type.shape[-2:]:
        (w,) = w.inputs
    if not m["x"].type.is_float or w.type.shape[-2:] != y.type.shape[-2:] or w.type.size != w.type.shape[-1] * w.type.shape[-2]:
        return None
    matrix = m.make(shape.Reshape(w.type.shape[-2:]), w, loc=w.loc)
    return m.make(linear.Linear(), m["x"], m.make(shape.Transpose((1, 0)), matrix, loc=w.loc))


def _rooted_in_constant(node: Node) -> bool:
    while isinstance(node.op, shape.Broadcast | shape.Reshape | shape.Transpose) and node.inputs:
        (node,) = node.inputs
    return node.op.name == "const"


MOVES = (
    shape.Reshape,
    shape.Transpose,
    shape.Broadcast,
    shape.Slice,
    shape.Pad,
    shape.Concat,
    shape.Flip,
    shape.Roll,
    unary.Cast,
)

RULES: tuple[Rule, ...] = (
    Rule(op(MOVES), drop_identity, Exact()),
    Rule(op(shape.Reshape, op(shape.Reshape, X)), merge_reshapes, Exact()),
    Rule(op(shape.Transpose, op(shape.Transpose, X, name="inner")), merge_transposes, Exact()),
    Rule(op(shape.Broadcast, op(shape.Broadcast, X)), merge_broadcasts, Exact()),
    Rule(op(shape.Slice, op(shape.Slice, X, name="inner")), merge_slices, Exact()),
    Rule(op(shape.Transpose, X), transpose_to_reshape, Exact()),
    Rule(op(shape.LayoutTransform, X), layout_to_reshape, Exact()),
    Rule(op(shape.Broadcast, X), broadcast_to_reshape, Exact()),
    Rule(op(shape.Slice, op(shape.Transpose, X, name="transpose")), slice_of_transpose, Exact()),
    Rule(op(shape.Slice, op(shape.Reshape, X, name="reshape")), slice_of_reshape, Exact()),
    Rule(op(shape.Slice, op(linear.Linear, name="layer", where=lambda n: n.op == linear.Linear())), slice_of_linear, Exact()),
    Rule(op(shape.Reshape, op(shape.Transpose, X, name="transpose")), reshape_of_transpose, Exact()),
    Rule(op((reduce.Sum, reduce.Mean, reduce.Max, reduce.Min), X), keep_image_dims, Exact()),
    Rule(op(unary.Clamp, X), clamp_to_relu, Exact()),
    Rule(op((unary.Clamp, unary.Relu), op((unary.Clamp, unary.Relu), X, name="inner")), merge_clamps, Exact()),
    Rule(op(unary.Neg, op(unary.Neg, X)), double_negation, Exact()),
    Rule(op(binary.Mul, X, _is(1.0), commutes=True), times_one, Exact()),
    Rule(op(binary.Div, X, _is(1.0)), divided_by_one, Exact()),
    Rule(op(binary.Sub, X, _is(0.0)), minus_zero, Exact()),
    Rule(op(binary.Mul, X, op(unary.Sigmoid, X), commutes=True), x_times_sigmoid, Close(2)),
    Rule(op(attention.ScaledDotProductAttention), drop_mask, Exact()),
    Rule(op(linear.Matmul, X, any_("y", _rooted_in_constant)), matmul_to_linear, Exact()),
)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """One form for what can be written in several: identities dropped, chains of movements merged."""

    name = "canonicalize"
    contract = Close(2)

    def rules(self) -> Sequence[Rule]:
        return RULES
