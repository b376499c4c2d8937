"""How long values live: whose memory a node shows, and how much memory is in use at once."""

from __future__ import annotations

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.ops.core import Const, Input
from paring.ir.ops.shape import Reshape


def root(node: Node) -> Node:
    """The node whose memory this one shows: a Reshape is a view."""
    while isinstance(node.op, Reshape):
        (node,) = node.inputs
    return node


def peak_activation_bytes(graph: Graph) -> int:
    """Most bytes of activations alive at once, the graph's inputs and outputs included: what an ideal allocator needs.

    Nodes run in order; the graph's inputs are there from the start.
    """
    nodes = [node for node in graph.nodes() if not isinstance(node.op, Const | Reshape)]
    last = {node: step for step, node in enumerate(nodes)}
    for step, node in enumerate(nodes):
        last.update((root(operand), step) for operand in node.inputs)
    last.update((root(node), len(nodes)) for node in graph.outputs)
    change = np.zeros(len(nodes) + 2, np.int64)
    for first, node in enumerate(nodes):
        change[0 if isinstance(node.op, Input) else first] += node.type.bytes
        change[last[node] + 1] -= node.type.bytes
    return int(change.cumsum().max())
