"""The text form: prints a graph so that parsing gives it back. Constants stand as digests, small ones in full."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Array, Op
from paring.ir.ops.core import Const, Input, Region

INLINE_ELEMENTS = 8


def show(graph: Graph, *, locs: bool = True) -> str:
    """The graph as text, one node a line; `locs=False` leaves provenance out (what equality looks at)."""
    return "\n".join(_graph_lines(graph, "", locs)) + "\n"


def same(a: Graph, b: Graph) -> bool:
    """Whether two graphs are the same program: equal ops, attributes, constants and wiring; provenance does not count."""
    return show(a, locs=False) == show(b, locs=False)


def constants(graph: Graph) -> dict[str, Array]:
    """The arrays that the text names by digest (those of regions included), each once."""
    found: dict[str, Array] = {}
    pending = [graph]
    while pending:
        for node in pending.pop().nodes():
            if isinstance(node.op, Region):
                pending.append(node.op.body)
            elif isinstance(node.op, Const) and not _inline(node.op):
                found[node.op.digest] = node.op.value
    return found


def _inline(op: Const) -> bool:
    return op.value.size <= INLINE_ELEMENTS


def _graph_lines(graph: Graph, indent: str, locs: bool) -> list[str]:
    names = {node: f"%{number}" for number, node in enumerate(graph.nodes())}
    lines = [f"{indent}graph({', '.join(names[node] for node in graph.inputs)}) {{"]
    for node in names:
        lines.extend(_node_lines(node, names, indent + "  ", locs))
    lines.append(f"{indent}  return {', '.join(names[node] for node in graph.outputs)}")
    lines.append(f"{indent}}}")
    return lines


def _node_lines(node: Node, names: dict[Node, str], indent: str, locs: bool) -> list[str]:
    operands = ", ".join(names[operand] for operand in node.inputs)
    head = f"{indent}{names[node]}: {node.type} = {node.op.name}({operands}){attributes(node.op)}"
    tail = f" @{quote(node.loc.module)}:{quote(node.loc.source)}" if locs and node.loc else ""
    if not isinstance(node.op, Region):
        return [head + tail]
    body = _graph_lines(node.op.body, indent, locs)
    return [f"{head} {body[0].lstrip()}", *body[1:-1], body[-1] + tail]


def attributes(op: Op) -> str:
    """The op's attributes that differ from their defaults, as ` {name=value, ...}`, or nothing."""
    if isinstance(op, Const):
        if not _inline(op):
            return f" {{sha256={quote(op.digest)}}}"
        return f" {{value={literal(tuple(op.value.ravel().tolist()))}}}"
    shown = []
    for field in dataclasses.fields(op):
        value = getattr(op, field.name)
        if isinstance(value, Graph) or (isinstance(op, Input) and field.name != "label"):
            continue
        if field.default is dataclasses.MISSING or literal(value) != literal(field.default):
            shown.append(f"{field.name}={literal(value)}")
    return f" {{{', '.join(shown)}}}" if shown else ""


def literal(value: object) -> str:
    """A Python literal that reads back to the same value, including -0.0, inf and nan."""
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, tuple):
        inner = ", ".join(literal(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, float | np.floating) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, bool | int | float | None):
        return repr(value)
    raise TypeError(f"an attribute is a str, int, float, bool, None or a tuple of them, not {type(value).__name__}")


def quote(text: str) -> str:
    """A string in double quotes with everything odd escaped, on one line."""
    if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
        return f'"{text}"'
    safe = "".join(c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\u{ord(c):08x}" for c in text)
    return f'"{safe}"'
