"""The parameters of values, from their ranges on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paring.ir.errors import InputError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import norm
from paring.passes.compress.calibrate import gather
from paring.passes.compress.quantization.observers import Affine, Observer, affine
from paring.passes.rewriter import Context, describe

# Values beyond this are masks: minus infinity written as a finite number.
FAR = 1e9


def calibrate(
    graph: Graph, groups: Sequence[tuple[Node, ...]], make: Callable[[], Observer], dtype: str, context: Context
) -> tuple[dict[Node, Affine], set[Node]]:
    """The parameters of each value of the groups, and the values that 8 bits cannot carry: not finite, or masks."""
    observers = {node: observer for group in groups for observer in [make()] for node in group}
    lost: set[Node] = set()

    def see(node: Node, values: Array) -> None:
        try:
            observers[node].observe(values)
        except InputError:
            lost.add(node)

    gather(graph, [node for group in groups for node in group], context, see)
    params: dict[Node, Affine] = {}
    dead = [describe(g[0]) for g in groups if observers[g[0]].range() == (0.0, 0.0) and not lost & set(g)]
    if dead:
        context.notes.append(f"0 throughout calibration, so 8 bits do not know their range: {', '.join(dead)}")
    for group in groups:
        known = _known_range(group)
        low, high = known or observers[group[0]].range()
        if max(-low, high) > FAR:
            lost.add(group[0])
        params.update((node, affine(low, high, dtype)) for node in group)
    return params, {node for group in groups if lost & set(group) for node in group}


def _known_range(group: tuple[Node, ...]) -> tuple[float, float] | None:
    """What all values of a group are sure to lie within, where that is also what they use."""
    return (0.0, 1.0) if all(isinstance(node.op, norm.Softmax) for node in group) else None
