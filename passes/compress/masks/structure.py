"""What structure the zeros of a weight have."""

from __future__ import annotations

import numpy as np

from paring.ir.op import Array
from paring.passes.compress.layers import taps_last
from paring.passes.compress.masks.grid import Grid

# From the coarsest to the finest; a weight has the first of which every one of its zeros is part.
GRIDS: dict[str, Grid] = {
    "whole output channels": Grid(columns=0, kernel=True),
    "whole input channels": Grid(rows=0, kernel=True),
    **{f"blocks of {rows}x{columns}": Grid(rows, columns) for rows, columns in ((16, 16), (8, 8), (4, 4))},
}
KERNELS = Grid(kernel=True)
# So many neighbouring output channels may have the same zeros.
SHARES = (16, 8, 4)
VECTORS = {f"vectors of {size} input channels": Grid(columns=size) for size in SHARES}
GROUPS = (2, 4, 8, 16, 32)
# More different kernels than this are no dictionary.
MOST_PATTERNS = 32
# As many as an int64 has bits for.
MOST_TAPS = 62
# How many of the n weights of m that may be there are: the others are zero by chance.
FILLED = 0.95


def structure(weight: Array) -> str:
    """That of a layer's zeros in a few words: `whole kernels`, `2:4`, `8 patterns of 4 weights`, `unstructured`, ..."""
    zero = weight == 0
    if not zero.any():
        return "no zeros"
    if zero.all():
        return "all zero"
    coarse = next((name for name, grid in GRIDS.items() if _covers(grid, weight)), "")
    if coarse:
        return coarse
    share = next((size for size in SHARES if _covers(Grid(size), weight)), 1)
    fine = "whole kernels" if _covers(KERNELS, weight) else _patterns(~zero) or _n_of_m(~zero)
    if fine:
        return f"{fine}, the same for {share} output channels" if share > 1 else fine
    if share > 1:
        return f"vectors of {share} output channels"
    return next((name for name, grid in VECTORS.items() if _covers(grid, weight)), "unstructured")


def _covers(grid: Grid, weight: Array) -> bool:
    """Whether every zero is in a unit that is zero throughout; units have more than one weight, and fit."""
    if grid.rows > weight.shape[0] or grid.columns > weight.shape[1]:
        return False
    whole = grid.spread(grid.empty(weight), weight)
    return bool((whole == (weight == 0)).all() and grid.sizes(weight).max() > 1)


def _patterns(there: Array) -> str:
    """Kernels that are zero, or one of few patterns with the same number of weights."""
    kernels = taps_last(there).reshape(-1, taps_last(there).shape[2])
    some = kernels[kernels.any(1)]
    entries = np.unique(some.sum(1))
    if not 1 < kernels.shape[1] <= MOST_TAPS or len(entries) > 1:
        return ""
    found = np.unique(some @ (1 << np.arange(kernels.shape[1])))
    if len(found) > min(MOST_PATTERNS, len(some) // 2):
        return ""
    return f"{len(found)} patterns of {entries[0]} weights" + (" and whole kernels" if len(some) < len(kernels) else "")


def _n_of_m(there: Array) -> str:
    """At most n of each m neighbouring input channels, and nearly as many."""
    taps = taps_last(there)
    for m in GROUPS:
        if taps.shape[1] % m == 0:
            n = int(taps.reshape(taps.shape[0], -1, m, taps.shape[2]).sum(2).max())
            if 2 * n <= m and there.mean() >= FILLED * n / m:
                return f"{n}:{m}"
    return ""
