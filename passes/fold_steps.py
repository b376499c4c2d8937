"""fold-qdq, steps: arithmetic between dequantize and quantize becomes one rounding from integers to integers."""

from __future__ import annotations

import dataclasses

import numpy as np

from paring.ir.graph import Node
from paring.ir.ops import binary, quantized, unary
from paring.ir.ops.quantized import narrowed
from paring.passes.affine import Affine, affine_of, is_number
from paring.passes.contract import Exact, Steps
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.qdq import MANY_STEPS, Quantized, is_dequantize, ordinary, quantized_of, rounding_of, spread, steps_per_unit

TOO_FINE = "its constants are too many, or too large for the steps of the result"


def narrow_range(m: Match) -> Node | None:
    """quantize(relu|clamp(x)) -> quantize{low, high}(x), x a number"""
    quantize, bounds = m.root.op, m["bounds"].op
    assert isinstance(quantize, quantized.Quantize)
    if not is_number(m["x"]):
        return m.decline("x may be NaN, which is the least integer of the range")
    low, high = (bounds.low, bounds.high) if isinstance(bounds, unary.Clamp) else (0.0, np.inf)
    # Rounding keeps the order, so it may be done before the bounds are applied to its results.
    least, most = (int(q) for q in quantize.ref(np.array([low, high], np.float32)))
    if least > most:
        return m.decline("the range is empty")
    low_q, high_q = narrowed(quantize.dtype, least, most)
    return m.make(dataclasses.replace(quantize, low=low_q, high=high_q), m["x"])


def quantize_affine(m: Match) -> Node | None:
    """quantize(x * c + d), x integers, c and d constant -> requantize(x, c / s, d / s)

    x may be a concat of integers with different scales, moved too: c and d are those of each element's own part. So the parts
    are rounded once, to the scale of the result: a scale that the parts share would round them once more and save no kernel.
    """
    x = affine_of(m["x"])
    return None if x is None else _requantized(m, x.times(np.asarray(steps_per_unit(m.root))), None)


def quantize_residual(m: Match) -> Node | None:
    """quantize(x * c + d ± dequantize(r)) -> requantize(x, c / s, d / s, r)"""
    (left, right), unit = m["x"].inputs, steps_per_unit(m.root)
    signed = (left, unit), (right, -unit if isinstance(m["x"].op, binary.Sub) else unit)
    for (x, x_unit), (r, r_unit) in (signed, signed[::-1]):
        affine, residual = affine_of(x), quantized_of(r)
        if affine is not None and residual is not None:
            return _requantized(m, affine.times(np.asarray(x_unit)), residual, r_unit)
    if affine_of(left) is not None and affine_of(right) is not None:
        return m.decline("both terms are sums that are not rounded to 8 bits")
    return None


def _requantized(m: Match, x: Affine, residual: Quantized | None, unit: float = 1.0) -> Node | None:
    """requantize of x in steps, plus a residual in units."""
    scale = float(np.float32((residual.scale if residual else 1.0) * unit))
    reach = abs(scale) * residual.reach if residual else 0.0
    if not x.is_small or max(x.peak, reach) > MANY_STEPS or not ordinary(np.asarray(scale)):
        return m.decline(TOO_FINE)
    factors = (spread(m, value, m.root.type) for value in (x.factor, x.shift))
    if residual is None:
        return m.make(rounding_of(m.root), x.x, *factors)
    return m.make(rounding_of(m.root, scale, residual.zero_point), x.x, *factors, residual.q)


def quantize_product(m: Match) -> Node | None:
    """quantize(dequantize(x) * dequantize(y)) -> quantized_mul(x, y)"""
    q, x, y = m.root.op, quantized_of(m["x"]), quantized_of(m["y"])
    assert isinstance(q, quantized.Quantize)
    assert x is not None
    assert y is not None
    scale = np.asarray(x.scale * y.scale * q.steps_per_unit).astype(np.float32)
    if not ordinary(scale) or scale == 0:
        return m.decline("the product of the scales is too small or too large")
    rounding = quantized.QuantizedMul(q.zero_point, q.dtype, q.low, q.high, x.zero_point, y.zero_point, float(scale))
    return m.make(rounding, x.q, y.q)


_SUM = op((binary.Add, binary.Sub), name="x")

RULES: tuple[Rule, ...] = (
    Rule(op(quantized.Quantize, op((unary.Relu, unary.Clamp), any_("x"), name="bounds")), narrow_range, Exact()),
    Rule(op(quantized.Quantize, any_("x")), quantize_affine, Steps(1)),
    Rule(op(quantized.Quantize, _SUM), quantize_residual, Steps(1)),
    Rule(
        op(quantized.Quantize, op(binary.Mul, any_("x", is_dequantize), any_("y", is_dequantize))),
        quantize_product,
        Steps(1),
    ),
)
