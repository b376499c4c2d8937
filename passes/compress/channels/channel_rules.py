"""What each operator does to labels of channels: hand them on, move them, tie them. What is not in the table pins them."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Array, Op
from paring.ir.ops import attention, binary, conv, index, linear, norm, pool, reduce, resize, scan, shape, unary
from paring.passes.compress.channels.channels import Channels, Flow, Rule, find_channels
from paring.passes.compress.channels.labels import Value, one_value, varying
from paring.passes.compress.layers import is_layer
from paring.passes.util import channel_axis

# Labels are arrays: beyond so many elements a reshape that tangles channels with pixels ties them instead.
MOST_LABELS = 1 << 20


def channels_of(graph: Graph) -> Channels:
    """The groups of coupled channels of a graph."""
    return find_channels(graph, RULES)


def _bound(node: Node) -> tuple[bool, ...]:
    return (False,) * node.type.rank


def _has_constants(flow: Flow, node: Node) -> bool:
    return all(flow.values[i] is None for i in node.inputs[1:])


def zero_or_unknown(rest: Array) -> Array:
    return np.where(rest == 0, rest, np.nan)


# --- layers ---------------------------------------------------------------------------------------------------------


def layer(flow: Flow, node: Node) -> Value:
    """Reads channels and makes new ones, zero once they are masked. Groups of a convolution go whole."""
    x = flow.values[node.inputs[0]]
    if not is_layer(node) or x is None:
        return flow.mixed(node)
    axis = channel_axis(node)
    x = flow.tied(node, x, [a for a in range(node.type.rank) if a != axis])
    own = flow.coupling.fresh(node.type.shape[axis])
    flow.layers[node] = own
    groups = node.op.groups if isinstance(node.op, conv.Conv2d) else 1
    if groups > 1:
        read = np.broadcast_to(x.labels.ravel(), (node.inputs[0].type.shape[axis],)).reshape(groups, -1)
        flow.coupling.tie_along(np.concatenate([own.reshape(groups, -1), read], 1), [1])
    else:
        padded = isinstance(node.op, conv.Conv2d) and any(map(any, node.op.padding))
        flow.reads(node, x, axis, padded)
    labels = own.reshape([-1 if a == axis else 1 for a in range(node.type.rank)])
    return Value(labels, np.zeros(labels.shape, node.type.dtype), _bound(node))


# --- element by element ---------------------------------------------------------------------------------------------


def elementwise(flow: Flow, node: Node) -> Value:
    """Elements at the same place go together; constants are cut to fit."""
    of = [flow.values[i] for i in node.inputs]
    known = [value for value in of if value is not None]
    if not all(i.type.is_float for i in (node, *node.inputs[-2:])):
        return flow.mixed(node)
    labels, bound = flow.joined(known)
    rests = [
        flow.constant_rest(i, labels.shape)
        if value is None
        else np.broadcast_to(value.rest if value in bound else np.full(value.rest.shape, np.nan), labels.shape)
        for i, value in zip(node.inputs, of, strict=True)
    ]
    free = tuple(all(value.free[axis] for value in known) for axis in range(node.type.rank))
    return Value(labels, masked_result(flow, node, labels, rests), free)


def masked_result(flow: Flow, node: Node, labels: Array, rests: list[Array]) -> Array:
    """What an operator of elements makes of masked operands. What is infinite or NaN is no number to carry on: it is pinned."""
    if isinstance(node.op, binary.Where):
        return np.where(rests[1] == rests[2], rests[1], np.nan)
    known = np.logical_and.reduce([~np.isnan(rest) for rest in rests])
    with np.errstate(all="ignore"):
        found = np.asarray(node.op.ref(*rests)).astype(node.type.dtype)
    flow.coupling.pin(labels[known & ~np.isfinite(found)], f"once masked they would not be finite after {node.op.name}")
    found = np.where(known & np.isfinite(found), found, np.nan)
    if isinstance(node.op, binary.Mul):
        # Whatever the other factor is, it is finite.
        return np.where((rests[0] == 0) | (rests[1] == 0), 0, found)
    return found


def batch_norm(flow: Flow, node: Node) -> Value:
    """A scale and a shift of each channel."""
    if not _has_constants(flow, node):
        return flow.mixed(node)
    x = flow.tied(node, flow.value(node.inputs[0]), [a for a in range(node.type.rank) if a != 1])
    if not x.varies(1):
        return Value(x.labels, np.full(x.labels.shape, np.nan), _bound(node))
    parameters = [flow.constant(i) for i in node.inputs[1:]]
    with np.errstate(all="ignore"):
        found = np.asarray(node.op.ref(x.rest, *parameters)).astype(node.type.dtype)
    flow.coupling.pin(x.labels[~np.isnan(x.rest) & ~np.isfinite(found)], "once masked they would not be finite after batch_norm")
    return Value(x.labels, np.where(np.isfinite(found), found, np.nan), _bound(node))


# --- what mixes along some axes -------------------------------------------------------------------------------------


def reduction(flow: Flow, node: Node) -> Value:
    """Sums, means and extremes keep channels apart that they do not run over."""
    assert isinstance(node.op, reduce.Reduction)
    x = flow.tied(node, flow.value(node.inputs[0]), node.op.axes)
    rest = zero_or_unknown(x.rest) if isinstance(node.op, reduce.Sum) else x.rest
    if node.op.keepdims:
        return Value(x.labels, rest, _bound(node))
    return Value(x.labels.squeeze(node.op.axes), rest.squeeze(node.op.axes), _bound(node))


def windows(flow: Flow, node: Node) -> Value:
    """Poolings and resampling: pixels of one channel of one image."""
    if getattr(node.op, "layout", "NCHW") != "NCHW":
        return flow.mixed(node)
    x = flow.tied(node, flow.value(node.inputs[0]), (2, 3))
    whole = not isinstance(node.op, pool.AvgPool2d) or not (any(node.op.padding) or node.op.ceil_mode)
    return Value(x.labels, x.rest if whole else zero_or_unknown(x.rest), _bound(node))


def last_axes_norm(flow: Flow, node: Node) -> Value:
    """Layer and RMS norms: their statistics are those of all that lies along the last axes, so that stays together."""
    if not _has_constants(flow, node):
        return flow.mixed(node)
    last = node.inputs[1].type.rank
    x = flow.tied(node, flow.value(node.inputs[0]), range(node.type.rank - last, node.type.rank))
    shift = [flow.constant(i) for i in node.inputs[2:]]
    kept = all(not found.any() for found in shift)
    return Value(x.labels, zero_or_unknown(x.rest) if kept else np.full(x.rest.shape, np.nan), _bound(node))


def group_norm(flow: Flow, node: Node) -> Value:
    """Groups go whole: the statistics are those of one group. A group of zeros becomes the shift of each channel."""
    assert isinstance(node.op, norm.GroupNorm)
    if not _has_constants(flow, node):
        return flow.mixed(node)
    x = flow.tied(node, flow.value(node.inputs[0]), [a for a in range(node.type.rank) if a != 1])
    if not x.varies(1):
        return flow.mixed(node)
    groups = node.op.groups
    flow.coupling.tie_along(x.labels.reshape(groups, -1), [1], "group_norm mixes them")
    zero = np.repeat((x.rest.reshape(groups, -1) == 0).all(1), x.labels.size // groups).reshape(x.rest.shape)
    shift = flow.constant(node.inputs[2]).reshape(x.rest.shape)
    return Value(x.labels, np.where(zero, shift, np.nan), _bound(node))


def along_axis(flow: Flow, node: Node) -> Value:
    """Softmax and running sums."""
    assert isinstance(node.op, norm.Softmax | scan.CumSum)
    x = flow.tied(node, flow.value(node.inputs[0]), (node.op.axis,))
    rest = zero_or_unknown(x.rest) if isinstance(node.op, scan.CumSum) else np.full(x.rest.shape, np.nan)
    return Value(x.labels, rest, _bound(node))


def triangle(flow: Flow, node: Node) -> Value:
    last = (node.type.rank - 2, node.type.rank - 1)
    x = flow.tied(node, flow.value(node.inputs[0]), last)
    return Value(x.labels, zero_or_unknown(x.rest), _bound(node))


def heads(flow: Flow, node: Node) -> Value:
    """Attention and batched products: whole matrices go together, so the heads of all operands. Zero values give zeros."""
    last = (node.type.rank - 2, node.type.rank - 1)
    of = [flow.values[i] for i in node.inputs]
    known = {i: flow.tied(node, value, last) for i, value in zip(node.inputs, of, strict=True) if value is not None}
    labels, bound = flow.joined(known.values())
    factors = node.inputs[2:3] if isinstance(node.op, attention.ScaledDotProductAttention) else node.inputs
    zero = np.zeros(labels.shape, bool)
    for factor in factors:
        if factor in known and known[factor] in bound:
            zero = zero | (known[factor].rest == 0)
    return Value(labels, np.where(zero, 0.0, np.nan), _bound(node))


# --- what moves -----------------------------------------------------------------------------------------------------


def broadcast(flow: Flow, node: Node) -> Value:
    x, before = flow.value(node.inputs[0]), node.inputs[0].type
    new = (1,) * (node.type.rank - before.rank)
    dims = (*new, *before.shape)
    had = ((False,) * len(new)) + x.free
    free = tuple(f or (size == 1 and now > 1) for f, size, now in zip(had, dims, node.type.shape, strict=True))
    return Value(x.labels.reshape(new + x.labels.shape), x.rest.reshape(new + x.rest.shape), free)


def transpose(flow: Flow, node: Node) -> Value:
    assert isinstance(node.op, shape.Transpose)
    x, perm = flow.value(node.inputs[0]), node.op.perm
    return Value(x.labels.transpose(perm), x.rest.transpose(perm), _bound(node))


def flip(flow: Flow, node: Node) -> Value:
    assert isinstance(node.op, shape.Flip)
    x = flow.value(node.inputs[0])
    return Value(np.flip(x.labels, node.op.axes), np.flip(x.rest, node.op.axes), _bound(node))


def roll(flow: Flow, node: Node) -> Value:
    assert isinstance(node.op, shape.Roll)
    x = flow.tied(node, flow.value(node.inputs[0]), node.op.axes)
    return Value(x.labels, x.rest, _bound(node))


def part(flow: Flow, node: Node) -> Value:
    """A slice. With steps, what stays of a range would not lie at even distances."""
    assert isinstance(node.op, shape.Slice)
    op = node.op
    x = flow.tied(node, flow.value(node.inputs[0]), [axis for axis, step in enumerate(op.steps) if step > 1])
    ranges = tuple(
        slice(start, stop) if extent > 1 else slice(None)
        for start, stop, extent in zip(op.starts, op.stops, x.labels.shape, strict=True)
    )
    return Value(x.labels[ranges], x.rest[ranges], _bound(node))


def pad(flow: Flow, node: Node) -> Value:
    """New channels stay; around an image the padding has to be what is masked, to be one value with it."""
    assert isinstance(node.op, shape.Pad)
    op, x = node.op, flow.value(node.inputs[0])
    padded = [axis for axis, pair in enumerate(op.padding) if any(pair)]
    if op.mode != "constant":
        x = flow.tied(node, x, padded)
        return Value(x.labels, x.rest, _bound(node))
    wide = [op.padding[axis] if x.varies(axis) else (0, 0) for axis in range(node.type.rank)]
    stays = flow.coupling.fresh(1)
    flow.coupling.pin(stays, "it meets padding")
    rest = x.rest
    if any(not x.varies(axis) for axis in padded):
        rest = np.where(rest == np.asarray(op.value, node.type.dtype), rest, np.nan)
    return Value(np.pad(x.labels, wide, constant_values=stays[0]), np.pad(rest, wide, constant_values=np.nan), _bound(node))


def concat(flow: Flow, node: Node) -> Value:
    """Channels side by side; along another axis than that of channels the same ones of all parts."""
    assert isinstance(node.op, shape.Concat)
    axis, of = node.op.axis, [flow.values[i] for i in node.inputs]
    known = [value for value in of if value is not None]
    cross = list(np.broadcast_shapes(*(value.labels.take([0], axis).shape for value in known)))
    sizes = [i.type.shape[axis] for i in node.inputs]
    apart = any(value.varies(axis) for value in known) or all(size == 1 for size in sizes)
    labels, rests = [], []
    for operand, value, size in zip(node.inputs, of, sizes, strict=True):
        dims = [size if apart and a == axis else extent for a, extent in enumerate(cross)]
        if value is not None:
            found, rest = value.labels, value.rest
        else:
            found, rest = _beside(flow, known[0], axis), flow.constant_rest(operand, tuple(dims))
        labels.append(np.broadcast_to(found, dims))
        rests.append(np.broadcast_to(rest, dims))
    if apart:
        return Value(np.concatenate(labels, axis), np.concatenate(rests, axis), _bound(node))
    for other in labels[1:]:
        flow.coupling.tie(labels[0], other)
    return Value(labels[0], one_value(np.concatenate(rests, axis), [axis]), _bound(node))


def _beside(flow: Flow, other: Value, axis: int) -> Array:
    """Labels for a constant next to a value: those across the axis, or if there are none labels that stay."""
    across = other.labels.take([0], axis)
    if across.size > 1:
        return across
    stays = flow.coupling.fresh(1)
    flow.coupling.pin(stays, "it meets a constant")
    return stays.reshape(across.shape)


def reshape(flow: Flow, node: Node) -> Value:
    """Labels are reshaped as the elements are, within each run of dimensions that is split or merged."""
    x = flow.value(node.inputs[0])
    before, after = node.inputs[0].type.shape, node.type.shape
    blocks = list(_blocks(before, after))
    if prod(before[a] for old, _ in blocks if any(map(x.varies, old)) for a in old) > MOST_LABELS:
        x = flow.tied(node, x, [a for old, _ in blocks if len(old) > 1 for a in old])
    full, dims = list(x.labels.shape), [1] * len(after)
    for old, new in blocks:
        if any(map(x.varies, old)):
            for a in old:
                full[a] = before[a]
            for a in new:
                dims[a] = after[a]
    labels, rest = (np.broadcast_to(array, full).reshape(dims) for array in (x.labels, x.rest))
    apart = varying(labels)
    same = [a for a in range(len(dims)) if a not in apart]
    return Value(_shortened(labels, same), one_value(rest, same), _bound(node))


def _shortened(labels: Array, axes: Iterable[int]) -> Array:
    for axis in axes:
        labels = labels.take([0], axis)
    return labels


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> Iterable[tuple[list[int], list[int]]]:
    """The least runs of dimensions, before and after, that hold the same elements."""
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        left = right = 1
        while True:
            if left <= right and i < len(before) and (left < right or not old):
                left, old, i = left * before[i], [*old, i], i + 1
            elif j < len(after) and (right < left or not new):
                right, new, j = right * after[j], [*new, j], j + 1
            else:
                break
        yield old, new


def gather(flow: Flow, node: Node) -> Value:
    """Rows taken along an axis that has no channels, as the class token of a transformer is."""
    assert isinstance(node.op, index.Gather)
    x, axis = flow.values[node.inputs[0]], node.op.axis
    if x is None or x.varies(axis):
        return flow.mixed(node)
    dims = (*x.labels.shape[:axis], *(1,) * node.inputs[1].type.rank, *x.labels.shape[axis + 1 :])
    return Value(x.labels.reshape(dims), x.rest.reshape(dims), _bound(node))


RULES: dict[type[Op], Rule] = {
    conv.Conv2d: layer,
    linear.Linear: layer,
    **dict.fromkeys((unary.Unary, unary.Cast, binary.Binary, binary.Where), elementwise),
    norm.BatchNorm: batch_norm,
    **dict.fromkeys((norm.LayerNorm, norm.RmsNorm), last_axes_norm),
    norm.GroupNorm: group_norm,
    **dict.fromkeys((reduce.Sum, reduce.Mean, reduce.Max, reduce.Min), reduction),
    **dict.fromkeys((pool.MaxPool2d, pool.AvgPool2d, pool.AdaptiveAvgPool2d, resize.Resize), windows),
    **dict.fromkeys((norm.Softmax, scan.CumSum), along_axis),
    index.Tril: triangle,
    **dict.fromkeys((attention.ScaledDotProductAttention, linear.Matmul), heads),
    shape.Broadcast: broadcast,
    shape.Transpose: transpose,
    shape.Flip: flip,
    shape.Roll: roll,
    shape.Slice: part,
    shape.Pad: pad,
    shape.Concat: concat,
    shape.Reshape: reshape,
    index.Gather: gather,
}
"""By operator class, for those derived from it too."""
