"""pass prune-channels: channels that matter least are removed, with all that hangs on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.passes.base import Pass
from paring.passes.compress.channels.channel_rules import channels_of
from paring.passes.compress.channels.channels import Channels, Group
from paring.passes.compress.channels.cut import removed_by, without
from paring.passes.compress.channels.families import Families
from paring.passes.compress.channels.paying import keep_what_pays
from paring.passes.compress.criteria import (
    CHANNEL_CRITERIA,
    SCOPES,
    SLACK,
    Evidence,
    channel_scores,
    check_choice,
    check_evidence,
)
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Removes the channels that matter least; the result computes what the network does whose channels are masked instead.

    `ratio`: the share of channels that goes, of those that can. `criterion`: l2 or l1 of the weights that make a channel, or
    random (by `seed`). `scope`: the same share of every layer, or where in the network the scores are least (global).
    `round_to`: channel counts that change stay multiples of it: by default of the channels that the target's kernels compute
    at once; 0 or 1: any count. A layer keeps at least one channel. `measure`: time the network before and after, give layers
    that became slower their channels back, and write the conversion efficiency into the ledger; by default where the target's
    code runs on this host.
    """

    name = "prune-channels"
    contract = Lossy("metric", math.inf)
    before = ("equalize", "smooth", "quantize")
    least = {"round_to": 0, "seed": 0}
    calibrated = True
    ratio: float = 0.5
    criterion: str = "l2"
    scope: str = "layer"
    round_to: int | None = None
    seed: int = 0
    measure: bool | None = None

    def check(self) -> None:
        super().check()
        if not 0 <= self.ratio < 1:
            raise ArgumentError(f"pass {self.name}: ratio is {self.ratio}", hint="a share of channels: 0 or more, less than 1")
        check_choice(self.name, "criterion", self.criterion, CHANNEL_CRITERIA)
        check_choice(self.name, "scope", self.scope, SCOPES)

    def plan(self, graph: Graph, context: Context | None = None) -> dict[Node, Array]:
        """By layer the output channels that the pass removes, for `masked`; with a context where the criterion looks at data."""
        context = context or Context()
        families = ranked(self, graph, context)
        return removed_by(families.chosen(self._keep(families, context)))

    def run(self, graph: Graph, context: Context) -> Graph:
        families = ranked(self, graph, context)
        decline_stays(self.name, families.channels, context)
        keep = paying(self, families, self._keep(families, context), context)
        return removed(self, families, keep, context)

    def _keep(self, families: Families, context: Context) -> list[int]:
        """How many groups stay of each family."""
        wanted = self._shares(families) if self.scope == SCOPES[1] else [_staying(len(f), self.ratio) for f in families.families]
        keep = [family.rounded(count) for family, count in zip(families.families, wanted, strict=True)]
        for family, count, rounded in zip(families.families, wanted, keep, strict=True):
            if count == 0:
                context.notes.append(f"one channel stays of {family.name}")
            if count < rounded == len(family):
                reason = (
                    f"all channels stay: no number of them from {family.width(max(count, 1))} on is a multiple of {family.step}"
                )
                context.decline(self.name, family.layers[0], f"{reason}, which round_to asks for")
        return keep

    def _shares(self, families: Families) -> list[int]:
        """How many groups stay of each family when those of the least scores in the whole network go."""
        everything = sorted((g for family in families.families for g in family.groups), key=lambda g: families.rank[g.number])
        total = np.cumsum([group.size for group in everything])
        least = total <= self.ratio * sum(group.size for group in everything) + SLACK
        gone = {group.number for group, goes in zip(everything, least, strict=True) if goes}
        return [sum(group.number not in gone for group in family.groups) for family in families.families]


class Choosing(Protocol):
    """A pass that removes channels: how it judges and rounds, and whether it measures."""

    name: ClassVar[str]

    @property
    def criterion(self) -> str: ...
    @property
    def round_to(self) -> int | None: ...
    @property
    def seed(self) -> int: ...
    @property
    def measure(self) -> bool | None: ...


def ranked(choosing: Choosing, graph: Graph, context: Context) -> Families:
    """The families of a graph, each in the order of how much its groups matter."""
    check_evidence(choosing.name, choosing.criterion, graph, context)
    channels = channels_of(graph)
    layers = tuple(dict.fromkeys(layer for group in channels.groups for layer in group.channels))
    evidence = Evidence(graph, layers, context, np.random.default_rng(choosing.seed), channels)
    rank = channel_scores(channels.groups, choosing.criterion, evidence)
    step = context.machine.block if choosing.round_to is None else choosing.round_to
    return Families.of(channels, rank, step)


def decline_stays(who: str, channels: Channels, context: Context) -> None:
    """Name what cannot go, and why."""
    for stay in channels.stays:
        width = stay.layer.inputs[1].type.shape[0]
        context.decline(who, stay.layer, f"{stay.count} of {width} channels stay: {stay.reason}")


def paying(choosing: Choosing, families: Families, keep: Sequence[int], context: Context) -> Sequence[int]:
    """How many groups stay of each family: so many, or as many more as pay where that is measured."""
    measured = context.time is not None if choosing.measure is None else choosing.measure
    return keep_what_pays(families, keep, context) if measured else keep


def removed(choosing: Choosing, families: Families, keep: Sequence[int], context: Context) -> Graph:
    """The graph in which so many groups stay of each family; one unit of fuel for each that goes."""
    wanted = families.chosen(keep, context)
    groups = [group for group in wanted if context.spend(choosing.name, group.layer)]
    context.notes.append(_summary(families.channels, groups))
    return without(families.channels, groups) if groups else families.channels.flow.graph


def _staying(count: int, ratio: float) -> int:
    return count - math.floor(ratio * count + SLACK)


def _summary(channels: Channels, groups: Sequence[Group]) -> str:
    can, gone = sum(group.size for group in channels.groups), sum(group.size for group in groups)
    every = sum(map(len, channels.flow.layers.values()))
    layers = len(removed_by(groups))
    return f"{gone} of {every} channels removed, in {layers} of {len(channels.flow.layers)} layers; {can} could go"
