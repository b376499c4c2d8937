"""Reductions over any set of dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.types import TensorType


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


def reduced_shape(shape: tuple[int, ...], axes: tuple[int, ...], keepdims: bool) -> tuple[int, ...]:
    return tuple(1 if d in axes else s for d, s in enumerate(shape) if keepdims or d not in axes)


@dataclass(frozen=True)
class Reduction(Op):
    """Base of reductions; `axes` are sorted and not negative."""

    axes: tuple[int, ...]
    keepdims: bool = False

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(tuple(sorted(set(self.axes))) == self.axes, f"axes {self.axes} are not sorted and distinct")
        require(all(0 <= a < x.rank for a in self.axes), f"axes {self.axes} are out of range", why=f"{x}")
        require(x.dtype != "bool", "does not apply to bool", hint="cast first")
        return x.with_shape(reduced_shape(x.shape, self.axes, self.keepdims))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls((1,)), (_f(2, 5),)),
            (cls((0, 2), True), (_f(3, 4, 2),)),
            (cls((2, 3)), (_f(2, 3, 4, 5),)),
            (cls(()), (_f(2),)),
            (cls((0,)), (TensorType("int32", (3, 2)),)),
        ]


class Sum(Reduction):
    name = "sum"

    def ref(self, *arrays: Array) -> Array:
        return wide(arrays[0]).sum(self.axes, keepdims=self.keepdims)


class Mean(Reduction):
    name = "mean"

    def infer(self, *types: TensorType) -> TensorType:
        require(types[0].is_float, "x is not a float tensor", why=f"{types[0]}")
        return super().infer(*types)

    def ref(self, *arrays: Array) -> Array:
        with np.errstate(all="ignore"):
            count = np.prod([arrays[0].shape[a] for a in self.axes])
            return wide(arrays[0]).sum(self.axes, keepdims=self.keepdims) / count

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [s for s in super().samples(rng) if s[1][0].is_float]


class _Extreme(Reduction):
    """Greatest or least; NaN wins always."""

    def infer(self, *types: TensorType) -> TensorType:
        require(all(types[0].shape[a] for a in self.axes if a < types[0].rank), "nothing to choose from", why=f"{types[0]}")
        return super().infer(*types)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return bounds[0].max(self.axes, keepdims=self.keepdims)


class Max(_Extreme):
    name = "max"

    def ref(self, *arrays: Array) -> Array:
        return arrays[0].max(self.axes, keepdims=self.keepdims)


class Min(_Extreme):
    name = "min"

    def ref(self, *arrays: Array) -> Array:
        return arrays[0].min(self.axes, keepdims=self.keepdims)


@dataclass(frozen=True)
class ArgMax(Op):
    """Index (int64) of the first greatest element along one axis; a NaN counts as greatest."""

    name = "argmax"
    axis: int
    keepdims: bool = False

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(0 <= self.axis < x.rank, f"axis {self.axis} is out of range", why=f"{x}")
        require(x.shape[self.axis] > 0, "nothing to choose from", why=f"{x}")
        return TensorType("int64", reduced_shape(x.shape, (self.axis,), self.keepdims))

    def ref(self, *arrays: Array) -> Array:
        return np.argmax(arrays[0], self.axis, keepdims=self.keepdims)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(1), (_f(2, 5),)), (cls(0, True), (_f(3, 2),)), (cls(2), (_f(2, 2, 17),))]
