"""The passes that set weights to zero with one mistake each: the tests must tell these from the right ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np

from paring.ir.op import Array
from paring.passes.base import Pass
from paring.passes.compress.criteria import SLACK
from paring.passes.compress.masks import mask_pass, masks, prune_pattern
from paring.passes.compress.masks.grid import Grid
from paring.passes.compress.masks.prune_pattern import PrunePattern
from paring.passes.compress.masks.prune_weights import PruneBlock, PruneKernel, PruneNm, PruneUnstructured, PruneVector

Patch = Callable[[], AbstractContextManager[Any]]
WrongMask = tuple[Pass, Patch]


def _instead(owner: Any, name: str, wrong: Callable[..., Any]) -> Patch:
    """`wrong(right, *arguments)` in place of a function."""
    right = getattr(owner, name)
    return lambda: mock.patch.object(owner, name, lambda *args: wrong(right, *args))


# --- n of m ---------------------------------------------------------------------------------------------------------


def removes_n(right: Any, self: PruneNm, weight: Array, scores: Array) -> Array:
    """n and m - n swapped."""
    return right(PruneNm(n=self.m - self.n, m=self.m), weight, scores)


def keeps_the_least(right: Any, self: PruneNm, weight: Array, scores: Array) -> Array:
    return right(self, weight, -scores)


def along_the_outputs(right: Any, self: PruneNm, weight: Array, scores: Array) -> Array:
    if scores.shape[0] % self.m:
        return right(self, weight, scores)
    turned = right(self, np.ascontiguousarray(weight.swapaxes(0, 1)), np.ascontiguousarray(scores.swapaxes(0, 1)))
    return turned.swapaxes(0, 1)


def across_taps(right: Any, self: PruneNm, weight: Array, scores: Array) -> Array:
    """Neighbours in memory, as of a linear layer."""
    return right(self, weight.reshape(len(weight), -1), scores.reshape(len(weight), -1)).reshape(weight.shape)


def shares_nothing(right: Any, self: PruneNm, weight: Array, scores: Array) -> Array:
    return right(PruneNm(n=self.n, m=self.m), weight, scores)


# --- units by rank --------------------------------------------------------------------------------------------------


def one_more(right: Any, means: Array, sizes: Array, ratio: float, rows: bool) -> Array:
    return right(means, sizes, min(ratio + 1.0 / max(1, means.size), 1.0), rows)


def greatest_go(right: Any, means: Array, sizes: Array, ratio: float, rows: bool) -> Array:
    return right(-means, sizes, ratio, rows)


def counts_units(right: Any, means: Array, sizes: Array, ratio: float, rows: bool) -> Array:
    """As if units at the edge had as many weights as others."""
    return right(means, np.ones_like(sizes), ratio, rows)


def zeros_do_not_count(right: Any, means: Array, sizes: Array, ratio: float, rows: bool) -> Array:
    dead = ~np.isfinite(means)
    order = np.argsort(np.where(dead, np.inf, means).ravel(), kind="stable")
    gone = np.zeros(means.size, bool)
    gone[order] = np.cumsum(sizes.ravel()[order]) <= ratio * sizes.sum() + SLACK
    return gone.reshape(means.shape) | dead


def swaps_the_shape(right: Any, self: PruneBlock | PruneKernel) -> Grid:
    found = right(self)
    return Grid(found.columns, found.rows, found.kernel)


def forgets_the_taps(right: Any, self: Any) -> Grid:
    return Grid(right(self).rows, right(self).columns, kernel=not right(self).kernel)


def off_by_one(right: Any, self: Grid, units: Array, weight: Array) -> Array:
    """The right number of units, each a channel further."""
    return np.roll(right(self, units, weight), 1, 0)


def transposes_units(right: Any, self: Grid, units: Array, weight: Array) -> Array:
    square = units.shape[0] == units.shape[1]
    return right(self, units.swapaxes(0, 1) if square else units, weight)


def sums_score(right: Any, self: Grid, weight: Array) -> Array:
    """Units of all sizes count as one weight, so that small ones at the edge seem to matter less."""
    return np.minimum(right(self, weight), 1)


def spares_nobody(right: Any, self: Any, weights: Any, means: Mapping[Any, Array], sizes: Any, context: Any) -> Any:
    flat, counts = (np.concatenate([of[w].ravel() for w in weights]) for of in (means, sizes))
    every = mask_pass._least(flat, counts, self.ratio, False)
    ends = np.cumsum([means[w].size for w in weights])[:-1]
    return {w: part.reshape(means[w].shape) for w, part in zip(weights, np.split(every, ends), strict=True)}


# --- any ------------------------------------------------------------------------------------------------------------


def revives_zeros(right: Any, array: Array, loc: Any) -> Any:
    return right(np.where(array == 0, np.float32(2.0**-10), array).astype(array.dtype), loc)


def leaves_minus_zero(right: Any, array: Array, loc: Any) -> Any:
    return right(np.where(array == 0, np.float32(-0.0), array).astype(array.dtype), loc)


def rescales(right: Any, array: Array, loc: Any) -> Any:
    """Makes up for what is gone."""
    return right((array * np.float32(2)).astype(array.dtype), loc)


def one_reader(right: Any, graph: Any, new: Mapping[Any, Any]) -> Any:
    return right(graph, {masks.Weight(w.constant, w.layers[:1]): node for w, node in new.items()})


# --- patterns -------------------------------------------------------------------------------------------------------


def without_centre(right: Any, kernels: Array, entries: int) -> Array:
    best = np.argsort(-kernels, -1, kind="stable")[..., :entries]
    found = np.zeros(kernels.shape, bool)
    np.put_along_axis(found, best, True, -1)
    return found


def every_pattern(right: Any, kernels: Any, entries: int, most: int) -> Array:
    return right(kernels, entries, 999)


def rarest(right: Any, kernels: Any, entries: int, most: int) -> Array:
    return right(kernels, entries, 999)[-most:]


def upside_down(right: Any, kernels: Any, entries: int, most: int) -> Array:
    return right(kernels, entries, most)[:, [6, 7, 8, 3, 4, 5, 0, 1, 2]]


_ANY: tuple[tuple[str, Patch], ...] = (
    ("revives_zeros", _instead(mask_pass, "constant", revives_zeros)),
    ("leaves_minus_zero", _instead(mask_pass, "constant", leaves_minus_zero)),
    ("rescales", _instead(mask_pass, "constant", rescales)),
    ("one_reader", _instead(mask_pass, "with_masks", one_reader)),
)
_RANK: tuple[tuple[str, Patch], ...] = (
    ("one_more", _instead(mask_pass, "_least", one_more)),
    ("greatest_go", _instead(mask_pass, "_least", greatest_go)),
    ("zeros_do_not_count", _instead(mask_pass, "_least", zeros_do_not_count)),
)
_UNITS: tuple[tuple[str, Patch], ...] = (
    ("off_by_one", _instead(Grid, "spread", off_by_one)),
    ("transposes_units", _instead(Grid, "spread", transposes_units)),
)
_EDGES: tuple[tuple[str, Patch], ...] = (
    ("counts_units", _instead(mask_pass, "_least", counts_units)),
    ("sums_score", _instead(Grid, "sizes", sums_score)),
)

_BY_PASS: dict[Pass, tuple[tuple[str, Patch], ...]] = {
    PruneUnstructured(): (*_ANY, *_RANK, *_UNITS),
    PruneUnstructured(scope="global", ratio=0.9): (("spares_nobody", _instead(PruneUnstructured, "_over_all", spares_nobody)),),
    PruneBlock(shape="3x2"): (
        *(*_RANK[:2], *_UNITS, *_EDGES),
        ("swaps_the_shape", _instead(PruneBlock, "grid", swaps_the_shape)),
        ("forgets_the_taps", _instead(PruneBlock, "grid", forgets_the_taps)),
    ),
    PruneVector(size=4): (*_RANK[:2], *_UNITS, ("forgets_the_taps", _instead(PruneVector, "grid", forgets_the_taps))),
    PruneKernel(share=2, inputs=3): (
        *(*_RANK, *_UNITS, ("swaps_the_shape", _instead(PruneKernel, "grid", swaps_the_shape))),
        ("forgets_the_taps", _instead(PruneKernel, "grid", forgets_the_taps)),
    ),
    PruneNm(n=1): (
        *_ANY,
        ("removes_n", _instead(PruneNm, "_best", removes_n)),
        ("keeps_the_least", _instead(PruneNm, "_best", keeps_the_least)),
        ("along_the_outputs", _instead(PruneNm, "_best", along_the_outputs)),
        ("across_taps", _instead(PruneNm, "_best", across_taps)),
    ),
    PruneNm(share=4): (("shares_nothing", _instead(PruneNm, "_best", shares_nothing)), *_UNITS[:1]),
    PrunePattern(patterns=3, share=2, inputs=2): (
        *(*_ANY[:3], *_UNITS[:1]),
        ("without_centre", _instead(prune_pattern, "natural", without_centre)),
        ("every_pattern", _instead(prune_pattern, "dictionary", every_pattern)),
        ("rarest", _instead(prune_pattern, "dictionary", rarest)),
        ("upside_down", _instead(prune_pattern, "dictionary", upside_down)),
    ),
}

WRONG_MASKS: dict[str, WrongMask] = {
    f"{prune} {name}": (prune, patch) for prune, patches in _BY_PASS.items() for name, patch in patches
}
