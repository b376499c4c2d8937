"""Which channels of a graph hang together, found by following labels from the layers that make them to those that read them.

Every output channel of a convolution or linear layer with constant weights gets a label. Operators hand labels on, tie them
(a sum needs the same channels of both operands), or pin them (an output of the network keeps all its channels). What is tied
is removed together or not at all; what is pinned stays, with the reason. Nothing here knows how channels are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.interpreter import interpret
from paring.ir.op import Array, Op
from paring.ir.ops.core import Const, Input
from paring.ir.ops.shape import Broadcast
from paring.passes.compress.channels.labels import Coupling, Value, one_value, slices_apart, varying
from paring.passes.util import by_class

ALL = "they are all that some value has"
GRID = "they form a grid with others, of which whole rows go"
Rule = Callable[["Flow", Node], Value]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only go together: of each layer which of its outputs, by `number` in the order of their layers."""

    number: int
    channels: Mapping[Node, Array]

    @property
    def layer(self) -> Node:
        """The first of its layers."""
        return next(iter(self.channels))

    @property
    def size(self) -> int:
        return sum(map(len, self.channels.values()))


@dataclass(frozen=True)
class Stay:
    """So many of a layer's channels stay, and why."""

    layer: Node
    count: int
    reason: str


class Flow:
    """Labels of every value of a graph. `values` has None for what is computed of constants alone."""

    def __init__(self, graph: Graph, rules: Mapping[type[Op], Rule]) -> None:
        self.graph = graph
        self.coupling = Coupling()
        self.values: dict[Node, Value | None] = {}
        self.layers: dict[Node, Array] = {}
        self._constants: dict[Node, Array] = {}
        for node in graph.nodes():
            self.values[node] = self._value(node, rules)
        for node in graph.outputs:
            value = self.values[node]
            if value is not None:
                self.coupling.pin(value.labels, "it is an output of the network")
        self._settle()

    def _value(self, node: Node, rules: Mapping[type[Op], Rule]) -> Value | None:
        if isinstance(node.op, Input):
            return self.unknown(node, f"input {node.op.label!r}")
        if isinstance(node.op, Const) or (node.inputs and all(self.values[i] is None for i in node.inputs)):
            return None
        rule = by_class(rules, node.op)
        empty = any(i.type.size == 0 for i in (node, *node.inputs))
        return self.mixed(node) if rule is None or empty else rule(self, node)

    def _settle(self) -> None:
        """What is removed of a value is whole slices of it: where labels form a grid, those of one axis go together."""
        for value in self.values.values():
            if value is None or len(varying(value.labels)) < 2:
                continue
            roots = self.coupling.roots(value.labels)
            axes = varying(roots)
            if len(axes) > 1:
                kept = max(axes, key=lambda axis: slices_apart(roots, axis))
                self.coupling.tie_along(value.labels, [axis for axis in axes if axis != kept], GRID)

    # --- for rules ---------------------------------------------------------------------------------------------------

    def value(self, node: Node) -> Value:
        """That of a node which is not constant."""
        found = self.values[node]
        assert found is not None
        return found

    def unknown(self, node: Node, what: str) -> Value:
        """A value none of whose elements may go; what meets it stays too."""
        labels = self.coupling.fresh(1).reshape((1,) * node.type.rank)
        self.coupling.pin(labels, f"it meets {what}")
        return Value(labels, np.full(labels.shape, np.nan), (False,) * node.type.rank)

    def mixed(self, node: Node) -> Value:
        """The result of an operator that needs all channels of all its operands."""
        for operand in node.inputs:
            value = self.values[operand]
            if value is not None:
                self.coupling.pin(value.labels, f"{node.op.name} needs all of them")
        return self.unknown(node, f"the result of {node.op.name}")

    def tied(self, node: Node, value: Value, axes: Iterable[int]) -> Value:
        """A value whose labels do not differ along axes, because the node mixes what lies along them."""
        mixed = [axis for axis in axes if value.varies(axis)]
        labels = self.coupling.tie_along(value.labels, mixed, f"{node.op.name} mixes them")
        return Value(labels, one_value(value.rest, mixed), value.free)

    def joined(self, values: Iterable[Value]) -> tuple[Array, list[Value]]:
        """The labels of a value each of whose elements comes of those at the same place, and whose labels it has.

        What was broadcast along every dimension that can become shorter just becomes shorter with the others.
        """
        known = list(values)
        shape = np.broadcast_shapes(*(value.labels.shape for value in known))
        along = [axis for axis, extent in enumerate(shape) if extent > 1]
        bound = [v for v in known if v.labels.size > 1 or not all(v.free[axis] for axis in along)] or known[:1]
        for value in bound[1:]:
            self.coupling.tie(bound[0].labels, value.labels)
        return np.broadcast_to(bound[0].labels, shape), bound

    def constant(self, node: Node) -> Array:
        """A constant with its rank, not repeated along the dimensions that it is broadcast to."""
        if node not in self._constants:
            source = node.inputs[0] if isinstance(node.op, Broadcast) else node
            found = interpret(Graph((), (source,)), [])[0]
            self._constants[node] = found.reshape((1,) * (node.type.rank - found.ndim) + found.shape)
        return self._constants[node]

    def constant_rest(self, node: Node, shape: tuple[int, ...]) -> Array:
        """For labels of a shape the elements of a constant that go with them; NaN where they differ."""
        found = self.constant(node)
        axes = [axis for axis, extent in enumerate(shape) if extent == 1]
        return np.broadcast_to(one_value(found, axes), shape) if found.dtype.kind == "f" else np.full(shape, np.nan)

    def reads(self, node: Node, value: Value, axis: int, padded: bool) -> None:
        """A layer reads channels: what they hold once masked goes into its bias, so that has to be known."""
        if not value.varies(axis):
            return
        self.coupling.pin(value.labels[np.isnan(value.rest)], f"once masked they would not be one number each at {node.op.name}")
        if padded:
            lasting = value.rest != 0
            self.coupling.pin(value.labels[lasting], f"once masked they would not be zero as the padding of {node.op.name} is")


