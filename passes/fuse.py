"""fuse: nodes become regions, and a region is run as one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from paring.ir.graph import Graph, Node
from paring.ir.op import Op
from paring.ir.ops import (
    ELEMENTWISE,
    POINTWISE,
    attention,
    conv,
    index,
    linear,
    norm,
    pool,
    reduce,
    scan,
    shape,
    sparse,
    unary,
    winograd,
)
from paring.ir.ops.core import Const, Input, Region
from paring.ir.types import BYTES
from paring.passes.base import Pass
from paring.passes.rewriter import Context

MOVEMENT: tuple[type[Op], ...] = (
    shape.Transpose,
    shape.Slice,
    shape.Pad,
    shape.Flip,
    shape.Roll,
    shape.LayoutTransform,
    index.Tril,
)

# Kernels with many multiply-accumulates: their operands are read many times, so nothing is computed inside those reads.
HEAVY: tuple[type[Op], ...] = (
    *(conv.Conv2d, conv.ConvTranspose2d, linear.Linear, linear.Matmul),
    *(sparse.SparseConv2d, sparse.SparseLinear, winograd.WinogradConv2d),
)
# Kernels that read each operand element a few times: cheap elementwise producers may be computed where they are read.
LIGHT: tuple[type[Op], ...] = (
    *(norm.Softmax, norm.LayerNorm, norm.RmsNorm, norm.GroupNorm, norm.BatchNorm),
    *(reduce.Reduction, reduce.ArgMax, scan.CumSum),
)
# Anchors without an elementwise prologue: windows overlap, or the operands are copied whole.
ALONE: tuple[type[Op], ...] = (pool.Pool2d, pool.AdaptiveAvgPool2d)
# Operands of these may be read through movements, so that splitting and merging heads costs nothing.
THROUGH_MOVES: tuple[type[Op], ...] = (attention.ScaledDotProductAttention, attention.IntegerAttention)
# Kernels that can write their result transposed.
WRITES_TRANSPOSED = THROUGH_MOVES
ANCHORS = (*HEAVY, *LIGHT, *ALONE, *THROUGH_MOVES)

# Past this many nodes a kernel's registers spill, and the expression trees grow deep.
MAX_NODES = 24


@dataclass
class _Group:
    """A region in the making: its nodes, all inside except the root's result, and the anchor, once there is one."""

    root: Node
    nodes: set[Node]
    anchor: Node | None = None


@dataclass(frozen=True)
class Fuse(Pass):
    """Each anchor with the elementwise nodes around it, and each chain of elementwise nodes, becomes one region.

    Anchors are convolutions, products, norms, reductions, poolings and attention.

    `max_nodes` bounds the size of a region.
    """

    name = "fuse"
    max_nodes: int = MAX_NODES

    def run(self, graph: Graph, context: Context) -> Graph:
        groups = self._group(graph, context)
        # Found from the outputs back, read from the inputs on.
        context.declined.reverse()
        return _rebuild(graph, groups) if context.rewrites else graph

    def _group(self, graph: Graph, context: Context) -> dict[Node, _Group]:
        """From the outputs back: a node joins the group of its readers when it has no reader outside."""
        users = graph.users()
        outputs = set(graph.outputs)
        groups: dict[Node, _Group] = {}
        for node in reversed(graph.nodes()):
            readers = users[node]
            if not computes(node):
                continue
            if node not in outputs and _all_inline(node, readers, groups) and context.spend("fuse", node):
                continue
            found = list({id(groups[r]): groups[r] for r in readers if r in groups}.values())
            reason = _stands_alone(node, readers, groups, outputs) or self._refuses(found[0], node, users)
            if reason and readers:
                context.decline("fuse", node, reason)
            joined = found[0] if not reason and context.spend("fuse", node) else None
            if joined is None:
                groups[node] = _Group(node, {node}, node if isinstance(node.op, ANCHORS) else None)
                continue
            joined.nodes.add(node)
            groups[node] = joined
            if isinstance(node.op, ANCHORS):
                joined.anchor = node
        return groups

    def _refuses(self, group: _Group, node: Node, users: Mapping[Node, list[Node]]) -> str:
        """Why a node may not join the group of its readers; empty where it may."""
        readers = users[node]
        if len(group.nodes) >= self.max_nodes:
            return f"the region already has {self.max_nodes} nodes"
        if isinstance(group.root.op, shape.Concat) or isinstance(node.op, shape.Concat):
            return "a concat copies its operands"
        if isinstance(node.op, ANCHORS):
            return _refuses_anchor(group, node)
        if not isinstance(node.op, (*POINTWISE, *MOVEMENT, shape.Broadcast)):
            return f"{node.op.name} is a kernel of its own"
        own = _narrowed_anchor(node, users)
        if own is not None and _has_another_anchor(group, own, users):
            return f"behind {own.op.name} it writes fewer bytes, and the region has an anchor without it"
        if group.anchor is not None and _reaches(group, node, readers):
            return _refuses_prologue(group.anchor, node, readers)
        if isinstance(node.op, MOVEMENT) and group.anchor is not None:
            return "only what lies between its reader's kernel and the result can be computed there"
        return _refuses_recomputing(node, readers)


