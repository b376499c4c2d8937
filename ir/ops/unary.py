"""Elementwise operators of one operand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.types import DTYPES, TensorType

NUMBERS = ("float", "int", "uint")


def _erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def error_through(slope: Array, bound: Array) -> Array:
    """|slope| * bound, where a slope of 0 passes no error on, not even an infinite one, and no error is made of none."""
    with np.errstate(invalid="ignore"):
        return np.where((slope == 0) | (bound == 0), 0.0, np.abs(slope) * bound)


@dataclass(frozen=True)
class Unary(Op):
    """y = f(x) per element; `slope` is |f'| or a bound of it, used by the magnitude."""

    kinds: ClassVar[tuple[str, ...]] = ("float",)
    sample_range: ClassVar[tuple[float, float]] = (-3.0, 3.0)

    def infer(self, *types: TensorType) -> TensorType:
        kind = DTYPES[types[0].dtype].kind
        require(kind in self.kinds, f"does not apply to {types[0].dtype}", why=f"takes {', '.join(self.kinds)}")
        return types[0]

    def ref(self, *arrays: Array) -> Array:
        with np.errstate(all="ignore"):
            return self.f(wide(arrays[0]))

    def f(self, x: Array) -> Array:
        raise NotImplementedError(self.name)

    def slope(self, x: Array, y: Array) -> Array:
        return np.ones_like(x)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        with np.errstate(all="ignore"):
            slope = self.slope(wide(values[0]), wide(result))
        return np.maximum(np.abs(result), error_through(slope, bounds[0]))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        dtypes = [d for d in ("float32", "int32", "bool") if DTYPES[d].kind in cls.kinds]
        return [(cls(), (TensorType(d, s),)) for d in dtypes for s in ((2, 3, 5), (), (1,), (2, 0, 3))]


class Relu(Unary):
    name = "relu"
    kinds = NUMBERS

    def f(self, x: Array) -> Array:
        return np.where(x < 0, np.zeros_like(x), x)

    def slope(self, x: Array, y: Array) -> Array:
        return (x > 0).astype(float)


@dataclass(frozen=True)
class Clamp(Unary):
    """min(max(x, low), high), NaN kept; an absent side is infinite."""

    name = "clamp"
    kinds = NUMBERS
    low: float = -math.inf
    high: float = math.inf

    def infer(self, *types: TensorType) -> TensorType:
        require(
            self.low < math.inf and self.high > -math.inf,
            "low is infinity, high minus infinity, or one is NaN",
            why=f"{self.low} to {self.high}",
        )
        return super().infer(*types)

    def f(self, x: Array) -> Array:
        y = np.where(x < self.low, np.full_like(x, self.low) if math.isfinite(self.low) else x, x)
        return np.where(y > self.high, np.full_like(x, self.high) if math.isfinite(self.high) else y, y)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        x = TensorType("float32", (3, 4))
        return [(cls(0.0, 6.0), (x,)), (cls(-1.0, 1.0), (x,)), (cls(low=0.5), (x,)), (cls(0.0, 2.0), (x.with_dtype("int32"),))]


@dataclass(frozen=True)
class LeakyRelu(Unary):
    name = "leaky_relu"
    alpha: float = 0.01

    def f(self, x: Array) -> Array:
        return np.where(x < 0, self.alpha * x, x)

    def slope(self, x: Array, y: Array) -> Array:
        return np.where(x < 0, abs(self.alpha), 1.0)


@dataclass(frozen=True)
class Elu(Unary):
    """x for x > 0, else alpha * (exp(x * input_scale) - 1); both sides times scale (selu is one setting)."""

    name = "elu"
    alpha: float = 1.0
    scale: float = 1.0
    input_scale: float = 1.0

    def f(self, x: Array) -> Array:
        return self.scale * np.where(x > 0, x, self.alpha * np.expm1(np.minimum(x, 0) * self.input_scale))

    def slope(self, x: Array, y: Array) -> Array:
        left = self.alpha * self.input_scale * np.exp(np.minimum(x, 0) * self.input_scale)
        return abs(self.scale) * np.where(x > 0, 1.0, np.abs(left))

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        # exp and the subtraction of 1 are rounded at the size of 1, not of their difference.
        return np.maximum(super().magnitude(result, values, bounds), np.where(values[0] > 0, 0.0, abs(self.scale * self.alpha)))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        x = TensorType("float32", (3, 4))
        return [(cls(), (x,)), (cls(1.6732632423543772, 1.0507009873554805), (x,)), (cls(0.5, 1.0, 2.0), (x,))]


class Silu(Unary):
    name = "silu"

    def f(self, x: Array) -> Array:
        return x * _sigmoid(x)

    def slope(self, x: Array, y: Array) -> Array:
        return np.full_like(x, 1.1)


