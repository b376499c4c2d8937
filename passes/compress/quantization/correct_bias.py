"""correct-bias: the mean error that rounded weights make goes into the bias (Nagel et al. 2019, section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import reduce
from paring.passes.base import Pass
from paring.passes.compress.calibrate import check_calibration, gather
from paring.passes.compress.quantization.twins import find_twins, real_weight
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context
from paring.passes.util import channel_axis, const_value, constant, with_operands


@dataclass(frozen=True)
class CorrectBias(Pass):
    """After quantize: each layer's bias takes up what its rounded weights add on average, over the calibration data."""

    name = "correct-bias"
    contract = Lossy("noise", math.inf)
    calibrated = True
    after = ("quantize",)

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
        new = {layer: _shifted(layer, shift) for layer, shift in shifts.items() if context.spend(self.name, layer)}
        after = with_operands(graph, new)
        context.promise = twins.promise(after, context)
        return after


def _mean_error(layer: Node, old: Node) -> Node:
    """For each output the mean of what exact weights would give less what the rounded ones give, on the same operand."""
    lost = constant(const_value(old.inputs[1]) - const_value(real_weight(layer)))
    missing = Node(layer.op, (layer.inputs[0], lost))
    return Node(reduce.Mean(tuple(d for d in range(layer.type.rank) if d != channel_axis(layer))), (missing,))


def _shifted(layer: Node, shift: Array) -> tuple[Node, Node]:
    """Its weight, and a bias that is so much more."""
    biases = layer.inputs[2:]
    bias = const_value(biases[0]).astype(np.float64) if biases else 0.0
    return layer.inputs[1], constant((bias + shift).astype(np.float32), biases[0].loc if biases else layer.loc)
