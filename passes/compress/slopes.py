"""Criteria that ask how the loss changes: first-order Taylor expansion, and SNIP; both are gradients times weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Node
from paring.ir.op import Array
from paring.passes.util import const_value

if TYPE_CHECKING:
    from paring.passes.compress.criteria import Evidence

Figures = dict[Node, Array]


def _batches(evidence: Evidence) -> Iterator[Mapping[tuple[Node, int], Array]]:
    """Gradient times value of each constant that a layer reads, batch by batch."""
    context = evidence.context
    if context.gradients is None:
        raise ArgumentError("a criterion needs gradients, and nobody computes them", hint="paring.compile does, in torch")
    total = len(context.calibration)
    for number, gradients in enumerate(context.gradients(evidence.graph)):
        context.tell("gradients", number, total)
        found = {}
        for layer in evidence.layers:
            for place, operand in enumerate(layer.inputs[1:], 1):
                if (layer, place) in gradients:
                    found[layer, place] = gradients[layer, place] * const_value(operand)
        yield found
    context.tell("gradients", total, total)


def _mean(evidence: Evidence, of: Callable[[Node, Mapping[tuple[Node, int], Array]], Array]) -> Figures:
    """The mean over the batches of what is made of gradients times values, for each layer."""
    found: Figures = {}
    count = 0
    for products in _batches(evidence):
        count += 1
        for layer in evidence.layers:
            found[layer] = found.get(layer, 0.0) + of(layer, products)
    return {layer: total / count for layer, total in found.items()}


def _weight_changes(evidence: Evidence) -> Figures:
    return _mean(evidence, lambda layer, products: products[layer, 1])


def _squared_weight_changes(evidence: Evidence) -> Figures:
    return _mean(evidence, lambda layer, products: products[layer, 1] ** 2)


def _squared_channel_changes(evidence: Evidence) -> Figures:
    def joint(layer: Node, products: Mapping[tuple[Node, int], Array]) -> Array:
        parts = [products[layer, place] for place in (1, 2) if (layer, place) in products]
        change: Array = sum(part.reshape(part.shape[0], -1).sum(1) for part in parts)
        return change**2

    return _mean(evidence, joint)


def taylor_weights(layer: Node, evidence: Evidence) -> Array:
    """(dL/dw * w)^2, the mean over the batches: the change of the loss without the weight, to first order."""
    return evidence.once(_squared_weight_changes)[layer]


def taylor_channels(layer: Node, evidence: Evidence) -> Array:
    """(sum of dL/dw * w)^2 over weights and bias of a channel, the mean over the batches (Molchanov et al. 2019, eq. 8 and 9)."""
    return evidence.once(_squared_channel_changes)[layer]


def snip(layer: Node, evidence: Evidence) -> Array:
    """|dL/dw * w| of the loss over all batches: connection sensitivity (Lee et al. 2019, eq. 4 and 5)."""
    return np.abs(evidence.once(_weight_changes)[layer])
