"""The reference interpreter and the magnitude bound: what a graph means, and how well its numbers are conditioned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from paring.ir.errors import InputError, InternalError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops.core import Const, Input, Region
from paring.ir.types import type_of


def check_inputs(graph: Graph, arrays: Sequence[Array]) -> None:
    """Raise InputError unless the arrays match the graph's inputs in number, dtype and shape."""
    if len(arrays) != len(graph.inputs):
        raise InputError(f"expected {len(graph.inputs)} inputs, got {len(arrays)}")
    for position, (node, array) in enumerate(zip(graph.inputs, arrays, strict=True)):
        if type_of(array) != node.type:
            label = node.op.label if isinstance(node.op, Input) else ""
            raise InputError(f"input {position} ({label}) is {type_of(array)}, expected {node.type}")


def evaluate(node: Node, operands: Sequence[Array], *, exact_real: bool = False) -> Array:
    """One node on given operands, rounded to its type; with `exact_real` floats stay float64."""
    if isinstance(node.op, Region):
        return interpret(node.op.body, operands, exact_real=exact_real)[0]
    with np.errstate(all="ignore"):
        result = np.asarray(node.op.ref(*operands))
    if result.shape != node.type.shape:
        raise InternalError(f"{node.op.name}: ref gives shape {result.shape}, infer says {node.type}")
    dtype = "float64" if exact_real and node.type.is_float else node.type.dtype
    with np.errstate(all="ignore"):
        return result.astype(dtype, copy=False)


def walk(graph: Graph, arrays: Sequence[Array], *, exact_real: bool = False) -> Iterator[tuple[Node, Array]]:
    """Yield each node with its value, in topological order; values are dropped after their last use."""
    values: dict[Node, Array] = dict(zip(graph.inputs, arrays, strict=True))
    left = graph.use_counts()
    for node in graph.nodes():
        if node not in values:
            values[node] = evaluate(node, [values[operand] for operand in node.inputs], exact_real=exact_real)
        yield node, values[node]
        for operand in node.inputs:
            left[operand] -= 1
            if not left[operand]:
                del values[operand]
        if not left[node] and node in values:
            del values[node]


def interpret(graph: Graph, arrays: Sequence[Array], *, exact_real: bool = False) -> list[Array]:
    """Run a graph. Arrays have the inputs' types; with `exact_real` every float is carried as float64.

    Raises InputError where the arrays do not match.
    """
    if not exact_real:
        check_inputs(graph, arrays)
    wanted = set(graph.outputs)
    found = {node: value for node, value in walk(graph, arrays, exact_real=exact_real) if node in wanted}
    return [found[node] for node in graph.outputs]


def magnitude_bound(graph: Graph, arrays: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """(outputs in float64, bounds): |computed - real| <= k * eps * bound for a computation that errs by k ulps at each node.

    The bound follows each operand's error through every op at first order, so cancellation shows as a bound larger than
    the value itself.
    """
    check_inputs(graph, arrays)
    wide = [array.astype(np.float64) if node.type.is_float else array for node, array in zip(graph.inputs, arrays, strict=True)]
    return _bounded(graph, wide, [np.abs(array.astype(np.float64)) for array in arrays])


def _bounded(graph: Graph, arrays: Sequence[Array], given: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """The outputs of a graph on inputs that have bounds already, and theirs."""
    values: dict[Node, Array] = dict(zip(graph.inputs, arrays, strict=True))
    bounds: dict[Node, Array] = dict(zip(graph.inputs, given, strict=True))
    for node in graph.nodes():
        if node in values:
            continue
        operands = tuple(values[operand] for operand in node.inputs)
        operand_bounds = tuple(bounds[operand] for operand in node.inputs)
        if isinstance(node.op, Region):
            (values[node],), (bounds[node],) = _bounded(node.op.body, operands, operand_bounds)
        else:
            values[node] = evaluate(node, operands, exact_real=True)
            bounds[node] = _bound(node, values[node], operands, operand_bounds)
    return [values[n] for n in graph.outputs], [bounds[n] for n in graph.outputs]


def _bound(node: Node, value: Array, operands: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
    if isinstance(node.op, Const):
        return np.abs(value.astype(np.float64))
    with np.errstate(all="ignore"):
        return np.asarray(node.op.magnitude(value, operands, bounds), dtype=np.float64)
