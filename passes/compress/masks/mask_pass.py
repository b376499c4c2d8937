"""What the passes that set weights to zero have in common: which layers, judged how, and units of them by rank."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph
from paring.ir.op import Array
from paring.passes.base import Pass
from paring.passes.compress.criteria import CRITERIA, SCOPES, SLACK, WEIGHT_CRITERIA, Evidence, check_choice, check_evidence
from paring.passes.compress.layers import Names
from paring.passes.compress.masks.grid import Grid
from paring.passes.compress.masks.masks import Weight, check_finite, saliency, summary, weights_of, with_masks
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context
from paring.passes.util import constant


@dataclass(frozen=True)
class MaskPass(Pass, ABC):
    """Base: sets weights of convolutions and linear layers to zero.

    `criterion`: how much a weight matters, a row of `CRITERIA`; of several that go together it is the mean. `skip`: module
    paths and glob patterns, with commas: these layers stay as they are. `seed`: of chance, for criterion='random'.
    What is zero already stays zero, matters least, and so counts towards what is asked for.
    """

    contract = Lossy("metric", math.inf)
    calibrated = True
    before = ("equalize", "smooth", "quantize")
    least = {"seed": 0}
    criterion: str = "l1"
    skip: str = ""
    seed: int = 0

    def check(self) -> None:
        super().check()
        check_choice(self.name, "criterion", self.criterion, WEIGHT_CRITERIA)

    @abstractmethod
    def kept(self, weights: Sequence[Weight], scores: Mapping[Weight, Array], context: Context) -> Mapping[Weight, Array]:
        """For each weight, given the score of each element, which elements stay: bool, of the weight's shape."""

    def obstacle(self, weight: Weight) -> str:
        """Why this pass cannot do anything with a weight; empty where it can."""
        return ""

    def run(self, graph: Graph, context: Context) -> Graph:
        skip = Names(self.skip)
        weights = [weight for weight in weights_of(graph, skip, self.name, context) if self._fits(weight, context)]
        skip.check(graph, self.name)
        if not weights:
            context.notes.append("no layer that it could set to zero: paring why-not says why")
            return graph
        check_finite(weights, self.name)
        check_evidence(self.name, self.criterion, graph, context)
        layers = [layer for weight in weights for layer in weight.layers]
        evidence = Evidence(graph, layers, context, np.random.default_rng(self.seed))
        scores: dict[Weight, Array] = {}
        for number, weight in enumerate(weights):
            context.tell(self.name, number, len(weights))
            scores[weight] = saliency(weight, self.criterion, evidence)
        before = {weight: weight.value for weight in weights}
        after = dict(before)
        for weight, stays in self.kept(weights, scores, context).items():
            # Not a product, which would leave -0.0.
            masked = np.where(stays, weight.value, np.zeros((), weight.value.dtype))
            if (masked != weight.value).any() and context.spend(self.name, weight.layers[0]):
                after[weight] = masked
        context.tell(self.name, len(weights), len(weights))
        context.notes.extend(summary(before, after))
        changed = {w: constant(value, w.constant.loc) for w, value in after.items() if value is not before[w]}
        return with_masks(graph, changed) if changed else graph

    def _fits(self, weight: Weight, context: Context) -> bool:
        reason = self.obstacle(weight)
        for layer in weight.layers if reason else ():
            context.decline(self.name, layer, reason)
        return not reason


@dataclass(frozen=True)
class RatioPass(MaskPass):
    """Base: sets a share of all units of weights to zero.

    `ratio`: the share of weights that is zero afterwards, in whole units. `scope`: the same share of every layer (of every
    row of units, where a criterion compares no further), or where in the network the scores are least (global); then too
    each layer keeps at least one unit.
    """

    ratio: float = 0.5
    scope: str = "layer"

    def check(self) -> None:
        super().check()
        if not 0 <= self.ratio < 1:
            raise ArgumentError(f"pass {self.name}: ratio is {self.ratio}", hint="a share of weights: 0 or more, less than 1")
        check_choice(self.name, "scope", self.scope, SCOPES)
        if CRITERIA[self.criterion].rows and self.scope == SCOPES[1]:
            what = f"pass {self.name}: criterion {self.criterion!r} compares within an output channel, not over the network"
            raise ArgumentError(what, hint=f"scope={SCOPES[0]!r}")

    @abstractmethod
    def grid(self) -> Grid:
        """Which weights go together."""

    def obstacle(self, weight: Weight) -> str:
        return "it is one unit, which stays" if self.grid().sizes(weight.value).size == 1 else ""

    def kept(self, weights: Sequence[Weight], scores: Mapping[Weight, Array], context: Context) -> Mapping[Weight, Array]:
        grid = self.grid()
        sizes = {weight: grid.sizes(weight.value) for weight in weights}
        # What is zero throughout goes before what only matters nothing.
        means = {w: np.where(grid.empty(w.value), -np.inf, grid.sums(scores[w]) / sizes[w]) for w in weights}
        if self.scope == SCOPES[1]:
            units = self._over_all(weights, means, sizes, context)
        else:
            rows = CRITERIA[self.criterion].rows
            units = {w: _least(means[w], sizes[w], self.ratio, rows) for w in weights}
        return {weight: ~grid.spread(gone, weight.value) for weight, gone in units.items()}

    def _over_all(
        self, weights: Sequence[Weight], means: Mapping[Weight, Array], sizes: Mapping[Weight, Array], context: Context
    ) -> dict[Weight, Array]:
        """Which units go when those of the least scores in the whole network do."""
        flat, counts = (np.concatenate([of[w].ravel() for w in weights]) for of in (means, sizes))
        every = _least(flat, counts, self.ratio, False)
        ends = np.cumsum([means[w].size for w in weights])[:-1]
        units = {w: part.reshape(means[w].shape) for w, part in zip(weights, np.split(every, ends), strict=True)}
        for weight, gone in units.items():
            if gone.all():
                gone.flat[np.argmax(means[weight])] = False
                context.notes.append(f"one unit stays of {weight.name}")
        return units


def _least(means: Array, sizes: Array, ratio: float, rows: bool) -> Array:
    """The units of the least score, as many as make up `ratio` of the weights; of each row for itself with `rows`."""
    pools = len(means) if rows else 1
    order = np.argsort(means.reshape(pools, -1), 1, kind="stable")
    total = np.cumsum(np.take_along_axis(sizes.reshape(pools, -1), order, 1), 1)
    gone = np.empty(order.shape, bool)
    np.put_along_axis(gone, order, total <= ratio * total[:, -1:] + SLACK, 1)
    return gone.reshape(means.shape)
