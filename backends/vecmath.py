"""Elementary functions as vectorisable code: what TVM itself would turn into one libm call for each lane.

All take and give float32 expressions, scalar or vector. The largest errors over dense sweeps are in tests/test_vecmath.py.
`bind` names a subexpression, because a TVM expression is a tree: using it twice writes it out twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tvm import tirx
from tvm.ir.expr import TensorLoad
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Lanes, Value, constant, is_vector

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
# The upper bits of ln 2, few enough that a product with an exponent is exact; the lower ones.
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
# Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
MAGIC = 12582912.0
MAGIC_BITS = int(np.float32(MAGIC).view(np.int32))


def lanes_in(value: Value) -> int:
    return value.ty.dtype.lanes if is_vector(value) else 1


def dtype_of(value: Value) -> str:
    """The element type of an expression."""
    name = str(value.ty.dtype)
    return name.rsplit("x", 1)[0] if is_vector(value) else name


def with_lanes(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def full(like: Value, value: float) -> Value:
    """A constant of the type of `like`, in all its lanes."""
    dtype = dtype_of(like)
    return constant(float(value) if "float" in dtype else int(value), dtype, lanes_in(like))


def cast(value: Value, dtype: str) -> Value:
    return value if dtype_of(value) == dtype else value.astype(with_lanes(dtype, lanes_in(value)))


def reinterpret(value: Value, dtype: str, lanes: int | None = None) -> Value:
    """The same bits as another type of the same width; with `lanes`, as so many of them."""
    return tirx.reinterpret(with_lanes(dtype, lanes_in(value) if lanes is None else lanes), value)


def part(vector: Value, number: int, lanes: int) -> Value:
    """So many neighbouring lanes of a vector."""
    return tirx.Shuffle([vector], [tirx.const(number * lanes + i, "int32") for i in range(lanes)])


def is_plain(value: Value) -> bool:
    """Constants and loads may be written out any number of times."""
    inner = value.value if isinstance(value, tirx.Broadcast) else value
    return isinstance(inner, tirx.FloatImm | tirx.IntImm | TensorLoad | tirx.Var)


def bind(value: Value) -> Value:
    """The value under a name, through a buffer that LLVM makes a register: TVM writes its own bindings out again."""
    if is_plain(value):
        return value
    lanes = lanes_in(value)
    register = T.alloc_buffer((lanes,), dtype_of(value), scope="global")
    where = Lanes(0, lanes).expand() if lanes > 1 else tirx.const(0, "int32")
    T.buffer_store(register, value, [where])
    return register[where]


def fma(x: Value, y: Value, z: Value) -> Value:
    """x * y + z, rounded once. Also the way to keep TVM from rearranging floats: it does not look into a call."""
    return T.fma(x, y, z)


def polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """Horner's scheme, highest power first; `x` is a name."""
    y = full(x, coefficients[0])
    for c in coefficients[1:]:
        y = fma(y, x, full(x, c))
    return y


def power_of_two(exponent: Value) -> Value:
    """2^n as float32 for int32 n in [-126, 127]."""
    return reinterpret((exponent + full(exponent, 127)) << full(exponent, 23), "float32")


def scale(x: Value, exponent: Value) -> Value:
    """x * 2^n for n in [-252, 254], rounded once where the result is denormal."""
    exponent = bind(exponent)
    half = bind(exponent >> full(exponent, 1))
    return x * power_of_two(half) * power_of_two(exponent - half)


def limit(x: Value, low: float, high: float) -> Value:
    """x within [low, high]; NaN stays."""
    x = bind(x)
    x = bind(tirx.Select(x < full(x, low), full(x, low), x))
    return tirx.Select(x > full(x, high), full(x, high), x)


def _reduce_exp(x: Value) -> tuple[Value, Value]:
    """(r, n) with e^x = e^r * 2^n, |r| <= ln(2) / 2 and n an int32."""
    shifted = bind(fma(x, full(x, LOG2_E), full(x, MAGIC)))
    n = bind(shifted - full(x, MAGIC))
    r = fma(n, full(x, -LN2_LOW), fma(n, full(x, -LN2_HIGH), x))
    bits = reinterpret(shifted, "int32")
    return bind(r), bits - full(bits, MAGIC_BITS)


def _exp_reduced(r: Value) -> Value:
    """e^r for |r| <= ln(2) / 2, by N. Juffa's minimax polynomial."""
    return bind(polynomial(r, (1.37805939e-3, 8.37312452e-3, 4.16695364e-2, 1.66664720e-1, 4.99999851e-1, 1.0, 1.0)))


def exp(x: Value) -> Value:
    r, n = _reduce_exp(bind(limit(x, -104.0, 89.0)))
    return scale(_exp_reduced(r), n)


