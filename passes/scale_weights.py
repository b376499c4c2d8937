"""scale-weights: a gate on the channels of an image is applied to the weights that read it, where those are fewer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from paring.ir.graph import Node
from paring.ir.ops import binary, conv, shape, unary
from paring.passes.base import Pass
from paring.passes.contract import Close
from paring.passes.pattern import Match, Rule, any_, op


def _blocked_gate(node: Node) -> bool:
    """A broadcast over the image of one factor for each channel, blocked: (1, C/b, 1, 1, b)."""
    (source,) = node.inputs
    return source.type.rank == 5 and source.type.shape[0] == 1 and source.type.shape[2:4] == (1, 1)


def _bounded(node: Node) -> bool:
    match node.op:
        case unary.Clamp(low=low, high=high):
            return math.isfinite(low) and math.isfinite(high)
        case unary.Sigmoid() | unary.HardSigmoid() | unary.Tanh():
            return True
    return False


def gate_to_weights(m: Match) -> Node | None:
    """conv2d(x * broadcast(s), w) -> conv2d(x, w * broadcast(s)), blocked, one image, fewer weights than pixels"""
    layer, gated, (s,) = m.root.op, m["gated"], m["gate"].inputs
    weight = m.root.inputs[1]
    assert isinstance(layer, conv.Conv2d)
    if layer.layout == "NCHW" or layer.groups != 1 or weight.type.shape[4] != s.type.shape[4]:
        return m.decline("the convolution does not read whole blocks of channels")
    if gated.type.shape[0] != 1:
        return m.decline("each image of the batch has a gate of its own")
    if weight.type.size >= gated.type.size:
        return m.decline("there are more weights than pixels")
    if any(pair != (0, 0) for pair in layer.padding) and not _bounded(s):
        return m.decline("the gate may be infinite, and an infinite weight makes NaN of padding")
    # s varies over (I/b, b) of the weight's (O/b, I/b, KH, KW, b, b).
    along = m.make(shape.Reshape((1, s.type.shape[1], 1, 1, s.type.shape[4], 1)), s)
    scaled = m.make(binary.Mul(), weight, m.make(shape.Broadcast(weight.type.shape), along))
    return m.make(layer, m["x"], scaled, *m.root.inputs[2:])


_GATED = op(binary.Mul, any_("x"), op(shape.Broadcast, name="gate", where=_blocked_gate), name="gated", once=True, commutes=True)

RULES: tuple[Rule, ...] = (
    Rule(op(conv.Conv2d, _GATED, any_("w")), gate_to_weights, Close(2, finite=True)),
    Rule(op(conv.Conv2d, _GATED, any_("w"), any_("b")), gate_to_weights, Close(2, finite=True)),
)


@dataclass(frozen=True)
class ScaleWeights(Pass):
    """A squeeze-and-excitation gate scales the weights of the convolution behind it instead of the image before it."""

    name = "scale-weights"
    contract = Close(2, finite=True)

    def rules(self) -> Sequence[Rule]:
        return RULES
