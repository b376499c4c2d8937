"""Resampling of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.ops.conv import Pair
from paring.ir.types import TensorType


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


@dataclass(frozen=True)
class Resize(Op):
    """x (N, C, H, W) to the given size; torch's interpolate. mode: nearest, bilinear.

    `scales` is the ratio input/output used for coordinates where torch was given a scale factor, (0.0, 0.0) otherwise.
    """

    name = "resize"
    size: Pair
    mode: str = "nearest"
    align_corners: bool = False
    scales: tuple[float, float] = (0.0, 0.0)

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(x.is_float and x.rank == 4, "x is a float tensor of four dimensions", why=f"{x}")
        require(self.mode in ("nearest", "bilinear"), f"unknown mode {self.mode!r}", hint="nearest or bilinear")
        require(min(self.size) >= 1 and min(x.shape[2:]) >= 1, "sizes are positive", why=f"{self.size} from {x}")
        return x.with_shape((*x.shape[:2], *self.size))

    def taps(self, size: int, out: int, scale: float) -> tuple[Array, Array, Array]:
        """For each output position: lower index, upper index (int64), weight of the upper one (float32)."""
        position = np.arange(out, dtype=np.float32)
        ratio = np.float32(scale or size / out)
        if self.mode == "nearest":
            low = np.minimum(np.floor(position * ratio).astype(np.int64), size - 1)
            return low, low, np.zeros(out, np.float32)
        if self.align_corners:
            source = position * np.float32((size - 1) / (out - 1) if out > 1 else 0.0)
        else:
            source = np.maximum((position + np.float32(0.5)) * ratio - np.float32(0.5), np.float32(0))
        low = np.minimum(source.astype(np.int64), size - 1)
        return low, np.minimum(low + 1, size - 1), np.clip(source - low.astype(np.float32), 0, 1).astype(np.float32)

    def ref(self, *arrays: Array) -> Array:
        x = wide(arrays[0])
        for axis in (2, 3):
            low, high, weight = self.taps(x.shape[axis], self.size[axis - 2], self.scales[axis - 2])
            if self.mode == "nearest":
                x = np.take(x, low, axis)
                continue
            share = weight.astype(np.float64).reshape((-1, 1) if axis == 2 else (-1,))
            x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
        return x

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls((6, 9)), (_f(1, 2, 3, 4),)),
            (cls((2, 5)), (_f(2, 1, 5, 7),)),
            (cls((7, 5), "bilinear"), (_f(1, 2, 3, 4),)),
            (cls((6, 8), "bilinear", True), (_f(1, 2, 3, 4),)),
            (cls((1, 1), "bilinear", True), (_f(1, 2, 3, 4),)),
        ]
