"""Measured noise: how far float32 rounding alone moves a network's outputs, on given inputs.

The magnitude bound grows with each layer: at the output of ResNet-18 it is 1e19 times the values, and says nothing. Right
rewrites stay within a few times the measured noise however deep the network is; wrong ones are off by millions.
In a quantized network rounding alone can move an integer by a step, and what that does later is noise as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir import Const, Graph, Node, interpret, rebuild
from paring.ir.op import Array
from paring.ir.ops import binary, quantized, unary

# A contract bounds rounding in ulps; how it shows at the output is only measured, on one input: room for that.
MARGIN = 4.0

# Ops that round to an integer.
ROUNDING = (quantized.Quantize, quantized.Requantize, quantized.QuantizedMul)


@dataclass(frozen=True)
class Oracle:
    """What a program means on given inputs, in float64, and for each output the error that float32 rounding alone makes.

    `sway`: how far it moves when integers inside are a step off, which any rounding before them may cause.
    """

    arrays: Sequence[Array]
    real: list[Array]
    noise: list[float]
    sway: list[float]

    @staticmethod
    def of(graph: Graph, arrays: Sequence[Array]) -> Oracle:
        real = interpret(graph, arrays, exact_real=True)
        noise = [_noise(x, y) for x, y in zip(interpret(graph, arrays), real, strict=True)]
        return Oracle(arrays, real, noise, sway(graph, arrays))

    def distance(self, outputs: Sequence[Array]) -> float:
        """How many times the noise the worst output is off, beyond its sway; infinite where NaN or infinities differ.

        An output that float32 itself cannot hold (its noise is infinite) is not judged.
        """
        found = zip(outputs, self.real, self.noise, self.sway, strict=True)
        return max((max(0.0, _apart(x, y) - MARGIN * s) / n for x, y, n, s in found if np.isfinite(n)), default=0.0)

    def distance_of(self, graph: Graph) -> float:
        return self.distance(interpret(graph, self.arrays, exact_real=True))


def sway(graph: Graph, arrays: Sequence[Array]) -> list[float]:
    """How far each output moves when integers inside the graph are a step off, up or down, or not, at random."""
    rng = np.random.default_rng(0)
    users = graph.users()

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        new = node.with_inputs(inputs)
        if not isinstance(node.op, ROUNDING) or not users[node]:
            return new
        low, high = node.op.range
        off = Node(Const(rng.integers(-1, 2, node.type.shape).astype(np.int32)))
        moved = Node(binary.Add(), (Node(unary.Cast("int32"), (new,)), off))
        return Node(unary.Cast(node.type.dtype), (Node(unary.Clamp(float(low), float(high)), (moved,)),))

    swayed = rebuild(graph, visit)
    if all(a is b for a, b in zip(swayed.outputs, graph.outputs, strict=True)):
        return [0.0] * len(graph.outputs)
    return [_apart(x, y) for x, y in zip(interpret(swayed, arrays), interpret(graph, arrays), strict=True)]


def _noise(rounded: Array, real: Array) -> float:
    finite = np.abs(real[np.isfinite(real)]).max(initial=0.0)
    ulp = float(np.spacing(np.float32(min(finite, 3e38)))) if real.dtype.kind == "f" else 0.5
    return max(_apart(rounded, real), ulp)


def _apart(found: Array, real: Array) -> float:
    if found.shape != real.shape:
        return float("inf")
    with np.errstate(all="ignore"):
        same = (found == real) | (np.isnan(found) & np.isnan(real)) if real.dtype.kind == "f" else found == real
        apart = np.abs(np.asarray(found, np.float64) - np.asarray(real, np.float64))
    apart = np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))
    return float(apart.max(initial=0.0))
