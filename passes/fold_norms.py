"""fold-qdq, norms: softmax and layer norm between dequantize and quantize, by exact integer sums and single roundings.

They are spelled out in operators that there are: a quotient and a square root are rounded the same way on all hardware, so
the result has the same bits everywhere. What is computed once for a row is float64, where all of its sums are exact.
"""

from __future__ import annotations

import math

import numpy as np

from paring.ir.graph import Node
from paring.ir.ops import binary, norm, quantized, reduce, shape, unary
from paring.ir.types import TensorType
from paring.passes.contract import Steps
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.qdq import INT32, MANY_STEPS, float_constant, is_dequantize, ordinary, quantized_of, rounding_of, spread
from paring.passes.util import constant

# A float32 holds integers of 24 bits, and those of a row are added up in 31.
TABLE_BITS = 24
# Longer rows leave so few bits to each exponential that the sum of their roundings may show.
LONGEST_ROW = 1024


def _full(m: Match, value: float, type: TensorType) -> Node:
    return m.make(shape.Broadcast(type.shape), constant(np.array(value, type.dtype)))


def _widened(m: Match, x: Node, type: TensorType) -> Node:
    return m.make(shape.Broadcast(type.shape), x)


def _sound(eps: float, unit: float) -> bool:
    return 0 < eps * unit * unit < float(np.finfo(np.float32).max)


def softmax_on_integers(m: Match) -> Node | None:
    """quantize(softmax(dequantize(x))) -> requantize(e, 1 / (s * sum(e)), 0), e = lookup(max(x) - x, exp(-step * i))"""
    x, softmax, quantize = quantized_of(m["x"]), m["softmax"].op, m.root.op
    assert x is not None
    assert isinstance(softmax, norm.Softmax)
    assert isinstance(quantize, quantized.Quantize)
    length = x.q.type.shape[softmax.axis]
    if isinstance(softmax, norm.LogSoftmax) or not 0 < length <= LONGEST_ROW or x.q.type.size == 0:
        return m.decline(f"a logarithm, or a row of more than {LONGEST_ROW} elements")
    if not ordinary(np.asarray(quantize.steps_per_unit / 2.0**31)):
        return m.decline("the steps of the result are too small")
    bits = min(TABLE_BITS, 30 - math.ceil(math.log2(length)))
    table = np.rint(np.exp(-x.scale * np.arange(256.0)) * 2.0**bits).astype(np.int32)
    wide = m.make(unary.Cast("int32"), x.q)
    most = m.make(unary.Cast("int32"), m.make(reduce.Max((softmax.axis,), True), x.q))
    below = m.make(unary.Cast("uint8"), m.make(binary.Sub(), _widened(m, most, wide.type), wide))
    powers = m.make(quantized.Lookup(), below, constant(table))
    total = m.make(unary.Cast("float32"), m.make(reduce.Sum((softmax.axis,), True), powers))
    share = m.make(binary.Div(), _full(m, quantize.steps_per_unit, total.type), total)
    factors = (_widened(m, share, powers.type), spread(m, np.zeros(()), powers.type))
    return m.make(rounding_of(m.root), powers, *factors)


def layer_norm_on_integers(m: Match) -> Node | None:
    """quantize(layer_norm(dequantize(x), w, b)) -> requantize(n * x - sum(x), w / (s * deviation), b / s)"""
    x, layer, quantize = quantized_of(m["x"]), m["norm"].op, m.root.op
    assert x is not None
    assert isinstance(layer, norm.LayerNorm)
    assert isinstance(quantize, quantized.Quantize)
    weight, bias = float_constant(m["w"]), float_constant(m["b"])
    rank, count = m["w"].type.rank, m["w"].type.size
    if weight is None or bias is None or not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return m.decline("weight and bias are not constant and finite")
    if not 0 < count * 255 * 255 <= INT32 or not _sound(layer.eps, count / x.scale):
        return m.decline("the squares of a row may be more than 32 bits hold, or eps is not a small positive number")
    gain, shift = (v.astype(np.float64) * quantize.steps_per_unit for v in (weight, bias))
    peak = max(float(np.abs(gain).max()) * math.sqrt(count), float(np.abs(shift).max()))
    if peak > MANY_STEPS or not ordinary(gain):
        return m.decline("its constants are too large or too small for the steps of the result")
    wide = m.make(unary.Cast("int32"), x.q)
    axes = tuple(range(wide.type.rank - rank, wide.type.rank))
    total = m.make(reduce.Sum(axes, True), wide)
    squares = m.make(reduce.Sum(axes, True), m.make(binary.Mul(), wide, wide))
    inverse = m.make(unary.Cast("float32"), _inverse_deviation(m, total, squares, count, layer.eps * (count / x.scale) ** 2))
    times = m.make(binary.Mul(), wide, _full(m, count, wide.type))
    centred = m.make(binary.Sub(), times, _widened(m, total, wide.type))
    real = wide.type.with_dtype("float32")
    factor = m.make(binary.Mul(), _widened(m, inverse, real), spread(m, gain, real))
    return m.make(rounding_of(m.root), centred, factor, spread(m, shift, real))


def _inverse_deviation(m: Match, total: Node, squares: Node, count: int, eps: float) -> Node:
    """1 / sqrt(count * sum(x * x) - sum(x)^2 + eps) in float64: all but the last sum are integers below 2^53."""
    total, squares = (m.make(unary.Cast("float64"), sums) for sums in (total, squares))
    times = m.make(binary.Mul(), squares, _full(m, count, total.type))
    spread_out = m.make(binary.Sub(), times, m.make(binary.Mul(), total, total))
    # No product is added to here: compiled code would be free to round the two at once.
    deviation = m.make(unary.Sqrt(), m.make(binary.Add(), spread_out, _full(m, eps, total.type)))
    return m.make(binary.Div(), _full(m, 1.0, total.type), deviation)


_X = any_("x", is_dequantize)

RULES: tuple[Rule, ...] = (
    Rule(op(quantized.Quantize, op(norm.Softmax, _X, name="softmax")), softmax_on_integers, Steps(1)),
    Rule(
        op(quantized.Quantize, op(norm.LayerNorm, _X, any_("w"), any_("b"), name="norm")),
        layer_norm_on_integers,
        Steps(1),
    ),
)
