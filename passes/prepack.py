"""prepack: constant weights in the order in which kernels read them, once, at compile time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paring.ir.graph import Node
from paring.ir.op import Op
from paring.ir.ops import linear, pack, shape
from paring.passes.base import Pass
from paring.passes.contract import Exact
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.util import constant, is_const


def fold_packing(m: Match) -> Node | None:
    """pack(constant) -> constant"""
    (weight,) = m.root.inputs
    assert isinstance(weight.op, Op)
    return constant(m.root.op.ref(weight.op.ref()), weight.loc)


def _pack_linear(block: int, group: int) -> Rule:
    def pack_linear(m: Match) -> Node | None:
        """linear(x, constant w) -> linear{OI16o}(x, packed w), of integers linear{OI16o4i}"""
        layer, (x, weight, *bias) = m.root.op, m.root.inputs
        assert isinstance(layer, linear.Linear)
        if layer.weight_layout != "OI":
            return None
        integer = weight.type.dtype == "int8"
        if integer and group == 1:
            return m.decline("the target has no instruction that sums products of bytes")
        layout = f"OI{block}o{group}i" if integer else f"OI{block}o"
        packed = m.make(pack.PackLinearWeight(layout), weight, loc=weight.loc)
        constant_weight = constant(packed.op.ref(weight.op.ref()), weight.loc)
        return m.make(linear.Linear(layout, weight.type.shape[0]), x, constant_weight, *bias)

    return Rule(op(linear.Linear, where=lambda n: is_const(n.inputs[1])), pack_linear, Exact())


@dataclass(frozen=True)
class Prepack(Pass):
    """Constant weights are packed at compile time: linear layers in blocks of `block` outputs, padding included.

    The weights of 8-bit integers have `group` neighbouring inputs side by side (1: they stay as they are).
    """

    name = "prepack"
    block: int = 16
    group: int = 1

    def rules(self) -> Sequence[Rule]:
        packing = (pack.PackConvWeight, pack.PackLinearWeight, shape.Pad, shape.LayoutTransform)
        return (Rule(op(packing, any_("w", is_const)), fold_packing, Exact()), _pack_linear(self.block, self.group))
