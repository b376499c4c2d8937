"""Observers: which range of real numbers a tensor's integers are to cover, from the values seen in calibration.

An observer is fed batch by batch and gives (low, high); `affine` makes a float32 scale and a zero point of that.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np

from paring.ir.errors import ArgumentError, InputError
from paring.ir.op import Array
from paring.ir.ops.quantized import limits

Range = tuple[float, float]

# The least scale: float32's smallest normal number, whose reciprocal is finite.
LEAST_SCALE = float(np.finfo(np.float32).tiny)
STEPS = 255


@dataclass(frozen=True)
class Affine:
    """How integers of a dtype stand for real numbers: (q - zero_point) * scale."""

    scale: float
    zero_point: int
    dtype: str


def affine(low: float, high: float, dtype: str) -> Affine:
    """The parameters that cover [low, high], extended to 0: zero is always one of the steps."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"[{low}, {high}] is not a range that integers can cover")
    least, most = limits(dtype)
    if low == high:
        return Affine(1.0, 0, dtype)
    scale = max(float(np.float32((high - low) / (most - least))), LEAST_SCALE)
    return Affine(scale, min(max(least - round(low / scale), least), most), dtype)


class Observer(ABC):
    """Fed the values of one tensor, batch by batch."""

    def observe(self, values: Array) -> None:
        """Add a batch. Raises InputError where a value is not finite."""
        if values.size == 0:
            return
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError("an observed tensor has values that are not finite")
        self.add(values, low, high)

    @abstractmethod
    def add(self, values: Array, low: float, high: float) -> None:
        """Add a batch that is not empty, whose least and greatest values are given."""

    @abstractmethod
    def range(self) -> Range:
        """What the integers should cover; (0, 0) where nothing was seen."""


@dataclass
class MinMax(Observer):
    """The least and greatest value of all batches: nothing is clipped."""

    low: float = 0.0
    high: float = 0.0

    def add(self, values: Array, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> Range:
        return self.low, self.high


@dataclass
class Ema(Observer):
    """Exponential moving averages of each batch's least and greatest value (Jacob et al. 2018, section 3.1)."""

    momentum: float = 0.9
    ends: Range | None = None

    def add(self, values: Array, low: float, high: float) -> None:
        if self.ends is None:
            self.ends = low, high
        keep, take = self.momentum, 1 - self.momentum
        self.ends = self.ends[0] * keep + low * take, self.ends[1] * keep + high * take

    def range(self) -> Range:
        return self.ends or (0.0, 0.0)


@dataclass
class Histogram(MinMax):
    """Counts of values in bins of one width over [-2^exponent, 2^exponent].

    When a value lies outside, the range is doubled and neighbouring bins are merged: the result does not depend on the order
    of the batches. The greater of |low| and |high| has between 2048 and 4096 bins.
    """

    bins: int = 4096
    exponent: int | None = None
    counts: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, values: Array, low: float, high: float) -> None:
        super().add(values, low, high)
        if low == high == 0:
            # Zeros say nothing of how wide a bin should be, and every range holds them.
            return
        _, wanted = math.frexp(max(-low, high))
        if self.exponent is None:
            self.exponent, self.counts = wanted, np.zeros(2 * self.bins, np.int64)
        for _ in range(min(wanted - self.exponent, 2 * self.bins.bit_length())):
            half = self.bins // 2
            self.counts = np.pad(self.counts.reshape(-1, 2).sum(1), half)
        self.exponent = max(self.exponent, wanted)
        places = np.floor(values.ravel().astype(np.float64) / self.width).astype(np.int64) + self.bins
        self.counts = self.counts + np.bincount(np.clip(places, 0, 2 * self.bins - 1), minlength=2 * self.bins)

    @property
    def width(self) -> float:
        return math.ldexp(1.0, (self.exponent or 0)) / self.bins

    def edges(self) -> Array:
        """The lower edge of each bin, and the upper one of the last."""
        return np.arange(-self.bins, self.bins + 1) * self.width


