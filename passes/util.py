"""Small questions that several passes ask of nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from paring.ir.graph import Graph, Loc, Node, rebuild
from paring.ir.op import Array, Op
from paring.ir.ops import conv, linear
from paring.ir.ops.core import Const
from paring.ir.ops.shape import Broadcast, Reshape

Row = TypeVar("Row")


def is_const(node: Node) -> bool:
    return isinstance(node.op, Const)


def const_value(node: Node) -> Array:
    """The array of a Const. The caller has checked that it is one."""
    assert isinstance(node.op, Const)
    return node.op.value


def constant(array: Array, loc: Loc | None = None) -> Node:
    return Node(Const(np.asarray(array)), (), loc)


def is_plain(layer: Node) -> bool:
    """Whether a convolution or linear layer reads and gives its channels in order, and its weights are not packed."""
    match layer.op:
        case conv.Conv2d(layout="NCHW", out_layout="NCHW", weight_layout="OIHW"):
            return True
        case linear.Linear(weight_layout="OI", features=None):
            return True
    return False


def by_class(table: Mapping[type[Op], Row], op: Op) -> Row | None:
    """The row of an operator's class, or of the nearest class that it is derived from."""
    return next((table[cls] for cls in type(op).__mro__ if cls in table), None)


def channel_axis(layer: Node) -> int:
    """The dimension of a layer's result (or a norm's) that holds its channels."""
    return 1 if isinstance(layer.op, conv.Conv2d | conv.ConvTranspose2d) else layer.type.rank - 1


def with_operands(graph: Graph, new: Mapping[Node, Sequence[Node]]) -> Graph:
    """The graph in which some layers read other nodes after their first operand."""

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node in new:
            inputs = (inputs[0], *new[node])
        return node.with_inputs(inputs)

    return rebuild(graph, visit)


def splat_value(node: Node) -> float | int | None:
    """The one value of a constant tensor (of integers an int), however broadcast and reshaped; None where it is not one."""
    while isinstance(node.op, Broadcast | Reshape):
        (node,) = node.inputs
    if not isinstance(node.op, Const) or node.op.value.size == 0:
        return None
    flat = node.op.value.ravel()
    if flat.size > 1 and not bool((flat == flat[0]).all() and (np.signbit(flat) == np.signbit(flat[0])).all()):
        return None
    value: float | int = flat[0].item()
    return value


def channel_values(node: Node, channels: int, axis: int, rank: int) -> Array | None:
    """The (channels,) values of a constant that varies along one axis of a rank-`rank` tensor only; None for any other."""
    shape: tuple[int, ...] | None = None
    if isinstance(node.op, Broadcast):
        shape, (node,) = node.op.shape, node.inputs
    if not isinstance(node.op, Const):
        return None
    value = node.op.value
    if value.size == 1:
        return np.full((channels,), value.ravel()[0], value.dtype)
    dims = (1,) * (rank - value.ndim) + value.shape
    if len(dims) != rank or dims[axis] != channels or value.size != channels:
        return None
    if shape is None and value.ndim != rank:
        return None
    return value.reshape(channels)


def module_of(node: Node) -> str:
    """The path of the module that a node comes from; empty where that is not known."""
    return node.loc.module if node.loc else ""


def layer_name(layer: Node) -> str:
    """The path of its module, or what it is."""
    return module_of(layer) or f"{layer.op.name} {layer.type}"
