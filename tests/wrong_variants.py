"""For every rule, rewrites with one mistake each: the tests must tell them from the right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import wrong_qdq
import wrong_sparse
import wrong_winograd

from paring.ir import Graph, Node, Region
from paring.ir.ops import attention, binary, linear, norm, pack, pool, reduce, shape, unary
from paring.ir.ops.core import Const
from paring.passes import decompose
from paring.passes.fold_bn import _scaled
from paring.passes.pattern import Match
from paring.passes.util import channel_axis, channel_values, const_value, constant

Rewrite = Callable[[Match], Node | None]

# --- canonicalize ---------------------------------------------------------------------------------------------------


def drops_whatever_keeps_the_type(m: Match) -> Node | None:
    x = m.root.inputs[0]
    return x if x.type == m.root.type else None


def keeps_the_inner_shape(m: Match) -> Node | None:
    return m.root.inputs[0]


def composes_the_other_way(m: Match) -> Node | None:
    outer, inner = m.root.op.perm, m["inner"].op.perm
    return m.make(shape.Transpose(tuple(outer[d] for d in inner)), m["x"])


def keeps_the_inner_permutation(m: Match) -> Node | None:
    return m.make(m["inner"].op, m["x"])


def repeats_elements_instead_of_rows(m: Match) -> Node | None:
    x = m["x"]
    column = m.make(shape.Reshape((*x.type.shape, 1)), x)
    copies = m.make(shape.Broadcast((*x.type.shape, m.root.type.size // x.type.size)), column)
    return m.make(shape.Reshape(m.root.type.shape), copies)


def _merged_slices(start: Callable[[int, int, int], int], step: Callable[[int, int], int]) -> Rewrite:
    def merge_slices(m: Match) -> Node | None:
        outer, inner, sizes = m.root.op, m["inner"].op, m["x"].type.shape
        steps = tuple(step(i, o) for i, o in zip(inner.steps, outer.steps, strict=True))
        starts = [start(i, o, s) for i, o, s in zip(inner.starts, outer.starts, inner.steps, strict=True)]
        starts = [min(a, n) for a, n in zip(starts, sizes, strict=True)]
        stops = [min(a + max(0, (n - 1) * s + 1), z) for a, n, s, z in zip(starts, m.root.type.shape, steps, sizes, strict=True)]
        return m.make(shape.Slice(tuple(starts), tuple(stops), steps), m["x"])

    return merge_slices


def reshapes_any_transpose(m: Match) -> Node | None:
    return m.make(shape.Reshape(m.root.type.shape), m["x"])


def ignores_the_image(m: Match) -> Node | None:
    x = m["x"]
    return m.make(shape.Reshape(m.root.type.shape), x) if x.type.size == m.root.type.size else m.make(shape.Reshape((0,)), x)


def turns_the_broadcast_around(m: Match) -> Node | None:
    x = m["x"]
    return m.make(shape.Reshape(m.root.type.shape), m.make(shape.Flip((0,)), x)) if x.type.size == m.root.type.size else None


def cuts_the_transposed_dimensions(m: Match) -> Node | None:
    perm, cut = m["transpose"].op.perm, m.root.op
    moved = (tuple(values[d] for d in perm) for values in (cut.starts, cut.stops, cut.steps))
    return m.make(m["transpose"].op, m.make(shape.Slice(*moved), m["x"]))


def cuts_the_first_rows(m: Match) -> Node | None:
    cut, rows = m.root.op, m["x"].type.shape[0]
    width = m.root.type.size // rows
    if m["reshape"].type.rank != 3 or m["x"].type.rank != 2 or cut.steps != (1, 1, 1) or m.root.type.shape[0] != rows:
        return None
    return m.make(shape.Reshape(m.root.type.shape), m.make(shape.Slice((0, 0), (rows, width), (1, 1)), m["x"]))


def _cut_linear(offset: int, with_bias: bool) -> Rewrite:
    def slice_of_linear(m: Match) -> Node | None:
        cut, layer = m.root.op, m["layer"]
        size, last = m.root.type.shape[-1], layer.type.shape[-1]
        if m.root.type.shape[:-1] != layer.type.shape[:-1] or size != 2 or cut.steps[-1] != 1:
            return None
        start = max(0, min(cut.starts[-1] + offset, last - size))
        weight, *bias = layer.inputs[1:]
        part = m.make(shape.Slice((start, 0), (start + size, weight.type.shape[1]), (1, 1)), weight)
        biases = [m.make(shape.Slice((start,), (start + size,), (1,)), b) for b in bias]
        return m.make(layer.op, layer.inputs[0], part, *(biases if with_bias else ()))

    return slice_of_linear


def drops_the_transpose(m: Match) -> Node | None:
    return m.make(m.root.op, m["x"])


def reduces_the_channels(m: Match) -> Node | None:
    if m.root.op.axes != (2, 3) or m.root.op.keepdims:
        return None
    swapped = m.make(shape.Transpose((0, 2, 1, 3)), m["x"])
    found = m.make(dataclasses.replace(m.root.op, keepdims=True), swapped)
    same = found.type.size == m.root.type.size
    return m.make(shape.Reshape(m.root.type.shape), found) if same else m.make(shape.Reshape((0,)), found)


def takes_the_sum(m: Match) -> Node | None:
    return m.make(reduce.Sum((2, 3)), m["x"]) if m.root.op.axes == (2, 3) and not m.root.op.keepdims else None


def ignores_the_upper_bound(m: Match) -> Node | None:
    return m.make(unary.Relu(), m["x"]) if m.root.op.low == 0 else None


def ignores_the_lower_bound(m: Match) -> Node | None:
    return m.make(unary.Relu(), m["x"]) if m.root.op.high == np.inf else None


def _range(node: Node) -> tuple[float, float]:
    return (node.op.low, node.op.high) if isinstance(node.op, unary.Clamp) else (0.0, np.inf)


def widens_the_range(m: Match) -> Node | None:
    (low, high), (inner_low, inner_high) = _range(m.root), _range(m["inner"])
    return m.make(unary.Clamp(min(low, inner_low), max(high, inner_high)), m["x"])


def keeps_the_outer_range(m: Match) -> Node | None:
    return m.make(m.root.op, m["x"])


def merges_ranges_that_do_not_overlap(m: Match) -> Node | None:
    (low, high), (inner_low, inner_high) = _range(m.root), _range(m["inner"])
    return m.make(unary.Clamp(max(low, inner_low), min(high, inner_high)), m["x"])


def takes_the_absolute_value(m: Match) -> Node | None:
    return m.make(unary.Abs(), m["x"])


def keeps_one_negation(m: Match) -> Node | None:
    return m.root.inputs[0]


def negates(m: Match) -> Node | None:
    return m.make(unary.Neg(), m["x"])


def returns_the_neutral_element(m: Match) -> Node | None:
    return m["neutral"]


def forgets_the_factor(m: Match) -> Node | None:
    return m.make(unary.Sigmoid(), m["x"])


def squares_instead(m: Match) -> Node | None:
    return m.make(binary.Mul(), m["x"], m["x"])


def uses_an_approximation(m: Match) -> Node | None:
    return m.make(unary.HardSwish(), m["x"])


def forgets_to_transpose(m: Match) -> Node | None:
    w = m["y"].inputs[0] if m["y"].inputs else m["y"]
    return m.make(linear.Linear(), m["x"], m.make(shape.Reshape(w.type.shape[::-1]), w)) if w.type.rank == 2 else None


def flips_the_matrix(m: Match) -> Node | None:
    w = m["y"].inputs[0] if m["y"].inputs else m["y"]
    flipped = m.make(shape.Flip((0,)), w)
    return m.make(linear.Linear(), m["x"], m.make(shape.Transpose((1, 0)), flipped)) if w.type.rank == 2 else None


# --- dce ------------------------------------------------------------------------------------------------------------


def _cut_concat(shift: Callable[[int, int], int]) -> Rewrite:
    def slice_of_concat(m: Match) -> Node | None:
        cut, axis, offset = m.root.op, m["concat"].op.axis, 0
        for part in m["concat"].inputs:
            size = part.type.shape[axis]
            if offset <= cut.starts[axis] and cut.stops[axis] <= offset + size:
                move = shift(offset, size)
                length = cut.stops[axis] - cut.starts[axis]
                start = max(0, min(cut.starts[axis] - move, size - length))
                starts = tuple(start if d == axis else s for d, s in enumerate(cut.starts))
                stops = tuple(start + length if d == axis else s for d, s in enumerate(cut.stops))
                return m.make(shape.Slice(starts, stops, cut.steps), part)
            offset += size
        return None

    return slice_of_concat


def _cut_pad(move: int) -> Rewrite:
    def slice_of_pad(m: Match) -> Node | None:
        cut, sizes = m.root.op, m["x"].type.shape
        starts, stops = [], []
        for a, z, (before, _), n in zip(cut.starts, cut.stops, m["pad"].op.padding, sizes, strict=True):
            start = max(0, min(a - before + move, n - (z - a)))
            starts.append(start)
            stops.append(start + z - a)
        return m.make(shape.Slice(tuple(starts), tuple(stops), cut.steps), m["x"])

    return slice_of_pad


def takes_the_other_side(m: Match) -> Node | None:
    flat = _source(m["condition"])
    return None if flat.size == 0 else (m["y"] if flat.all() else m["x"])


def looks_at_the_first_element(m: Match) -> Node | None:
    return m["x"] if _source(m["condition"]).ravel()[0] else m["y"]


def _source(node: Node) -> Any:
    while node.inputs:
        (node,) = node.inputs
    return const_value(node)


def drops_the_wrong_operand(m: Match) -> Node | None:
    body = m.root.op.body
    read = body.use_counts()
    kept = [i for i, node in enumerate(body.inputs) if read[node]]
    if len(kept) == len(m.root.inputs):
        return None
    inner = Graph(tuple(body.inputs[i] for i in kept), body.outputs)
    return m.make(Region(m.root.op.kind, inner), *(m.root.inputs[i] for i in reversed(kept)))


# --- fold-bn --------------------------------------------------------------------------------------------------------


def _folded_norm(*, eps: bool = True, mean: bool = True, bias: bool = True, root: bool = True) -> Rewrite:
    def fold_batch_norm(m: Match) -> Node | None:
        layer = m["layer"]
        if isinstance(layer.op, linear.Linear) and layer.type.rank != 2:
            return None
        g, h, average, var = (const_value(node).astype(np.float64) for node in m.root.inputs[1:])
        deviation = var + (m.root.op.eps if eps else 0.0)
        with np.errstate(all="ignore"):
            scale = g / (np.sqrt(deviation) if root else deviation)
        old = Node(layer.op, layer.inputs[: None if bias else 2], layer.loc)
        return _scaled(m, old, scale, h - (average * scale if mean else 0.0))

    return fold_batch_norm


def _scale(m: Match) -> Any:
    layer = m["layer"]
    axis = channel_axis(layer)
    values = channel_values(m["c"], layer.type.shape[axis], axis, layer.type.rank)
    return None if values is None else values.astype(np.float64)


def scales_without_the_bias(m: Match) -> Node | None:
    scale, layer = _scale(m), m["layer"]
    if scale is None:
        return None
    scaled = _scaled(m, Node(layer.op, layer.inputs[:2]), scale, 0 * scale)
    return scaled if len(layer.inputs) == 2 else m.make(layer.op, *scaled.inputs[:2], layer.inputs[2])


def scales_twice(m: Match) -> Node | None:
    scale = _scale(m)
    return None if scale is None else _scaled(m, m["layer"], scale * scale, 0 * scale)


def replaces_the_bias(m: Match) -> Node | None:
    shift, layer = _scale(m), m["layer"]
    return None if shift is None else m.make(layer.op, *layer.inputs[:2], constant(shift.astype("float32")))


def adds_in_reverse_order(m: Match) -> Node | None:
    shift = _scale(m)
    return None if shift is None else _scaled(m, m["layer"], np.ones_like(shift), shift[::-1] + 1)


def _folded_pad(values: bool, swapped: bool) -> Rewrite:
    def fold_pad(m: Match) -> Node | None:
        layer, pad = m.root.op, m["pad"].op
        if any(p != (0, 0) for p in pad.padding[:2]) or pad.mode != "constant" or (pad.value != 0 and not values):
            return None
        extra = pad.padding[:1:-1] if swapped else pad.padding[2:]
        rows, columns = ((a + c, b + d) for (a, b), (c, d) in zip(layer.padding, extra, strict=True))
        return m.make(dataclasses.replace(layer, padding=(rows, columns)), m["x"], *m.root.inputs[1:])

    return fold_pad


def _norm_as_scale(*, eps: bool = True, mean: bool = True) -> Rewrite:
    def batch_norm_to_scale(m: Match) -> Node | None:
        x = m.root.inputs[0]
        g, h, average, var = (const_value(node).astype(np.float64) for node in m.root.inputs[1:])
        with np.errstate(all="ignore"):
            scale = g / np.sqrt(var + (m.root.op.eps if eps else 0.0))
        shift = h - average * scale if mean else h
        column = (-1,) + (1,) * (x.type.rank - 2)
        parts = [m.make(shape.Broadcast(x.type.shape), constant(v.astype("float32").reshape(column))) for v in (scale, shift)]
        return m.make(binary.Add(), m.make(binary.Mul(), x, parts[0]), parts[1])

    return batch_norm_to_scale


# --- decompose, prepack, scale-weights ------------------------------------------------------------------------------


def pools_the_greatest(m: Match) -> Node | None:
    return m.make(reduce.Max((2, 3), True), *m.root.inputs) if m.root.op.size == (1, 1) else None


def adds_up_the_whole(m: Match) -> Node | None:
    whole = m.root.type.shape[2:] == (1, 1)
    return m.make(reduce.Sum((2, 3), True), *m.root.inputs) if whole else None


def swaps_rows_and_columns_of_the_window(m: Match) -> Node | None:
    size, (oh, ow) = m.root.inputs[0].type.shape[2:4], m.root.op.size
    if size[0] % oh or size[1] % ow:
        return None
    kernel = (size[0] // oh, size[1] // ow)
    return m.make(pool.AvgPool2d(kernel, kernel, count_include_pad=False), m.make(shape.Flip((3,)), *m.root.inputs))


def takes_the_mean_of_any_pool(m: Match) -> Node | None:
    mean = m.make(reduce.Mean((2, 3), True), *m.root.inputs)
    return m.make(shape.Broadcast(m.root.type.shape), mean)


def _transposed(*, flip: bool = True, bias: bool = True, shift: int = 0) -> Rewrite:
    """Of the right rewrite: the taps of a phase in their own order, no bias, or the phases woven in a row late."""

    def transposed_conv_to_conv(m: Match) -> Node | None:
        right = decompose.transposed_conv_to_conv(m)
        if right is None:
            return None
        whole = right.inputs[0]
        woven = whole.inputs[0]
        split = woven.inputs[0]
        layer = split.inputs[0]
        x, weight, *rest = layer.inputs
        value = weight.op.value if flip else np.ascontiguousarray(weight.op.value[:, :, ::-1, ::-1])
        wrong = Node(layer.op, [x, Node(Const(value)), *(rest if bias else ())])
        woven = woven.with_inputs([split.with_inputs([wrong])])
        turned = Node(shape.Roll((shift,), (2,)), [whole.with_inputs([woven])]) if shift else whole.with_inputs([woven])
        return right.with_inputs([turned])

    return transposed_conv_to_conv


def shuffles_in_another_order(m: Match) -> Node | None:
    r, (x,) = m.root.op.factor, m.root.inputs
    n, c, h, w = x.type.shape
    split = m.make(shape.Reshape((n, c // (r * r), r, r, h, w)), x)
    return m.make(shape.Reshape(m.root.type.shape), m.make(shape.Transpose((0, 1, 4, 3, 5, 2)), split))


def _spelled_out(*, scale: bool = True, mask: bool = True, axis: int = 3) -> Rewrite:
    def spell_out_attention(m: Match) -> Node | None:
        op, (q, k, v, *masks) = m.root.op, m.root.inputs
        assert isinstance(op, attention.ScaledDotProductAttention)
        if op.causal or (masks and not isinstance(masks[0].op, Const)):
            return None
        scores = m.make(linear.Matmul(), q, m.make(shape.Transpose((0, 1, 3, 2)), k))
        factor = constant(np.array(op.scale_for(q.type.shape[3]) if scale else 1.0, "float32"))
        scores = m.make(binary.Mul(), scores, m.make(shape.Broadcast(scores.type.shape), factor))
        if masks and mask:
            scores = m.make(binary.Add(), scores, masks[0])
        return m.make(linear.Matmul(), m.make(norm.Softmax(axis), scores), v)

    return spell_out_attention


def drops_causality_too(m: Match) -> Node | None:
    q, k, v, *mask = m.root.inputs
    return m.make(attention.ScaledDotProductAttention(), q, k, v) if mask else None


def packs_reversed(m: Match) -> Node | None:
    (weight,) = m.root.inputs
    return constant(m.root.op.ref(const_value(weight)[::-1]))


def pads_with_ones(m: Match) -> Node | None:
    (weight,) = m.root.inputs
    packed = m.root.op.ref(const_value(weight))
    return constant(np.where(packed == 0, np.ones_like(packed), packed))


def _packed(block: int, reverse: bool, bias: bool) -> Rewrite:
    def pack_linear(m: Match) -> Node | None:
        x, weight, *rest = m.root.inputs
        if m.root.op.weight_layout != "OI":
            return None
        value = const_value(weight)
        packed = pack.PackLinearWeight(f"OI{block}o").ref(value[::-1] if reverse else value)
        return m.make(linear.Linear(f"OI{block}o", value.shape[0]), x, constant(packed), *(rest if bias else ()))

    return pack_linear


def _gated_weights(*, gate_outputs: bool) -> Rewrite:
    def gate_to_weights(m: Match) -> Node | None:
        layer, (s,), weight = m.root.op, m["gate"].inputs, m.root.inputs[1]
        if not gate_outputs:
            return m.make(layer, m["x"], *m.root.inputs[1:])
        along = m.make(shape.Reshape((1, s.type.shape[1], 1, 1, 1, s.type.shape[4])), s)
        scaled = m.make(binary.Mul(), weight, m.make(shape.Broadcast(weight.type.shape), along))
        return m.make(layer, m["x"], scaled, *m.root.inputs[2:])

    return gate_to_weights


def swaps_the_operands(m: Match) -> Node | None:
    x = next((n.inputs[0] for n in m.root.inputs if isinstance(n.op, shape.Reshape)), None)
    if x is None or len(m.root.inputs) != 2 or x.type.rank >= m.root.type.rank:
        return None
    operands = [m.make(shape.Reshape(x.type.shape), other) for other in m.root.inputs[::-1]]
    return m.make(shape.Reshape(m.root.type.shape), m.make(m.root.op, *operands))


def repeats_along_the_wrong_dimension(m: Match) -> Node | None:
    (x,), after = m["broadcast"].inputs, m.root.type.shape
    if x.type.size != after[-1] or after[0] % x.type.size:
        return None
    size = x.type.size
    column = m.make(shape.Broadcast((after[0] // size, size, after[-1])), m.make(shape.Reshape((size, 1)), x))
    return m.make(shape.Reshape(after), column)


WRONG: dict[str, tuple[Rewrite, ...]] = {
    "drop-identity": (drops_whatever_keeps_the_type,),
    "merge-reshapes": (keeps_the_inner_shape,),
    "merge-transposes": (composes_the_other_way, keeps_the_inner_permutation),
    "merge-broadcasts": (repeats_elements_instead_of_rows, keeps_the_inner_shape),
    "merge-slices": (
        _merged_slices(lambda i, o, s: i + o, lambda i, o: i * o),
        _merged_slices(lambda i, o, s: i + o * s, lambda i, o: max(i, o)),
    ),
    "transpose-to-reshape": (reshapes_any_transpose,),
    "layout-to-reshape": (ignores_the_image,),
    "broadcast-to-reshape": (turns_the_broadcast_around,),
    "slice-of-transpose": (cuts_the_transposed_dimensions,),
    "slice-of-reshape": (cuts_the_first_rows,),
    "elementwise-of-reshape": (swaps_the_operands,),
    "reshape-of-broadcast": (repeats_along_the_wrong_dimension,),
    "slice-of-linear": (_cut_linear(2, True), _cut_linear(0, False)),
    "reshape-of-transpose": (drops_the_transpose,),
    "keep-image-dims": (reduces_the_channels, takes_the_sum),
    "clamp-to-relu": (ignores_the_upper_bound, ignores_the_lower_bound),
    "merge-clamps": (widens_the_range, keeps_the_outer_range, merges_ranges_that_do_not_overlap),
    "double-negation": (takes_the_absolute_value, keeps_one_negation),
    "times-one": (negates, returns_the_neutral_element),
    "divided-by-one": (negates, returns_the_neutral_element),
    "minus-zero": (negates, returns_the_neutral_element),
    "x-times-sigmoid": (forgets_the_factor, squares_instead, uses_an_approximation),
    "matmul-to-linear": (forgets_to_transpose, flips_the_matrix),
    "slice-of-concat": (_cut_concat(lambda offset, size: 0), _cut_concat(lambda offset, size: offset - 1)),
    "slice-of-pad": (_cut_pad(0), _cut_pad(-1)),
    "settled-where": (takes_the_other_side, looks_at_the_first_element),
    "unread-operands": (drops_the_wrong_operand,),
    "fold-batch-norm": (_folded_norm(eps=False), _folded_norm(mean=False), _folded_norm(bias=False), _folded_norm(root=False)),
    "fold-scale": (scales_without_the_bias, scales_twice),
    "fold-shift": (replaces_the_bias, adds_in_reverse_order),
    "fold-pad": (_folded_pad(True, False), _folded_pad(False, True)),
    "batch-norm-to-scale": (_norm_as_scale(eps=False), _norm_as_scale(mean=False)),
    "adaptive-pool-to-mean": (pools_the_greatest, adds_up_the_whole),
    "adaptive-pool-to-pool": (swaps_rows_and_columns_of_the_window,),
    "whole-pool-to-mean": (takes_the_mean_of_any_pool, adds_up_the_whole),
    "transposed-conv-to-conv": (_transposed(flip=False), _transposed(bias=False), _transposed(shift=1)),
    "spell-out-pixel-shuffle": (shuffles_in_another_order,),
    "drop-mask": (drops_causality_too,),
    "spell-out-attention": (_spelled_out(scale=False), _spelled_out(mask=False), _spelled_out(axis=2)),
    "fold-packing": (packs_reversed, pads_with_ones),
    "pack-linear": (_packed(4, True, True), _packed(4, False, False)),
    "gate-to-weights": (_gated_weights(gate_outputs=True), _gated_weights(gate_outputs=False)),
    **wrong_qdq.WRONG,
    **wrong_sparse.WRONG,
    **wrong_winograd.WRONG,
}
"""By rule: rewrites to put in place of the right one."""
