"""Rewrites of `winograd` with one mistake each: the tests must tell them from the right one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from planting_weights import BLOCK, WINOGRAD

from paring.ir import Node
from paring.ir import layout as lay
from paring.ir.op import Array
from paring.ir.ops.winograd import PIXELS, transformed_weight
from paring.passes.pattern import Match
from paring.passes.util import const_value, constant

Rewrite = Callable[[Match], Node | None]


def _changed(change: Callable[[Node], Node]) -> Rewrite:
    """The right node, changed."""

    def winograd_wrongly(m: Match) -> Node | None:
        node = WINOGRAD._conv2d(m)
        return None if node is None else change(node)

    return winograd_wrongly


def _of_weight(change: Callable[[Array], Array]) -> Rewrite:
    """The weight (O, I, 3, 3) changed before it is transformed."""

    def winograd_wrongly(m: Match) -> Node | None:
        node = WINOGRAD._conv2d(m)
        if node is None:
            return None
        plain = lay.unblock_conv_weight(const_value(m.root.inputs[1]))
        read = 2 * node.inputs[1].type.shape[2]
        transformed = constant(transformed_weight(change(plain[:, :read]), BLOCK))
        return Node(node.op, (node.inputs[0], transformed, *node.inputs[2:]), node.loc)

    return winograd_wrongly


def _without_border(node: Node) -> Node:
    return Node(replace(node.op, pad_value=0 if node.op.pad_value else 1), node.inputs, node.loc)  # type: ignore[call-arg]


def _without_bias(node: Node) -> Node:
    return Node(node.op, node.inputs[:2], node.loc)


def _saturated(node: Node) -> Node:
    """A weight cut off where 16 bits would not be needed."""
    weight = np.clip(const_value(node.inputs[1]), -2048, 2047)
    return Node(node.op, (node.inputs[0], constant(weight), *node.inputs[2:]), node.loc)


def _turned(node: Node) -> Node:
    """Positions column by column."""
    weight = const_value(node.inputs[1])
    tiles = weight.reshape(weight.shape[0], PIXELS, PIXELS, *weight.shape[2:]).swapaxes(1, 2).reshape(weight.shape)
    return Node(node.op, (node.inputs[0], constant(np.ascontiguousarray(tiles)), *node.inputs[2:]), node.loc)


WRONG: dict[str, tuple[Rewrite, ...]] = {
    "winograd-conv2d": (
        *map(_changed, (_without_border, _without_bias, _saturated, _turned)),
        _of_weight(lambda weight: weight[:, :, ::-1, ::-1]),
        _of_weight(lambda weight: weight[:, ::-1]),
    )
}
