"""Integers that stand for real numbers: value = (integer - zero point) * scale.

Each op is defined to the bit: integers are exact, and what is computed in float32 is the sequence of single roundings written
here, so all targets give the same integers. `fma32` rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, require
from paring.ir.types import BYTES, DTYPES, TensorType

INTEGERS = ("int8", "uint8", "int32")


def limits(dtype: str) -> tuple[int, int]:
    """The least and greatest integer of a dtype."""
    signed, bits = DTYPES[dtype].kind == "int", DTYPES[dtype].bits
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def narrowed(dtype: str, low: int, high: int) -> tuple[int | None, int | None]:
    """A range as the ops want it: None for an end that is the dtype's own, or lies beyond it."""
    least, most = limits(dtype)
    return (None if low <= least else int(low)), (None if high >= most else int(high))


def fma32(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float32 arrays with a single rounding, as hardware does it.

    The product is exact in float64; the sum is rounded there to odd, so that rounding it to float32 is right (Boldo and
    Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    with np.errstate(all="ignore"):
        product, addend = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
        total = product + addend
        back = total - product
        rest = (product - (total - back)) + (addend - back)
        even = (total.view(np.int64) & 1) == 0
        towards = np.where(rest > 0, np.inf, -np.inf)
        odd = np.where((rest != 0) & even & np.isfinite(total), np.nextafter(total, towards), total)
        return odd.astype(np.float32)


def _is_float32(value: float) -> bool:
    return float(np.float32(value)) == value


@dataclass(frozen=True)
class _ToBytes(Op):
    """Base of ops that end in 8 bits: clamp(round(t) + zero_point, low, high), where halves go to even and NaN to `low`.

    `low` and `high` are within the range of `dtype`; None: its own.
    """

    zero_point: int = 0
    dtype: str = "uint8"
    low: int | None = None
    high: int | None = None

    @property
    def range(self) -> tuple[int, int]:
        low, high = limits(self.dtype)
        return low if self.low is None else self.low, high if self.high is None else self.high

    def check_range(self) -> None:
        require(self.dtype in BYTES, f"does not give {self.dtype}", why=f"gives {' or '.join(BYTES)}")
        (least, most), (low, high) = limits(self.dtype), self.range
        require(least <= low <= high <= most, f"[{low}, {high}] is not a range of {self.dtype}")
        require(least <= self.zero_point <= most, f"zero point {self.zero_point} is not a {self.dtype}")

    def settle(self, t: Array) -> Array:
        """The integers for float32 values in steps, counted from the zero point."""
        low, high = (np.float32(bound - self.zero_point) for bound in self.range)
        clamped = np.where(t > low, np.where(t < high, t, high), low)
        return (np.rint(clamped).astype(np.int32) + self.zero_point).astype(self.dtype)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))


@dataclass(frozen=True)
class Quantize(_ToBytes):
    """float32 -> 8 bits: t = x * (1 / scale), the reciprocal rounded to float32 before."""

    name = "quantize"
    scale: float = 1.0

    @property
    def steps_per_unit(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.float32(1.0 / self.scale))

    def infer(self, *types: TensorType) -> TensorType:
        self.check_range()
        require(types[0].dtype == "float32", "x is not float32", why=f"{types[0]}")
        require(_is_float32(self.scale) and self.scale > 0, f"scale {self.scale!r} is not a positive float32")
        require(np.isfinite(self.steps_per_unit), f"scale {self.scale!r} is too small to divide by")
        return types[0].with_dtype(self.dtype)

    def ref(self, *arrays: Array) -> Array:
        return self.settle(arrays[0].astype(np.float32) * np.float32(self.steps_per_unit))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        x = TensorType("float32", (2, 3, 5))
        return [(cls(7, "uint8", scale=0.25), (x,)), (cls(-3, "int8", -127, 90, 0.03125), (x,))]


@dataclass(frozen=True)
class Dequantize(Op):
    """Integers -> float32: float32(q - zero_point) * scale."""

    name = "dequantize"
    scale: float = 1.0
    zero_point: int = 0

    def infer(self, *types: TensorType) -> TensorType:
        require(types[0].dtype in INTEGERS, f"does not apply to {types[0].dtype}", why=f"takes {', '.join(INTEGERS)}")
        require(_is_float32(self.scale) and self.scale > 0, f"scale {self.scale!r} is not a positive float32")
        low, high = limits(types[0].dtype)
        fits = low <= self.zero_point <= high if types[0].dtype in BYTES else self.zero_point == 0
        require(fits, f"zero point {self.zero_point} does not fit {types[0].dtype}")
        return types[0].with_dtype("float32")

    def ref(self, *arrays: Array) -> Array:
        return (arrays[0].astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls(0.125, 9), (TensorType("uint8", (2, 3, 5)),)),
            (cls(0.75, -2), (TensorType("int8", (4,)),)),
            (cls(2.0), (TensorType("int32", (2, 2)),)),
        ]


@dataclass(frozen=True)
class DequantizeChannels(Op):
    """int8 weights with a float32 scale for each index of `axis` -> float32: float32(q) * scale."""

    name = "dequantize_channels"
    arity = (2, 2)
    axis: int = 0

    def infer(self, *types: TensorType) -> TensorType:
        q, scale = types
        require(q.dtype == "int8" and scale.dtype == "float32", "weights are int8, scales float32", why=f"{q}, {scale}")
        require(0 <= self.axis < q.rank, f"axis {self.axis} is out of range", why=f"{q}")
        require(scale.shape == (q.shape[self.axis],), "one scale for each channel", why=f"{scale} for axis {self.axis} of {q}")
        return q.with_dtype("float32")

    def ref(self, *arrays: Array) -> Array:
        q, scale = arrays
        along = [-1 if d == self.axis else 1 for d in range(q.ndim)]
        return q.astype(np.float32) * scale.astype(np.float32).reshape(along)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        weight = TensorType("int8", (4, 3, 2))
        return [(cls(axis), (weight, TensorType("float32", (size,)))) for axis, size in ((0, 4), (1, 3))]


