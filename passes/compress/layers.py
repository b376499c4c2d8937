"""Layers with weights: which they are, which a user means by name, and where their channels go."""

from __future__ import annotations

import fnmatch
from math import prod

from paring.ir.errors import ArgumentError, nearest
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import pool, quantized, reduce, shape, unary
from paring.ir.ops.core import Const
from paring.passes.util import is_const, is_plain, module_of


class Names:
    """Which nodes a list of module paths and glob patterns means: a path means all that lies below it."""

    def __init__(self, text: str) -> None:
        self.patterns = [part.strip() for part in text.split(",") if part.strip()]
        self.used: set[str] = set()

    def has(self, node: Node) -> bool:
        path = module_of(node)
        hits = [p for p in self.patterns if path == p or path.startswith(f"{p}.") or fnmatch.fnmatchcase(path, p)]
        self.used.update(hits)
        return bool(hits)

    def check(self, graph: Graph, who: str) -> None:
        """Raise ArgumentError for a name that meant none of the nodes that were asked about."""
        known = sorted({node.loc.module for node in graph.nodes() if node.loc and node.loc.module})
        for pattern in (p for p in self.patterns if p not in self.used):
            hint = nearest(pattern, known, f"modules: {', '.join(known[:20]) or 'none have names'}")
            raise ArgumentError(f"{who}: skip names {pattern!r}, which is no module", hint=hint)


def is_quantized_weight(node: Node) -> bool:
    """Whether a node is dequantize of constant integers."""
    return isinstance(node.op, quantized.Dequantize | quantized.DequantizeChannels) and isinstance(node.inputs[0].op, Const)


def is_layer(node: Node) -> bool:
    """A convolution or linear layer in plain layout with constant float32 weights."""
    return node.type.dtype == "float32" and is_plain(node) and all(map(is_const, node.inputs[1:]))


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


def taps_last(weight: Array) -> Array:
    """(outputs, inputs, taps) of a layer's weight; a linear layer has one tap. A view of a contiguous array."""
    return weight.reshape(*weight.shape[:2], -1)


def _axis_after_reshape(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """The dimension of the same size with as many elements after it."""
    inner = prod(before[axis + 1 :])
    places = [d for d, size in enumerate(after) if size == before[axis] and prod(after[d + 1 :]) == inner]
    return places[0] if len(places) == 1 or (places and before[axis] == 1) else None
