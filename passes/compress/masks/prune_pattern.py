"""pass prune-pattern: 3x3 kernels keep the weights of one of a few patterns (Niu et al. 2020, "PatDNN", section 4)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.op import Array
from paring.passes.compress.masks.grid import Grid
from paring.passes.compress.masks.mask_pass import MaskPass
from paring.passes.compress.masks.masks import Weight
from paring.passes.rewriter import Context

KERNEL = (3, 3)
TAPS = 9
CENTRE = 4


@dataclass(frozen=True)
class PrunePattern(MaskPass):
    """Each 3x3 kernel keeps the weights of one pattern out of a dictionary, all others become zero.

    The natural pattern of a kernel is its centre and the `entries` - 1 other weights that matter most. The `patterns` most
    frequent ones in the network are the dictionary; each kernel gets that which keeps most of what matters. `share`: so many
    neighbouring output channels have the same pattern for `inputs` neighbouring input channels, so that vectors of them share
    it (those of 8-bit integers hold four inputs); 1 and 1 is PatDNN proper. Kernels that are zero stay zero and have no say.
    """

    name = "prune-pattern"
    criterion: str = "l2"
    entries: int = 4
    patterns: int = 8
    share: int = 16
    inputs: int = 1

    def check(self) -> None:
        super().check()
        if self.entries >= TAPS:
            raise ArgumentError(f"pass {self.name}: entries is {self.entries}", hint=f"of {TAPS} weights, so 1 to {TAPS - 1}")

    def obstacle(self, weight: Weight) -> str:
        return "" if weight.kernel == KERNEL else f"its kernels are {'x'.join(map(str, weight.kernel)) or 'single weights'}"

    def kept(self, weights: Sequence[Weight], scores: Mapping[Weight, Array], context: Context) -> Mapping[Weight, Array]:
        grid = Grid(self.share, self.inputs)
        kernels = {weight: grid.sums(scores[weight]) for weight in weights}
        known = dictionary(list(kernels.values()), self.entries, self.patterns)
        if not len(known):
            return {}
        context.notes.append(f"patterns, most frequent first: {', '.join(map(drawn, known))}")
        kept = {}
        for weight, found in kernels.items():
            best = np.argmax(found @ known.T.astype(np.float64), -1)
            kept[weight] = grid.spread(known[best], weight.value)
        return kept


def natural(kernels: Array, entries: int) -> Array:
    """The pattern of each of (..., 9) kernels: the centre and the greatest of the others. Of equal ones the first."""
    wanted = kernels.copy()
    wanted[..., CENTRE] = np.inf
    best = np.argsort(-wanted, -1, kind="stable")[..., :entries]
    found = np.zeros(kernels.shape, bool)
    np.put_along_axis(found, best, True, -1)
    return found


def dictionary(kernels: Sequence[Array], entries: int, most: int) -> Array:
    """(patterns, 9) bool: at most so many of the most frequent natural patterns, most frequent first."""
    counts: Counter[int] = Counter()
    places = 1 << np.arange(TAPS)
    for scores in kernels:
        codes = natural(scores[scores.any(-1)], entries) @ places
        counts.update(dict(zip(*(part.tolist() for part in np.unique(codes, return_counts=True)), strict=True)))
    # Ties are settled by the pattern itself, so that the same network gives the same dictionary.
    best = sorted(counts, key=lambda code: (-counts[code], code))[:most]
    return np.array([[code >> place & 1 for place in range(TAPS)] for code in best], bool).reshape(-1, TAPS)


def drawn(pattern: Array) -> str:
    """Row by row: `.x./xx./.x.`."""
    marks = "".join(".x"[int(stays)] for stays in pattern)
    return "/".join(marks[row : row + KERNEL[1]] for row in range(0, TAPS, KERNEL[1]))
