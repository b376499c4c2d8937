"""pass prune-search: how much of each family of channels goes, for a budget of time, multiply-adds or bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph
from paring.passes.base import Pass
from paring.passes.compress.calibrate import check_calibration
from paring.passes.compress.channels.channel_rules import channels_of
from paring.passes.compress.channels.costs import KINDS, Costs
from paring.passes.compress.channels.families import Families
from paring.passes.compress.channels.paying import timer
from paring.passes.compress.channels.prune_channels import decline_stays, paying, ranked, removed
from paring.passes.compress.channels.sensitivity import Curve, Judge, scan, table
from paring.passes.compress.criteria import CHANNEL_CRITERIA, SLACK, check_choice
from paring.passes.contract import Lossy
from paring.passes.ledger import measure
from paring.passes.rewriter import Context

# The share of multiply-adds that may be left where no budget is given.
DEFAULT = 0.5
METHODS = ("greedy", "evolutionary")
# Of the evolution: how many candidates live, for how many generations, and how many families a mutation widens and narrows.
POPULATION = 8
GENERATIONS = 6
MOST_MOVED = 3
# How many narrower levels of a family each step looks at.
LEVELS = 16
Keep = tuple[int, ...]
Step = tuple[float, int, int]


@dataclass(frozen=True)
class PruneSearch(Pass):
    """Removes channels where they cost most for what they are worth, until a share of the dense network's cost is left.

    One of `channels`, `macs`, `size` (bytes of parameters), `latency`: the share that may be left; by default macs=0.5. Latency
    is measured where the target's code runs on this host, else modelled; the ledger says which. First a scan: each
    family of coupled channels alone becomes narrower, and how far the user's metric falls, or without one how much of the outputs
    is lost on calibration data, goes into the ledger; a budget of 1.0 does only that. `method`: greedy takes what does least
    damage for the cost it saves, damages being added; evolutionary starts there, and tries mutations of it on the whole
    network, by `seed`. `criterion`, `round_to` and `measure` are those of prune-channels.
    """

    name = "prune-search"
    contract = Lossy("metric", math.inf)
    before = ("equalize", "smooth", "quantize")
    least = {"round_to": 0, "seed": 0}
    calibrated = True
    channels: float | None = None
    macs: float | None = None
    size: float | None = None
    latency: float | None = None
    method: str = "greedy"
    criterion: str = "l2"
    round_to: int | None = None
    seed: int = 0
    measure: bool | None = None

    def check(self) -> None:
        super().check()
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            hint = "the share of the dense network's that may be left: prune-search{macs=0.5}"
            raise ArgumentError(f"pass {self.name} takes one budget, not {' and '.join(given)}", hint=hint)
        if not 0 < self.budget <= 1:
            raise ArgumentError(f"pass {self.name}: {self.kind} is {self.budget}", hint="a share: more than 0, at most 1")
        check_choice(self.name, "method", self.method, METHODS)
        check_choice(self.name, "criterion", self.criterion, CHANNEL_CRITERIA)

    @property
    def kind(self) -> str:
        return next((kind for kind in KINDS if getattr(self, kind) is not None), "macs")

    @property
    def budget(self) -> float:
        found: float | None = getattr(self, self.kind)
        return DEFAULT if found is None else found

    def run(self, graph: Graph, context: Context) -> Graph:
        if context.calibration or context.metric is None:
            check_calibration(graph, context, self.name)
        families = ranked(self, graph, context)
        decline_stays(self.name, families.channels, context)
        judge = Judge(graph, context)
        curves = scan(families, judge, context)
        context.notes.extend(
            table(families, curves, "the metric lost" if context.metric else "noise over signal of the outputs, as powers")
        )
        spent = Spent(self, families, context)
        path = greedy_path(families, curves, Costs(families, self.kind, context.machine))
        keep = spent.first_within(path)
        if self.method == METHODS[1] and keep != path[0]:
            keep = Evolution(self, families, judge, spent, context).best(keep)
        keep = tuple(paying(self, families, keep, context))
        left = spent.share(keep)
        context.notes.append(f"{self.kind}: {left:.1%} of the dense network's are left ({spent.how})")
        if left > self.budget + SLACK:
            context.notes.append(f"over the budget of {self.budget:.1%}: what was undone would have been slower")
        return removed(self, families, keep, context)


class Spent:
    """The cost of whole graphs, as a share of the dense one's; each computed or measured once."""

    def __init__(self, search: PruneSearch, families: Families, context: Context) -> None:
        self.search, self.families, self.context = search, families, context
        self.time = timer(context, search.measure)
        self.how = "counted"
        self._known: dict[Keep, float] = {}
        self.dense = self._cost(families.channels.flow.graph)

    def share(self, keep: Keep) -> float:
        if keep not in self._known:
            self._known[keep] = self._cost(self.families.graph(keep)) / max(self.dense, 1e-30)
        return self._known[keep]

    def first_within(self, path: Sequence[Keep]) -> Keep:
        """The first of ever smaller networks that is within the budget, by bisection. Raises ArgumentError where none is."""
        low, high = 0, len(path) - 1
        least = self.share(path[high])
        if least > self.search.budget:
            what = f"pass {self.search.name}: {self.search.kind}={self.search.budget:g} cannot be reached"
            why = f"with the most gone that was tried of each family {least:.1%} are left"
            raise ArgumentError(what, why=why, hint="paring why-not says which channels stay, and why; round_to=1 leaves fewer")
        while low < high:
            self.context.tell("budget", low, len(path))
            middle = (low + high) // 2
            if self.share(path[middle]) <= self.search.budget:
                high = middle
            else:
                low = middle + 1
        return path[low]

    def _cost(self, graph: Graph) -> float:
        if self.search.kind == "latency":
            timing = self.time(graph)
            self.how = "measured" if timing.measured else "modelled: the target is not at hand"
            return timing.seconds
        if self.search.kind == "channels":
            return float(sum(len(labels) for labels in channels_of(graph).flow.layers.values()))
        size = measure(graph)
        return float(size.macs if self.search.kind == "macs" else size.parameter_bytes)


