"""Pooling over the two image dimensions, in plain and blocked layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.ops.conv import Pair
from paring.ir.types import BYTES, TensorType


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


def pool_extent(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """torch's rule: with ceil_mode a last window that starts in the right padding is dropped."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    extent = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (extent - 1) * stride >= size + padding:
        extent -= 1
    return extent


@dataclass(frozen=True)
class Pool2d(Op):
    """Base of window pooling; x (N, C, H, W) or blocked."""

    integers: ClassVar[tuple[str, ...]] = ()
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False
    layout: str = "NCHW"

    def infer(self, *types: TensorType) -> TensorType:
        x, block = types[0], lay.channel_block(self.layout)
        require(x.is_float or x.dtype in self.integers, "x is not a float tensor", why=f"{x}")
        require(
            x.rank == (5 if block else 4) and (not block or x.shape[4] == block),
            f"x does not fit layout {self.layout}",
            why=f"{x}",
        )
        require(min(*self.kernel, *self.stride, *self.dilation) >= 1, "kernel, stride and dilation are positive")
        require(
            all(0 <= 2 * p <= k for p, k in zip(self.padding, self.kernel, strict=True)), "padding is at most half the kernel"
        )
        window = zip(x.shape[2:4], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        oh, ow = (pool_extent(*w, self.ceil_mode) for w in window)
        require(oh > 0 and ow > 0, "the kernel is larger than the padded input", why=f"{self.kernel} on {x}")
        return x.with_shape((*x.shape[:2], oh, ow, *x.shape[4:]))

    def windows(self, x: Array, fill: float) -> Array:
        """(KH * KW, ...result shape): the elements under each kernel position, `fill` where outside x."""
        h, w = x.shape[2:4]
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel, self.stride, self.padding, self.dilation
        oh, ow = (
            pool_extent(*v, self.ceil_mode)
            for v in zip((h, w), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        bottom, right = ((o - 1) * s + d * (k - 1) + 1 for o, s, d, k in ((oh, sh, dh, kh), (ow, sw, dw, kw)))
        grid = ((ph, max(0, bottom - h - ph)), (pw, max(0, right - w - pw)))
        xp = np.pad(x, ((0, 0), (0, 0), *grid, *(((0, 0),) * (x.ndim - 4))), constant_values=fill)
        taps = [(r * dh, s * dw) for r in range(kh) for s in range(kw)]
        return np.stack([xp[:, :, t : t + (oh - 1) * sh + 1 : sh, s : s + (ow - 1) * sw + 1 : sw] for t, s in taps])


@dataclass(frozen=True)
class MaxPool2d(Pool2d):
    """The greatest element of each window, of floats or 8-bit integers; padding never wins; NaN wins always."""

    name = "max_pool2d"
    integers = BYTES

    def ref(self, *arrays: Array) -> Array:
        (x,) = arrays
        return self.windows(wide(x), -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min).max(0)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return self.windows(bounds[0], 0.0).max(0)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls((3, 3), (2, 2), (1, 1)), (_f(1, 3, 8, 7),)),
            (cls((2, 3), (2, 1), (0, 1), (1, 2)), (_f(2, 2, 6, 9),)),
            (cls((3, 3), (2, 2), ceil_mode=True), (_f(1, 2, 8, 6),)),
            (cls((2, 2), (2, 2), layout="NCHW4c"), (_f(1, 2, 5, 4, 4),)),
            (cls((3, 3), (2, 2), (1, 1)), (TensorType("int8", (1, 3, 5, 4)),)),
            (cls((3, 2), (1, 2), (1, 0), layout="NCHW4c"), (TensorType("uint8", (1, 2, 5, 4, 4)),)),
        ]


@dataclass(frozen=True)
class AvgPool2d(Pool2d):
    """The mean of each window. `count_include_pad`: padding counts in the divisor (not what ceil_mode adds beyond it)."""

    name = "avg_pool2d"
    count_include_pad: bool = True

    def divisors(self, h: int, w: int) -> Array:
        """(OH, OW): how many elements each window's sum is divided by."""
        counts = []
        for size, k, s, p, d in zip((h, w), self.kernel, self.stride, self.padding, self.dilation, strict=True):
            starts = np.arange(pool_extent(size, k, s, p, d, self.ceil_mode)) * s - p
            ends = np.minimum(starts + k, size + p)
            counts.append(ends - starts if self.count_include_pad else np.minimum(ends, size) - np.maximum(starts, 0))
        return np.maximum(counts[0][:, None] * counts[1][None, :], 1)

    def infer(self, *types: TensorType) -> TensorType:
        require(self.dilation == (1, 1), "average pooling has no dilation")
        return super().infer(*types)

    def ref(self, *arrays: Array) -> Array:
        x = wide(arrays[0])
        divisors = self.divisors(*x.shape[2:4]).reshape(1, 1, *self.divisors(*x.shape[2:4]).shape, *((1,) * (x.ndim - 4)))
        return self.windows(x, 0.0).sum(0) / divisors

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls((3, 3), (2, 2), (1, 1)), (_f(1, 3, 8, 7),)),
            (cls((3, 2), (2, 2), (1, 0), count_include_pad=False), (_f(2, 2, 6, 9),)),
            (cls((3, 3), (2, 2), (1, 1), ceil_mode=True), (_f(1, 2, 8, 6),)),
            (cls((2, 2), (2, 2), layout="NCHW4c"), (_f(1, 2, 4, 4, 4),)),
        ]


@dataclass(frozen=True)
class AdaptiveAvgPool2d(Op):
    """Means over windows [floor(i * H / OH), ceil((i + 1) * H / OH)), likewise for columns."""

    name = "adaptive_avg_pool2d"
    size: Pair
    layout: str = "NCHW"

    def infer(self, *types: TensorType) -> TensorType:
        x, block = types[0], lay.channel_block(self.layout)
        require(x.is_float and x.rank == (5 if block else 4), f"x does not fit layout {self.layout}", why=f"{x}")
        require(not block or x.shape[4] == block, f"x does not fit layout {self.layout}", why=f"{x}")
        require(min(self.size) >= 1 and min(x.shape[2:4]) >= 1, "sizes are positive", why=f"{self.size} from {x}")
        return x.with_shape((*x.shape[:2], *self.size, *x.shape[4:]))

    def ref(self, *arrays: Array) -> Array:
        x = wide(arrays[0])
        for axis, out in ((2, self.size[0]), (3, self.size[1])):
            size = x.shape[axis]
            parts = [np.take(x, range(i * size // out, -(-(i + 1) * size // out)), axis).mean(axis) for i in range(out)]
            x = np.stack(parts, axis)
        return x

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls((1, 1)), (_f(2, 3, 5, 4),)),
            (cls((3, 2)), (_f(1, 2, 7, 5),)),
            (cls((6, 6)), (_f(1, 2, 4, 3),)),
            (cls((2, 2), "NCHW4c"), (_f(1, 2, 4, 4, 4),)),
        ]
