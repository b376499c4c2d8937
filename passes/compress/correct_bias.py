"""correct-bias: the mean error that rounded weights make goes into the bias (Nagel et al. 2019, section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Graph, Node, rebuild
from paring.ir.op import Array
from paring.ir.ops import conv, reduce
from paring.passes.base import Pass
from paring.passes.compress.calibrate import check_calibration, gather
from paring.passes.compress.twins import find_twins, real_weight
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context
from paring.passes.util import const_value, constant


@dataclass(frozen=True)
class CorrectBias(Pass):
    """After quantize: each layer's bias takes up what its rounded weights add on average, over the calibration data."""

    name = "correct-bias"
    contract = Lossy("noise", math.inf)
    lossy = True
    calibrated = True

    def run(self, graph: Graph, context: Context) -> Graph:
        twins = find_twins(graph, context, self.name)
        if twins is None:
            return graph
        check_calibration(graph, context, self.name)
        errors = {_mean_error(layer, old): layer for layer, old in twins.layers.items()}
        sums: dict[Node, Array] = {}

        def see(node: Node, values: Array) -> None:
            sums[node] = sums.get(node, 0.0) + values.astype(np.float64)

        gather(graph, list(errors), context, see)
        shifts = {layer: sums[node] / len(context.calibration) for node, layer in errors.items()}
        shifts = {layer: shift for layer, shift in shifts.items() if context.spend(self.name, layer)}
        after = _with_shifts(graph, shifts)
        context.promise = twins.promise(after, context)
        return after


def _mean_error(layer: Node, old: Node) -> Node:
    """For each output the mean of what exact weights would give less what the rounded ones give, on the same operand."""
    lost = constant(const_value(old.inputs[1]) - const_value(real_weight(layer)))
    missing = Node(layer.op, (layer.inputs[0], lost))
    axis = 1 if isinstance(layer.op, conv.Conv2d) else layer.type.rank - 1
    return Node(reduce.Mean(tuple(d for d in range(layer.type.rank) if d != axis)), (missing,))


def _with_shifts(graph: Graph, shifts: dict[Node, Array]) -> Graph:
    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node in shifts:
            bias = const_value(node.inputs[2]).astype(np.float64) if len(node.inputs) == 3 else 0.0
            loc = node.inputs[2].loc if len(node.inputs) == 3 else node.loc
            inputs = (*inputs[:2], constant((bias + shifts[node]).astype(np.float32), loc))
        return node if inputs == node.inputs else node.with_inputs(inputs)

    return rebuild(graph, visit)
