"""pass smooth: outliers of activations move into the weights that read them (Xiao et al. 2023, "SmoothQuant")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import linear, shape, unary
from paring.passes.base import Pass
from paring.passes.compress.calibrate import check_calibration, peaks
from paring.passes.compress.layers import is_layer
from paring.passes.compress.quantization.rescale import (
    Values,
    divide_outputs,
    input_ranges,
    is_norm,
    multiply_inputs,
    values_of,
    with_values,
)
from paring.passes.contract import Close
from paring.passes.rewriter import Context


@dataclass(frozen=True, eq=False)
class Group:
    """A producer that can take a scale for each feature, and all linear layers that read its result."""

    producer: Node
    end: Node
    readers: tuple[Node, ...]


@dataclass(frozen=True)
class Smooth(Pass):
    """Features of large activations before linear layers are scaled down, and the weights that read them up.

    Behind layer norms, RMS norms and linear layers (also through relu), where nothing but linear layers reads the result.
    `strength`: 0 leaves the activations as they are, 1 gives all features one range; 0.5 shares the burden.
    """

    name = "smooth"
    contract = Close(2)
    lossy = True
    calibrated = True
    before = ("quantize",)
    strength: float = 0.5

    def check(self) -> None:
        super().check()
        if not 0 <= self.strength <= 1:
            raise ArgumentError(f"pass smooth: strength is {self.strength}", hint="between 0 and 1")

    def run(self, graph: Graph, context: Context) -> Graph:
        groups = _groups(graph, context)
        if not groups:
            return graph
        check_calibration(graph, context, self.name)
        largest = peaks(graph, {group.end: group.end.type.rank - 1 for group in groups}, context)
        values: Values = {}
        for group in groups:
            if context.spend(self.name, group.producer):
                self._smooth(group, largest[group.end], values)
        return with_values(graph, values)

    def _smooth(self, group: Group, largest: Array, values: Values) -> None:
        for node in (group.producer, *group.readers):
            values.setdefault(node, values_of(node))
        weights = np.max([input_ranges(values[reader][0], reader) for reader in group.readers], 0)
        both = (largest > 0) & (weights > 0)
        large, small = np.where(both, largest, 1.0), np.where(both, weights, 1.0)
        scale = large**self.strength / small ** (1 - self.strength)
        # One factor for all features does not matter: around 1 the weights stay near what they were.
        scale = np.where(both, scale / np.exp(np.log(scale[both]).mean() if both.any() else 0.0), 1.0)
        divide_outputs(values[group.producer], scale)
        for reader in group.readers:
            multiply_inputs(values[reader], reader, scale)


def _groups(graph: Graph, context: Context) -> list[Group]:
    users, outputs = graph.users(), set(graph.outputs)
    found = []
    for producer in graph.nodes():
        if not (is_norm(producer) or (is_layer(producer) and isinstance(producer.op, linear.Linear))):
            continue
        end = producer
        while len(users[end]) == 1 and end not in outputs and _keeps_features(users[end][0]):
            (end,) = users[end]
        readers = users[end]
        if readers and end not in outputs and all(is_layer(r) and isinstance(r.op, linear.Linear) for r in readers):
            found.append(Group(producer, end, tuple(dict.fromkeys(readers))))
        elif any(isinstance(r.op, linear.Linear) for r in readers):
            context.decline("smooth", producer, "not only linear layers read it")
    return found


def _keeps_features(node: Node) -> bool:
    """Whether f(s * x) = s * f(x) for a scale of each feature of the last dimension."""
    if isinstance(node.op, shape.Reshape):
        return node.type.shape[-1:] == node.inputs[0].type.shape[-1:]
    return isinstance(node.op, unary.Relu | unary.LeakyRelu)
