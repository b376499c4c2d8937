"""The static plan: the order of the kernels, and where each of their results lies in one arena.

Placement is greedy by size with best fit (Pisarchyk and Lee 2020): the largest result first, each in the tightest gap
between those that are alive at the same time. Inputs, weights and outputs of the graph lie outside the arena.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from paring.ir.graph import Graph, Node, rebuild
from paring.ir.liveness import root
from paring.ir.op import Array
from paring.ir.ops import ELEMENTWISE
from paring.ir.ops.core import Const, Input, Region
from paring.ir.ops.shape import Broadcast, Reshape
from paring.ir.types import DTYPES

# What TVM's kernels assume of the buffers they are given.
ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """Where a value lies: `position` counts inputs, weights and outputs, and is the byte offset in the arena."""

    space: str  # input, weight, arena, output
    position: int


@dataclass(frozen=True, eq=False)
class Step:
    """One kernel call: `body` over `operands`, which gives `node`; `in_place` where it overwrites an operand."""

    node: Node
    body: Graph
    operands: tuple[Node, ...]
    in_place: bool


@dataclass(frozen=True, eq=False)
class Allocation:
    """Bytes of the arena that are taken from step `first` to step `last`, by one result or by several in turn."""

    nodes: tuple[Node, ...]
    bytes: int
    offset: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Plan:
    """`slots` has each result, input and weight; a Reshape and a repeated weight share the slot of what they show.

    `outputs` says where each output of the graph is found: an output that is an input or a weight is not computed at all.
    """

    graph: Graph
    order: tuple[Step, ...]
    slots: dict[Node, Slot]
    weights: tuple[Const, ...]
    outputs: tuple[Slot, ...]
    results: tuple[Node, ...]
    allocations: tuple[Allocation, ...]
    peak_bytes: int


def plan(graph: Graph) -> Plan:
    """Plan a lowered graph: nodes are Input, Const, Reshape, and one kernel for each Region or other single op."""
    steps = _steps(graph)
    slots, weights, results = _outside(graph, steps)
    order, groups = _share(steps, slots)
    allocations = _place(groups)
    for allocation in allocations:
        slots.update((node, Slot("arena", allocation.offset)) for node in allocation.nodes)
    for node in graph.nodes():
        if isinstance(node.op, Reshape):
            slots[node] = slots[root(node)]
    peak = max((a.offset + aligned(a.bytes) for a in allocations), default=0)
    outputs = tuple(slots[node] for node in graph.outputs)
    launched = tuple(step for step in order if step.node.type.size)
    return Plan(graph, launched, slots, weights, outputs, results, allocations, peak)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def storage_bytes(node: Node) -> int:
    """Bytes of a value's buffer: kernels take at least one element."""
    return max(node.type.size, 1) * DTYPES[node.type.dtype].bytes


def as_kernel(node: Node) -> tuple[Graph, tuple[Node, ...]]:
    """The body that computes a node, and the operands it takes: a Region's own, or one made for a single op.

    Equal kernels get equal text: the body's inputs are labelled by position. Constants of a single element stay in the
    body, where the lowering writes them as immediates; larger ones become operands.
    """
    if isinstance(node.op, Region):
        body = node.op.body
        large = tuple(n for n in body.nodes() if isinstance(n.op, Const) and not _immediate(n))
        arguments = _arguments((*body.inputs, *large))
        whole = Graph(tuple(arguments), body.outputs)
        return rebuild(whole, lambda old, inputs: arguments.get(old) or old.with_inputs(inputs)), (*node.inputs, *large)
    operands = tuple(i for i in dict.fromkeys(node.inputs) if not _immediate(i))
    arguments = _arguments(operands)
    alone = Node(node.op, [arguments.get(i, i) for i in node.inputs], node.loc)
    return Graph(tuple(arguments.values()), (alone,)), operands


def _arguments(nodes: Iterable[Node]) -> dict[Node, Node]:
    return {n: Node(Input(str(position), n.type.dtype, n.type.shape)) for position, n in enumerate(nodes)}


def _immediate(node: Node) -> bool:
    return isinstance(node.op, Const) and node.type.size == 1


