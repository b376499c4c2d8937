"""pass adaround: weights are rounded up or down as serves the layer's result best (Nagel et al. 2020, "Up or Down?")."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops.quantized import Dequantize, DequantizeChannels
from paring.passes.base import Pass
from paring.passes.compress.calibrate import check_calibration
from paring.passes.compress.operands import see_operands
from paring.passes.compress.quantization.twins import find_twins
from paring.passes.compress.quantization.weights import dequantized
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context
from paring.passes.util import const_value, with_operands

# The rectified sigmoid reaches 0 and 1: it is stretched to [-0.1, 1.1] and cut off.
STRETCH = 1.2
MARGIN = 0.1


@dataclass(frozen=True)
class AdaRound(Pass):
    """After quantize: each weight is rounded up or down so that the layer's result is nearest to the float one.

    One layer after the other, by gradient descent on a soft rounding that is driven to 0 or 1, from the second moments of the
    layer's operands in calibration. A row that this does not improve keeps its nearest integers, a weight of 0 stays 0.
    `iterations` of Adam at `rate` for each layer; `drive` is how strongly soft roundings are driven to the ends.
    """

    name = "adaround"
    contract = Lossy("noise", math.inf)
    calibrated = True
    after = ("quantize",)
    iterations: int = 500
    rate: float = 0.05
    drive: float = 0.05

    def check(self) -> None:
        super().check()
        if not self.rate > 0 or not self.drive >= 0:
            raise ArgumentError("pass adaround: rate is positive, drive is not negative")

    def run(self, graph: Graph, context: Context) -> Graph:
        twins = find_twins(graph, context, self.name)
        if twins is None:
            return graph
        check_calibration(graph, context, self.name)
        moments = _moments(graph, list(twins.layers), context)
        new: dict[Node, tuple[Node, ...]] = {}
        for number, (layer, old) in enumerate(twins.layers.items()):
            context.tell(self.name, number, len(twins.layers))
            if context.spend(self.name, layer):
                new[layer] = (self._rounded(layer, old, moments[layer]), *layer.inputs[2:])
        context.tell(self.name, len(twins.layers), len(twins.layers))
        after = with_operands(graph, new)
        context.promise = twins.promise(after, context)
        return after

    def _rounded(self, layer: Node, old: Node, moments: Array) -> Node:
        """The layer's weight node with other integers."""
        weight, stored = layer.inputs[1], layer.inputs[1].inputs[0]
        nearest, per_channel = const_value(stored), isinstance(weight.op, DequantizeChannels)
        scales = const_value(weight.inputs[1]) if per_channel else _scale_of(weight)
        along = np.broadcast_to(scales.astype(np.float64), nearest.shape[:1]).reshape((-1,) + (1,) * (nearest.ndim - 1))
        steps = const_value(old.inputs[1]).astype(np.float64) / along
        # The greatest integer in use is the greatest there is: ranges come from the weights themselves.
        most = int(np.abs(nearest.astype(np.int32)).max(initial=1))
        groups = len(moments)
        shape = (groups, nearest.shape[0] // groups, -1)
        found = self._search(steps.reshape(shape), nearest.astype(np.float64).reshape(shape), moments, most)
        return dequantized(found.reshape(nearest.shape).astype(np.int8), scales, per_channel, stored)

    def _search(self, steps: Array, nearest: Array, moments: Array, most: int) -> Array:
        """Integers (groups, rows, columns), floors of `steps` or one more, with the least d M d' for d = integers - steps."""
        moments = moments / max(float(np.trace(moments, axis1=1, axis2=2).mean()) / moments.shape[-1], 1e-300)
        floor = np.floor(steps)
        logits = _logit((steps - floor + MARGIN) / STRETCH)
        mean, square = np.zeros_like(logits), np.zeros_like(logits)
        for iteration in range(1, self.iterations + 1):
            soft, slope = _soft(logits)
            gradient = 2 * (np.clip(floor + soft, -most, most) - steps) @ moments * slope
            gradient += self.drive * _pull(soft, iteration / self.iterations) * slope
            gradient[steps == 0] = 0.0
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            corrected = mean / (1 - 0.9**iteration), square / (1 - 0.999**iteration)
            logits = logits - self.rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        # A pruned weight is not rounded: it stays 0, as if there were none.
        found = np.where(steps == 0, 0.0, np.clip(floor + (_soft(logits)[0] >= 0.5), -most, most))
        better = _loss(found - steps, moments) < _loss(nearest - steps, moments)
        return np.where(better[..., None], found, nearest)


def _scale_of(weight: Node) -> Array:
    assert isinstance(weight.op, Dequantize)
    return np.full(1, weight.op.scale, np.float32)


def _loss(apart: Array, moments: Array) -> Array:
    """Of each row."""
    return ((apart @ moments) * apart).sum(-1)


def _logit(share: Array) -> Array:
    return np.log(share / (1 - share))


def _soft(logits: Array) -> tuple[Array, Array]:
    """The rectified sigmoid and its slope."""
    sigmoid = 1 / (1 + np.exp(-logits))
    stretched = sigmoid * STRETCH - MARGIN
    inside = (stretched > 0) & (stretched < 1)
    return np.clip(stretched, 0, 1), np.where(inside, STRETCH * sigmoid * (1 - sigmoid), 0.0)


def _pull(soft: Array, progress: float) -> Array:
    """The gradient of 1 - |2h - 1|^beta: nothing at first, then ever more towards 0 or 1, with beta from 20 to 2."""
    if progress < 0.2:
        return np.zeros_like(soft)
    beta = 2 + 18 * (1 - (progress - 0.2) / 0.8)
    away = 2 * soft - 1
    return -2 * beta * np.sign(away) * np.abs(away) ** (beta - 1)


def _moments(graph: Graph, layers: list[Node], context: Context) -> dict[Node, Array]:
    """Of each layer the second moments (groups, columns, columns) of what its weights meet, over the calibration data."""
    found: dict[Node, Array] = {}

    def see(layer: Node, rows: Array) -> None:
        found[layer] = found.get(layer, 0.0) + (rows.swapaxes(1, 2) @ rows).astype(np.float64)

    see_operands(graph, layers, context, see)
    return found
