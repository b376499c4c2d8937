"""Labels of channels: which ones go together, which stay, and what a channel holds once it is masked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from networkx.utils import UnionFind

from paring.ir.op import Array


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of the channels of one node's result; all three have its rank.

    `labels` (int64): which label each element has; an extent of 1 says that nothing is removed along that dimension.
    `rest`, of the same shape: what the elements of a label hold once its producers are masked; NaN where that is not one
    known finite number. `free`: whether a dimension can be made shorter at will, because the value was broadcast along it.
    """

    labels: Array
    rest: Array
    free: tuple[bool, ...]

    def varies(self, axis: int) -> bool:
        return bool(self.labels.shape[axis] > 1)


class Coupling:
    """Labels that go together, as disjoint sets; those that must stay, and why."""

    def __init__(self) -> None:
        self._sets: UnionFind[int] = UnionFind()
        self._count = 0
        self._pinned: dict[int, str] = {}
        self._mixed: dict[int, str] = {}

    def fresh(self, count: int) -> Array:
        """New labels, each in a set of its own."""
        self._count += count
        return np.arange(self._count - count, self._count)

    def tie(self, a: Array, b: Array) -> None:
        """Labels at the same place, after broadcasting, go together."""
        a, b = np.broadcast_arrays(a, b)
        apart = a != b
        for pair in np.unique(a[apart] * self._count + b[apart]).tolist():
            self._sets.union(*divmod(pair, self._count))

    def tie_along(self, labels: Array, axes: Iterable[int], why: str = "") -> Array:
        """Labels that differ along these axes only go together, because of `why`; gives them with extents of 1 there."""
        for axis in axes:
            if labels.shape[axis] > 1:
                first = labels.take([0], axis)
                self.tie(labels, first)
                labels = first
                if why:
                    for label in np.unique(first).tolist():
                        self._mixed.setdefault(label, why)
        return labels

    def pin(self, labels: Array, why: str) -> None:
        """These stay, for a reason; the first one given counts."""
        for label in np.unique(labels).tolist():
            self._pinned.setdefault(label, why)

    def roots(self, labels: Array) -> Array:
        """One label for each set, in the same shape."""
        unique, inverse = np.unique(labels, return_inverse=True)
        names = np.array([self._sets[label] for label in unique.tolist()], np.int64)
        return names[inverse].reshape(labels.shape)

    def pinned(self) -> dict[int, str]:
        """The roots of the sets that stay, and why."""
        return self._by_root(self._pinned)

    def mixed(self) -> dict[int, str]:
        """The roots of the sets that some operator made one of many, and which."""
        return self._by_root(self._mixed)

    def _by_root(self, reasons: dict[int, str]) -> dict[int, str]:
        found: dict[int, str] = {}
        for label, why in reasons.items():
            found.setdefault(self._sets[label], why)
        return found


def varying(labels: Array) -> list[int]:
    """The axes along which labels are not all the same."""
    return [axis for axis in range(labels.ndim) if labels.shape[axis] > 1 and (labels != labels.take([0], axis)).any()]


def slices_apart(labels: Array, axis: int) -> int:
    """How many sets remain when all labels of each slice across an axis go together."""
    sets: UnionFind[int] = UnionFind()
    for row in np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1):
        sets.union(*np.unique(row).tolist())
    return len(list(sets.to_sets()))


def along(array: Array, axis: int) -> Array:
    """The elements along an axis, of the first place of all others: for what does not differ along these."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)[:, 0]


def one_value(rest: Array, axes: Iterable[int]) -> Array:
    """`rest` with an extent of 1 along axes: the value itself where there is only one, else NaN."""
    for axis in axes:
        if rest.shape[axis] > 1:
            first = rest.take([0], axis)
            rest = np.where((rest == first).all(axis, keepdims=True), first, np.nan).astype(rest.dtype)
    return rest
