"""Elementwise aten operators. Those that are one IR operator are rows; those that are composed are short functions."""

from __future__ import annotations

import math
from functools import partial

from paring.frontends.aten_builder import Builder, Operand, Table, Unsupported, promote
from paring.ir import Node, Op
from paring.ir.ops import binary as bi
from paring.ir.ops import unary as un

ADD, SUB, MUL, DIV = bi.Add(), bi.Sub(), bi.Mul(), bi.Div()

UNARY: dict[str, Op] = {
    "relu": un.Relu(),
    "relu6": un.Clamp(0.0, 6.0),
    "silu": un.Silu(),
    "hardswish": un.HardSwish(),
    "hardsigmoid": un.HardSigmoid(),
    "selu": un.Elu(1.6732632423543772, 1.0507009873554805),
    "sigmoid": un.Sigmoid(),
    "tanh": un.Tanh(),
    "exp": un.Exp(),
    "log": un.Log(),
    "sqrt": un.Sqrt(),
    "rsqrt": un.Rsqrt(),
    "erf": un.Erf(),
    "sin": un.Sin(),
    "cos": un.Cos(),
    "abs": un.Abs(),
    "neg": un.Neg(),
    "floor": un.Floor(),
    "ceil": un.Ceil(),
    "round": un.Round(),
    "sign": un.Sign(),
    "sgn": un.Sign(),
}
BINARY: dict[str, Op] = {
    "mul.Tensor": MUL,
    "mul.Scalar": MUL,
    "remainder.Tensor": bi.Remainder(),
    "remainder.Scalar": bi.Remainder(),
    "remainder.Scalar_Tensor": bi.Remainder(),
    "floor_divide.default": bi.FloorDiv(),
    "floor_divide.Scalar": bi.FloorDiv(),
    "maximum.default": bi.Maximum(),
    "minimum.default": bi.Minimum(),
    "max.other": bi.Maximum(),
    "min.other": bi.Minimum(),
}
COMPARE: dict[str, Op] = {
    "eq": bi.Equal(),
    "ne": bi.NotEqual(),
    "lt": bi.Less(),
    "le": bi.LessEqual(),
    "gt": bi.Greater(),
    "ge": bi.GreaterEqual(),
}
LOGICAL: dict[str, Op] = {
    "logical_and.default": bi.LogicalAnd(),
    "logical_or.default": bi.LogicalOr(),
    "logical_xor.default": bi.NotEqual(),
}
BITWISE: dict[str, Op] = {
    f"{name}.{overload}": op
    for names, op in (
        (("bitwise_and", "__and__"), bi.LogicalAnd()),
        (("bitwise_or", "__or__"), bi.LogicalOr()),
        (("bitwise_xor", "__xor__"), bi.NotEqual()),
    )
    for name in names
    for overload in ("Tensor", "Scalar")
}
ON_BOOL: dict[type[Op], Op] = {
    bi.Add: bi.LogicalOr(),
    bi.Mul: bi.LogicalAnd(),
    bi.Maximum: bi.LogicalOr(),
    bi.Minimum: bi.LogicalAnd(),
}


def unary(op: Op, b: Builder, x: Node, *_: object) -> Node:
    """One IR operator; integers are promoted as torch does, and need no rounding."""
    if not b.type.is_float and isinstance(op, un.Floor | un.Ceil | un.Round):
        return x
    if b.type.dtype == "bool":
        raise Unsupported("not on bool")
    return b.node(op, b.cast(x, b.type.dtype))


def binary(op: Op, b: Builder, x: Operand, y: Operand) -> Node:
    """One IR operator on promoted, broadcast operands."""
    dtype = promote(x, y)
    if dtype == "bool":
        if type(op) not in ON_BOOL:
            raise Unsupported("not on bool")
        op = ON_BOOL[type(op)]
    return b.apply(op, x, y, dtype=dtype)


def compare(op: Op, b: Builder, x: Operand, y: Operand) -> Node:
    dtype = promote(x, y)
    ordered = not isinstance(op, bi.Equal | bi.NotEqual)
    return b.apply(op, x, y, dtype="int32" if dtype == "bool" and ordered else dtype)