def _stands_alone(node: Node, readers: list[Node], groups: Mapping[Node, _Group], outputs: set[Node]) -> str:
    """Why there is no one group that a node could join; empty where there is."""
    if node in outputs or not readers:
        return "it is a result of the network"
    if not all(reader in groups for reader in readers):
        return "it is read as a view"
    return "several kernels read it" if len({id(groups[reader]) for reader in readers}) > 1 else ""


def _refuses_prologue(anchor: Node, node: Node, readers: list[Node]) -> str:
    """Why a node may not be computed where the anchor reads it."""
    if isinstance(anchor.op, THROUGH_MOVES):
        allowed: tuple[type[Op], ...] = (*MOVEMENT, shape.Broadcast)
    else:
        allowed = (*ELEMENTWISE, shape.Broadcast) if isinstance(anchor.op, LIGHT) else ()
    if not isinstance(node.op, allowed):
        return f"{anchor.op.name} wants this operand in memory"
    return _refuses_recomputing(node, readers)


def _narrowed_anchor(node: Node, users: Mapping[Node, list[Node]]) -> Node | None:
    """The anchor that only this node reads, into fewer bytes than the anchor's result has."""
    narrowed = [i for i in node.inputs if isinstance(i.op, ANCHORS) and len(users[i]) == 1 and node.type.bytes < i.type.bytes]
    return narrowed[0] if isinstance(node.op, POINTWISE) and narrowed else None


def _has_another_anchor(group: _Group, anchor: Node, users: Mapping[Node, list[Node]]) -> bool:
    """Whether a group has an anchor, or reads what is going to be its anchor, besides this one."""
    read = (operand for member in group.nodes for operand in member.inputs if operand is not anchor)
    return group.anchor is not None or any(isinstance(n.op, ANCHORS) and len(users[n]) == 1 for n in read)


def _refuses_recomputing(node: Node, readers: list[Node]) -> str:
    if isinstance(node.op, POINTWISE) and any(_expands(reader) for reader in readers):
        return "a broadcast would compute it again for each copy"
    return ""


def _all_inline(node: Node, readers: list[Node], groups: Mapping[Node, _Group]) -> bool:
    """Whether every reader computes the node itself: then each region has a copy of it, at no cost.

    A broadcast is repeated, and bytes are widened, where they are read: less is moved than by way of memory.
    """
    widens = isinstance(node.op, unary.Cast) and node.inputs[0].type.dtype in BYTES
    if not (widens or isinstance(node.op, shape.Broadcast)):
        return False
    return all(reader in groups and _inlines(groups[reader], reader) for reader in readers)


