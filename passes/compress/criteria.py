"""How much a channel matters, as a table: a layer gives one figure for each of its output channels, the least goes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from paring.ir.graph import Node
from paring.ir.op import Array
from paring.passes.compress.channels import Group
from paring.passes.util import const_value

Criterion = Callable[[Node, np.random.Generator], Array]


def _rows(layer: Node) -> Array:
    """(channels, weights of each) in float64."""
    weight = const_value(layer.inputs[1])
    return weight.reshape(weight.shape[0], -1).astype(np.float64)


def l1(layer: Node, rng: np.random.Generator) -> Array:
    """The sum of |weight| (Li et al. 2017)."""
    return np.abs(_rows(layer)).sum(1)


def l2(layer: Node, rng: np.random.Generator) -> Array:
    """The Euclidean norm of the weights."""
    return np.sqrt((_rows(layer) ** 2).sum(1))


def random(layer: Node, rng: np.random.Generator) -> Array:
    """Nothing but chance, as a control."""
    return rng.random(layer.inputs[1].type.shape[0])


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2, "random": random}


def scores(groups: list[Group], criterion: Criterion, seed: int) -> Mapping[int, float]:
    """For each group the mean over its channels, each relative to the mean of its layer.

    Layers of different size so count the same, within a group and between groups.
    """
    rng = np.random.default_rng(seed)
    layers = dict.fromkeys(layer for group in groups for layer in group.channels)
    relative: dict[Node, Array] = {}
    for layer in layers:
        found = criterion(layer, rng)
        mean = found.mean()
        relative[layer] = found / mean if mean > 0 else np.zeros_like(found)
    return {
        group.number: float(np.concatenate([relative[layer][places] for layer, places in group.channels.items()]).mean())
        for group in groups
    }