@dataclass(frozen=True, eq=False)
class Channels:
    """The groups of a graph, and the sets of which no more than all but one may go: they are all that some value has.

    `roots` names for each value the group of each element; numbers that are no group's stay.
    """

    flow: Flow
    roots: Mapping[Node, Array]
    groups: tuple[Group, ...]
    wholes: tuple[frozenset[int], ...]
    stays: tuple[Stay, ...]

    def families(self) -> list[list[Group]]:
        """Groups that share layers, in the order of these: the widths of their layers hang together."""
        links: nx.Graph = nx.Graph()
        for group in self.groups:
            links.add_edges_from((group.number, layer) for layer in group.channels)
        components = list(nx.connected_components(links))
        family = {number: place for place, component in enumerate(components) for number in component}
        families: list[list[Group]] = [[] for _ in components]
        for group in self.groups:
            families[family[group.number]].append(group)
        return families


def find_channels(graph: Graph, rules: Mapping[type[Op], Rule]) -> Channels:
    """Follow labels through a graph by the rules of its operators."""
    flow = Flow(graph, rules)
    coupling = flow.coupling
    roots = {node: coupling.roots(value.labels) for node, value in flow.values.items() if value is not None}
    sets = {frozenset(np.unique(found).tolist()) for found in roots.values()}
    alone = {root for whole in sets if len(whole) == 1 for root in whole}
    pinned, mixed = coupling.pinned(), coupling.mixed()
    held = alone | set(pinned)
    channels: dict[int, dict[Node, Array]] = {}
    stays: list[Stay] = []
    for layer, labels in flow.layers.items():
        own = coupling.roots(labels)
        why: dict[str, int] = {}
        for root in dict.fromkeys(own.tolist()):
            places = np.flatnonzero(own == root)
            if root in held:
                reason = (mixed.get(root) if root in alone else None) or pinned.get(root) or ALL
                why[reason] = why.get(reason, 0) + len(places)
            else:
                channels.setdefault(root, {})[layer] = places
        stays += [Stay(layer, count, reason) for reason, count in why.items()]
    groups = tuple(Group(root, of) for root, of in channels.items())
    wholes = sorted((whole for whole in sets if whole and not whole & held), key=sorted)
    return Channels(flow, roots, groups, tuple(wholes), tuple(stays))
