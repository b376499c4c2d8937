"""Scales of channels moved from one layer to the next: y = f(x / s) * s for every positive s, where f is a relu or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import conv, norm
from paring.passes.util import const_value, constant, is_const, with_operands

NORMS = (norm.LayerNorm, norm.RmsNorm)
Values = dict[Node, list[Array]]
"""Of each layer its constants in float64: the weight, and the bias where it has one."""


def is_norm(node: Node) -> bool:
    """A norm over the last dimension with constant float32 weights."""
    constants = node.inputs[1:]
    return isinstance(node.op, NORMS) and all(is_const(i) and i.type.rank == 1 and i.type.dtype == "float32" for i in constants)


def values_of(node: Node) -> list[Array]:
    return [const_value(i).astype(np.float64) for i in node.inputs[1:]]


def by_group(weight: Array, node: Node) -> Array:
    """(groups, outputs, inputs, kernel) of a layer's weight: a view of a contiguous array."""
    groups = node.op.groups if isinstance(node.op, conv.Conv2d) else 1
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def output_ranges(weight: Array) -> Array:
    """The greatest |weight| of each output."""
    return np.abs(weight).reshape(weight.shape[0], -1).max(1, initial=0.0)


def input_ranges(weight: Array, node: Node) -> Array:
    """The greatest |weight| that each input meets."""
    return np.abs(by_group(weight, node)).max((1, 3), initial=0.0).ravel()


def divide_outputs(values: list[Array], scale: Array) -> None:
    """Weight and bias of a layer, or gain and shift of a norm, so that its result is divided by `scale`."""
    for i, value in enumerate(values):
        values[i] = value / scale.reshape((-1,) + (1,) * (value.ndim - 1))


def multiply_inputs(values: list[Array], node: Node, scale: Array) -> None:
    """The weight of a layer whose operand has been divided by `scale`."""
    grouped = by_group(values[0], node)
    values[0] = (grouped * scale.reshape(grouped.shape[0], 1, -1, 1)).reshape(values[0].shape)


def with_values(graph: Graph, new: Mapping[Node, list[Array]]) -> Graph:
    """The graph with the constants of some layers replaced, rounded once."""

    def constants(layer: Node) -> list[Node]:
        arrays = zip(layer.inputs[1:], new[layer], strict=True)
        return [constant(value.astype(old.type.dtype), old.loc) for old, value in arrays]

    return with_operands(graph, {layer: constants(layer) for layer in new})
