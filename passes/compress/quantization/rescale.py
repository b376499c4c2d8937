"""Scales of channels moved from one layer to the next: y = f(x / s) * s for every positive s, where f is a relu or nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import conv, norm, pool, reduce, shape, unary
from paring.passes.util import const_value, constant, is_const, is_plain, with_operands

NORMS = (norm.LayerNorm, norm.RmsNorm)
Values = dict[Node, list[Array]]
"""Of each layer its constants in float64: the weight, and the bias where it has one."""


def is_layer(node: Node) -> bool:
    """A convolution or linear layer in plain layout with constant float32 weights."""
    return node.type.dtype == "float32" and is_plain(node) and all(map(is_const, node.inputs[1:]))


def is_norm(node: Node) -> bool:
    """A norm over the last dimension with constant float32 weights."""
    constants = node.inputs[1:]
    return isinstance(node.op, NORMS) and all(is_const(i) and i.type.rank == 1 and i.type.dtype == "float32" for i in constants)


def carries(node: Node, axis: int) -> int | None:
    """Where the channels of `axis` are in the result of a node that keeps them apart and f(s * x) = s * f(x); else None."""
    before = node.inputs[0].type.shape
    match node.op:
        case unary.Relu() | unary.LeakyRelu():
            return axis
        case pool.MaxPool2d(layout="NCHW") | pool.AvgPool2d(layout="NCHW") | pool.AdaptiveAvgPool2d(layout="NCHW"):
            return axis if axis == 1 else None
        case reduce.Mean(axes=axes, keepdims=keepdims) if axis not in axes:
            return axis if keepdims else axis - sum(a < axis for a in axes)
        case shape.Pad(mode="constant", value=0.0, padding=padding) if padding[axis] == (0, 0):
            return axis
        case shape.Reshape(shape=after):
            return _axis_after_reshape(before, after, axis)
    return None


def _axis_after_reshape(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """The dimension of the same size with as many elements after it."""
    inner = int(np.prod(before[axis + 1 :]))
    places = [d for d, size in enumerate(after) if size == before[axis] and int(np.prod(after[d + 1 :])) == inner]
    return places[0] if len(places) == 1 or (places and before[axis] == 1) else None


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
