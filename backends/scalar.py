"""What every elementwise op is on TVM expressions, scalar or vector: the table SCALARS.

The meaning is that of the IR's `ref`, special values included. TVM rearranges arithmetic as if it were exact: of floats
(x - x becomes 0, not (x < y) becomes x >= y), and of int32 and int64 as if they had no end ((x + 1) > x becomes true). So float
sums and products go in as `fma`, integer ones by way of `wrapping`, logic as bits of bytes; it leaves these alone, and LLVM
turns them back into the plain instructions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm_ffi import structural_equal

from paring.backends import vecmath as vm
from paring.backends import wrapping
from paring.backends.kernel import Value
from paring.backends.quantized import QUANTIZED
from paring.backends.vecmath import bind, cast, dtype_of, fma, full
from paring.ir.op import Op
from paring.ir.ops import binary, unary
from paring.ir.types import DTYPES

ScalarRule = Callable[..., Value]


def is_float(value: Value) -> bool:
    return "float" in dtype_of(value)


def same(x: Value, y: Value) -> bool:
    """Whether two expressions are the same text, which TVM takes for equality even of NaNs."""
    return bool(structural_equal(x, y))


def libm(name: str, *values: Value) -> Value:
    """The C library's function on scalars, float32 by way of float64."""
    result = tirx.call_pure_extern("float64", name, *(cast(v, "float64") for v in values))
    return cast(result, dtype_of(values[0]))


def opaque(value: Value) -> Value:
    """A constant that TVM does not fold with: it refuses a division by one that is zero."""
    return fma(value, full(value, 1.0), full(value, -0.0))


def add(x: Value, y: Value) -> Value:
    return fma(x, full(x, 1.0), y) if is_float(x) else wrapping.add(x, y)


def sub(x: Value, y: Value) -> Value:
    return fma(y, full(y, -1.0), x) if is_float(x) else wrapping.sub(x, y)


def mul(x: Value, y: Value) -> Value:
    return fma(x, y, full(x, -0.0)) if is_float(x) else wrapping.mul(x, y)


def _logic(operation: Callable[..., Value], *values: Value) -> Value:
    """An operation on bools, as bytes that are 0 or 1."""
    result = operation(*(cast(value, "int8") for value in values))
    return tirx.NE(result, full(result, 0))


def div(x: Value, y: Value) -> Value:
    return opaque(x) / opaque(y)


def maximum(x: Value, y: Value) -> Value:
    """NaN where either is NaN."""
    x, y = bind(x), bind(y)
    greater = tirx.Select(x > y, x, y)
    return tirx.Select(tirx.isnan(x), x, greater) if is_float(x) else greater


def minimum(x: Value, y: Value) -> Value:
    """NaN where either is NaN."""
    x, y = bind(x), bind(y)
    lesser = tirx.Select(x < y, x, y)
    return tirx.Select(tirx.isnan(x), x, lesser) if is_float(x) else lesser


def is_number(x: Value) -> Value:
    return tirx.Not(tirx.isnan(x))


def equal(x: Value, y: Value) -> Value:
    """TVM compares bools as if they were floats, which LLVM refuses."""
    if dtype_of(x) == "bool":
        x, y = cast(x, "int8"), cast(y, "int8")
    return tirx.EQ(x, y)


def not_equal(x: Value, y: Value) -> Value:
    """True where either is NaN: TVM's own comparison is false there."""
    if not is_float(x):
        return tirx.Not(equal(x, y))
    x, y = bind(x), bind(y)
    return tirx.Or(tirx.NE(x, y), tirx.Or(tirx.isnan(x), tirx.isnan(y)))


def _compare(plain: Callable[[Value, Value], Value], on_equal: bool) -> ScalarRule:
    def rule(op: Op, x: Value, y: Value) -> Value:
        if is_float(x) and same(x, y):
            return is_number(x) if on_equal else x < y
        return plain(x, y)

    return rule


def _relu(op: Op, x: Value) -> Value:
    x = bind(x)
    return tirx.Select(x < full(x, 0), full(x, 0), x)


def _clamp(op: unary.Clamp, x: Value) -> Value:
    x = bind(x)
    if not is_float(x):
        return _clamp_integer(op, x)
    if math.isfinite(op.low):
        x = bind(tirx.Select(x < full(x, op.low), full(x, op.low), x))
    if math.isfinite(op.high):
        x = tirx.Select(x > full(x, op.high), full(x, op.high), x)
    return x


def _clamp_integer(op: unary.Clamp, x: Value) -> Value:
    """The bound is cast to the integer type by truncation, the comparison is that of real numbers."""
    if math.isfinite(op.low):
        x = bind(tirx.Select(x < full(x, math.ceil(op.low)), full(x, int(op.low)), x))
    if math.isfinite(op.high):
        x = tirx.Select(x > full(x, math.floor(op.high)), full(x, int(op.high)), x)
    return x


