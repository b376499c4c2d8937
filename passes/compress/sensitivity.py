"""How much a network suffers when one family of channels alone becomes narrower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Graph
from paring.ir.op import Array
from paring.passes.compress.families import Families
from paring.passes.compress.scan import BATCHES, Ratio
from paring.passes.rewriter import Context

# The shares of a family's groups that are taken away.
RATIOS = (0.25, 0.5, 0.75, 0.9)
# With a metric noise only decides between candidates that the metric does not tell apart.
NOISE_BESIDE_METRIC = 1e-3


class Judge:
    """The damage of a graph against the dense one: how far the metric falls, as a share of it; without one the noise power.

    Noise over signal of all outputs on the first batches of the calibration data, 0 where there is neither.
    """

    def __init__(self, dense: Graph, context: Context) -> None:
        self.context = context
        self.batches = context.calibration[:BATCHES]
        self.right = [context.run(dense, batch) for batch in self.batches]
        self.best = context.metric(dense) if context.metric else 0.0

    def damage(self, graph: Graph) -> float:
        noise = self.noise(graph) ** 2
        if self.context.metric is None:
            return noise
        lost = (self.best - self.context.metric(graph)) / max(abs(self.best), 1e-12)
        return max(lost, 0.0) + NOISE_BESIDE_METRIC * noise

    def noise(self, graph: Graph) -> float:
        """As amplitudes."""
        ratio = Ratio()
        for batch, right in zip(self.batches, self.right, strict=True):
            for wanted, found in zip(right, self.context.run(graph, batch), strict=True):
                ratio.add(wanted, found)
        return ratio.relative


@dataclass(frozen=True, eq=False)
class Curve:
    """The damage that one family does alone, by the share of its groups that is gone: (shares, damages), both rising from 0."""

    shares: Array
    damages: Array

    def at(self, share: float) -> float:
        """Between what was tried on a straight line; beyond it on that of the last two."""
        if share <= self.shares[-1] or len(self.shares) < 2:
            return float(np.interp(share, self.shares, self.damages))
        slope = (self.damages[-1] - self.damages[-2]) / (self.shares[-1] - self.shares[-2])
        return float(self.damages[-1] + slope * (share - self.shares[-1]))


def scan(families: Families, judge: Judge, context: Context) -> list[Curve]:
    """The curve of each family, from a run of the network for each and for each of RATIOS."""
    curves, total = [], len(families.families) * len(RATIOS)
    for place, family in enumerate(families.families):
        counts = sorted({family.rounded(round(len(family) * (1 - ratio))) for ratio in RATIOS} - {len(family)}, reverse=True)
        found = [0.0]
        for number, count in enumerate(counts):
            context.tell("scan", place * len(RATIOS) + number, total)
            keep = families.dense
            keep[place] = count
            # A network with fewer channels is no better: where it seems so, that is chance.
            found.append(max(found[-1], judge.damage(families.graph(keep))))
        shares = [0.0, *(1 - count / len(family) for count in counts)]
        curves.append(Curve(np.array(shares), np.array(found)))
    context.tell("scan", total, total)
    return curves


def table(families: Families, curves: Sequence[Curve], what: str) -> list[str]:
    """The scan for the ledger: a line for each family, with what was tried."""
    lines = [f"sensitivity ({what} without these shares of one family's channels):"]
    for family, curve in zip(families.families, curves, strict=True):
        tried = zip(curve.shares[1:], curve.damages[1:], strict=True)
        shown = ", ".join(f"{share:.0%} {damage:.2g}" for share, damage in tried) or "no other width fits"
        lines.append(f"  {family.name} ({family.width(len(family))} channels): {shown}")
    return lines
