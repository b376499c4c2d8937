"""Rewrites of `sparsify` with one mistake each: the tests must tell them from the right ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from planting_weights import BLOCK, GROUP, ROWS, VECTORS

from paring.ir import Node
from paring.ir.op import Array
from paring.ir.ops import conv, sparse
from paring.passes.pattern import Match
from paring.passes.sparsify import Sparsify
from paring.passes.util import const_value, constant

Lists = tuple[Array, Array, Array]


def _wrong(right: Sparsify, change: Callable[[Array, Array, Array], Lists]) -> Callable[[Match], Node | None]:
    """The right lists, changed."""

    def sparsify_wrongly(m: Match) -> Node | None:
        rewrite = right._conv2d if isinstance(m.root.op, conv.Conv2d) else right._linear
        node = rewrite(m)
        if node is None:
            return None
        x, values, places, starts, *bias = node.inputs
        changed = change(*(const_value(operand) for operand in (values, places, starts)))
        return Node(node.op, (x, *map(constant, changed), *bias), node.loc)

    return sparsify_wrongly


def _next_place(values: Array, places: Array, starts: Array) -> Lists:
    """Each place moved on by one entry's channels, where that stays within its span."""
    step = GROUP if values.dtype == "int8" else 1
    moved = np.where(places % BLOCK == BLOCK - step, places, places + step)
    return values, moved.astype(places.dtype), starts


def _without_the_last(values: Array, places: Array, starts: Array) -> Lists:
    return np.concatenate([values[:-1], values[-1:] * 0]), places, starts


def _backwards(values: Array, places: Array, starts: Array) -> Lists:
    """Entries in descending order; in vectors the lanes."""
    return (values[:, ::-1] if values.shape[1] > 1 else values[::-1]).copy(), places, starts


def _late(values: Array, places: Array, starts: Array) -> Lists:
    """Lists that begin where the next one does."""
    return values, places, np.append(starts[0], np.append(starts[2:], starts[-1]))


def _drops_bias(right: Sparsify) -> Callable[[Match], Node | None]:
    def sparsify_wrongly(m: Match) -> Node | None:
        node = (right._conv2d if isinstance(m.root.op, conv.Conv2d) else right._linear)(m)
        return None if node is None else Node(node.op, node.inputs[:4], node.loc)

    return sparsify_wrongly


def _by_input(values: Array, places: Array, starts: Array) -> Lists:
    """The weights of 8 bits of one input side by side instead of those of one output."""
    if values.dtype != "int8":
        return values, places, starts
    return values.reshape(-1, BLOCK, GROUP).swapaxes(1, 2).reshape(values.shape).copy(), places, starts


def _forgets_padding(m: Match) -> Node | None:
    """Zeros in the padding of bytes."""
    node = VECTORS._conv2d(m)
    assert node is None or isinstance(node.op, sparse.SparseConv2d)
    return None if node is None else Node(replace(node.op, pad_value=0), node.inputs, node.loc)


_CHANGES = (_next_place, _without_the_last, _backwards, _late)
_BOTH = (
    *(_wrong(right, change) for right in (ROWS, VECTORS) for change in _CHANGES),
    *(_wrong(VECTORS, _by_input), _drops_bias(ROWS), _drops_bias(VECTORS)),
)
WRONG = {"sparsify-conv2d": (*_BOTH, _forgets_padding), "sparsify-linear": _BOTH}