def logical(op: Op, b: Builder, x: Operand, y: Operand) -> Node:
    return b.apply(op, x, y, dtype="bool")


def bitwise(op: Op, b: Builder, x: Operand, y: Operand) -> Node:
    if b.type.dtype != "bool":
        raise Unsupported("bitwise operators are supported on bool only")
    return logical(op, b, x, y)


def bitwise_not(b: Builder, x: Node) -> Node:
    if x.type.dtype == "bool":
        return b.node(un.LogicalNot(), x)
    # Two's complement: ~x is -x - 1 in signed integers of any width.
    return b.apply(SUB, b.node(un.Neg(), x), 1, dtype=x.type.dtype)


def _scaled(b: Builder, x: Operand, factor: Operand, dtype: str) -> Operand:
    if not isinstance(factor, Node) and factor == 1:
        return x
    return b.apply(ON_BOOL[bi.Mul] if dtype == "bool" else MUL, x, factor, dtype=dtype)


def add(b: Builder, x: Operand, y: Operand, alpha: Operand = 1) -> Node:
    return binary(ADD, b, x, _scaled(b, y, alpha, promote(x, y)))


def sub(b: Builder, x: Operand, y: Operand, alpha: Operand = 1) -> Node:
    return binary(SUB, b, x, _scaled(b, y, alpha, promote(x, y)))


def rsub(b: Builder, x: Operand, y: Operand, alpha: Operand = 1) -> Node:
    return sub(b, y, x, alpha)


def div(b: Builder, x: Operand, y: Operand) -> Node:
    return b.apply(DIV, x, y, dtype=b.type.dtype)


def div_mode(b: Builder, x: Operand, y: Operand, mode: str | None = None) -> Node:
    if mode is None:
        return div(b, x, y)
    if mode == "floor":
        return binary(bi.FloorDiv(), b, x, y)
    if b.type.is_float:
        return trunc(b, div(b, x, y))
    # Towards zero: the quotient of the magnitudes, with the sign of the product.
    left, right = b.together(x, y)
    quotient = b.node(bi.FloorDiv(), b.node(un.Abs(), left), b.node(un.Abs(), right))
    return b.node(MUL, quotient, b.node(MUL, b.node(un.Sign(), left), b.node(un.Sign(), right)))


def fmod(b: Builder, x: Operand, y: Operand) -> Node:
    """The remainder with the sign of the dividend."""
    left, right = b.together(x, y)
    size = b.node(bi.Remainder(), b.node(un.Abs(), left), b.node(un.Abs(), right))
    return b.where(b.apply(bi.Less(), left, 0, dtype=left.type.dtype), b.node(un.Neg(), size), size)


def trunc(b: Builder, x: Node) -> Node:
    if not x.type.is_float:
        return x
    return b.where(b.apply(bi.Less(), x, 0.0), b.node(un.Ceil(), x), b.node(un.Floor(), x))


def round_decimals(b: Builder, x: Node, decimals: int) -> Node:
    """Scaled by a power of ten, rounded half to even, scaled back, as torch does."""
    ten = 10.0 ** abs(decimals)
    up, down = (MUL, DIV) if decimals >= 0 else (DIV, MUL)
    return b.apply(down, b.node(un.Round(), b.apply(up, x, ten)), ten)


def power(b: Builder, x: Operand, y: Operand) -> Node:
    """Small whole exponents become products and roots become roots, as in torch's own kernels."""
    dtype = b.type.dtype
    if not isinstance(y, Node) and isinstance(x, Node):
        base = b.cast(x, dtype)
        if y in (2, 3):
            square = b.node(MUL, base, base)
            return square if y == 2 else b.node(MUL, square, base)
        if y == 1:
            return base
        if b.type.is_float and y == 0.5:
            return b.node(un.Sqrt(), base)
        if b.type.is_float and y == -0.5:
            return b.node(un.Rsqrt(), base)
        if b.type.is_float and y in (-1, -2):
            return b.apply(DIV, 1.0, base if y == -1 else b.node(MUL, base, base))
        if not b.type.is_float and isinstance(y, int) and y >= 0:
            return _whole_power(b, base, y)
    if not b.type.is_float:
        raise Unsupported("integer powers are supported for constant exponents only")
    return b.apply(bi.Pow(), x, y, dtype=dtype)


