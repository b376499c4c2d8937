"""Look-ups by index, and triangular masks. An index out of range is clamped: it stands for the first or the last position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, require
from paring.ir.types import TensorType


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


@dataclass(frozen=True)
class Gather(Op):
    """numpy.take: x[..., indices, ...] along one axis (embedding, index_select). Indices are clamped to [0, size - 1]."""

    name = "gather"
    arity = (2, 2)
    axis: int

    def infer(self, *types: TensorType) -> TensorType:
        x, indices = types
        require(indices.dtype in ("int32", "int64"), "indices are int32 or int64", why=f"{indices}")
        require(0 <= self.axis < x.rank, f"axis {self.axis} is out of range", why=f"{x}")
        require(x.shape[self.axis] > 0 or indices.size == 0, "nothing to choose from", why=f"{x}")
        return x.with_shape((*x.shape[: self.axis], *indices.shape, *x.shape[self.axis + 1 :]))

    def ref(self, *arrays: Array) -> Array:
        return np.take(arrays[0], arrays[1], self.axis, mode="clip")

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.take(bounds[0], values[1], self.axis, mode="clip")

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        index = TensorType("int64", (2, 3))
        return [(cls(0), (_f(7, 4), index)), (cls(1), (_f(2, 9, 3), index)), (cls(0), (_f(5), TensorType("int32", ())))]


@dataclass(frozen=True)
class GatherElements(Op):
    """numpy.take_along_axis: the result has the shape of the indices, which are clamped to [0, size - 1]."""

    name = "gather_elements"
    arity = (2, 2)
    axis: int

    def infer(self, *types: TensorType) -> TensorType:
        x, indices = types
        require(indices.dtype in ("int32", "int64"), "indices are int32 or int64", why=f"{indices}")
        require(0 <= self.axis < x.rank == indices.rank, "x and indices differ in rank", why=f"{x}, {indices}")
        inside = all(i <= s for d, (i, s) in enumerate(zip(indices.shape, x.shape, strict=True)) if d != self.axis)
        require(inside, "indices are larger than x", why=f"{indices} on {x}")
        require(x.shape[self.axis] > 0 or indices.size == 0, "nothing to choose from", why=f"{x}")
        return x.with_shape(indices.shape)

    def _take(self, x: Array, indices: Array) -> Array:
        corner = tuple(slice(None) if d == self.axis else slice(0, s) for d, s in enumerate(indices.shape))
        return np.take_along_axis(x[corner], np.clip(indices.astype(np.int64), 0, x.shape[self.axis] - 1), self.axis)

    def ref(self, *arrays: Array) -> Array:
        return self._take(arrays[0], arrays[1])

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return self._take(bounds[0], values[1])

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(1), (_f(3, 7), TensorType("int64", (3, 2)))), (cls(0), (_f(9, 3), TensorType("int64", (2, 2))))]


@dataclass(frozen=True)
class Tril(Op):
    """The lower triangle of the last two dimensions: elements with column - row <= diagonal, zero elsewhere."""

    name = "tril"
    diagonal: int = 0

    def infer(self, *types: TensorType) -> TensorType:
        require(types[0].rank >= 2, "x has at least two dimensions", why=f"{types[0]}")
        return types[0]

    def ref(self, *arrays: Array) -> Array:
        return np.tril(arrays[0], self.diagonal)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(), (_f(4, 4),)), (cls(-1), (_f(2, 3, 5),)), (cls(1), (TensorType("bool", (3, 3)),))]


class Triu(Tril):
    """The upper triangle of the last two dimensions: elements with column - row >= diagonal, zero elsewhere."""

    name = "triu"

    def ref(self, *arrays: Array) -> Array:
        return np.triu(arrays[0], self.diagonal)
