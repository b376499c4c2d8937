"""For every rule, and every pass that is not made of rules, builders of its left-hand side."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import planting_qdq
import planting_weights

from paring.generators import Builder, splitting, squeeze_excite
from paring.ir import Graph, Input, Node, Op, Region
from paring.ir.ops import attention, binary, conv, linear, norm, pool, reduce, shape, unary
from paring.passes import canonicalize, dce, decompose, fold_bn, sink_reshapes
from paring.passes.pattern import Rule
from paring.testing import Plant

BLOCK = 4

RULES: dict[str, tuple[Rule, ...]] = {
    "canonicalize": canonicalize.RULES,
    "dce": dce.RULES,
    "fold-bn": fold_bn.RULES,
    "decompose{attention=True}": (*decompose.RULES, *decompose.ATTENTION_RULES),
    "fold-qdq": planting_qdq.RULES,
    **planting_weights.RULES,
    "sink-reshapes": sink_reshapes.RULES,
}
"""All rules, by the pass that applies them."""


def _slice(b: Builder, x: Node) -> Node:
    """Any part of x, mostly a large one, sometimes none."""
    starts, stops = [], []
    for size in x.type.shape:
        start, stop = int(b.rng.integers(0, size // 3 + 1)), int(b.rng.integers(size - size // 3, size + 1))
        starts.append(start)
        stops.append(start if b.chance(0.05) else stop)
    return b.node(shape.Slice(tuple(starts), tuple(stops), tuple(b.choose(1, 1, 2) for _ in starts)), x)


def _turn(b: Builder, x: Node) -> Node:
    return b.node(shape.Transpose(tuple(int(d) for d in b.rng.permutation(x.type.rank))), x)


def drop_identity(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    rank, dims = x.type.rank, x.type.shape
    ops: tuple[Op, ...] = (
        *(shape.Reshape(dims), shape.Transpose(tuple(range(rank))), shape.Broadcast(dims), shape.Concat(0)),
        *(shape.Slice((0,) * rank, dims, (1,) * rank), shape.Pad(((0, 0),) * rank), unary.Cast("float32")),
        *(shape.Roll((dims[0],), (0,)), shape.Flip(()), shape.Roll((1,), (0,)), shape.Flip((rank - 1,))),
    )
    return b.node(ops[int(b.rng.integers(len(ops)))], x)


def merge_reshapes(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    return b.node(shape.Reshape(x.type.shape[::-1]), b.node(shape.Reshape((x.type.size,)), x))


def merge_transposes(b: Builder) -> Node:
    return _turn(b, _turn(b, b.tensor(3, 4)))


def merge_broadcasts(b: Builder) -> Node:
    x = b.tensor(1, 2, 3)
    return b.node(shape.Broadcast((2, 3, *x.type.shape)), b.node(shape.Broadcast((3, *x.type.shape)), x))


def merge_slices(b: Builder) -> Node:
    return _slice(b, _slice(b, b.input(*((9,) if b.chance(0.5) else (4, 11)))))


def transpose_to_reshape(b: Builder) -> Node:
    x = b.input(*((4, 1, 3) if b.chance(0.5) else (1, 3, 1, 4)))
    return b.node(shape.Transpose((0, 2, 1) if x.type.rank == 3 else (2, 1, 0, 3)), x)


def layout_to_reshape(b: Builder) -> Node:
    x = b.input(b.choose(1, 2), b.choose(BLOCK, BLOCK, 2 * BLOCK, 2 * BLOCK, 6), *((1, 1) if b.chance(0.9) else (2, 1)))
    return b.node(shape.LayoutTransform("NCHW", f"NCHW{BLOCK}c", x.type.shape[1]), x)


def broadcast_to_reshape(b: Builder) -> Node:
    x = b.tensor(1, 2, 3)
    return b.node(shape.Broadcast((1, *x.type.shape)), x)


def slice_of_transpose(b: Builder) -> Node:
    return _slice(b, _turn(b, b.tensor(2, 3, 4)))


def slice_of_reshape(b: Builder) -> Node:
    rows, outer, inner = b.choose(1, 2), b.choose(2, 3), b.choose(2, 4)
    x = b.node(shape.Reshape((rows, outer, inner)), b.input(rows, outer * inner))
    start = b.choose(*range(outer))
    return b.node(shape.Slice((0, start, 0), (rows, outer if b.chance(0.5) else start + 1, inner), (1, 1, 1)), x)


def slice_of_linear(b: Builder) -> Node:
    x = b.tensor(2, 3)
    y = b.node(linear.Linear(), x, b.weights(6, x.type.shape[-1]), *([b.weights(6)] if b.chance(0.5) else []))
    *lead, _ = y.type.shape
    ranges = [((*(0,) * len(lead), a), (*lead, a + 2), (1,) * (len(lead) + 1)) for a in (0, 2, 4)]
    return b.node(shape.Concat(0), *(b.node(shape.Slice(*r), y) for r in ranges))


def reshape_of_transpose(b: Builder) -> Node:
    n, c = b.choose(2, 3), b.choose(4, 5)
    turned = b.node(shape.Transpose((0, 3, 1, 2)), b.input(1, n, 1, c))
    return b.node(shape.Reshape((c, n)), turned)


def elementwise_of_reshape(b: Builder) -> Node:
    rows, columns = b.choose(4, 6), b.choose(2, 3)
    product = b.node(linear.Linear(), b.input(rows, 3), b.weights(columns, 3))
    split = b.node(shape.Reshape((2, rows // 2, columns)), product)
    if b.chance(0.4):
        return b.node(unary.Relu(), split)
    dims = (2, rows // 2, columns)
    other = b.node(shape.Broadcast(dims), b.input(columns)) if b.chance(0.5) else b.input(*dims)
    operands = (split, other) if b.chance(0.5) else (other, split)
    return b.node(binary.Sub() if b.chance(0.5) else binary.Mul(), *operands)


def reshape_of_broadcast(b: Builder) -> Node:
    width = b.choose(2, 3)
    dims = ((width,), (1, width), (1, 1), (2, 1))[b.choose(0, 0, 1, 1, 2, 3)]
    repeated = b.node(shape.Broadcast((3, 2, width)), b.input(*dims))
    return b.node(shape.Reshape((6, width)), repeated)


def keep_image_dims(b: Builder) -> Node:
    x = b.input(b.choose(1, 2), b.choose(1, 3), 2, 4)
    ops = (reduce.Sum((2, 3)), reduce.Mean((2, 3)), reduce.Max((2, 3)), reduce.Min((2, 3)))
    return b.node(ops[b.choose(0, 1, 2, 3)], x)


def clamp_to_relu(b: Builder) -> Node:
    bounds = ((0.0, np.inf), (-0.0, np.inf), (0.0, 3.0), (1.0, np.inf))[b.choose(0, 0, 0, 0, 0, 0, 0, 1, 2, 3)]
    return b.node(unary.Clamp(*bounds), b.tensor(1, 2, 3, 4))


def merge_clamps(b: Builder) -> Node:
    bounds = ((0.0, 3.0), (-1.0, 2.0), (-2.0, 1.0), (2.0, 3.0), (-0.0, 4.0), (-3.0, -2.0))
    ops: list[Op] = [unary.Clamp(*bounds[i]) for i in b.rng.integers(0, len(bounds), 2)]
    if b.chance(0.3):
        ops[b.choose(0, 1)] = unary.Relu()
    return b.node(ops[1], b.node(ops[0], b.tensor(1, 2, 3, 4)))


def double_negation(b: Builder) -> Node:
    return b.node(unary.Neg(), b.node(unary.Neg(), b.tensor(1, 2, 3, 4)))


def _with_constant(op: Op, *values: float) -> Plant:
    def plant(b: Builder) -> Node:
        x = b.tensor(1, 2, 3, 4)
        value = values[int(b.rng.integers(len(values)))]
        return b.node(op, x, b.splat(value, x.type.shape))

    return plant


def x_times_sigmoid(b: Builder) -> Node:
    x = b.input(2, 3)
    return b.node(binary.Mul(), *((x, b.node(unary.Sigmoid(), x))[:: b.choose(1, -1)]))


def matmul_to_linear(b: Builder) -> Node:
    x = b.tensor(2, 3)
    width, out = x.type.shape[-1], b.choose(1, 3)
    source = (width, out) if b.chance(0.7) else (1, out)
    y = b.node(shape.Broadcast((*x.type.shape[:-2], width, out)), b.weights(*source))
    return b.node(linear.Matmul(), x, y)


def slice_of_concat(b: Builder) -> Node:
    x = b.tensor(2, 3, 4)
    width = int(b.rng.integers(1, x.type.shape[-1] + 1))
    y = b.node(shape.Slice((0,) * x.type.rank, (*x.type.shape[:-1], width), (1,) * x.type.rank), x)
    joined = b.node(shape.Concat(x.type.rank - 1), y, x, y)
    start, stop = sorted(int(v) for v in b.rng.integers(width, width + x.type.shape[-1] + 1, 2))
    lead = x.type.shape[:-1]
    return b.node(shape.Slice((*(0,) * len(lead), start), (*lead, stop), (1,) * x.type.rank), joined)


def slice_of_pad(b: Builder) -> Node:
    x = b.tensor(1, 2, 3)
    mode = ("constant", "replicate")[b.choose(0, 1)]
    pads = tuple((b.choose(0, 2), b.choose(0, 1)) for _ in x.type.shape)
    y = b.node(shape.Pad(pads, mode, 3.0 if mode == "constant" else 0.0), x)
    starts = [before + int(b.rng.integers(0, size)) for (before, _), size in zip(pads, x.type.shape, strict=True)]
    stops = [before + size + (after if b.chance(0.1) else 0) for (before, after), size in zip(pads, x.type.shape, strict=True)]
    return b.node(shape.Slice(tuple(starts), tuple(stops), (b.choose(1, 2),) * len(starts)), y)


def settled_where(b: Builder) -> Node:
    x = b.tensor(1, 2, 3, 4)
    chosen = np.array([True, False]) if b.chance(0.1) else np.array(b.chance(0.5))
    dims = x.type.shape if chosen.size == 1 or x.type.shape[-1] == 2 else None
    condition = b.node(shape.Broadcast(dims), b.const(chosen)) if dims else b.const(np.full(x.type.shape, True))
    return b.node(binary.Where(), condition, x, b.like(x))


def unread_operands(b: Builder) -> Node:
    x, y = b.input(3), b.input(2)
    inner = [Node(Input(f"a{i}", "float32", n.type.shape)) for i, n in enumerate((x, y, x))]
    left = Node(unary.Relu(), (inner[0],))
    body = Graph(tuple(inner), (Node(binary.Sub(), (left, inner[2])),))
    other = b.node(unary.Neg(), x)
    return b.node(Region("chain", body), other, y, x)


def fold_batch_norm(b: Builder) -> Node:
    return b.batch_norm(_layer(b))


def _layer(b: Builder) -> Node:
    """Any layer with constant weights whose channels are dimension 1, its bias present or not."""
    kind, bias = b.choose(0, 1, 2, 3), b.chance(0.5)
    x = b.image() if kind < 3 else b.tensor(2)
    if kind == 0:
        return b.layer(x, b.choose(1, 3, 8), b.choose(1, 3), bias=bias)
    if kind == 1:
        return b.layer(x, x.type.shape[1], groups=x.type.shape[1], bias=bias)
    if kind == 2:
        groups = 2 if x.type.shape[1] % 2 == 0 else 1
        parameters = [b.weights(x.type.shape[1], 2, 2, 2), *([b.weights(2 * groups)] if bias else [])]
        return b.node(conv.ConvTranspose2d(groups=groups), x, *parameters)
    return b.node(linear.Linear(), x, b.weights(4, x.type.shape[1]), *([b.weights(4)] if bias else []))


def _per_output(op: Op) -> Plant:
    def plant(b: Builder) -> Node:
        y = _layer(b)
        return b.node(op, *((y, b.vector_for(y))[:: b.choose(1, -1)]))

    return plant


def _fold_pad(bias: bool) -> Plant:
    def plant(b: Builder) -> Node:
        x = b.image()
        pads = ((0, 0), (0, 0), (b.choose(0, 2), 1), (b.choose(0, 1), b.choose(0, 1)))
        return b.layer(b.node(shape.Pad(pads, value=float(b.choose(0, 0, 0, 0, 0, 1))), x), b.choose(1, 4), 3, bias=bias)

    return plant


def batch_norm_to_scale(b: Builder) -> Node:
    return b.batch_norm(b.tensor(2, 3, 4))


def adaptive_pool_to_mean(b: Builder) -> Node:
    return b.node(pool.AdaptiveAvgPool2d((1, 1)), b.input(1, b.choose(1, 3), b.choose(2, 4), b.choose(1, 2)))


def adaptive_pool_to_pool(b: Builder) -> Node:
    return b.node(pool.AdaptiveAvgPool2d((2, b.choose(1, 2))), b.input(1, b.choose(1, 3), b.choose(2, 4), 4))


def whole_pool_to_mean(b: Builder) -> Node:
    x = b.input(2, b.choose(1, 3), b.choose(2, 4), 4)
    return b.node(pool.AvgPool2d(x.type.shape[2:] if b.chance(0.8) else (2, 2), (1, 1)), x)


def transposed_conv_to_conv(b: Builder) -> Node:
    groups, stride, kernel = b.choose(1, 2), (b.choose(1, 2, 3), b.choose(1, 2)), (b.choose(2, 3, 4), b.choose(2, 3))
    padding = (b.choose(0, 1), b.choose(0, 1))
    extra = (b.choose(*range(stride[0])), b.choose(*range(stride[1])))
    op = conv.ConvTranspose2d(stride, padding, extra, groups=groups)
    operands = [b.input(b.choose(1, 2), 2 * groups, 3, 4), b.weights(2 * groups, 2, *kernel)]
    return b.node(op, *operands, *([b.weights(2 * groups)] if b.chance(0.5) else []))


def spell_out_pixel_shuffle(b: Builder) -> Node:
    return b.node(shape.PixelShuffle(2), b.input(1, b.choose(4, 8, 12), b.choose(1, 3), 2))


def spell_out_attention(b: Builder) -> Node:
    q, k, v = b.input(1, 2, 3, 4), b.input(1, 2, 5, 4), b.input(1, 2, 5, 3)
    mask = [b.weights(1, 2, 3, 5)] if b.chance(0.5) else []
    return b.node(attention.ScaledDotProductAttention(0.5 if b.chance(0.5) else None), q, k, v, *mask)


def drop_mask(b: Builder) -> Node:
    q, k, v = b.input(1, 2, 3, 4), b.input(1, 2, 5, 4), b.input(1, 2, 5, 3)
    mask = b.node(shape.Broadcast((1, 2, 3, 5)), b.const(np.array(True)))
    return b.node(attention.ScaledDotProductAttention(causal=b.chance(0.5)), q, k, v, mask)


PLANTERS: dict[str, tuple[Plant, ...]] = {
    "drop-identity": (drop_identity,),
    "merge-reshapes": (merge_reshapes,),
    "merge-transposes": (merge_transposes,),
    "merge-broadcasts": (merge_broadcasts,),
    "merge-slices": (merge_slices,),
    "transpose-to-reshape": (transpose_to_reshape,),
    "layout-to-reshape": (layout_to_reshape,),
    "broadcast-to-reshape": (broadcast_to_reshape,),
    "slice-of-transpose": (slice_of_transpose,),
    "slice-of-reshape": (slice_of_reshape,),
    "slice-of-linear": (slice_of_linear,),
    "elementwise-of-reshape": (elementwise_of_reshape,),
    "reshape-of-broadcast": (reshape_of_broadcast,),
    "reshape-of-transpose": (reshape_of_transpose,),
    "keep-image-dims": (keep_image_dims,),
    "clamp-to-relu": (clamp_to_relu,),
    "merge-clamps": (merge_clamps,),
    "double-negation": (double_negation,),
    "times-one": (_with_constant(binary.Mul(), 1.0, 1.0, 1.0, -1.0),),
    "divided-by-one": (_with_constant(binary.Div(), 1.0, 1.0, 2.0),),
    "minus-zero": (_with_constant(binary.Sub(), 0.0, 0.0, -0.0),),
    "x-times-sigmoid": (x_times_sigmoid,),
    "matmul-to-linear": (matmul_to_linear,),
    "slice-of-concat": (slice_of_concat,),
    "slice-of-pad": (slice_of_pad,),
    "settled-where": (settled_where,),
    "unread-operands": (unread_operands,),
    "fold-batch-norm": (fold_batch_norm,),
    "fold-scale": (_per_output(binary.Mul()),),
    "fold-shift": (_per_output(binary.Add()),),
    "fold-pad": (_fold_pad(False), _fold_pad(True)),
    "batch-norm-to-scale": (batch_norm_to_scale,),
    "adaptive-pool-to-mean": (adaptive_pool_to_mean,),
    "adaptive-pool-to-pool": (adaptive_pool_to_pool,),
    "whole-pool-to-mean": (whole_pool_to_mean,),
    "transposed-conv-to-conv": (transposed_conv_to_conv,),
    "spell-out-pixel-shuffle": (spell_out_pixel_shuffle,),
    "spell-out-attention": (spell_out_attention,),
    "drop-mask": (drop_mask,),
    **planting_weights.PLANTERS,
    **planting_qdq.PLANTERS,
}
"""By rule, for each of its patterns one planter."""


# --- passes that are not made of rules ------------------------------------------------------------------------------


def constant_difference(b: Builder) -> Node:
    x = b.tensor(2, 3)
    dims = x.type.shape
    value = b.node(binary.Sub(), b.weights(*dims), b.weights(*dims))
    return b.node(binary.Add(), x, value)


def empty_part(b: Builder) -> Node:
    x = b.tensor(2, 3)
    nothing = b.node(shape.Slice((0,) * x.type.rank, (0, *x.type.shape[1:]), (1,) * x.type.rank), x)
    return b.node(shape.Concat(0), b.node(unary.Neg(), nothing), x)


def twins(b: Builder) -> Node:
    """The same twice, or nearly: other attributes, other order, other constants."""
    x = b.tensor(2, 3, 4)
    y = b.like(x)
    pairs: tuple[Callable[[], tuple[Node, Node]], ...] = (
        lambda: (b.node(unary.Relu(), x), b.node(unary.Relu(), x)),
        lambda: (b.node(unary.Clamp(0.0, 2.0), x), b.node(unary.Clamp(0.0, 3.0), x)),
        lambda: (b.node(binary.Sub(), x, y), b.node(binary.Sub(), y, x)),
        lambda: (b.splat(1.0, x.type.shape), b.splat(2.0, x.type.shape)),
        lambda: (b.node(binary.Mul(), x, b.splat(2.0, x.type.shape)), b.node(binary.Mul(), x, b.splat(2.0, x.type.shape))),
    )
    left, right = pairs[int(b.rng.integers(len(pairs)))]()
    return b.node(shape.Concat(0), left, right)


def blocked_concat(b: Builder) -> Node:
    x = b.image()
    left, right = b.layer(x, b.choose(4, 8), 1), b.layer(x, b.choose(3, 4), 1)
    return b.layer(b.node(shape.Concat(1), left, right), 4, 1)


def blocked_slice(b: Builder) -> Node:
    y = b.layer(b.image(), 12, 1)
    n, _, h, w = y.type.shape
    first = b.choose(0, 2, 4)
    return b.layer(b.node(shape.Slice((0, first, 0, 0), (n, b.choose(8, 10, 12), h, w), (1, 1, b.choose(1, 2), 1)), y), 4, 1)


def blocked_pad(b: Builder) -> Node:
    y = b.node(unary.Relu(), b.layer(b.image(), 8, 1))
    pads = ((0, 0), (0, b.choose(0, 0, 1)), (1, 0), (0, 2))
    return b.layer(b.node(shape.Pad(pads, value=float(b.choose(0, 2))), y), 4, 1)


def blocked_gate(b: Builder) -> Node:
    return squeeze_excite(b)


def blocked_pool(b: Builder) -> Node:
    y = b.layer(b.image(), b.choose(3, 8), 3)
    return b.layer(b.node(pool.MaxPool2d((3, 3), (1, 2), (1, 0 if y.type.shape[3] > 2 else 1)), y), 8, 1)


def blocked_shift(b: Builder) -> Node:
    y = b.layer(b.image(), b.choose(3, 8), 3)
    return b.layer(b.node(binary.Sub(), b.vector_for(y), y), 4, 1)


def depthwise(b: Builder) -> Node:
    x = b.layer(b.image(), b.choose(1, 3, 8), 1)
    return b.layer(x, x.type.shape[1], 3, groups=x.type.shape[1], stride=b.choose(1, 2))


def uneven_groups(b: Builder) -> Node:
    x = b.layer(b.image(), 24, 1)
    return b.layer(x, 24, b.choose(1, 3), groups=2)


def narrow_groups(b: Builder) -> Node:
    x = b.layer(b.image(), b.choose(4, 6, 12), 1)
    return b.layer(x, x.type.shape[1], 3, groups=x.type.shape[1] // 2, stride=b.choose(1, 2))


def epilogue(b: Builder) -> Node:
    y = b.layer(b.image(), b.choose(1, 3, 8), b.choose(1, 3))
    y = b.node(binary.Sub(), *((y, b.like(y))[:: b.choose(1, -1)]))
    return b.node(unary.Relu(), y)


def elementwise_chain(b: Builder) -> Node:
    x = b.tensor(2, 3, 4)
    y = b.node(unary.Neg(), b.node(binary.Sub(), x, b.like(x)))
    return b.node(binary.Maximum(), b.node(binary.Sub(), y, b.splat(3.0, x.type.shape)), x)


def shared_value(b: Builder) -> Node:
    """A value that is read both inside and outside of what could be one region."""
    x = b.tensor(2, 3, 4)
    y = b.node(unary.Neg(), x)
    b.pool.append(b.node(shape.Reshape((prod(x.type.shape),)), y))
    return b.node(unary.Relu(), b.node(binary.Add(), y, x))


def prologue(b: Builder) -> Node:
    x = b.node(unary.Abs(), b.tensor(2, 3))
    if b.exact:
        return b.node(reduce.Max((1,)), x)
    return b.node(norm.Softmax(x.type.rank - 1), b.node(binary.Mul(), x, b.splat(0.5, x.type.shape)))


PASS_PLANTERS: dict[str, tuple[Plant, ...]] = {
    "const-fold": (constant_difference, empty_part),
    "cse": (twins,),
    "layout{block=4}": (
        *(
            blocked_concat,
            blocked_slice,
            blocked_pad,
            blocked_gate,
            blocked_pool,
            blocked_shift,
            depthwise,
            narrow_groups,
            splitting,
        ),
    ),
    "fuse": (epilogue, elementwise_chain, shared_value, prologue),
}
"""By pass, for those that are not made of rules."""