@dataclass
class Percentile(Histogram):
    """Leaves `100 - percentile` percent of the values out at each end."""

    percentile: float = 99.99

    def range(self) -> Range:
        if self.exponent is None:
            return 0.0, 0.0
        below, out = np.cumsum(self.counts), (1 - self.percentile / 100) * self.counts.sum()
        edges = self.edges()
        first = int(np.searchsorted(below, out, "right"))
        last = int(np.searchsorted(below, below[-1] - out))
        return max(self.low, float(edges[first])), min(self.high, float(edges[last + 1]))


@dataclass
class Kl(Histogram):
    """The threshold whose clipped distribution loses least information (Migacz 2017, as in TensorRT and MXNet).

    Over |x|; 256 levels where values have one sign, 128 where they have both.
    """

    def range(self) -> Range:
        if self.exponent is None:
            return 0.0, 0.0
        sizes = self.counts[self.bins :] + self.counts[: self.bins][::-1]
        levels = 128 if self.low < 0 < self.high else 256
        threshold = _least_divergence(sizes.astype(np.float64), levels) * self.width
        return max(self.low, -threshold), min(self.high, threshold)


def _least_divergence(counts: Array, levels: int) -> int:
    """How many of the bins to keep so that `levels` levels describe the distribution best."""
    used = int(np.flatnonzero(counts)[-1]) + 1
    # Zeros of a relu and of padding are exact on any scale, and would outweigh all else.
    counts = np.concatenate([counts[1:2], counts[1:used]])
    best, kept = math.inf, used
    for stop in range(used, levels - 1, -max(1, levels // 16)):
        divergence = _divergence(counts, stop, levels)
        if divergence < best:
            best, kept = divergence, stop
    return kept


def _divergence(counts: Array, stop: int, levels: int) -> float:
    """Kullback-Leibler divergence of the first bins, the rest clipped into the last one, from what `levels` levels keep."""
    kept = counts[:stop]
    if not kept.any():
        return math.inf
    clipped = kept.copy()
    clipped[-1] += counts[stop:].sum()
    starts = np.linspace(0, stop, levels, endpoint=False).astype(np.int64)
    sums, filled = np.add.reduceat(kept, starts), np.add.reduceat(kept > 0, starts, dtype=np.float64)
    level = np.repeat(sums / np.maximum(filled, 1), np.diff([*starts, stop]))
    p, q = clipped / clipped.sum(), np.where(kept > 0, level, 0) / kept.sum()
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-10))).sum())


@dataclass
class Mse(Histogram):
    """The range with the least squared error of rounding and clipping: both ends shrunk together, then each alone."""

    def range(self) -> Range:
        filled = np.flatnonzero(self.counts)
        if not filled.size:
            return 0.0, 0.0
        points, weights = (filled - self.bins + 0.5) * self.width, self.counts[filled].astype(np.float64)

        def loss(ends: Range) -> float:
            return float((weights * (points - _rounded(points, *ends)) ** 2).sum())

        low, high = min(self.low, 0.0), max(self.high, 0.0)
        shares = 0.96 ** np.arange(100)
        low, high = min(((low * s, high * s) for s in shares), key=loss)
        low, high = min(((low * s, high) for s in shares), key=loss)
        return min(((low, high * s) for s in shares), key=loss)


def _rounded(points: Array, low: float, high: float) -> Array:
    """What 8 bits over [low, high] make of real numbers."""
    scale = max((high - low) / STEPS, LEAST_SCALE)
    zero = round(-low / scale)
    return (np.clip(np.rint(points / scale) + zero, 0, STEPS) - zero) * scale


NAMES = ("minmax", "ema", "percentile", "kl", "mse")


def make_observer(name: str, *, percentile: float = 99.99, momentum: float = 0.9) -> Observer:
    """A fresh observer. Raises ArgumentError for an unknown name or a setting out of range."""
    if not 50 < percentile <= 100:
        raise ArgumentError(f"percentile is {percentile}", hint="more than 50, at most 100: 99.99 leaves 0.01 % out at each end")
    if not 0 <= momentum < 1:
        raise ArgumentError(f"momentum is {momentum}", hint="at least 0, less than 1")
    match name:
        case "minmax":
            return MinMax()
        case "ema":
            return Ema(momentum)
        case "percentile":
            return Percentile(percentile=percentile)
        case "kl":
            return Kl()
        case "mse":
            return Mse()
    raise ArgumentError(f"unknown calibrator {name!r}", hint=f"known: {', '.join(NAMES)}")