def _leaky_relu(op: unary.LeakyRelu, x: Value) -> Value:
    x = bind(x)
    return tirx.Select(x < full(x, 0.0), x * full(x, op.alpha), x)


def _hard_sixth(x: Value) -> Value:
    """clip(x + 3, 0, 6) / 6."""
    return vm.limit(add(x, full(x, 3.0)), 0.0, 6.0) * full(x, 1.0 / 6.0)


def _hard_swish(op: Op, x: Value) -> Value:
    x = bind(x)
    return mul(x, _hard_sixth(x))


def _sign(op: Op, x: Value) -> Value:
    """-1, 0 or 1; 0 for NaN."""
    x = bind(x)
    zero = full(x, 0)
    below = zero if dtype_of(x) == "uint8" else tirx.Select(x < zero, full(x, -1), zero)
    return tirx.Select(x > zero, full(x, 1), below)


def _negate(op: Op, x: Value) -> Value:
    return -x if is_float(x) else sub(full(x, 0), x)


def _abs(op: Op, x: Value) -> Value:
    """The least integer has no positive counterpart: it stays."""
    if dtype_of(x) == "uint8":
        return x
    x = bind(x)
    return tirx.abs(x) if is_float(x) else tirx.Select(x < full(x, 0), _negate(op, x), x)


def _floor_div(op: Op, x: Value, y: Value) -> Value:
    return _float_division(x, y)[0] if is_float(x) else _integer_division(x, y)[0]


def _remainder(op: Op, x: Value, y: Value) -> Value:
    return _float_division(x, y)[1] if is_float(x) else _integer_division(x, y)[1]


def _float_division(x: Value, y: Value) -> tuple[Value, Value]:
    """numpy's floor_divide and remainder of scalars, in float64."""
    dtype = dtype_of(x)
    x, y = bind(cast(x, "float64")), bind(cast(y, "float64"))
    zero, one = full(x, 0.0), full(x, 1.0)
    rest = bind(libm("fmod", x, y))
    crosses = bind(tirx.Or(tirx.And(rest < zero, y > zero), tirx.And(rest > zero, y < zero)))
    modulus = tirx.Select(crosses, add(rest, y), tirx.Select(equal(rest, zero), libm("copysign", zero, y), rest))
    whole = bind(sub(div(sub(x, rest), y), tirx.Select(crosses, one, zero)))
    floor = bind(tirx.floor(whole))
    floor = bind(tirx.Select(sub(whole, floor) > full(x, 0.5), add(floor, one), floor))
    ratio = bind(div(x, y))
    quotient = tirx.Select(equal(whole, zero), libm("copysign", zero, ratio), floor)
    by_zero = bind(equal(y, zero))
    return cast(tirx.Select(by_zero, ratio, quotient), dtype), cast(tirx.Select(by_zero, rest, modulus), dtype)


def _integer_division(x: Value, y: Value) -> tuple[Value, Value]:
    """Floor division and remainder; a divisor of 0 gives 0, as in numpy, and nothing traps."""
    x, y = bind(x), bind(y)
    zero, one = full(x, 0), full(x, 1)
    by_zero = bind(equal(y, zero))
    if dtype_of(x) == "uint8":
        safe = bind(tirx.Select(by_zero, one, y))
        quotient, rest = tirx.floordiv(x, safe), tirx.floormod(x, safe)
    else:
        # The least integer divided by -1 overflows, which is a trap on x86.
        by_minus_one = equal(y, full(x, -1))
        safe = bind(tirx.Select(tirx.Or(by_zero, by_minus_one), one, y))
        quotient = tirx.Select(by_minus_one, sub(zero, x), tirx.floordiv(x, safe))
        rest = tirx.floormod(x, safe)
    return tirx.Select(by_zero, zero, quotient), tirx.Select(by_zero, zero, rest)


def _constant_of(value: Value) -> float | None:
    inner = value.value if isinstance(value, tirx.Broadcast) else value
    return float(inner.value) if isinstance(inner, tirx.FloatImm) else None


def _pow(op: Op, x: Value, y: Value) -> Value:
    exponent = _constant_of(y)
    if exponent == 1.0:
        return x
    if exponent == 2.0:
        x = bind(x)
        return mul(x, x)
    return tirx.power(x, y)


def _cast(op: unary.Cast, x: Value) -> Value:
    source, target = DTYPES[dtype_of(x)], DTYPES[op.dtype]
    if target.kind == "bool":
        return x if source.kind == "bool" else not_equal(x, full(x, 0))
    if source.kind == "float" and target.kind != "float" and target.bits < 32:
        # As C does it: by way of int.
        return cast(cast(x, "int32"), op.dtype)
    return cast(x, op.dtype)


