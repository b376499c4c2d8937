"""Passes that set weights to zero by rank: single ones, n of m, blocks, vectors, kernels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.op import Array
from paring.ir.ops import conv
from paring.passes.compress.layers import taps_last
from paring.passes.compress.masks.grid import Grid
from paring.passes.compress.masks.mask_pass import MaskPass, RatioPass
from paring.passes.compress.masks.masks import Weight
from paring.passes.rewriter import Context

_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)")


@dataclass(frozen=True)
class PruneUnstructured(RatioPass):
    """Single weights that matter least become zero (Han et al. 2015; over the whole network: scope='global')."""

    name = "prune-unstructured"

    def grid(self) -> Grid:
        return Grid()


@dataclass(frozen=True)
class PruneBlock(RatioPass):
    """Blocks of weights that matter least become zero.

    `shape`: output channels x input channels of a block, which lies in one tap of a convolution. This is the block-sparse
    matrix (BSR) of a layer whose weight is laid out (O, KH * KW * I). Smaller blocks are left over at the edges.
    """

    name = "prune-block"
    shape: str = "16x1"

    def check(self) -> None:
        super().check()
        if not _SHAPE.fullmatch(self.shape):
            hint = "output channels x input channels, like '16x1' or '4x4'"
            raise ArgumentError(f"pass {self.name}: shape is {self.shape!r}", hint=hint)

    def grid(self) -> Grid:
        rows, columns = map(int, self.shape.split("x"))
        return Grid(rows, columns)


@dataclass(frozen=True)
class PruneVector(RatioPass):
    """Vectors of weights along the output channels become zero: for one input channel and tap, `size` output channels.

    These are the column vectors of Chen et al. 2021 ("Efficient tensor core-based GPU kernels for structured sparsity"), and
    `prune-block` of shape `size` x 1: what one vector instruction multiplies is there or not.
    """

    name = "prune-vector"
    size: int = 16

    def grid(self) -> Grid:
        return Grid(self.size)


@dataclass(frozen=True)
class PruneKernel(RatioPass):
    """Whole kernels of spatial convolutions become zero: all taps of one pair of output and input channel.

    The connectivity pruning of Niu et al. 2020 (PatDNN). `share`: so many neighbouring output channels lose the same ones,
    which are the 1xN patterns of Lin et al. 2022, and so many neighbouring `inputs`: vectors of 8-bit integers hold four.
    """

    name = "prune-kernel"
    share: int = 1
    inputs: int = 1

    def grid(self) -> Grid:
        return Grid(self.share, self.inputs, kernel=True)

    def obstacle(self, weight: Weight) -> str:
        if not isinstance(weight.layers[0].op, conv.Conv2d) or weight.kernel == (1, 1):
            return "its kernels are single weights: prune-unstructured"
        if weight.constant.type.shape[1] == 1:
            return "each output channel has one kernel: without it the channel could go, with prune-channels"
        return super().obstacle(weight)


@dataclass(frozen=True)
class PruneNm(MaskPass):
    """Of each `m` neighbouring input channels `n` stay, those that matter most, for each output channel and tap.

    The N:M sparsity of Zhou et al. 2021; 2:4 by default. `share`: so many neighbouring output channels keep the same ones.
    """

    name = "prune-nm"
    n: int = 2
    m: int = 4
    share: int = 1

    def check(self) -> None:
        super().check()
        if self.n >= self.m:
            raise ArgumentError(f"pass {self.name}: {self.n} of {self.m} would stay", hint="n is less than m, like n=2, m=4")

    def obstacle(self, weight: Weight) -> str:
        inputs = weight.constant.type.shape[1]
        return f"its {inputs} input channels are no multiple of {self.m}" if inputs % self.m else ""

    def kept(self, weights: Sequence[Weight], scores: Mapping[Weight, Array], context: Context) -> Mapping[Weight, Array]:
        return {weight: self._best(weight.value, scores[weight]) for weight in weights}

    def _best(self, weight: Array, scores: Array) -> Array:
        """Where a weight is among the `n` best of its `m`; of equal ones the first stay."""
        grid = Grid(self.share)
        found = taps_last(grid.sums(scores))
        groups = found.reshape(found.shape[0], found.shape[1] // self.m, self.m, found.shape[2])
        order = np.argsort(-groups, 2, kind="stable")
        stays = np.zeros(groups.shape, bool)
        np.put_along_axis(stays, order[:, :, : self.n], True, 2)
        return grid.spread(stays.reshape(found.shape), weight)