def exp_negative(x: Value) -> Value:
    """e^x for x <= 0."""
    x = bind(x)
    r, n = _reduce_exp(bind(tirx.Select(x < full(x, -104.0), full(x, -104.0), x)))
    return scale(_exp_reduced(r), n)


def exp_moderate(x: Value) -> Value:
    """e^x for |x| <= 87."""
    r, n = _reduce_exp(bind(x))
    return _exp_reduced(r) * power_of_two(n)


def expm1(x: Value) -> Value:
    """e^x - 1 for x <= 80, precise also where it is small."""
    x = bind(limit(x, -40.0, 80.0))
    r, n = _reduce_exp(x)
    # Cephes' coefficients of (e^r - 1 - r) / r^2.
    tail = polynomial(r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
    y = bind(fma(tail, bind(r * r), r))
    unit = bind(power_of_two(n))
    return fma(y, unit, unit - full(x, 1.0))


def log(x: Value) -> Value:
    """N. Juffa's logf."""
    x = bind(x)
    tiny = bind(x < full(x, 1.175494351e-38))
    scaled = bind(tirx.Select(tiny, x * full(x, 8388608.0), x))
    bits = bind(reinterpret(scaled, "int32"))
    two_thirds = int(np.float32(0.666666667).view(np.int32))
    exponent = bind((bits - full(bits, two_thirds)) & full(bits, -(1 << 23)))
    m = bind(reinterpret(bits - exponent, "float32") - full(x, 1.0))
    shift = tirx.Select(tiny, full(x, -23.0), full(x, 0.0))
    i = fma(cast(exponent, "float32"), full(x, 2.0**-23), shift)
    s = bind(m * m)
    r = polynomial(s, (-0.130310059, -0.121483512, -0.166846126, -0.249996200))
    t = polynomial(s, (0.140869141, 0.139814854, 0.200120345))
    r = fma(fma(t, m, r), m, full(x, 0.333331972))
    r = fma(fma(r, m, full(x, -0.5)), s, m)
    y = bind(fma(i, full(x, LN2), r))
    edge = tirx.Select(tirx.EQ(x, full(x, 0.0)), full(x, -np.inf), tirx.Select(x < full(x, 0.0), full(x, np.nan), x))
    inside = tirx.And(x > full(x, 0.0), x < full(x, np.inf))
    return tirx.Select(inside, y, edge)


def erf(x: Value) -> Value:
    """N. Juffa's erff: two polynomials, the outer one in the exponent."""
    x = bind(x)
    # erf(4) is 1 in float32.
    a = bind(_at_most(tirx.abs(x), 4.0))
    s = bind(a * a)
    outer = polynomial(a, (-1.72853470e-5, 3.83197126e-4))
    outer = fma(outer, s, polynomial(a, (-3.88396438e-3, 2.42546219e-2)))
    for c in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        outer = fma(outer, a, full(x, c))
    outer = bind(full(x, 1.0) - exp_moderate(fma(outer, a, -a)))
    outer = tirx.Select(x < full(x, 0.0), -outer, outer)
    inner = polynomial(s, (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1))
    return tirx.Select(a > full(x, 0.921875), outer, fma(inner, x, x))


def _at_most(x: Value, high: float) -> Value:
    x = bind(x)
    return tirx.Select(x > full(x, high), full(x, high), x)


def tanh(x: Value) -> Value:
    """Cephes' tanhf: a polynomial near zero, else 1 - 2 / (e^2|x| + 1)."""
    x = bind(x)
    # tanh(10) is 1 in float32.
    a = bind(_at_most(tirx.abs(x), 10.0))
    s = bind(a * a)
    inner = polynomial(s, (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1))
    inner = fma(bind(inner * s), x, x)
    outer = bind(full(x, 1.0) - full(x, 2.0) / (exp_moderate(a + a) + full(x, 1.0)))
    outer = tirx.Select(x < full(x, 0.0), -outer, outer)
    return tirx.Select(a < full(x, 0.625), inner, outer)


def sigmoid(x: Value) -> Value:
    """From e^-|x|, which neither overflows nor loses the small side."""
    x = bind(x)
    e = bind(exp_negative(-tirx.abs(x)))
    return tirx.Select(x >= full(x, 0.0), full(x, 1.0), e) / (e + full(x, 1.0))


def silu(x: Value) -> Value:
    x = bind(x)
    return x * sigmoid(x)


# log2(erfc(a / sqrt 2) / 2) on [0, 13], by weighted least squares: an absolute error of 5e-8 in its power of two.
_LOG2_TAIL = (
    *(-4.591209634695725e-09, 2.1778369330149872e-07, -4.0983636608871166e-06, 3.810211637755856e-05),
    *(-0.00015839820844121277, -0.00022275467927102, 0.007181735243648291, -0.052575964480638504),
    *(-0.4591835141181946, -1.1511080265045166, -0.9999999403953552),
)
# 2^r on [-1/2, 1/2], at Chebyshev's points.
_EXP2 = (
    0.00015469732170458883,
    0.0013400432653725147,
    0.00961802527308464,
    0.05550327152013779,
    0.24022650718688965,
    0.6931471824645996,
    1.0,
)


def gelu(x: Value) -> Value:
    """max(x, 0) - |x| * tail, where tail is the normal distribution's beyond |x|: no cancellation, one exponential."""
    x = bind(x)
    zero = full(x, 0.0)
    # Beyond 14 the tail is zero in float32.
    a = bind(_at_most(tirx.abs(x), 14.0))
    exponent = bind(polynomial(a, _LOG2_TAIL))
    shifted = bind(fma(exponent, full(x, 1.0), full(x, MAGIC)))
    r = bind(exponent - (shifted - full(x, MAGIC)))
    bits = reinterpret(shifted, "int32")
    tail = bind(polynomial(r, _EXP2) * power_of_two(bits - full(bits, MAGIC_BITS)))
    tail = tirx.Select(exponent < full(x, -125.0), zero, tail)
    # |x| for negative x, so that -inf gives NaN as its definition does; at most 14 for positive x, so that inf stays.
    size = tirx.Select(-x > a, x, -a)
    return fma(size, tail, tirx.Select(x < zero, zero, x))


def gelu_tanh(x: Value) -> Value:
    """(1 + tanh(u)) / 2 is sigmoid(2 u), which does not cancel."""
    x = bind(x)
    s = bind(x * x)
    twice = 2 * 0.7978845608028654
    u = x * fma(s, full(x, twice * 0.044715), full(x, twice))
    return x * sigmoid(u)


def elu(x: Value, alpha: float, scale_by: float, input_scale: float) -> Value:
    x = bind(x)
    zero = full(x, 0.0)
    below = expm1(tirx.Select(x > zero, zero, x) * full(x, input_scale))
    return tirx.Select(x > zero, x * full(x, scale_by), below * full(x, alpha * scale_by))


def sin(x: Value) -> Value:
    return _circular(x, 0, tirx.sin)


def cos(x: Value) -> Value:
    return _circular(x, 1, tirx.cos)


# Up to here the remainder of a division by pi / 2 in three parts is precise enough.
_FAR = 30_000.0


def _circular(x: Value, quarter: int, precise: Callable[[Value], Value]) -> Value:
    """N. Juffa's sinf, turned by so many quarters; the C library, one lane at a time, where a lane is far from zero."""
    x = bind(x)
    lanes = lanes_in(x)
    register, where = T.alloc_buffer((lanes,), "float32", scope="global"), Lanes(0, lanes).expand()
    furthest = bind(tirx.abs(x))
    while lanes > 1:
        lanes //= 2
        low, high = (bind(part(furthest, half, lanes)) for half in range(2))
        # A comparison with NaN is false: without the second test a NaN would hide a larger lane.
        furthest = bind(tirx.Select(tirx.Or(low > high, tirx.isnan(high)), low, high))
    with T.If(cast(furthest, "float32") < tirx.const(_FAR, "float32")):
        with T.Then():
            T.buffer_store(register, _circular_near(x, quarter), [where])
        with T.Else():
            T.buffer_store(register, precise(x), [where])
    return register[where]


def _circular_near(x: Value, quarter: int) -> Value:
    shifted = bind(fma(x, full(x, 0.6366197723675814), full(x, MAGIC)))
    j = bind(shifted - full(x, MAGIC))
    r = x
    for part in (1.57079601, 3.13916473e-07, 5.39030253e-15):
        r = fma(j, full(x, -part), r)
    r = bind(r)
    s = bind(r * r)
    sine = polynomial(s, (2.86567956e-6, -1.98559923e-4, 8.33338592e-3, -1.66666672e-1))
    sine = fma(sine, bind(r * s), r)
    cosine = polynomial(s, (2.44677067e-5, -1.38877297e-3, 4.16666567e-2, -5.0e-1, 1.0))
    bits = reinterpret(shifted, "int32")
    turn = bind(bits + full(bits, quarter))
    odd = tirx.NE(turn & full(bits, 1), full(bits, 0))
    y = bind(tirx.Select(odd, cosine, sine))
    return tirx.Select(tirx.NE(turn & full(bits, 2), full(bits, 0)), -y, y)
