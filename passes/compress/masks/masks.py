"""Masks: the weights of a graph that can be set to zero, how much each matters, and the graph in which some are zero.

A mask is the zeros of a constant and nothing else: what comes after sees weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ModelError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import conv, linear
from paring.passes.compress.criteria import CRITERIA, Evidence
from paring.passes.compress.layers import Names, is_layer, is_quantized_weight
from paring.passes.ledger import SHOWN_LAYERS
from paring.passes.rewriter import Context
from paring.passes.util import const_value, is_const, layer_name, with_operands

# Layers whose shares of zeros differ by more are shown.
UNEVEN = 0.01
LAYERS = (conv.Conv2d, conv.ConvTranspose2d, linear.Linear)


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant weight, (O, I/groups, KH, KW) or (O, I), and the layers that read it: they have it in common."""

    constant: Node
    layers: tuple[Node, ...]

    @property
    def value(self) -> Array:
        return const_value(self.constant)

    @property
    def name(self) -> str:
        return layer_name(self.layers[0])

    @property
    def kernel(self) -> tuple[int, ...]:
        """(KH, KW); () of a linear layer."""
        return self.constant.type.shape[2:]


def weights_of(graph: Graph, skip: Names, who: str, context: Context) -> list[Weight]:
    """The weights that can have a mask, in the order of their layers; for others the context is told why not."""
    users, found = graph.users(), dict[Node, list[Node]]()
    for layer in graph.nodes():
        if isinstance(layer.op, LAYERS):
            reason = "skipped by name" if skip.has(layer) else _obstacle(layer, users)
            if reason:
                context.decline(who, layer, reason)
            else:
                found.setdefault(layer.inputs[1], []).append(layer)
    return [Weight(node, tuple(layers)) for node, layers in found.items()]


def _obstacle(layer: Node, users: Mapping[Node, Sequence[Node]]) -> str:
    """Why a layer's weight can have no mask; empty where it can."""
    if isinstance(layer.op, conv.ConvTranspose2d):
        return "it is a transposed convolution that does not decompose into plain ones"
    if is_quantized_weight(layer.inputs[1]):
        return "it is quantized"
    if not is_const(layer.inputs[1]):
        return "its weight is computed, not constant"
    if not is_layer(layer):
        return f"it is no float32 layer in plain layout with constant operands: {layer.type}"
    weight = layer.inputs[1]
    if weight.type.size == 0:
        return "its weight is empty"
    others = [user for user in users[weight] if not (is_layer(user) and user.inputs[1] is weight)]
    return f"its weight is also read by {others[0].op.name}" if others else ""


def check_finite(weights: Sequence[Weight], who: str) -> None:
    """Raise ModelError that names all layers with a weight that is NaN or infinite."""
    bad = [weight.name for weight in weights if not np.isfinite(weight.value).all()]
    if bad:
        raise ModelError(
            "a weight is NaN or infinite", where=", ".join(bad), hint=f"{who} needs a model whose weights are finite"
        )


def saliency(weight: Weight, criterion: str, evidence: Evidence) -> Array:
    """How much each element matters, float64 of the weight's shape, 0 or more: the mean over the layers that read it.

    Raises ModelError where a score is not a number.
    """
    judge = CRITERIA[criterion].weights
    assert judge is not None
    found = np.mean([judge(layer, evidence) for layer in weight.layers], 0)
    if not np.isfinite(found).all():
        raise ModelError(f"criterion {criterion!r} gives NaN or infinite scores", where=weight.name)
    return np.where(weight.value != 0, found, 0.0)


def with_masks(graph: Graph, new: Mapping[Weight, Node]) -> Graph:
    """The graph in which layers read other weights."""
    return with_operands(graph, {layer: (node, *layer.inputs[2:]) for weight, node in new.items() for layer in weight.layers})


def zeros(array: Array) -> float:
    """The share of elements that are zero."""
    return float((array == 0).mean()) if array.size else 0.0


def summary(before: Mapping[Weight, Array], after: Mapping[Weight, Array]) -> list[str]:
    """For the ledger: the share of zeros in all of these weights, and in those layers that have most and least."""
    total = sum(value.size for value in before.values())
    if not total:
        return []
    was, now = (sum(zeros(v) * v.size for v in values.values()) / total for values in (before, after))
    notes = [f"{now:.1%} of the {total} weights of {len(after)} layers are zero, {was:.1%} before; constants keep their size"]
    shares = sorted((zeros(value), weight.name) for weight, value in after.items())
    if shares[-1][0] - shares[0][0] > UNEVEN:
        shown = shares if len(shares) <= SHOWN_LAYERS else [*shares[:2], *shares[-2:]]
        notes.append("zeros by layer" + (", least and most: " if shown is not shares else ": ") + listed(shown))
    return notes


def listed(shares: Sequence[tuple[float, str]]) -> str:
    return ", ".join(f"{name} {share:.1%}" for share, name in shares)
