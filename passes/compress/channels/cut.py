"""Channels removed from a graph, and the dense graph with the same channels masked, which computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from paring.ir.errors import ArgumentError, InternalError
from paring.ir.graph import Graph, Node, rebuild
from paring.ir.interpreter import interpret
from paring.ir.op import Array, Op
from paring.ir.ops import ELEMENTWISE, attention, conv, linear, norm, shape
from paring.ir.ops.core import Const
from paring.passes.compress.channels.channels import Channels, Group
from paring.passes.compress.channels.labels import along
from paring.passes.compress.layers import is_layer
from paring.passes.util import by_class, channel_axis, const_value, constant, with_operands

Operands = Sequence[Node]
Removed = Mapping[Node, Array]
"""By layer the output channels that are gone, ascending."""


def removed_by(groups: Iterable[Group]) -> dict[Node, Array]:
    """What groups take from each layer."""
    found: dict[Node, list[Array]] = {}
    for group in groups:
        for layer, places in group.channels.items():
            found.setdefault(layer, []).append(places)
    return {layer: np.sort(np.concatenate(places)) for layer, places in found.items()}


def masked(graph: Graph, removed: Mapping[Node, Sequence[int] | Array]) -> Graph:
    """The dense graph in which the weights and biases of some output channels of its layers are zero.

    Raises ArgumentError for a node that is no convolution or linear layer of the graph with constant weights, and for a
    channel that it does not have.
    """
    known = set(graph.nodes())
    new: dict[Node, list[Node]] = {}
    for layer, channels in removed.items():
        if layer not in known or not is_layer(layer):
            raise ArgumentError(
                f"{layer.op.name} is no layer of this graph with constant weights", hint="give nodes of the graph"
            )
        places, width = np.asarray(channels, np.int64), layer.inputs[1].type.shape[0]
        if places.size and not (places.min() >= 0 and places.max() < width):
            raise ArgumentError(f"{layer.op.name} has no channel {places.max()}", why=f"it has {width}")
        new[layer] = [_zeroed(i, places) for i in layer.inputs[1:]]
    return with_operands(graph, new)


def _zeroed(node: Node, places: Array) -> Node:
    value = const_value(node).copy()
    value[places] = 0
    return constant(value, node.loc)


@dataclass(frozen=True)
class Cut:
    """What stays of a value: these places along one axis."""

    axis: int
    kept: tuple[int, ...]


def without(channels: Channels, groups: Iterable[Group]) -> Graph:
    """The graph without these groups: computes what `masked(graph, removed_by(groups))` does, sums in the same order.

    What a removed channel would still hold once masked goes into the biases of the layers that read it.
    """
    knife = Knife(channels, frozenset(group.number for group in groups))
    return rebuild(channels.flow.graph, knife.visit)


class Knife:
    """Rebuilds nodes without some groups. Operands are old nodes where types are asked for, new ones where graphs are built."""

    def __init__(self, channels: Channels, gone: frozenset[int]) -> None:
        self.channels = channels
        self.gone = np.array(sorted(gone), np.int64)
        self._cuts: dict[Node, Cut | None] = {}
        self._narrowed: dict[tuple[Node, Cut], Node] = {}

    def visit(self, node: Node, inputs: tuple[Node, ...]) -> Node:
        cuts = [self.cut(i) for i in node.inputs]
        if self.cut(node) is None and not any(cuts):
            return node.with_inputs(inputs)
        rule = by_class(SHRINK, node.op) or _as_it_is
        op, operands = rule(self, node, inputs)
        return Node(op, operands, node.loc)

    def cut(self, node: Node) -> Cut | None:
        """What stays of an old node; None: all of it."""
        if node not in self._cuts:
            roots = self.channels.roots.get(node)
            lost = np.zeros(0, bool) if roots is None else np.isin(roots, self.gone)
            self._cuts[node] = _cut_of(lost, node) if lost.any() else None
        return self._cuts[node]

    def lost(self, node: Node, axis: int) -> Array:
        """The places that are gone along an axis."""
        cut = self.cut(node)
        everything = np.arange(node.type.shape[axis])
        return everything[:0] if cut is None or cut.axis != axis else np.setdiff1d(everything, cut.kept)

    def fitted(self, node: Node, inputs: Operands) -> list[Node]:
        """New operands that have become as short as the result has."""
        cut = self.cut(node)
        pairs = zip(node.inputs, inputs, strict=True)
        return [new if cut is None or self.cut(old) == cut else self.narrow(new, cut) for old, new in pairs]

    def narrow(self, node: Node, cut: Cut) -> Node:
        """What is constant, or broadcast along the axis, shortened."""
        if (node, cut) not in self._narrowed:
            self._narrowed[node, cut] = self._narrow(node, cut)
        return self._narrowed[node, cut]

    def _narrow(self, node: Node, cut: Cut) -> Node:
        if isinstance(node.op, shape.Broadcast):
            (x,) = node.inputs
            axis = cut.axis - (node.type.rank - x.type.rank)
            short = axis >= 0 and x.type.shape[axis] > 1
            return Node(
                shape.Broadcast(_sized(node.op.shape, cut)), [self.narrow(x, Cut(axis, cut.kept)) if short else x], node.loc
            )
        if isinstance(node.op, Const):
            return constant(const_value(node).take(cut.kept, cut.axis), node.loc)
        if all(isinstance(n.op, Const) or n.inputs for n in Graph((), (node,)).nodes()):
            return constant(interpret(Graph((), (node,)), [])[0].take(cut.kept, cut.axis), node.loc)
        if isinstance(node.op, ELEMENTWISE):
            return node.with_inputs([self.narrow(i, cut) for i in node.inputs])
        raise InternalError(f"{node.op.name} can not become shorter")


def _cut_of(lost: Array, node: Node) -> Cut:
    for axis in range(lost.ndim):
        across = lost.all(tuple(a for a in range(lost.ndim) if a != axis))
        if across.any() and not across.all() and across.sum() * (lost.size // lost.shape[axis]) == lost.sum():
            return Cut(axis, tuple(np.flatnonzero(~across).tolist()))
    raise InternalError(f"what is removed of {node.op.name} {node.type} is no range of one dimension")


def _sized(dims: tuple[int, ...], cut: Cut | None) -> tuple[int, ...]:
    return dims if cut is None else tuple(len(cut.kept) if a == cut.axis else size for a, size in enumerate(dims))


# --- how operators become smaller: (operator, operands) from a node and its new operands ------------------------------


def _as_it_is(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    return node.op, inputs


def _fitted(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    return node.op, knife.fitted(node, inputs)


def _layer(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    """Rows and columns of the weight; what masked operands would have added goes into the bias."""
    axis = channel_axis(node)
    weight, *bias = (const_value(i) for i in node.inputs[1:])
    locs = [i.loc for i in node.inputs[1:]]
    op, cut, gone = node.op, knife.cut(node), knife.lost(node.inputs[0], axis)
    if not (isinstance(op, conv.Conv2d) and op.groups > 1) and gone.size:
        rest = along(knife.channels.flow.value(node.inputs[0]).rest, axis)
        bias = _with_rest(weight[:, gone], bias, np.broadcast_to(rest, (weight.shape[1],))[gone])
        weight = np.delete(weight, gone, 1)
    if cut is not None:
        weight, bias = weight[list(cut.kept)], [b[list(cut.kept)] for b in bias]
        if isinstance(op, conv.Conv2d) and op.groups > 1:
            op = replace(op, groups=op.groups * len(cut.kept) // node.type.shape[axis])
    parameters = [constant(value, loc) for value, loc in zip((weight, *bias), (*locs, node.loc), strict=False)]
    return op, [inputs[0], *parameters]


def _with_rest(weight: Array, bias: list[Array], rest: Array) -> list[Array]:
    """The bias with the sum of what lost columns held, computed in float64 and rounded once."""
    if not rest.any():
        return bias
    held = weight.reshape(*weight.shape[:2], -1).astype(np.float64).sum(2) @ rest.astype(np.float64)
    return [(held + (bias[0].astype(np.float64) if bias else 0.0)).astype(weight.dtype)]


def _channel_norm(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    """Parameters of channels; groups of a group norm go whole."""
    op, cut = node.op, knife.cut(node)
    if cut is None:
        return op, inputs
    if isinstance(op, norm.GroupNorm):
        op = replace(op, groups=op.groups * len(cut.kept) // node.type.shape[cut.axis])
    return op, [inputs[0], *(knife.narrow(i, Cut(0, cut.kept)) for i in inputs[1:])]


def _broadcast(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    return shape.Broadcast(_sized(node.type.shape, knife.cut(node))), inputs


def _reshape(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    return shape.Reshape(_sized(node.type.shape, knife.cut(node))), inputs


def _slice(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    """Bounds count what stays before them."""
    op, cut = node.op, knife.cut(node.inputs[0])
    assert isinstance(op, shape.Slice)
    if cut is None:
        return op, inputs
    starts, stops = list(op.starts), list(op.stops)
    starts[cut.axis], stops[cut.axis] = (int(np.searchsorted(cut.kept, v[cut.axis])) for v in (op.starts, op.stops))
    return replace(op, starts=tuple(starts), stops=tuple(stops)), inputs


def _concat(knife: Knife, node: Node, inputs: Operands) -> tuple[Op, Operands]:
    cut = knife.cut(node)
    assert isinstance(node.op, shape.Concat)
    return node.op, inputs if cut is None or cut.axis == node.op.axis else knife.fitted(node, inputs)


Shrink = Callable[[Knife, Node, Operands], tuple[Op, Operands]]

SHRINK: dict[type[Op], Shrink] = {
    **dict.fromkeys((conv.Conv2d, linear.Linear), _layer),
    **dict.fromkeys((norm.BatchNorm, norm.GroupNorm), _channel_norm),
    **dict.fromkeys((*ELEMENTWISE, attention.ScaledDotProductAttention, linear.Matmul), _fitted),
    shape.Broadcast: _broadcast,
    shape.Reshape: _reshape,
    shape.Slice: _slice,
    shape.Concat: _concat,
}
"""By operator class, for those derived from it too; all others keep their attributes and operands."""
