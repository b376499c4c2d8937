"""How much a network suffers when one family of channels alone becomes narrower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from paring.ir.graph import Graph
from paring.ir.op import Array
from paring.passes.compress.calibrate import BATCHES
from paring.passes.compress.channels.families import Families
from paring.passes.rewriter import Context

# The shares of a family's groups that are taken away.
RATIOS = (0.25, 0.5, 0.75, 0.9)
# With a metric noise only decides between candidates that the metric does not tell apart.
NOISE_BESIDE_METRIC = 1e-3
MOST_DAMAGE = 1e6


class Judge:
    """The damage of a graph against the dense one: how far the metric falls, as a share of it; without one what is lost of the
    outputs on the first batches of the calibration data: noise over signal, as powers, once the outputs are scaled to fit best.

    That is 1 / c - 1, c being the squared cosine between the outputs: it grows without end where nothing is left of them, as
    noise over signal does not, and small noise counts alike.
    """

    def __init__(self, dense: Graph, context: Context) -> None:
        self.context = context
        self.batches = context.calibration[:BATCHES]
        self.right = self._outputs(dense)
        self.best = context.metric(dense) if context.metric else 0.0

    def damage(self, graph: Graph) -> float:
        return self.both(graph)[0]

    def both(self, graph: Graph) -> tuple[float, str]:
        """The damage, and what to tell of it: how far the metric fell, or what is lost."""
        lost = self.lost(graph)
        if self.context.metric is None:
            return lost, "all" if lost >= MOST_DAMAGE else f"{lost:.2g}"
        found = self.context.metric(graph)
        fallen = max((self.best - found) / max(abs(self.best), 1e-12), 0.0)
        return fallen + NOISE_BESIDE_METRIC * lost, f"{self.best - found:.2g}"

    def lost(self, graph: Graph) -> float:
        """0 where the outputs are the same; at most MOST_DAMAGE."""
        found = self._outputs(graph)
        both = max(float(self.right @ found), 0.0) ** 2
        alone = float(self.right @ self.right) * float(found @ found)
        return min(alone / both - 1, MOST_DAMAGE) if both > 0 else MOST_DAMAGE * float(alone > 0)

    def _outputs(self, graph: Graph) -> Array:
        """All float outputs on all batches, in float64, what is not finite as 0."""
        arrays = [y for batch in self.batches for y in self.context.run(graph, batch) if y.dtype.kind == "f"]
        flat = np.concatenate([np.zeros(0), *(y.astype(np.float64).ravel() for y in arrays)])
        return np.where(np.isfinite(flat), flat, 0.0)


@dataclass(frozen=True, eq=False)
class Curve:
    """The damage that one family does alone, by the share of its groups that is gone: (shares, damages), from 0.

    `told`: for each share that was tried what the ledger says of it.
    """

    shares: Array
    damages: Array
    told: tuple[str, ...] = ()

    @cached_property
    def expected(self) -> Array:
        """The damages with slopes that only rise: a network that is ruined cannot lose more, which makes nothing cheap."""
        steps = np.diff(self.shares)
        slopes = np.maximum.accumulate(np.diff(self.damages) / steps)
        return np.concatenate([[0.0], np.cumsum(np.maximum(slopes, 0.0) * steps)])

    def at(self, share: float) -> float:
        """What is expected, on a straight line between what was tried."""
        return float(np.interp(share, self.shares, self.expected))

    def was_tried(self, share: float) -> bool:
        """Whether so much, or more, was taken away."""
        return bool(share <= self.shares[-1])


def scan(families: Families, judge: Judge, context: Context) -> list[Curve]:
    """The curve of each family, from a run of the network for each and for each of RATIOS."""
    curves, total = [], len(families.families) * len(RATIOS)
    for place, family in enumerate(families.families):
        counts = sorted({family.rounded(round(len(family) * (1 - ratio))) for ratio in RATIOS} - {len(family)}, reverse=True)
        found, told = [0.0], []
        for number, count in enumerate(counts):
            context.tell("scan", place * len(RATIOS) + number, total)
            keep = families.dense
            keep[place] = count
            damage, said = judge.both(families.graph(keep))
            found.append(damage)
            told.append(said)
        shares = [0.0, *(1 - count / len(family) for count in counts)]
        curves.append(Curve(np.array(shares), np.array(found), tuple(told)))
    context.tell("scan", total, total)
    return curves


def table(families: Families, curves: Sequence[Curve], what: str) -> list[str]:
    """The scan for the ledger: a line for each family, with what was tried."""
    lines = [f"sensitivity ({what} without these shares of one family's channels):"]
    for family, curve in zip(families.families, curves, strict=True):
        tried = zip(curve.shares[1:], curve.told, strict=True)
        shown = ", ".join(f"{share:.0%}: {said}" for share, said in tried) or "no other width fits"
        lines.append(f"  {family.name} ({family.width(len(family))} channels): {shown}")
    return lines
