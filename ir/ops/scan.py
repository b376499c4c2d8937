"""Running sums."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.types import TensorType


@dataclass(frozen=True)
class CumSum(Op):
    """Sum of all elements up to and including each one, along one axis."""

    name = "cumsum"
    axis: int

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(0 <= self.axis < x.rank, f"axis {self.axis} is out of range", why=f"{x}")
        require(x.dtype != "bool", "does not apply to bool", hint="cast first")
        return x

    def ref(self, *arrays: Array) -> Array:
        return wide(arrays[0]).cumsum(self.axis)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(1), (TensorType(d, (2, 5, 3)),)) for d in ("float32", "int64")]
