"""Ops on integers that stand for real numbers, on TVM expressions: the roundings of `ir/ops/quantized.py`, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Value
from paring.backends.vecmath import MAGIC, MAGIC_BITS, bind, cast, fma, full, lanes_in, reinterpret, with_lanes
from paring.ir.op import Op
from paring.ir.ops import quantized
from paring.ir.ops.attention import IntegerAttention


def _settle(op: Any, t: Value) -> Value:
    """Steps from the zero point, float32, to the integer: a NaN fails the first comparison."""
    low, high = (full(t, bound - op.zero_point) for bound in op.range)
    t = bind(t)
    t = bind(tirx.Select(t > low, t, low))
    if lanes_in(t) > 1 and (op.dtype, op.range[1]) == ("uint8", 255):
        return _saturate(_nearest(t), op.zero_point)
    t = bind(tirx.Select(t < high, t, high))
    # Adding 1.5 * 2^23 rounds to an integer, halves to even, and leaves it in the last bits.
    bits = reinterpret(fma(t, full(t, 1.0), full(t, MAGIC)), "int32")
    return cast(bits - full(bits, MAGIC_BITS - op.zero_point), op.dtype)


def _nearest(t: Value) -> Value:
    """The nearest int32, halves to even. Beyond int32 the instruction gives the greatest or the least: both large, unsigned."""
    dtype = with_lanes("int32", lanes_in(t))
    return T.call_llvm_pure_intrin(dtype, "llvm.lrint", t)


def _saturate(steps: Value, zero: int) -> Value:
    """uint8 of steps + zero, which is not negative unless it is beyond int32: one narrowing instruction of x86."""
    whole = reinterpret(steps + full(steps, zero), "uint32")
    return cast(tirx.min(whole, full(whole, 255)), "uint8")


def _steps(x: Value, zero: int) -> Value:
    """float32(x - zero)."""
    x = cast(x, "int32")
    return cast(x - full(x, zero) if zero else x, "float32")


def _quantize(op: quantized.Quantize, x: Value) -> Value:
    return _settle(op, x * full(x, op.steps_per_unit))


def _dequantize(op: quantized.Dequantize, q: Value) -> Value:
    steps = _steps(q, op.zero_point)
    return steps * full(steps, op.scale)


def _descale(op: Op, total: Value, multiplier: Value, bias: Value) -> Value:
    return fma(_steps(total, 0), multiplier, bias)


def _requantize(op: quantized.Requantize, x: Value, multiplier: Value, bias: Value, *residual: Value) -> Value:
    t = fma(_steps(x, 0), multiplier, bias)
    for r in residual:
        t = fma(_steps(r, op.residual_zero), full(t, op.residual_scale), bind(t))
    return _settle(op, t)


def weight_place(op: IntegerAttention, below: Value) -> Value:
    """Where the table of an attention has the weight of a key whose score is that much below the greatest one, int32."""
    t = cast(below, "float32")
    t = bind(t * full(t, op.steps))
    t = bind(tirx.Select(t < full(t, 255.0), t, full(t, 255.0)))
    bits = reinterpret(fma(t, full(t, 1.0), full(t, MAGIC)), "int32")
    return bits - full(bits, MAGIC_BITS)


def weight_share(op: IntegerAttention, total: Value) -> Value:
    """What the sum of weighted values is multiplied by, float32, given the sum of the weights."""
    total = cast(tirx.max(total, full(total, 1)), "float32")
    return bind(full(total, op.scale) / total)


def _quantized_mul(op: quantized.QuantizedMul, x: Value, y: Value) -> Value:
    wide = [cast(v, "int32") for v in (x, y)]
    product = cast((wide[0] - full(wide[0], op.x_zero)) * (wide[1] - full(wide[1], op.y_zero)), "float32")
    return _settle(op, product * full(product, op.scale))


QUANTIZED: dict[type[Op], Callable[..., Value]] = {
    quantized.Quantize: _quantize,
    quantized.Dequantize: _dequantize,
    quantized.Descale: _descale,
    quantized.Requantize: _requantize,
    quantized.QuantizedMul: _quantized_mul,
}
