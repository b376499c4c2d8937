"""const-fold: what depends on constants only is computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Graph, Node, rebuild
from paring.ir.interpreter import evaluate
from paring.ir.op import Array
from paring.ir.ops.core import Const, Input
from paring.ir.ops.quantized import Dequantize, DequantizeChannels
from paring.ir.ops.shape import Broadcast
from paring.passes.base import Pass
from paring.passes.rewriter import Context
from paring.passes.util import constant


@dataclass(frozen=True)
class ConstFold(Pass):
    """Nodes that depend on constants only, and empty tensors, become constants.

    A broadcast stays where it is used by something that is not constant: a repeated value is cheaper than a large
    constant. `limit` is the greatest size in bytes of a new constant that is larger than all it was made of.
    Quantized constants stay what they are until `dequantize` is set: `fold-qdq` computes with their integers.
    """

    name = "const-fold"
    least = {"limit": 0}
    limit: int = 1 << 20
    dequantize: bool = False

    def run(self, graph: Graph, context: Context) -> Graph:
        values: dict[Node, Array] = {}

        def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
            new = node.with_inputs(inputs)
            if isinstance(new.op, Const):
                values[new] = new.op.value
                return new
            if isinstance(new.op, Input):
                return new
            if isinstance(new.op, Dequantize | DequantizeChannels) and not self.dequantize:
                return new
            known = all(operand in values for operand in inputs)
            empty = new.type.size == 0 or (bool(inputs) and all(operand.type.size == 0 for operand in inputs))
            if not known and not empty:
                return new
            repeats = isinstance(new.op, Broadcast) and not empty
            grows = new.type.bytes > max(self.limit, sum(_held(i) for i in inputs))
            if not repeats and grows and not isinstance(new.op, Dequantize | DequantizeChannels):
                return new
            value = evaluate(new, [values[i] if i in values else _zeros(i) for i in inputs])
            if repeats:
                values[new] = value
                return new
            return _fold(new, value, context, values)

        return rebuild(graph, visit)


def _fold(node: Node, value: Array, context: Context, values: dict[Node, Array]) -> Node:
    if not context.spend("const-fold", node):
        return node
    folded = constant(value, node.loc)
    values[folded] = value
    return folded


def _held(node: Node) -> int:
    """Bytes that a constant operand takes now: a broadcast takes what it repeats."""
    return _held(node.inputs[0]) if isinstance(node.op, Broadcast) else node.type.bytes


def _zeros(node: Node) -> Array:
    """Stands in for an operand whose values cannot matter, because the result or the operand is empty."""
    return np.zeros(node.type.shape, node.type.dtype)