def greedy_path(families: Families, curves: Sequence[Curve], costs: Costs) -> list[Keep]:
    """From the dense network to the smallest: each step narrows the family whose damage is least for the cost it saves."""
    keep, path = families.dense, [tuple(families.dense)]
    while True:
        steps = [step for place in range(len(keep)) if (step := _step(families, curves, costs, keep, place))]
        if not steps:
            return path
        _, place, level = min(steps)
        keep[place] = level
        path.append(tuple(keep))


def _step(families: Families, curves: Sequence[Curve], costs: Costs, keep: list[int], place: int) -> Step | None:
    """(damage for each unit of cost, family, groups that stay) of narrowing a family, to the level where that is least."""
    family, old = families.families[place], keep[place]
    before, found = costs.of(place, keep), None
    lower = [level for level in family.levels if level < old and curves[place].was_tried(1 - level / len(family))]
    for level in lower[:: max(1, len(lower) // LEVELS)]:
        keep[place] = level
        saved = before - costs.of(place, keep)
        damage = curves[place].at(1 - level / len(family)) - curves[place].at(1 - old / len(family))
        step = (damage / saved if saved > 0 else math.inf, place, level)
        found = step if found is None or step[0] < found[0] else found
    keep[place] = old
    return found


class Evolution:
    """Candidates of the same cost: mutations widen some families and narrow others; the least damaged live on."""

    def __init__(self, search: PruneSearch, families: Families, judge: Judge, spent: Spent, context: Context) -> None:
        self.families, self.judge, self.spent, self.context = families, judge, spent, context
        self.budget = search.budget
        self.rng = np.random.default_rng(search.seed)
        self.costs = Costs(families, search.kind, context.machine)
        self._known: dict[Keep, float] = {}

    def best(self, start: Keep) -> Keep:
        """The least damaged candidate within the budget that was found, the first one among equals."""
        living, limit = [start], self.costs.total(start)
        for generation in range(GENERATIONS):
            self.context.tell("evolution", generation, GENERATIONS)
            children = [self._mutation(living[int(self.rng.integers(len(living)))], limit) for _ in range(POPULATION)]
            living = sorted(dict.fromkeys([*living, *children]), key=self._damage)[:POPULATION]
        self.context.tell("evolution", GENERATIONS, GENERATIONS)
        return next(keep for keep in [*living, start] if self.spent.share(keep) <= self.budget)

    def _damage(self, keep: Keep) -> float:
        if keep not in self._known:
            self._known[keep] = self.judge.damage(self.families.graph(keep))
        return self._known[keep]

    def _mutation(self, keep: Keep, limit: float) -> Keep:
        """Some families wider, then others narrower until the cost is no greater; itself where that does not come out."""
        found = list(keep)
        order = [int(place) for place in self.rng.permutation(len(found))]
        wider = order[: int(self.rng.integers(1, MOST_MOVED + 1))]
        for place in wider:
            more = [level for level in self.families.families[place].levels if level > found[place]]
            found[place] = more[int(self.rng.integers(len(more)))] if more else found[place]
        for place in (place for place in order if place not in wider):
            for level in self.families.families[place].levels:
                if self.costs.total(found) <= limit:
                    return tuple(found)
                found[place] = min(found[place], level)
        return tuple(found) if self.costs.total(found) <= limit else keep