@dataclass(frozen=True)
class Descale(Op):
    """Sums of products -> float32: fma(float32(sum), multiplier, bias), all of one shape."""

    name = "descale"
    arity = (3, 3)

    def infer(self, *types: TensorType) -> TensorType:
        total, *factors = types
        require(total.dtype in INTEGERS, f"does not apply to {total.dtype}", why=f"takes {', '.join(INTEGERS)}")
        require(all(t == total.with_dtype("float32") for t in factors), "multiplier and bias do not match", why=f"{types}")
        return total.with_dtype("float32")

    def ref(self, *arrays: Array) -> Array:
        return fma32(arrays[0].astype(np.float32), *(a.astype(np.float32) for a in arrays[1:]))

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        factor = TensorType("float32", (2, 3, 5))
        return [(cls(), (TensorType("int32", (2, 3, 5)), factor, factor))]


@dataclass(frozen=True)
class Requantize(_ToBytes):
    """Integers -> 8 bits in other steps, with what a residual connection adds: operands of one shape.

    t = fma(float32(x), multiplier, bias), and with a residual r: t = fma(float32(r - residual_zero), residual_scale, t).
    """

    name = "requantize"
    arity = (3, 4)
    residual_scale: float = 1.0
    residual_zero: int = 0

    def infer(self, *types: TensorType) -> TensorType:
        self.check_range()
        x, multiplier, bias, *residual = types
        require(x.dtype in INTEGERS, f"does not apply to {x.dtype}", why=f"takes {', '.join(INTEGERS)}")
        factor = x.with_dtype("float32")
        require(multiplier == factor == bias, "multiplier and bias do not match", why=f"{multiplier}, {bias} for {x}")
        require(_is_float32(self.residual_scale), f"residual_scale {self.residual_scale!r} is not a float32")
        if residual:
            fits = residual[0].dtype in BYTES and residual[0].shape == x.shape
            require(fits, "the residual does not match", why=f"{residual[0]} for {x}")
            low, high = limits(residual[0].dtype)
            require(low <= self.residual_zero <= high, f"residual_zero {self.residual_zero} does not fit {residual[0]}")
        return x.with_dtype(self.dtype)

    def ref(self, *arrays: Array) -> Array:
        x, multiplier, bias, *residual = arrays
        t = fma32(x.astype(np.float32), multiplier.astype(np.float32), bias.astype(np.float32))
        for r in residual:
            steps = (r.astype(np.int32) - self.residual_zero).astype(np.float32)
            t = fma32(steps, np.full_like(steps, self.residual_scale), t)
        return self.settle(t)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        shape = (2, 3, 5)
        factor = TensorType("float32", shape)
        operands = [TensorType(d, shape) for d in INTEGERS]
        return [
            (cls(3, "uint8"), (operands[2], factor, factor)),
            (cls(-5, "int8", -100, 100), (operands[1], factor, factor)),
            (cls(0, "uint8", 0, 200, 0.5, 7), (operands[2], factor, factor, operands[1])),
            (cls(1, "int8", None, None, 1.25, -9), (operands[0], factor, factor, operands[0])),
        ]


@dataclass(frozen=True)
class QuantizedMul(_ToBytes):
    """The product of two 8-bit tensors of one shape: t = float32((x - x_zero) * (y - y_zero)) * scale."""

    name = "quantized_mul"
    arity = (2, 2)
    x_zero: int = 0
    y_zero: int = 0
    scale: float = 1.0

    def infer(self, *types: TensorType) -> TensorType:
        self.check_range()
        require(all(t.dtype in BYTES for t in types), "operands are not of 8 bits", why=", ".join(map(str, types)))
        require(types[0].shape == types[1].shape, "operands differ in shape", why=f"{types[0]} against {types[1]}")
        for t, zero in zip(types, (self.x_zero, self.y_zero), strict=True):
            low, high = limits(t.dtype)
            require(low <= zero <= high, f"zero point {zero} does not fit {t.dtype}")
        require(_is_float32(self.scale) and self.scale > 0, f"scale {self.scale!r} is not a positive float32")
        return types[0].with_dtype(self.dtype)

    def ref(self, *arrays: Array) -> Array:
        x, y = (a.astype(np.int32) - zero for a, zero in zip(arrays, (self.x_zero, self.y_zero), strict=True))
        return self.settle((x * y).astype(np.float32) * np.float32(self.scale))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        x, y = TensorType("uint8", (2, 3, 5)), TensorType("int8", (2, 3, 5))
        return [(cls(4, "uint8", x_zero=3, scale=0.25), (x, x)), (cls(-1, "int8", x_zero=2, y_zero=-7, scale=0.125), (x, y))]


@dataclass(frozen=True)
class Lookup(Op):
    """Any function of 8 bits: the entry of a table of 256, which starts at the least integer of q's dtype."""

    name = "lookup"
    arity = (2, 2)

    def infer(self, *types: TensorType) -> TensorType:
        q, table = types
        require(q.dtype in BYTES, f"does not apply to {q.dtype}", why=f"takes {' or '.join(BYTES)}")
        require(table.shape == (256,), "a table has 256 entries", why=f"{table}")
        return q.with_dtype(table.dtype)

    def ref(self, *arrays: Array) -> Array:
        q, table = arrays
        return table[q.astype(np.int32) - limits(q.dtype.name)[0]]

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(), (TensorType(q, (2, 3, 5)), TensorType(t, (256,)))) for q, t in (("uint8", "uint8"), ("int8", "float32"))]
