"""For every pass that is not made of rules, passes with one mistake each: the tests must tell them from the right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np

from paring.ir import Graph, Node, Op, Region, rebuild
from paring.ir.interpreter import evaluate
from paring.ir.ops import binary, conv, shape
from paring.ir.ops.core import Const, Input
from paring.passes import fuse, layout
from paring.passes.base import Pass
from paring.passes.const_fold import ConstFold
from paring.passes.cse import Cse
from paring.passes.fuse import Fuse
from paring.passes.layout import Layout
from paring.passes.rewriter import Context
from paring.passes.util import const_value, constant


class SwapsOperands(ConstFold):
    """Evaluates with the operands in the wrong order."""

    def run(self, graph: Graph, context: Context) -> Graph:
        def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
            new = node.with_inputs(inputs)
            if isinstance(node.op, Const | Input) or not all(isinstance(i.op, Const) for i in inputs):
                return node if isinstance(node.op, Const | Input) else new
            context.spend("const-fold", node)
            order = inputs[::-1] if isinstance(node.op, binary.Sub) else inputs
            return constant(evaluate(new, [const_value(i) for i in order]))

        return rebuild(graph, visit)


class EmptiesTooMuch(ConstFold):
    """Takes a node with one empty operand for an empty node."""

    def run(self, graph: Graph, context: Context) -> Graph:
        def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
            if any(i.type.size == 0 for i in inputs):
                context.spend("const-fold", node)
                return constant(np.zeros(node.type.shape, node.type.dtype))
            return node.with_inputs(inputs)

        return rebuild(graph, visit)


class MergesBy(Cse):
    """Nodes are taken for the same when `key` is."""

    def __init__(self, key: Callable[[Node, tuple[Node, ...]], object]) -> None:
        object.__setattr__(self, "key", key)

    def run(self, graph: Graph, context: Context) -> Graph:
        known: dict[object, Node] = {}

        def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
            new = node.with_inputs(inputs)
            if isinstance(new.op, Input):
                return new
            first = known.setdefault((self.key(new, inputs), new.type), new)
            return first if first is new or context.spend("cse", new) else new

        return rebuild(graph, visit)


def _value(op: Op) -> object:
    return op.digest if isinstance(op, Const) else op


class Patched(Pass):
    """A pass run with one of its functions replaced."""

    name = "patched"

    def __init__(self, base: Pass, patch: Callable[[], Any]) -> None:
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "patch", patch)

    def run(self, graph: Graph, context: Context) -> Graph:
        with self.patch():
            return self.base.run(graph, context)


def _blocked(op: type[Op], change: Callable[[Any, Node, Node], Node | None]) -> Patched:
    """The layout pass with what it makes of one op changed: `change(walker, old, blocked)`."""
    right = layout.BLOCKED[op]

    def wrong(walker: Any, node: Node) -> Node | None:
        blocked = right(walker, node)
        return None if blocked is None else change(walker, node, blocked)

    return Patched(Layout(4), lambda: mock.patch.dict(layout.BLOCKED, {op: wrong}))


def reverses_the_operands(walker: Any, node: Node, blocked: Node) -> Node:
    return blocked.with_inputs(blocked.inputs[::-1])


def shifts_the_blocks(walker: Any, node: Node, blocked: Node) -> Node:
    op = blocked.op
    room = blocked.inputs[0].type.shape[1] - op.stops[1]
    move = 1 if room > 0 else -min(1, op.starts[1])
    starts, stops = ((values[0], values[1] + move, *values[2:]) for values in (op.starts, op.stops))
    return Node(shape.Slice(starts, stops, op.steps), blocked.inputs)


def pads_with_another_value(walker: Any, node: Node, blocked: Node) -> Node:
    return Node(dataclasses.replace(blocked.op, value=0.0), blocked.inputs)


def forgets_the_bias(walker: Any, node: Node, blocked: Node) -> Node:
    return Node(blocked.op, blocked.inputs[:2])


def turns_the_padding(walker: Any, node: Node, blocked: Node) -> Node:
    rows, columns = blocked.op.padding
    return Node(dataclasses.replace(blocked.op, padding=(rows[::-1], columns[::-1])), blocked.inputs)


def takes_one_channel_less(name: str) -> Callable[[Any, Node, Node], Node]:
    def change(walker: Any, node: Node, blocked: Node) -> Node:
        count = getattr(blocked.op, name)
        return Node(dataclasses.replace(blocked.op, **{name: count - 1}), blocked.inputs) if count > 1 else blocked

    return change


def ignores_whole_blocks(walker: Any, node: Node) -> Node | None:
    if node.op.axis != 1 or not any(map(walker.is_blocked, node.inputs)) or node.type.shape[1] % 4:
        return None
    plain = [walker.plain(i) for i in node.inputs]
    rolled = Node(shape.Roll((1,), (1,)), [Node(shape.Concat(1), plain)])
    return Node(shape.LayoutTransform("NCHW", "NCHW4c", node.type.shape[1]), [rolled])


def _region(change: Callable[[Node, list[Node]], Sequence[Node]]) -> Patched:
    """The fuse pass with the bodies of its regions rebuilt: `change(node, new inputs)` gives the inputs to use."""
    right = fuse._Body.region

    def wrong(body: Any, members: list[Node], new: dict[Node, Node]) -> Node:
        region = right(body, members, new)

        def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
            return node if not inputs else node.with_inputs(change(node, list(inputs)))

        return Node(Region(region.op.kind, rebuild(region.op.body, visit)), region.inputs, region.loc)

    return Patched(Fuse(), lambda: mock.patch.object(fuse._Body, "region", wrong))


def swaps_operands(node: Node, inputs: list[Node]) -> Sequence[Node]:
    return inputs[::-1] if isinstance(node.op, binary.Sub) else inputs


def forgets_constants(node: Node, inputs: list[Node]) -> Sequence[Node]:
    return [constant(np.zeros_like(i.op.value)) if isinstance(i.op, Const) else i for i in inputs]


def reads_the_first_operand_twice(node: Node, inputs: list[Node]) -> Sequence[Node]:
    return [inputs[0]] * 2 if len(inputs) == 2 and inputs[0].type == inputs[1].type else inputs


WRONG_PASSES: dict[str, tuple[Pass, ...]] = {
    "const-fold": (SwapsOperands(), EmptiesTooMuch()),
    "cse": (
        MergesBy(lambda node, inputs: (node.op.name, inputs) if node.inputs else _value(node.op)),
        MergesBy(lambda node, inputs: (_value(node.op), frozenset(inputs))),
        MergesBy(lambda node, inputs: ("const" if isinstance(node.op, Const) else node.op, inputs)),
    ),
    "layout{block=4}": (
        *(_blocked(shape.Concat, reverses_the_operands), _blocked(shape.Slice, shifts_the_blocks)),
        *(_blocked(shape.Pad, pads_with_another_value), _blocked(conv.Conv2d, forgets_the_bias)),
        *(_blocked(conv.Conv2d, turns_the_padding), _blocked(binary.Sub, reverses_the_operands)),
        *(_blocked(conv.Conv2d, takes_one_channel_less(name)) for name in ("in_channels", "out_channels")),
        Patched(Layout(4), lambda: mock.patch.dict(layout.BLOCKED, {shape.Concat: ignores_whole_blocks})),
    ),
    "fuse": (_region(swaps_operands), _region(forgets_constants), _region(reads_the_first_operand_twice)),
}
"""By pass, for those that are not made of rules."""