def _inlines(group: _Group, reader: Node) -> bool:
    if isinstance(reader.op, (*ELEMENTWISE, shape.Broadcast)):
        return True
    return reader is group.anchor and isinstance(reader.op, (*LIGHT, *THROUGH_MOVES))


def computes(node: Node) -> bool:
    """Whether a node is work for a kernel: a reshape is a view, a constant and an input are there already."""
    return not isinstance(node.op, Input | Const | Region | shape.Reshape)


def _refuses_anchor(group: _Group, node: Node) -> str:
    """Why an anchor may not become that of a group of nodes behind it: they are elementwise, or transpose its result."""
    if group.anchor is not None:
        return "the region has an anchor already"
    others = (*POINTWISE, shape.Broadcast)
    moved = [n for n in group.nodes if not isinstance(n.op, others)]
    if moved == [group.root] and isinstance(group.root.op, shape.Transpose) and isinstance(node.op, WRITES_TRANSPOSED):
        (written,) = group.root.inputs
    elif moved:
        return f"its result would be read through a {moved[0].op.name}"
    else:
        written = group.root
    if node.type.shape != written.type.shape or any(_expands(n) and node in n.inputs for n in group.nodes):
        return "its result is broadcast"
    return ""


def _expands(node: Node) -> bool:
    """Whether a node reads its operand more than once for an element."""
    return isinstance(node.op, shape.Broadcast) and node.type.size > node.inputs[0].type.size


def _reaches(group: _Group, node: Node, readers: list[Node]) -> bool:
    """Whether a node is read, through the group, by its anchor."""
    anchor = group.anchor
    pending, seen = list(readers), set(readers)
    inside: dict[Node, list[Node]] = {}
    for member in group.nodes:
        for operand in member.inputs:
            inside.setdefault(operand, []).append(member)
    while pending:
        current = pending.pop()
        if current is anchor:
            return True
        for reader in inside.get(current, ()):
            if reader not in seen:
                seen.add(reader)
                pending.append(reader)
    return False


def _rebuild(graph: Graph, groups: dict[Node, _Group]) -> Graph:
    """The graph of regions, built in the old graph's order."""
    new: dict[Node, Node] = {}
    order = graph.nodes()
    position = {node: i for i, node in enumerate(order)}
    for node in order:
        group = groups.get(node)
        if group is None:
            inputs = tuple(new[i] for i in node.inputs)
            new[node] = node.with_inputs(inputs)
        elif group.root is node:
            members = sorted(group.nodes, key=position.__getitem__)
            new[node] = _Body(group, groups).region(members, new)
    return Graph(tuple(new[n] for n in graph.inputs), tuple(new[n] for n in graph.outputs))


class _Body:
    """A region's body in the making.

    Constants of one element and what belongs to no region, but is computed by each reader, have a copy inside; all else from
    outside becomes an operand.
    """

    def __init__(self, group: _Group, groups: Mapping[Node, _Group]) -> None:
        self.group, self.groups = group, groups
        self.inside: dict[Node, Node] = {}
        self.operands: list[Node] = []
        self.inputs: list[Node] = []

    def region(self, members: list[Node], new: Mapping[Node, Node]) -> Node:
        for node in members:
            self.inside[node] = Node(node.op, [self._value(operand) for operand in node.inputs], node.loc)
        body = Graph(tuple(self.inputs), (self.inside[self.group.root],))
        anchor = self.group.anchor or self.group.root
        return Node(Region(anchor.op.name, body), [new[operand] for operand in self.operands], anchor.loc)

    def _value(self, node: Node) -> Node:
        if node not in self.inside:
            if computes(node) and node not in self.groups:
                self.inside[node] = Node(node.op, [self._value(operand) for operand in node.inputs], node.loc)
            elif isinstance(node.op, Const) and node.op.value.size == 1:
                self.inside[node] = node
            else:
                self.inside[node] = Node(Input(f"a{len(self.operands)}", node.type.dtype, node.type.shape))
                self.inputs.append(self.inside[node])
                self.operands.append(node)
        return self.inside[node]
