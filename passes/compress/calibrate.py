"""Calibration: batches of inputs go through a graph, and observers see the values between units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from paring.ir.errors import ArgumentError, InputError
from paring.ir.graph import Graph, Node
from paring.ir.interpreter import check_inputs, evaluate
from paring.ir.op import Array
from paring.ir.ops.core import Const, Input
from paring.passes.rewriter import Context

# How many batches are looked at: values of all nodes are kept, and the interpreter runs them.
BATCHES = 4


def check_calibration(graph: Graph, context: Context, who: str) -> None:
    """Raise ArgumentError where a pass has no data, InputError for a batch that does not fit or is not finite."""
    if not context.calibration:
        hint = "paring.compile(..., calibration=batches) or --calibration FILE, some dozens of typical inputs"
        raise ArgumentError(f"{who} needs calibration data", hint=hint)
    for number, batch in enumerate(context.calibration):
        try:
            check_inputs(graph, batch)
        except InputError as error:
            raise InputError(error.what, where=f"calibration batch {number}", hint=error.hint) from None
        for node, array in zip(graph.inputs, batch, strict=True):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                label = node.op.label if isinstance(node.op, Input) else ""
                where = f"calibration batch {number}, input {label}"
                raise InputError("calibration data are NaN or infinite", where=where, hint="leave such inputs out")


def gather(graph: Graph, nodes: Sequence[Node], context: Context, see: Callable[[Node, Array], None]) -> None:
    """Show the value of each node for each batch of the calibration data: one run of the graph for each batch."""
    computed = [n for n in nodes if not isinstance(n.op, Input | Const)]
    observed = Graph(graph.inputs, tuple(computed))
    constants = {n: n.op.value for n in nodes if isinstance(n.op, Const)}
    total = len(context.calibration)
    for number, batch in enumerate(context.calibration):
        context.tell("calibrate", number, total)
        values = dict(zip(computed, context.run(observed, batch) if computed else (), strict=True))
        values.update(zip(graph.inputs, batch, strict=True))
        values.update(constants)
        for node in nodes:
            see(node, values[node])
    context.tell("calibrate", total, total)


def peaks(graph: Graph, axes: Mapping[Node, int], context: Context) -> dict[Node, Array]:
    """The greatest |value| of each channel of some nodes in calibration, float64; `axes`: the dimension of their channels."""
    found: dict[Node, Array] = {}

    def see(node: Node, values: Array) -> None:
        others = tuple(d for d in range(values.ndim) if d != axes[node])
        greatest = np.abs(values).max(others, initial=0.0).astype(np.float64)
        found[node] = np.maximum(found.get(node, 0.0), greatest)

    gather(graph, list(axes), context, see)
    return found


def evaluate_from(outputs: Sequence[Node], known: Mapping[Node, Array]) -> list[Array]:
    """The values of some nodes, given those of others: only what lies between is computed."""
    values = dict(known)
    stack = list(outputs)
    while stack:
        node = stack[-1]
        missing = [i for i in node.inputs if i not in values] if node not in values else []
        if missing:
            stack.extend(missing)
            continue
        if node not in values:
            values[node] = evaluate(node, [values[i] for i in node.inputs])
        stack.pop()
    return [values[node] for node in outputs]
