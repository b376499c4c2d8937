"""Normalisations and softmaxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.ops.unary import error_through
from paring.ir.types import TensorType


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


def _per_channel(array: Array, rank: int) -> Array:
    return array.reshape((1, -1) + (1,) * (rank - 2))


@dataclass(frozen=True)
class BatchNorm(Op):
    """(x - mean) / sqrt(var + eps) * weight + bias with given statistics, each of shape (C,), over dimension 1.

    Operands: x, weight, bias, mean, var.
    """

    name = "batch_norm"
    arity = (5, 5)
    eps: float = 1e-5

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(x.is_float and x.rank >= 2, "x is a float tensor with a channel dimension", why=f"{x}")
        wanted = TensorType(x.dtype, (x.shape[1],))
        require(all(t == wanted for t in types[1:]), "parameters do not match the channels", why=f"{types[1]} for {x}")
        return x

    def ref(self, *arrays: Array) -> Array:
        x, *params = (wide(a) for a in arrays)
        weight, bias, mean, var = (_per_channel(p, x.ndim) for p in params)
        with np.errstate(all="ignore"):
            return (x - mean) / np.sqrt(var + self.eps) * weight + bias

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        rank = result.ndim
        weight, bias, mean, var = (_per_channel(np.abs(wide(v)), rank) for v in values[1:])
        with np.errstate(all="ignore"):
            return np.maximum(np.abs(result), (bounds[0] + mean) * weight / np.sqrt(var + self.eps) + bias)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        c = _f(3)
        return [(cls(), (_f(2, 3, 4, 2), c, c, c, c)), (cls(1e-3), (_f(4, 3), c, c, c, c))]


def _normalized_bound(x: Array, bound: Array, axes: tuple[int, ...], eps: float, centred: bool) -> Array:
    """Error of (x - mean) / std at first order: shifts of the element, of the mean and of the deviation."""
    mean = x.mean(axes, keepdims=True) if centred else 0.0
    std = np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + eps)
    unit = np.abs(x - mean) / std
    own = (bound + bound.mean(axes, keepdims=True)) / std
    through_std = unit * (unit * (bound + bound.mean(axes, keepdims=True)) / std).mean(axes, keepdims=True)
    return np.maximum(unit, own + through_std)


@dataclass(frozen=True)
class LayerNorm(Op):
    """Normalised over the last len(weight.shape) dimensions. Operands: x, weight, bias."""

    name = "layer_norm"
    arity = (3, 3)
    eps: float = 1e-5

    def infer(self, *types: TensorType) -> TensorType:
        x, weight, bias = types
        require(x.is_float, "x is not a float tensor", why=f"{x}")
        require(weight == bias and weight.rank >= 1, "weight and bias differ", why=f"{weight}, {bias}")
        require(
            x.shape[-weight.rank :] == weight.shape and weight.dtype == x.dtype, "weight does not match x", why=f"{weight}, {x}"
        )
        return x

    def _axes(self, weight: Array) -> tuple[int, ...]:
        return tuple(range(-weight.ndim, 0))

    def ref(self, *arrays: Array) -> Array:
        x, weight, bias = (wide(a) for a in arrays)
        axes = self._axes(weight)
        with np.errstate(all="ignore"):
            centred = x - x.mean(axes, keepdims=True)
            return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + self.eps) * weight + bias

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        x, weight, bias = (wide(v) for v in values)
        return _normalized_bound(x, bounds[0], self._axes(weight), self.eps, True) * np.abs(weight) + np.abs(bias)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(), (_f(2, 3, 5), _f(5), _f(5))), (cls(1e-6), (_f(2, 3, 4), _f(3, 4), _f(3, 4)))]


@dataclass(frozen=True)
class RmsNorm(Op):
    """x / sqrt(mean(x^2) + eps) * weight over the last len(weight.shape) dimensions. Operands: x, weight."""

    name = "rms_norm"
    arity = (2, 2)
    eps: float = 1e-6

    def infer(self, *types: TensorType) -> TensorType:
        x, weight = types
        require(x.is_float and weight.rank >= 1, "x is not a float tensor", why=f"{x}")
        require(
            x.shape[-weight.rank :] == weight.shape and weight.dtype == x.dtype, "weight does not match x", why=f"{weight}, {x}"
        )
        return x

    def ref(self, *arrays: Array) -> Array:
        x, weight = (wide(a) for a in arrays)
        axes = tuple(range(-weight.ndim, 0))
        with np.errstate(all="ignore"):
            return x / np.sqrt((x**2).mean(axes, keepdims=True) + self.eps) * weight

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        x, weight = (wide(v) for v in values)
        axes = tuple(range(-weight.ndim, 0))
        return _normalized_bound(x, bounds[0], axes, self.eps, False) * np.abs(weight)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(), (_f(2, 3, 5), _f(5))), (cls(1e-5), (_f(2, 3, 4), _f(3, 4)))]


@dataclass(frozen=True)
class GroupNorm(Op):
    """Normalised within groups of channels (dimension 1) and all later dimensions. Operands: x, weight (C,), bias (C,)."""

    name = "group_norm"
    arity = (3, 3)
    groups: int
    eps: float = 1e-5

    def infer(self, *types: TensorType) -> TensorType:
        x, weight, bias = types
        require(x.is_float and x.rank >= 2, "x is a float tensor with a channel dimension", why=f"{x}")
        require(
            self.groups >= 1 and x.shape[1] % self.groups == 0, f"{x.shape[1]} channels do not divide into {self.groups} groups"
        )
        wanted = TensorType(x.dtype, (x.shape[1],))
        require(weight == wanted and bias == wanted, "parameters do not match the channels", why=f"{weight}, {bias} for {x}")
        return x

    def ref(self, *arrays: Array) -> Array:
        x, weight, bias = (wide(a) for a in arrays)
        grouped = x.reshape(x.shape[0], self.groups, x.size // max(1, x.shape[0] * self.groups))
        with np.errstate(all="ignore"):
            centred = grouped - grouped.mean(2, keepdims=True)
            y = centred / np.sqrt((centred**2).mean(2, keepdims=True) + self.eps)
        return y.reshape(x.shape) * _per_channel(weight, x.ndim) + _per_channel(bias, x.ndim)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        x, weight, bias = (wide(v) for v in values)
        grouped = (x.shape[0], self.groups, x.size // max(1, x.shape[0] * self.groups))
        unit = _normalized_bound(x.reshape(grouped), bounds[0].reshape(grouped), (2,), self.eps, True).reshape(x.shape)
        return unit * _per_channel(np.abs(weight), x.ndim) + _per_channel(np.abs(bias), x.ndim)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(2), (_f(2, 4, 3, 2), _f(4), _f(4))), (cls(3), (_f(1, 3, 5), _f(3), _f(3)))]


@dataclass(frozen=True)
class Softmax(Op):
    """exp(x - max) / sum(exp(x - max)) along one axis."""

    name = "softmax"
    axis: int

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(x.is_float, "x is not a float tensor", why=f"{x}")
        require(0 <= self.axis < x.rank, f"axis {self.axis} is out of range", why=f"{x}")
        return x

    def ref(self, *arrays: Array) -> Array:
        x = wide(arrays[0])
        with np.errstate(all="ignore"):
            e = np.exp(x - x.max(self.axis, keepdims=True, initial=-np.inf))
            return e / e.sum(self.axis, keepdims=True)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        y = wide(result)
        spread = bounds[0] + error_through(y, bounds[0]).sum(self.axis, keepdims=True)
        return error_through(y, 1 + spread)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(1), (_f(2, 5),)), (cls(0), (_f(4, 3),)), (cls(2), (_f(2, 3, 17),))]


@dataclass(frozen=True)
class LogSoftmax(Softmax):
    """log(softmax(x)) along one axis."""

    name = "log_softmax"

    def ref(self, *arrays: Array) -> Array:
        x = wide(arrays[0])
        with np.errstate(all="ignore"):
            shifted = x - x.max(self.axis, keepdims=True, initial=-np.inf)
            return shifted - np.log(np.exp(shifted).sum(self.axis, keepdims=True))

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        share = np.exp(wide(result))
        return np.abs(result) + 1 + bounds[0] + error_through(share, bounds[0]).sum(self.axis, keepdims=True)
