"""Elementwise operators of two and three operands. Shapes are equal: broadcasting is explicit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.ops.unary import NUMBERS, error_through
from paring.ir.types import DTYPES, TensorType


@dataclass(frozen=True)
class Binary(Op):
    """z = f(x, y) per element of two tensors of one type."""

    arity = (2, 2)
    kinds: ClassVar[tuple[str, ...]] = NUMBERS
    result: ClassVar[str | None] = None
    sample_range: ClassVar[tuple[float, float]] = (-3.0, 3.0)

    def infer(self, *types: TensorType) -> TensorType:
        x, y = types
        require(x == y, "operands differ in type", why=f"{x} against {y}", hint="broadcast or cast explicitly")
        kind = DTYPES[x.dtype].kind
        require(kind in self.kinds, f"does not apply to {x.dtype}", why=f"takes {', '.join(self.kinds)}")
        return x.with_dtype(self.result) if self.result else x

    def ref(self, *arrays: Array) -> Array:
        with np.errstate(all="ignore"):
            return self.f(wide(arrays[0]), wide(arrays[1]))

    def f(self, x: Array, y: Array) -> Array:
        raise NotImplementedError(self.name)

    def slopes(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        return np.ones_like(x), np.ones_like(y)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        with np.errstate(all="ignore"):
            dx, dy = self.slopes(wide(values[0]), wide(values[1]), wide(result))
        return np.maximum(np.abs(result), error_through(dx, bounds[0]) + error_through(dy, bounds[1]))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        dtypes = [d for d in ("float32", "int32", "int64", "bool") if DTYPES[d].kind in cls.kinds]
        types = [TensorType(d, s) for d in dtypes for s in ((2, 3, 5), (), (1,))]
        return [(cls(), (t, t)) for t in types]


class Add(Binary):
    name = "add"

    def f(self, x: Array, y: Array) -> Array:
        return x + y


class Sub(Binary):
    name = "sub"

    def f(self, x: Array, y: Array) -> Array:
        return x - y


class Mul(Binary):
    name = "mul"

    def f(self, x: Array, y: Array) -> Array:
        return x * y

    def slopes(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        return y, x


class Div(Binary):
    """True division, floats only."""

    name = "div"
    kinds = ("float",)
    sample_range = (0.5, 3.0)

    def f(self, x: Array, y: Array) -> Array:
        return x / y

    def slopes(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        return 1 / y, z / y


class FloorDiv(Binary):
    """Rounded towards minus infinity."""

    name = "floor_div"
    sample_range = (1.0, 9.0)

    def f(self, x: Array, y: Array) -> Array:
        return np.floor_divide(x, y)

    def slopes(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        return np.zeros_like(x), np.zeros_like(y)


class Remainder(Binary):
    """x - floor(x / y) * y: the sign of the divisor."""

    name = "remainder"
    sample_range = (1.0, 9.0)

    def f(self, x: Array, y: Array) -> Array:
        return np.remainder(x, y)

    def slopes(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        return np.ones_like(x), np.abs(np.floor(x / y))


class Pow(Binary):
    name = "pow"
    kinds = ("float",)
    sample_range = (0.5, 3.0)

    def f(self, x: Array, y: Array) -> Array:
        return np.power(x, y)

    def slopes(self, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
        return y * np.power(x, y - 1), np.where(z == 0, 0.0, z * np.log(np.abs(x)))


class Maximum(Binary):
    """The greater one; NaN where either is NaN."""

    name = "maximum"

    def f(self, x: Array, y: Array) -> Array:
        return np.maximum(x, y)


class Minimum(Binary):
    """The lesser one; NaN where either is NaN."""

    name = "minimum"

    def f(self, x: Array, y: Array) -> Array:
        return np.minimum(x, y)


class _Compare(Binary):
    result = "bool"

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return result.astype(np.float64)


class Equal(_Compare):
    name = "equal"
    kinds = (*NUMBERS, "bool")

    def f(self, x: Array, y: Array) -> Array:
        return x == y


class NotEqual(_Compare):
    name = "not_equal"
    kinds = (*NUMBERS, "bool")

    def f(self, x: Array, y: Array) -> Array:
        return x != y


class Less(_Compare):
    name = "less"

    def f(self, x: Array, y: Array) -> Array:
        return x < y


class LessEqual(_Compare):
    name = "less_equal"

    def f(self, x: Array, y: Array) -> Array:
        return x <= y


class Greater(_Compare):
    name = "greater"

    def f(self, x: Array, y: Array) -> Array:
        return x > y


class GreaterEqual(_Compare):
    name = "greater_equal"

    def f(self, x: Array, y: Array) -> Array:
        return x >= y


class LogicalAnd(_Compare):
    name = "logical_and"
    kinds = ("bool",)

    def f(self, x: Array, y: Array) -> Array:
        return np.logical_and(x, y)


class LogicalOr(_Compare):
    name = "logical_or"
    kinds = ("bool",)

    def f(self, x: Array, y: Array) -> Array:
        return np.logical_or(x, y)


@dataclass(frozen=True)
class Where(Op):
    """x where the condition holds, else y."""

    name = "where"
    arity = (3, 3)

    def infer(self, *types: TensorType) -> TensorType:
        condition, x, y = types
        require(condition.dtype == "bool", "the condition is not bool", why=f"it is {condition}")
        require(x == y and x.shape == condition.shape, "operands differ in type", why=f"{condition}, {x}, {y}")
        return x

    def ref(self, *arrays: Array) -> Array:
        return np.where(*arrays)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.where(values[0], bounds[1], bounds[2])

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        types = [TensorType(d, s) for d in ("float32", "int64", "bool") for s in ((2, 3), ())]
        return [(cls(), (t.with_dtype("bool"), t, t)) for t in types]
