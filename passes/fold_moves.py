"""fold-qdq, moves: what only moves or chooses elements does so with the integers, so that dequantize and quantize meet."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from paring.ir.graph import Node
from paring.ir.interpreter import evaluate
from paring.ir.op import Op
from paring.ir.ops import index, pool, quantized, reduce, shape
from paring.ir.ops.quantized import limits
from paring.passes.affine import is_number
from paring.passes.contract import Exact
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.qdq import is_dequantize, quantized_of
from paring.passes.util import const_value, constant, is_const

# Each element of the result is one of the operand's, and the order of integers is that of what they stand for.
CHOOSING = (
    *(shape.Reshape, shape.Transpose, shape.Slice, shape.Flip, shape.Roll, shape.Broadcast, shape.PixelShuffle),
    *(reduce.Max, reduce.Min, index.Gather, index.GatherElements),
)


def _moved(m: Match, op: Op, x: Node, *others: Node) -> Node:
    """The move of integers, done at once where they are constant and do not become more: weights stay constants."""
    node = m.make(op, x, *others, loc=x.loc if is_const(x) else None)
    if is_const(x) and not others and node.type.size <= x.type.size:
        return constant(evaluate(node, [const_value(x)]), x.loc)
    return node


def move_integers(m: Match) -> Node | None:
    """move(dequantize(x)) -> dequantize(move(x))"""
    x = quantized_of(m.root.inputs[0])
    assert x is not None
    return m.make(m.root.inputs[0].op, _moved(m, m.root.op, x.q, *m.root.inputs[1:]))


def pad_integers(m: Match) -> Node | None:
    """pad(dequantize(x), v), v on a step -> dequantize(pad(x, v / s + zero))"""
    x, pad, dequantize = quantized_of(m["x"]), m.root.op, m["x"].op
    assert x is not None
    assert isinstance(pad, shape.Pad)
    if pad.mode != "constant":
        return m.make(dequantize, m.make(pad, x.q))
    low, high = limits(x.q.type.dtype)
    step = np.clip(np.rint(pad.value / x.scale) + x.zero_point, low, high).astype(x.q.type.dtype)
    if not math.isfinite(pad.value) or dequantize.ref(step).astype(np.float32).tobytes() != np.float32(pad.value).tobytes():
        return m.decline("the padding lies between two steps")
    return m.make(dequantize, m.make(dataclasses.replace(pad, value=float(step)), x.q))


def concat_integers(m: Match) -> Node | None:
    """concat(dequantize(x), dequantize(y), ...), same parameters -> dequantize(concat(x, y, ...))"""
    first = m.root.inputs[0]
    if any((n.op, n.inputs[0].type.dtype) != (first.op, first.inputs[0].type.dtype) for n in m.root.inputs):
        return m.decline("the parts have different scales or zero points")
    return m.make(first.op, m.make(m.root.op, *(n.inputs[0] for n in m.root.inputs)))


def _always_full(pooling: Op, x: Node) -> bool:
    """Whether each window has an element of x in it."""
    assert isinstance(pooling, pool.MaxPool2d)
    whole = np.zeros((1, 1, *x.type.shape[2:4], *(1,) * (x.type.rank - 4)), np.float32)
    return bool(np.isfinite(pooling.ref(whole)).all())


def pool_integers(m: Match) -> Node | None:
    """max_pool2d(dequantize(x)) -> dequantize(max_pool2d(x))"""
    x = quantized_of(m["x"])
    assert x is not None
    if not _always_full(m.root.op, x.q):
        return m.decline("a window has nothing but padding, which is not a number of steps")
    return m.make(m["x"].op, m.make(m.root.op, x.q))


def move_channels(m: Match) -> Node | None:
    """slice|transpose|reshape(dequantize_channels(x, s)) -> dequantize_channels(slice|transpose|reshape(x), s)"""
    move, dequantize, (x, scale) = m.root.op, m["x"].op, m["x"].inputs
    assert isinstance(dequantize, quantized.DequantizeChannels)
    axis: int | None = dequantize.axis
    match move:
        case shape.Transpose(perm=perm):
            axis = perm.index(dequantize.axis)
        case shape.Slice(starts=starts, stops=stops, steps=steps):
            ends = [(values[dequantize.axis],) for values in (starts, stops, steps)]
            scale = _moved(m, shape.Slice(*ends), scale)
        case shape.Reshape():
            axis = _kept_axis(x.type.shape, m.root.type.shape, dequantize.axis)
    if axis is None:
        return m.decline("the dimension of the scales is split or merged")
    return m.make(quantized.DequantizeChannels(axis), _moved(m, move, x), scale)


def _kept_axis(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """The dimension of a reshaped tensor that a dimension has become, the elements before and after it being the same."""
    outer = math.prod(before[:axis])
    return next((d for d, size in enumerate(after) if size == before[axis] and math.prod(after[:d]) == outer), None)


def quantize_before_move(m: Match) -> Node | None:
    """quantize(reshape|transpose|broadcast(x)) -> reshape|transpose|broadcast(quantize(x))"""
    move = m["move"]
    if m.uses[move] != 1 and not isinstance(move.op, shape.Broadcast):
        return m.decline("the values are needed as floats too")
    return m.make(move.op, m.make(m.root.op, move.inputs[0]))


def quantize_parts(m: Match) -> Node | None:
    """quantize(concat(x, y, ...)), one of them integers -> concat(quantize(x), quantize(y), ...)"""
    parts = m["concat"].inputs
    # Integers are joined again for each quantize: still fewer bytes than the floats once.
    once = m.uses[m["concat"]] == 1 and any(isinstance(p.op, quantized.Dequantize | quantized.Descale) for p in parts)
    if not once and not all(map(is_dequantize, parts)):
        return m.decline("no part comes from integers, or the whole is needed as floats too")
    return m.make(m["concat"].op, *(m.make(m.root.op, part) for part in parts))


def quantize_before_pool(m: Match) -> Node | None:
    """quantize(max_pool2d(x)), x a number -> max_pool2d(quantize(x))"""
    pooling, x = m["pool"], m["pool"].inputs[0]
    if m.uses[pooling] != 1 or not is_number(x) or not _always_full(pooling.op, x):
        return m.decline("the values are needed as floats too, or may be NaN or padding only")
    return m.make(pooling.op, m.make(m.root.op, x))


_X = any_("x", is_dequantize)
_MOVES = (shape.Reshape, shape.Transpose, shape.Broadcast)

RULES: tuple[Rule, ...] = (
    Rule(op(CHOOSING, where=lambda n: is_dequantize(n.inputs[0])), move_integers, Exact()),
    Rule(op(shape.Pad, _X), pad_integers, Exact()),
    Rule(op(shape.Concat, where=lambda n: all(map(is_dequantize, n.inputs))), concat_integers, Exact()),
    Rule(op(pool.MaxPool2d, _X), pool_integers, Exact()),
    Rule(
        op((shape.Slice, shape.Transpose, shape.Reshape), op(quantized.DequantizeChannels, name="x")),
        move_channels,
        Exact(),
    ),
    Rule(op(quantized.Quantize, op(_MOVES, name="move")), quantize_before_move, Exact()),
    Rule(op(quantized.Quantize, op(shape.Concat, name="concat")), quantize_parts, Exact()),
    Rule(op(quantized.Quantize, op(pool.MaxPool2d, name="pool")), quantize_before_pool, Exact()),
)