def square(b: Builder, x: Node) -> Node:
    return power(b, x, 2)


def _whole_power(b: Builder, base: Node, exponent: int) -> Node:
    result = b.full(base.type.shape, 1, base.type.dtype)
    while exponent:
        if exponent & 1:
            result = b.node(MUL, result, base)
        base = b.node(MUL, base, base)
        exponent >>= 1
    return result


def clamp(b: Builder, x: Node, low: Operand | None = None, high: Operand | None = None) -> Node:
    x = b.cast(x, b.type.dtype)
    if not isinstance(low, Node) and not isinstance(high, Node):
        sides = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
        # Bounds are floats in the IR: beyond 2^53 they would not be the integers that were asked for.
        if x.type.is_float or all(abs(s) < 2**53 or math.isinf(s) for s in sides):
            return b.node(un.Clamp(*sides), x)
    if low is not None:
        x = b.apply(bi.Maximum(), x, low, dtype=x.type.dtype)
    return x if high is None else b.apply(bi.Minimum(), x, high, dtype=x.type.dtype)


def clamp_max(b: Builder, x: Node, high: Operand) -> Node:
    return clamp(b, x, None, high)


def threshold(b: Builder, x: Node, limit: float, value: float) -> Node:
    return b.where(b.apply(bi.LessEqual(), x, limit, dtype=x.type.dtype), value, x, dtype=x.type.dtype)


def log1p(b: Builder, x: Node) -> Node:
    """Kahan's: log(1 + x) corrected by what adding 1 lost; exact to a few ulps near 0 too."""
    x = b.cast(x, b.type.dtype)
    above = b.apply(ADD, x, 1.0)
    lost = b.apply(SUB, above, 1.0)
    # The quotient is near 1: the product of x and its logarithm might overflow.
    corrected = b.node(MUL, b.node(DIV, x, lost), b.node(un.Log(), above))
    plain = b.apply(bi.LogicalOr(), b.apply(bi.Equal(), lost, 0.0), b.apply(bi.Equal(), x, math.inf))
    return b.where(plain, x, corrected)


def expm1(b: Builder, x: Node) -> Node:
    """elu is exp(x) - 1 to the left of 0; to its right exp(x) - 1 is -elu(-x) * exp(x)."""
    x = b.cast(x, b.type.dtype)
    right = b.node(MUL, b.node(un.Neg(), b.node(un.Elu(), b.node(un.Neg(), x))), b.node(un.Exp(), x))
    return b.where(b.apply(bi.Greater(), x, 0.0), right, b.node(un.Elu(), x))


def softplus(b: Builder, x: Node, beta: float = 1.0, limit: float = 20.0) -> Node:
    """log(1 + exp(beta x)) / beta, written as max(x, 0) + log1p(exp(-|beta x|)) / beta; x itself beyond the limit."""
    y = b.apply(MUL, x, beta) if beta != 1 else x
    tail = log1p(b, b.node(un.Exp(), b.node(un.Neg(), b.node(un.Abs(), y))))
    smooth = b.node(ADD, b.node(un.Relu(), y), tail)
    smooth = b.apply(DIV, smooth, beta) if beta != 1 else smooth
    return b.where(b.apply(bi.Greater(), y, limit), x, smooth)


def mish(b: Builder, x: Node) -> Node:
    return b.node(MUL, x, b.node(un.Tanh(), softplus(b, x)))


def log_sigmoid(b: Builder, x: Node) -> Node:
    return b.node(un.Neg(), softplus(b, b.node(un.Neg(), x), limit=math.inf))