@dataclass(frozen=True)
class Gelu(Unary):
    """x * Phi(x), exactly by erf, or by the tanh approximation (Hendrycks and Gimpel 2016)."""

    name = "gelu"
    approximate: bool = False

    def f(self, x: Array) -> Array:
        if self.approximate:
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))

    def slope(self, x: Array, y: Array) -> Array:
        return np.full_like(x, 1.2)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        # 1 + erf cancels for negative x: its rounding error is at the size of 1, so the product's is at that of x.
        return np.maximum(np.abs(values[0]).astype(np.float64), 1.2 * bounds[0])

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        x = TensorType("float32", (3, 4))
        return [(cls(), (x,)), (cls(True), (x,))]


class HardSwish(Unary):
    name = "hardswish"

    def f(self, x: Array) -> Array:
        return x * np.clip(x + 3, 0, 6) / 6

    def slope(self, x: Array, y: Array) -> Array:
        return np.full_like(x, 1.5)


class HardSigmoid(Unary):
    name = "hardsigmoid"

    def f(self, x: Array) -> Array:
        return np.clip(x + 3, 0, 6) / 6


class Sigmoid(Unary):
    name = "sigmoid"

    def f(self, x: Array) -> Array:
        return _sigmoid(x)

    def slope(self, x: Array, y: Array) -> Array:
        return y * (1 - y)


class Tanh(Unary):
    name = "tanh"

    def f(self, x: Array) -> Array:
        return np.tanh(x)

    def slope(self, x: Array, y: Array) -> Array:
        return 1 - y * y


class Exp(Unary):
    name = "exp"

    def f(self, x: Array) -> Array:
        return np.exp(x)

    def slope(self, x: Array, y: Array) -> Array:
        return y


class Log(Unary):
    name = "log"
    sample_range = (0.1, 5.0)

    def f(self, x: Array) -> Array:
        return np.log(x)

    def slope(self, x: Array, y: Array) -> Array:
        return 1 / x


class Sqrt(Unary):
    name = "sqrt"
    sample_range = (0.0, 5.0)

    def f(self, x: Array) -> Array:
        return np.sqrt(x)

    def slope(self, x: Array, y: Array) -> Array:
        return 0.5 / y


class Rsqrt(Unary):
    name = "rsqrt"
    sample_range = (0.1, 5.0)

    def f(self, x: Array) -> Array:
        return 1 / np.sqrt(x)

    def slope(self, x: Array, y: Array) -> Array:
        return 0.5 * y / x


class Erf(Unary):
    name = "erf"

    def f(self, x: Array) -> Array:
        return _erf(x)

    def slope(self, x: Array, y: Array) -> Array:
        return 2 / math.sqrt(math.pi) * np.exp(-x * x)


class Sin(Unary):
    name = "sin"

    def f(self, x: Array) -> Array:
        return np.sin(x)


class Cos(Unary):
    name = "cos"

    def f(self, x: Array) -> Array:
        return np.cos(x)


class Abs(Unary):
    name = "abs"
    kinds = NUMBERS

    def f(self, x: Array) -> Array:
        return np.abs(x)


class Neg(Unary):
    name = "neg"
    kinds = NUMBERS

    def f(self, x: Array) -> Array:
        return -x


class _Step(Unary):
    """Piecewise constant: an error passes only across a jump, which no bound can promise away."""

    def slope(self, x: Array, y: Array) -> Array:
        return np.zeros_like(x)


class Floor(_Step):
    name = "floor"

    def f(self, x: Array) -> Array:
        return np.floor(x)


class Ceil(_Step):
    name = "ceil"

    def f(self, x: Array) -> Array:
        return np.ceil(x)


class Round(_Step):
    """To the nearest integer, half to even."""

    name = "round"

    def f(self, x: Array) -> Array:
        return np.rint(x)


class Sign(_Step):
    """-1, 0 or 1; 0 for NaN, as torch has it."""

    name = "sign"
    kinds = NUMBERS

    def f(self, x: Array) -> Array:
        return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


class LogicalNot(_Step):
    name = "logical_not"
    kinds = ("bool",)

    def f(self, x: Array) -> Array:
        return np.logical_not(x)


@dataclass(frozen=True)
class Cast(Op):
    """To another dtype: float to int truncates towards zero, anything to bool is `!= 0`."""

    name = "cast"
    dtype: str

    def infer(self, *types: TensorType) -> TensorType:
        return types[0].with_dtype(self.dtype)

    def ref(self, *arrays: Array) -> Array:
        if self.dtype == "bool":
            return arrays[0] != 0
        with np.errstate(all="ignore"):
            return arrays[0].astype(self.dtype) if DTYPES[self.dtype].kind != "float" else wide(arrays[0])

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.maximum(np.abs(result), bounds[0])

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        pairs = (("float32", "int32"), ("int64", "float32"), ("bool", "float32"), ("float32", "bool"), ("int32", "int64"))
        return [(cls(to), (TensorType(src, (2, 3)),)) for src, to in pairs]