def overwritable(body: Graph) -> frozenset[int]:
    """Positions of the operands whose memory the result may take over.

    Each element of such an operand is read at the very index that is then written, and nowhere else: the body is
    elementwise, and nothing on the way from the operand to the result moves elements.
    """
    (output,) = body.outputs
    nodes = body.nodes()
    if not all(isinstance(n.op, (*ELEMENTWISE, Input, Const, Broadcast)) for n in nodes):
        return frozenset()
    moved: set[Node] = set()
    for node in reversed(nodes):
        if isinstance(node.op, Broadcast) or node in moved:
            moved.update(node.inputs)
    return frozenset(
        position
        for position, node in enumerate(body.inputs)
        if node not in moved and node.type.shape == output.type.shape and node.type.bytes == output.type.bytes
    )


def _steps(graph: Graph) -> list[Step]:
    computed = (node for node in graph.nodes() if not isinstance(node.op, Input | Const | Reshape))
    return [Step(node, *as_kernel(node), in_place=False) for node in computed]


def _outside(graph: Graph, steps: list[Step]) -> tuple[dict[Node, Slot], tuple[Const, ...], tuple[Node, ...]]:
    """The slots of inputs, weights and outputs, with the weights and the output nodes in the order of their slots."""
    slots = {node: Slot("input", position) for position, node in enumerate(graph.inputs)}
    weights: dict[str, tuple[int, Const]] = {}
    results: list[Node] = []
    for node in (root(n) for n in (*(o for step in steps for o in step.operands), *graph.outputs)):
        if isinstance(node.op, Const) and node not in slots:
            position, _ = weights.setdefault(node.op.digest, (len(weights), node.op))
            slots[node] = Slot("weight", position)
    for node in dict.fromkeys(root(n) for n in graph.outputs):
        if node not in slots:
            slots[node] = Slot("output", len(results))
            results.append(node)
    return slots, tuple(op for _, op in weights.values()), tuple(results)


@dataclass(eq=False)
class _Group:
    """Results that take turns in the same memory."""

    nodes: list[Node]
    bytes: int
    first: int
    last: int


def _share(steps: list[Step], slots: dict[Node, Slot]) -> tuple[list[Step], list[_Group]]:
    """Give each result that belongs in the arena a group of its own, or the one of an operand it overwrites."""
    last = {step.node: position for position, step in enumerate(steps)}
    for position, step in enumerate(steps):
        last.update((root(operand), position) for operand in step.operands)
    groups: dict[Node, _Group] = {}
    order: list[Step] = []
    for position, step in enumerate(steps):
        given = None if step.node in slots else _given_up(step, position, last, groups)
        if given is not None:
            group = groups[step.node] = groups[given]
            group.nodes.append(step.node)
            group.last = last[step.node]
        elif step.node not in slots:
            groups[step.node] = _Group([step.node], storage_bytes(step.node), position, last[step.node])
        order.append(replace(step, in_place=given is not None))
    return order, list(dict.fromkeys(groups.values()))


def _given_up(step: Step, position: int, last: dict[Node, int], groups: dict[Node, _Group]) -> Node | None:
    """The first operand whose memory the result may take: it is read here for the last time, and safely at each place."""
    legal = overwritable(step.body)
    places: dict[Node, list[int]] = {}
    for place, operand in enumerate(step.operands):
        places.setdefault(root(operand), []).append(place)
    for operand, where in places.items():
        if operand in groups and last[operand] == position and legal.issuperset(where):
            return operand
    return None


def _place(groups: list[_Group]) -> tuple[Allocation, ...]:
    """Offsets by size, largest first, each in the tightest gap between allocations alive at the same time."""
    count = len(groups)
    first, last = (np.array([getattr(g, name) for g in groups], np.int64) for name in ("first", "last"))
    size = np.array([aligned(g.bytes) for g in groups], np.int64)
    offset = np.full(count, -1, np.int64)
    for index in sorted(range(count), key=lambda i: (-size[i], first[i])):
        rivals = np.flatnonzero((offset >= 0) & (first <= last[index]) & (last >= first[index]))
        rivals = rivals[np.lexsort((rivals, offset[rivals]))]
        offset[index] = _best_gap(offset[rivals], size[rivals], int(size[index]))
    return tuple(Allocation(tuple(g.nodes), g.bytes, int(at), g.first, g.last) for g, at in zip(groups, offset, strict=True))


def _best_gap(offsets: Array, sizes: Array, wanted: int) -> int:
    """The start of the smallest gap that holds `wanted` bytes, or the end; `offsets` ascend."""
    best, best_room, end = -1, -1, 0
    for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
        room = offset - end
        if room >= wanted and (best < 0 or room < best_room):
            best, best_room = end, room
        end = max(end, offset + size)
    return end if best < 0 else best