def elu(b: Builder, x: Node, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Node:
    return b.node(un.Elu(float(alpha), float(scale), float(input_scale)), x)


def celu(b: Builder, x: Node, alpha: float = 1.0) -> Node:
    return b.node(un.Elu(float(alpha), 1.0, 1.0 / alpha), x)


def prelu(b: Builder, x: Node, weight: Node) -> Node:
    if x.type.rank > 1 and weight.type.size > 1:
        weight = b.reshape(weight, (weight.type.size, *(1,) * (x.type.rank - 2)))
    return b.where(b.apply(bi.Greater(), x, 0.0), x, b.apply(MUL, weight, x))


def glu(b: Builder, x: Node, axis: int = -1) -> Node:
    half = x.type.shape[axis] // 2
    return b.node(MUL, b.slice(x, axis, 0, half), b.node(un.Sigmoid(), b.slice(x, axis, half, 2 * half)))


def addcmul(op: Op, b: Builder, x: Node, y: Node, z: Node, value: Operand = 1) -> Node:
    dtype = b.type.dtype
    product = b.apply(op, y, z, dtype=dtype)
    return b.apply(ADD, x, _scaled(b, product, value, dtype), dtype=dtype)


def lerp(b: Builder, x: Node, y: Node, weight: Operand) -> Node:
    """x + w (y - x) for |w| < 1/2, else y - (y - x)(1 - w): exact at both ends, as torch computes it."""
    x, y, w = b.together(x, y, weight, dtype=b.type.dtype)
    gap = b.node(SUB, y, x)
    near = b.node(ADD, x, b.node(MUL, w, gap))
    far = b.node(SUB, y, b.node(MUL, gap, b.apply(SUB, 1.0, w)))
    return b.where(b.apply(bi.Less(), b.node(un.Abs(), w), 0.5), near, far)


def scaled_by(factor: float, op: Op, b: Builder, x: Node) -> Node:
    """op(x) times a constant: logarithms to another base."""
    return b.apply(MUL, b.node(op, b.cast(x, b.type.dtype)), factor)


def exp2(b: Builder, x: Node) -> Node:
    return b.apply(bi.Pow(), 2.0, x, dtype=b.type.dtype)


def reciprocal(b: Builder, x: Node) -> Node:
    return b.apply(DIV, 1.0, x, dtype=b.type.dtype)


def tan(b: Builder, x: Node) -> Node:
    x = b.cast(x, b.type.dtype)
    return b.node(DIV, b.node(un.Sin(), x), b.node(un.Cos(), x))


def erfc(b: Builder, x: Node) -> Node:
    return b.apply(SUB, 1.0, b.node(un.Erf(), b.cast(x, b.type.dtype)))


def cosh(b: Builder, x: Node) -> Node:
    up, down = (b.node(un.Exp(), n) for n in (x, b.node(un.Neg(), x)))
    return b.apply(MUL, b.node(ADD, up, down), 0.5)


def sinh(b: Builder, x: Node) -> Node:
    """(exp(|x|) - 1 - (exp(-|x|) - 1)) / 2 with the sign of x, so that nothing cancels near 0."""
    size = b.node(un.Abs(), x)
    half = b.apply(MUL, b.node(SUB, expm1(b, size), b.node(un.Elu(), b.node(un.Neg(), size))), 0.5)
    return b.where(b.apply(bi.Less(), x, 0.0), b.node(un.Neg(), half), half)


def fmax(op: Op, b: Builder, x: Operand, y: Operand) -> Node:
    """The greater (or lesser) one, where a NaN loses against a number."""
    left, right = b.together(x, y)
    best = b.where(isnan(b, left), right, b.node(op, left, right))
    return b.where(isnan(b, right), left, best)


def isnan(b: Builder, x: Node) -> Node:
    return b.node(bi.NotEqual(), x, x)


def isinf(b: Builder, x: Node) -> Node:
    return b.apply(bi.Equal(), b.node(un.Abs(), x), math.inf) if x.type.is_float else b.full(x.type.shape, False, "bool")


def gelu(b: Builder, x: Node, approximate: str = "none") -> Node:
    return b.node(un.Gelu(approximate == "tanh"), x)


def leaky_relu(b: Builder, x: Node, slope: float = 0.01) -> Node:
    return b.node(un.LeakyRelu(float(slope)), x)


def logical_not(b: Builder, x: Node) -> Node:
    return b.node(un.LogicalNot(), b.cast(x, "bool"))


def where(b: Builder, condition: Node, x: Operand, y: Operand) -> Node:
    return b.where(condition, x, y)


def masked_fill(b: Builder, x: Node, mask: Node, value: Operand) -> Node:
    return b.where(mask, value, x, dtype=x.type.dtype)


TABLE: Table = {
    **{f"aten.{name}.default": partial(unary, op) for name, op in UNARY.items()},
    **{f"aten.{name}": partial(binary, op) for name, op in BINARY.items()},
    **{f"aten.{name}.{overload}": partial(compare, op) for name, op in COMPARE.items() for overload in ("Tensor", "Scalar")},
    **{f"aten.{name}": partial(logical, op) for name, op in LOGICAL.items()},
    **{f"aten.{name}": partial(bitwise, op) for name, op in BITWISE.items()},
    **{f"aten.add.{overload}": add for overload in ("Tensor", "Scalar")},
    **{f"aten.sub.{overload}": sub for overload in ("Tensor", "Scalar")},
    **{f"aten.rsub.{overload}": rsub for overload in ("Tensor", "Scalar")},
    **{f"aten.div.{overload}": div for overload in ("Tensor", "Scalar")},
    **{f"aten.div.{overload}": div_mode for overload in ("Tensor_mode", "Scalar_mode")},
    **{f"aten.fmod.{overload}": fmod for overload in ("Tensor", "Scalar")},
    **{f"aten.pow.{overload}": power for overload in ("Tensor_Tensor", "Tensor_Scalar", "Scalar")},
    **{f"aten.{name}.{overload}": clamp for name in ("clamp", "clamp_min") for overload in ("default", "Tensor")},
    **{f"aten.clamp_max.{overload}": clamp_max for overload in ("default", "Tensor")},
    **{f"aten.where.{overload}": where for overload in ("self", "ScalarSelf", "ScalarOther", "Scalar")},
    **{f"aten.masked_fill.{overload}": masked_fill for overload in ("Scalar", "Tensor")},
    **{f"aten.lerp.{overload}": lerp for overload in ("Scalar", "Tensor")},
    "aten.addcmul.default": partial(addcmul, MUL),
    "aten.addcdiv.default": partial(addcmul, DIV),
    "aten.bitwise_not.default": bitwise_not,
    "aten.logical_not.default": logical_not,
    "aten.trunc.default": trunc,
    "aten.fix.default": trunc,
    "aten.round.decimals": round_decimals,
    "aten.hardtanh.default": clamp,
    "aten.threshold.default": threshold,
    "aten.log1p.default": log1p,
    "aten.expm1.default": expm1,
    "aten.softplus.default": softplus,
    "aten.mish.default": mish,
    "aten.log_sigmoid.default": log_sigmoid,
    "aten.elu.default": elu,
    "aten.celu.default": celu,
    "aten.gelu.default": gelu,
    "aten.leaky_relu.default": leaky_relu,
    "aten.prelu.default": prelu,
    "aten._prelu_kernel.default": prelu,
    "aten.glu.default": glu,
    "aten.square.default": square,
    "aten.reciprocal.default": reciprocal,
    "aten.exp2.default": exp2,
    "aten.log2.default": partial(scaled_by, 1 / math.log(2), un.Log()),
    "aten.log10.default": partial(scaled_by, 1 / math.log(10), un.Log()),
    "aten.tan.default": tan,
    "aten.erfc.default": erfc,
    "aten.cosh.default": cosh,
    "aten.sinh.default": sinh,
    "aten.fmax.default": partial(fmax, bi.Maximum()),
    "aten.fmin.default": partial(fmax, bi.Minimum()),
    "aten.isnan.default": isnan,
    "aten.isinf.default": isinf,
}
