"""cse: equal computations are done once."""

from __future__ import annotations

from dataclasses import dataclass

from paring.ir.graph import Graph, Node, rebuild
from paring.ir.op import Op
from paring.ir.ops.core import Const, Input
from paring.passes.base import Pass
from paring.passes.rewriter import Context
from paring.passes.util import module_of


@dataclass(frozen=True)
class Cse(Pass):
    """Nodes of the same op on the same operands become one node; equal constants become one constant.

    Floats of different modules stay apart: parameters that are equal today may be trained tomorrow.
    """

    name = "cse"

    def run(self, graph: Graph, context: Context) -> Graph:
        known: dict[tuple[Op | str, str, tuple[Node, ...]], Node] = {}

        def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
            new = node.with_inputs(inputs)
            if isinstance(new.op, Input):
                return new
            # Attributes 0.0 and -0.0 compare equal in Python, but are not the same op: their text differs.
            op = new.op.digest + _owner(new) if isinstance(new.op, Const) else new.op
            first = known.setdefault((op, repr(op), inputs), new)
            return first if first is new or context.spend("cse", new) else new

        return rebuild(graph, visit)


def _owner(constant: Node) -> str:
    """The module whose parameter a constant may be."""
    return f" {module_of(constant)}" if constant.type.is_float else ""
