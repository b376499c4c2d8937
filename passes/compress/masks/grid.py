"""How the weights of a layer are divided into units, each of which is set to zero as a whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array
from paring.passes.compress.layers import taps_last


@dataclass(frozen=True)
class Grid:
    """Blocks of `rows` neighbouring output channels x `columns` input channels, aligned to multiples of these.

    Input channels are counted within a convolution's group, as its weight has them. Each tap of a convolution is divided
    separately, or a block has the `kernel` as a whole. What is left over at the edge makes smaller blocks. 0 rows or
    columns: all of them.
    """

    rows: int = 1
    columns: int = 1
    kernel: bool = False

    def _extents(self, weight: Array) -> tuple[int, int, int]:
        """Of one block in (outputs, inputs, taps); at least 1 each."""
        o, i, taps = taps_last(weight).shape
        rows, columns = self.rows or o, self.columns or i
        return max(1, min(rows, o)), max(1, min(columns, i)), max(1, taps) if self.kernel else 1

    def sums(self, weight: Array) -> Array:
        """The sum over each unit: (blocks of outputs, blocks of inputs, taps or 1), of values of the weight's shape."""
        found = taps_last(weight)
        for axis, extent in enumerate(self._extents(weight)):
            if extent > 1:
                found = np.add.reduceat(found, range(0, found.shape[axis], extent), axis)
        return found

    def sizes(self, weight: Array) -> Array:
        """How many weights each unit has."""
        return self.sums(np.ones(weight.shape, np.int64))

    def spread(self, units: Array, weight: Array) -> Array:
        """What is known of units as an array of the weight's shape."""
        shape = taps_last(weight).shape
        for axis, (extent, size) in enumerate(zip(self._extents(weight), shape, strict=True)):
            if extent > 1:
                units = units.repeat(extent, axis).take(range(size), axis)
        return np.ascontiguousarray(units).reshape(weight.shape)

    def empty(self, weight: Array) -> Array:
        """Which units are zero throughout."""
        return self.sums((weight != 0).astype(np.int64)) == 0
