"""Invariants of a whole graph that no single node can see."""

from __future__ import annotations

from collections.abc import Mapping

from paring.ir.errors import IRTypeError, VerifyError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array, Op
from paring.ir.ops import OPS
from paring.ir.ops.core import Const, Input, Region


def verify(graph: Graph, *, inside: str = "", given: Mapping[Node, Array] | None = None) -> None:
    """Raise VerifyError unless the graph is well formed.

    Its inputs are distinct Input nodes and the only ones it reaches, each op is in the table, each stored type is what
    the op infers, constants hold what their readers are defined on, each region's body is a graph of its own. `given`: what
    is known of its inputs.
    """
    known = dict(given or {})
    where = inside or "graph"
    if not graph.outputs:
        raise VerifyError("a graph has at least one output", where=where)
    if len(set(graph.inputs)) != len(graph.inputs):
        raise VerifyError("an input is listed twice", where=where)
    for node in graph.inputs:
        if not isinstance(node.op, Input):
            raise VerifyError(f"{node.op.name} is listed as an input", where=where)
    listed = set(graph.inputs)
    for node in graph.nodes():
        if isinstance(node.op, Const):
            known[node] = node.op.value
        contents = tuple(known.get(operand) for operand in node.inputs)
        _verify_node(node, contents, where)
        if isinstance(node.op, Input) and node not in listed:
            raise VerifyError(f"input {node.op.label!r} is read but not listed", where=where, why="it belongs to another graph")
        if isinstance(node.op, Region):
            outside = {i: array for i, array in zip(node.op.body.inputs, contents, strict=True) if array is not None}
            verify(node.op.body, inside=f"region {node.op.kind} of {where}", given=outside)


def check_trusted(graph: Graph, constant: frozenset[Node] = frozenset()) -> None:
    """Raise VerifyError where a kernel would rely on values that nobody has checked; `constant`: inputs that are."""
    for node in graph.nodes():
        fixed = [isinstance(operand.op, Const) or operand in constant for operand in node.inputs]
        loose = [place for place in node.op.trusted if not fixed[place]]
        if loose:
            hint = "they are what `pack` of its lists gives, as constants"
            raise VerifyError(f"operand {loose[0]} of {node.op.name} is not constant", where=_place(node, "graph"), hint=hint)
        if isinstance(node.op, Region):
            body = node.op.body
            check_trusted(body, frozenset(i for i, known in zip(body.inputs, fixed, strict=True) if known))


def _verify_node(node: Node, contents: tuple[Array | None, ...], where: str) -> None:
    if not isinstance(node.op, Op) or OPS.get(node.op.name) is not type(node.op):
        what, hint = f"{node.op!r} is not in the table of operators", "add it to paring.ir.ops.ALL"
        raise VerifyError(what, where=_place(node, where), hint=hint)
    try:
        types = tuple(operand.type for operand in node.inputs)
        inferred = node.op.infer(*types)
        node.op.check_contents(types, contents)
    except IRTypeError as error:
        raise VerifyError(f"{node.op.name} is ill-typed: {error.what}", where=_place(node, where), why=error.why) from None
    if inferred != node.type:
        raise VerifyError(f"{node.op.name} claims {node.type}, infers {inferred}", where=_place(node, where))


def _place(node: Node, where: str) -> str:
    operands = ", ".join(str(operand.type) for operand in node.inputs)
    origin = f" from {node.loc}" if node.loc else ""
    return f"{getattr(node.op, 'name', node.op)}({operands}){origin} in {where}"
