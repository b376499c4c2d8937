"""sink-reshapes: elementwise work is done before a reshape that splits dimensions, next to the product it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paring.ir.graph import Node
from paring.ir.ops import ELEMENTWISE, linear, shape
from paring.passes.base import Pass
from paring.passes.contract import Exact
from paring.passes.pattern import Match, Rule, any_, op

# Kernels that take an elementwise epilogue, and such an epilogue itself.
PRODUCTS = (linear.Linear, linear.Matmul)


def elementwise_of_reshape(m: Match) -> Node | None:
    """f(reshape(x), y) -> reshape(f(x, reshape(y))), where x has fewer dimensions and comes from a product"""
    for node in m.root.inputs:
        if not isinstance(node.op, shape.Reshape):
            continue
        (x,) = node.inputs
        # Reshapes only ever move from more dimensions to fewer, so two of them cannot chase each other.
        if x.type.rank < node.type.rank and isinstance(x.op, (*PRODUCTS, *ELEMENTWISE)):
            operands = [x if other is node else m.make(shape.Reshape(x.type.shape), other) for other in m.root.inputs]
            return m.make(shape.Reshape(m.root.type.shape), m.make(m.root.op, *operands))
    return None


def reshape_of_broadcast(m: Match) -> Node | None:
    """reshape(broadcast(x)) -> broadcast(x), where the dimensions that x has stay the last ones"""
    (x,), before, after = m["broadcast"].inputs, m["broadcast"].type.shape, m.root.type.shape
    kept = x.type.rank
    while kept and x.type.shape[x.type.rank - kept] == 1:
        kept -= 1
    if len(after) < kept or after[len(after) - kept :] != before[len(before) - kept :]:
        return m.decline("a dimension along which the operand varies is split or merged")
    small = m.make(shape.Reshape(x.type.shape[x.type.rank - kept :]), x)
    return m.make(shape.Broadcast(after), small)


RULES: tuple[Rule, ...] = (
    Rule(op(ELEMENTWISE), elementwise_of_reshape, Exact()),
    Rule(op(shape.Reshape, op(shape.Broadcast, any_("x"), name="broadcast")), reshape_of_broadcast, Exact()),
)


@dataclass(frozen=True)
class SinkReshapes(Pass):
    """Elementwise nodes move before a reshape that splits dimensions, so that they fuse with the product before it."""

    name = "sink-reshapes"

    def rules(self) -> Sequence[Rule]:
        return RULES
