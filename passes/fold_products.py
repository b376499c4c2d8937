"""fold-qdq, products: layers, products, means of dequantized values become sums of integers and a descale."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, pool, quantized, reduce, shape, unary
from paring.ir.ops.quantized import limits
from paring.passes.contract import Close
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.qdq import INT32, Weights, float_constant, is_dequantize, ordinary, quantized_of, spread, weights_of
from paring.passes.util import constant, is_plain

LAYERS = (conv.Conv2d, linear.Linear)


def layer_on_integers(m: Match) -> Node | None:
    """conv2d|linear(dequantize(x), dequantize(w), b) -> descale(conv2d|linear(x, w, -zero * sum(w)), sx * sw, b)"""
    x, w = quantized_of(m.root.inputs[0]), weights_of(m.root.inputs[1])
    if x is None:
        return m.decline("its input is not quantized")
    if isinstance(w, str):
        return m.decline(w)
    bias = float_constant(m.root.inputs[2]) if len(m.root.inputs) == 3 else np.zeros(len(w.q), np.float32)
    if bias is None or not np.isfinite(bias).all():
        return m.decline("the bias is not constant and finite")
    if not is_plain(m.root):
        return m.decline("the weights are packed")
    offset = -x.zero_point * w.sums
    # Whatever the input and the order of the sum: each partial sum stays below this.
    worst = int((w.sizes * max(map(abs, limits(x.q.type.dtype))) + np.abs(offset)).max(initial=0))
    if worst > INT32:
        return m.decline(f"a sum may reach {worst}, more than 32 bits hold")
    multiplier = _multiplier(w, x.scale)
    if not ordinary(multiplier):
        return m.decline("the product of the scales is too small or too large")
    layer = m.root.op
    if isinstance(layer, conv.Conv2d):
        layer = dataclasses.replace(layer, pad_value=x.zero_point)
    weight = constant(w.q, m.root.inputs[1].loc)
    offsets = [constant(offset.astype(np.int32))] if offset.any() else []
    column = (-1, 1, 1) if isinstance(layer, conv.Conv2d) else (-1,)
    factors = (spread(m, values.reshape(column), m.root.type) for values in (multiplier, bias))
    return m.make(quantized.Descale(), m.make(layer, x.q, weight, *offsets), *factors)


def _multiplier(w: Weights, scale: float) -> Array:
    """One for each output. Sums over weights that are all zero are zero, whatever their scale is."""
    with np.errstate(all="ignore"):
        product = (w.scale.astype(np.float64) * scale).astype(np.float32)
    return np.where(w.sizes > 0, product, np.float32(0))


def matmul_on_integers(m: Match) -> Node | None:
    """matmul(dequantize(x), dequantize(y)) -> descale(matmul(x, y), sx * sy, 0)"""
    x, y = map(quantized_of, m.root.inputs)
    assert x is not None
    assert y is not None
    worst = m.root.inputs[0].type.shape[-1] * x.reach * y.reach
    if worst > INT32:
        return m.decline(f"a sum may reach {worst}, more than 32 bits hold")
    multiplier = np.asarray(x.scale * y.scale)
    if not ordinary(multiplier):
        return m.decline("the product of the scales is too small or too large")
    total = m.make(linear.Matmul(x.zero_point, y.zero_point), x.q, y.q)
    return _descaled(m, total, multiplier)


def _descaled(m: Match, total: Node, multiplier: Array) -> Node:
    type = total.type.with_dtype("float32")
    return m.make(quantized.Descale(), total, spread(m, multiplier, type), spread(m, np.zeros(()), type))


def mean_on_integers(m: Match) -> Node | None:
    """sum|mean(dequantize(x)) -> descale(sum(cast(x)) - count * zero, s / count, 0)"""
    x, reduction = quantized_of(m["x"]), m.root.op
    assert x is not None
    assert isinstance(reduction, reduce.Reduction)
    count = math.prod(m["x"].type.shape[a] for a in reduction.axes)
    if not 0 < count * 2 * 255 <= INT32:
        return m.decline(f"a sum of {count} integers may be more than 32 bits hold")
    multiplier = np.asarray(x.scale / count if isinstance(reduction, reduce.Mean) else x.scale)
    if not ordinary(multiplier):
        return m.decline("the scale is too small")
    total = m.make(reduce.Sum(reduction.axes, reduction.keepdims), m.make(unary.Cast("int32"), x.q))
    if x.zero_point:
        zero = constant(np.array(count * x.zero_point, np.int32))
        total = m.make(binary.Sub(), total, m.make(shape.Broadcast(total.type.shape), zero))
    return _descaled(m, total, multiplier)


def average_to_conv(m: Match) -> Node | None:
    """avg_pool2d(dequantize(x)) -> descale(conv2d(x, ones, -zero * count), s / count, 0), a channel at a time"""
    x, pooling = quantized_of(m["x"]), m.root.op
    assert x is not None
    assert isinstance(pooling, pool.AvgPool2d)
    padded = any(pooling.padding) and not pooling.count_include_pad
    if pooling.layout != "NCHW" or padded or pooling.ceil_mode:
        return m.decline("its windows are not divided by the same number")
    channels, count = m["x"].type.shape[1], math.prod(pooling.kernel)
    multiplier = np.asarray(x.scale / count)
    if count * 2 * 255 > INT32 or not ordinary(multiplier) or channels == 0:
        return m.decline("its windows are too large, or its scale too small")
    (ph, pw), zero = pooling.padding, x.zero_point
    layer = conv.Conv2d(pooling.stride, ((ph, ph), (pw, pw)), groups=channels, pad_value=zero)
    ones = constant(np.ones((channels, 1, *pooling.kernel), np.int8))
    offsets = [constant(np.full(channels, -zero * count, np.int32))] if zero else []
    return _descaled(m, m.make(layer, x.q, ones, *offsets), multiplier)


def _partly_quantized(layer: Node) -> bool:
    return any(isinstance(n.op, quantized.Dequantize | quantized.DequantizeChannels) for n in layer.inputs[:2])


_Q = any_("x", is_dequantize)

RULES: tuple[Rule, ...] = (
    Rule(op(LAYERS, where=_partly_quantized), layer_on_integers, Close(4)),
    Rule(op(linear.Matmul, _Q, any_("y", is_dequantize)), matmul_on_integers, Close(4)),
    Rule(op((reduce.Sum, reduce.Mean), _Q), mean_on_integers, Close(4)),
    Rule(op(pool.AvgPool2d, _Q), average_to_conv, Close(4)),
)