def _function(vector: Callable[[Value], Value], name: str) -> ScalarRule:
    """Our own code for float32; the C library, on scalars, for float64."""

    def rule(op: Op, x: Value) -> Value:
        return vector(x) if dtype_of(x) == "float32" else libm(name, x)

    return rule


def _sigmoid(op: Op, x: Value) -> Value:
    if dtype_of(x) == "float32":
        return vm.sigmoid(x)
    x = bind(x)
    e = bind(libm("exp", -tirx.abs(x)))
    return tirx.Select(x >= full(x, 0.0), full(x, 1.0), e) / (e + full(x, 1.0))


def _silu(op: Op, x: Value) -> Value:
    x = bind(x)
    return mul(x, _sigmoid(op, x))


def _gelu(op: unary.Gelu, x: Value) -> Value:
    if dtype_of(x) == "float32":
        return vm.gelu_tanh(x) if op.approximate else vm.gelu(x)
    x = bind(x)
    if op.approximate:
        u = x * fma(x * x, full(x, 0.044715), full(x, 1.0)) * full(x, math.sqrt(2 / math.pi))
        inner = libm("tanh", u)
    else:
        inner = libm("erf", x * full(x, math.sqrt(0.5)))
    return x * full(x, 0.5) * add(full(x, 1.0), inner)


def _elu(op: unary.Elu, x: Value) -> Value:
    if dtype_of(x) == "float32":
        return vm.elu(x, op.alpha, op.scale, op.input_scale)
    x = bind(x)
    zero = full(x, 0.0)
    below = libm("expm1", tirx.Select(x > zero, zero, x) * full(x, op.input_scale)) * full(x, op.alpha)
    return tirx.Select(x > zero, x, below) * full(x, op.scale)


def plain(function: Callable[..., Value]) -> ScalarRule:
    """A rule that needs nothing of the op."""
    return lambda op, *values: function(*values)


SCALARS: dict[type[Op], Any] = {
    **QUANTIZED,
    unary.Relu: _relu,
    unary.Clamp: _clamp,
    unary.LeakyRelu: _leaky_relu,
    unary.Elu: _elu,
    unary.Silu: _silu,
    unary.Gelu: _gelu,
    unary.HardSwish: _hard_swish,
    unary.HardSigmoid: plain(_hard_sixth),
    unary.Sigmoid: _sigmoid,
    unary.Tanh: _function(vm.tanh, "tanh"),
    unary.Exp: _function(vm.exp, "exp"),
    unary.Log: _function(vm.log, "log"),
    unary.Sqrt: plain(tirx.sqrt),
    unary.Rsqrt: plain(lambda x: full(x, 1.0) / tirx.sqrt(x)),
    unary.Erf: _function(vm.erf, "erf"),
    unary.Sin: _function(vm.sin, "sin"),
    unary.Cos: _function(vm.cos, "cos"),
    unary.Abs: _abs,
    unary.Neg: _negate,
    unary.Floor: plain(tirx.floor),
    unary.Ceil: plain(tirx.ceil),
    unary.Round: plain(tirx.nearbyint),
    unary.Sign: _sign,
    unary.LogicalNot: plain(lambda x: _logic(lambda a: a ^ full(a, 1), x)),
    unary.Cast: _cast,
    binary.Add: plain(add),
    binary.Sub: plain(sub),
    binary.Mul: plain(mul),
    binary.Div: plain(div),
    binary.FloorDiv: _floor_div,
    binary.Remainder: _remainder,
    binary.Pow: _pow,
    binary.Maximum: plain(maximum),
    binary.Minimum: plain(minimum),
    binary.Equal: _compare(equal, True),
    binary.NotEqual: plain(not_equal),
    binary.Less: _compare(lambda x, y: x < y, False),
    binary.LessEqual: _compare(lambda x, y: x <= y, True),
    binary.Greater: _compare(lambda x, y: x > y, False),
    binary.GreaterEqual: _compare(lambda x, y: x >= y, True),
    binary.LogicalAnd: plain(lambda x, y: _logic(lambda a, b: a & b, x, y)),
    binary.LogicalOr: plain(lambda x, y: _logic(lambda a, b: a | b, x, y)),
    binary.Where: plain(tirx.Select),
}

_BY_LIBM = (
    *(unary.Elu, unary.Silu, unary.Gelu, unary.Sigmoid, unary.Tanh, unary.Exp, unary.Log, unary.Erf, unary.Sin, unary.Cos),
)


def takes_vectors(op: Op, dtype: str) -> bool:
    """Whether the rule works on vectors of that element type; else it calls the C library, one scalar at a time."""
    if isinstance(op, binary.FloorDiv | binary.Remainder):
        return "float" not in dtype
    return dtype != "float64" or not isinstance(op, _BY_LIBM)
