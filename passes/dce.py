"""dce: what no output depends on is not computed. Unreachable nodes do not exist in a Graph; this is about parts of nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paring.ir.graph import Graph, Node
from paring.ir.ops.binary import Where
from paring.ir.ops.core import Region
from paring.ir.ops.shape import Broadcast, Concat, Pad, Slice
from paring.passes.base import Pass
from paring.passes.contract import Exact
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.util import splat_value


def slice_of_concat(m: Match) -> Node | None:
    """slice(concat(a, b, ...)) within one operand -> slice(that operand)"""
    cut, concat = m.root.op, m["concat"]
    assert isinstance(cut, Slice)
    assert isinstance(concat.op, Concat)
    axis, offset = concat.op.axis, 0
    for part in concat.inputs:
        size = part.type.shape[axis]
        if offset <= cut.starts[axis] and cut.stops[axis] <= offset + size:
            starts = tuple(s - offset if d == axis else s for d, s in enumerate(cut.starts))
            stops = tuple(s - offset if d == axis else s for d, s in enumerate(cut.stops))
            return m.make(Slice(starts, stops, cut.steps), part)
        offset += size
    return m.decline("the slice spans several operands")


def slice_of_pad(m: Match) -> Node | None:
    """slice(pad(x)) that keeps no padding -> slice(x)"""
    cut, pad = m.root.op, m["pad"].op
    assert isinstance(cut, Slice)
    assert isinstance(pad, Pad)
    starts = tuple(s - before for s, (before, _) in zip(cut.starts, pad.padding, strict=True))
    stops = tuple(s - before for s, (before, _) in zip(cut.stops, pad.padding, strict=True))
    inside = all(0 <= a <= b <= n for a, b, n in zip(starts, stops, m["x"].type.shape, strict=True))
    return m.make(Slice(starts, stops, cut.steps), m["x"]) if inside else m.decline("some padding is kept")


def settled_where(m: Match) -> Node | None:
    """where(constant condition, x, y) -> x or y"""
    condition = splat_value(m["condition"])
    return None if condition is None else (m["x"] if condition else m["y"])


def unread_operands(m: Match) -> Node | None:
    """region{body}(a, b) whose body does not read b -> region{body}(a)"""
    region = m.root.op
    assert isinstance(region, Region)
    read = region.body.use_counts()
    kept = [i for i, node in enumerate(region.body.inputs) if read[node]]
    if len(kept) == len(m.root.inputs):
        return None
    body = Graph(tuple(region.body.inputs[i] for i in kept), region.body.outputs)
    return m.make(Region(region.kind, body), *(m.root.inputs[i] for i in kept))


RULES: tuple[Rule, ...] = (
    Rule(op(Slice, op(Concat, name="concat")), slice_of_concat, Exact()),
    Rule(op(Slice, op(Pad, any_("x"), name="pad")), slice_of_pad, Exact()),
    Rule(
        op(Where, any_("condition", lambda n: n.op.name == "const" or isinstance(n.op, Broadcast)), any_("x"), any_("y")),
        settled_where,
        Exact(),
    ),
    Rule(op(Region), unread_operands, Exact()),
)


@dataclass(frozen=True)
class Dce(Pass):
    """Parts that no output depends on are dropped: operands of a concat that is sliced, the untaken side of a where."""

    name = "dce"

    def rules(self) -> Sequence[Rule]:
        return RULES
