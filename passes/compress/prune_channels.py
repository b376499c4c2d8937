"""pass prune-channels: channels that matter least are removed, with all that hangs on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.passes.base import Pass
from paring.passes.compress.channel_rules import channels_of
from paring.passes.compress.channels import Channels, Group
from paring.passes.compress.criteria import (
    CHANNEL_CRITERIA,
    SCOPES,
    SLACK,
    Evidence,
    channel_scores,
    check_choice,
    check_evidence,
)
from paring.passes.compress.cut import removed_by, without
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Removes the channels that matter least; the result computes what the network does whose channels are masked instead.

    `ratio`: the share of channels that goes, of those that can. `criterion`: l2 or l1 of the weights that make a channel, or
    random (by `seed`). `scope`: the same share of every layer, or where in the network the scores are least (global).
    `round_to`: channel counts that change stay multiples of it; 0 or 1: any count. A layer keeps at least one channel.
    """

    name = "prune-channels"
    contract = Lossy("metric", math.inf)
    before = ("equalize", "smooth", "quantize")
    least = {"round_to": 0, "seed": 0}
    calibrated = True
    ratio: float = 0.5
    criterion: str = "l2"
    scope: str = "layer"
    round_to: int = 8
    seed: int = 0

    def check(self) -> None:
        super().check()
        if not 0 <= self.ratio < 1:
            raise ArgumentError(f"pass {self.name}: ratio is {self.ratio}", hint="a share of channels: 0 or more, less than 1")
        check_choice(self.name, "criterion", self.criterion, CHANNEL_CRITERIA)
        check_choice(self.name, "scope", self.scope, SCOPES)

    def plan(self, graph: Graph, context: Context | None = None) -> dict[Node, Array]:
        """By layer the output channels that the pass removes, for `masked`; with a context where the criterion looks at data."""
        channels = channels_of(graph)
        return removed_by(self._chosen(channels, context or Context()))

    def run(self, graph: Graph, context: Context) -> Graph:
        channels = channels_of(graph)
        for stay in channels.stays:
            width = stay.layer.inputs[1].type.shape[0]
            context.decline(self.name, stay.layer, f"{stay.count} of {width} channels stay: {stay.reason}")
        wanted = self._chosen(channels, context)
        groups = [group for group in wanted if context.spend(self.name, next(iter(group.channels)))]
        context.notes.append(_summary(channels, groups))
        return without(channels, groups) if groups else graph

    def _chosen(self, channels: Channels, context: Context) -> list[Group]:
        """The groups that go, of each family those that matter least."""
        families = channels.families()
        graph = channels.flow.graph
        check_evidence(self.name, self.criterion, graph, context)
        layers = tuple(dict.fromkeys(layer for group in channels.groups for layer in group.channels))
        evidence = Evidence(graph, layers, context, np.random.default_rng(self.seed), channels)
        rank = channel_scores(channels.groups, self.criterion, evidence)
        keep = self._shares(families, rank) if self.scope == SCOPES[1] else [_staying(len(f), self.ratio) for f in families]
        chosen: list[Group] = []
        for family, count in zip(families, keep, strict=True):
            best = sorted(family, key=lambda group: -rank[group.number])
            if count == 0:
                context.notes.append(f"one channel stays of {_name(best[0])}")
            chosen += best[self._rounded(best, max(1, count)) :]
        return _sparing(channels, chosen, rank, context)

    def _shares(self, families: Sequence[Sequence[Group]], rank: Mapping[int, float]) -> list[int]:
        """How many groups stay of each family when those of the least scores in the whole network go."""
        everything = sorted((g for family in families for g in family), key=lambda group: rank[group.number])
        total = np.cumsum([group.size for group in everything])
        least = total <= self.ratio * sum(group.size for group in everything) + SLACK
        gone = {group.number for group, goes in zip(everything, least, strict=True) if goes}
        return [sum(group.number not in gone for group in family) for family in families]

    def _rounded(self, best: Sequence[Group], count: int) -> int:
        """The least number of groups, `count` or more, that leaves each layer its width or a multiple of `round_to`."""
        step = max(1, self.round_to)
        layers = list(dict.fromkeys(layer for group in best for layer in group.channels))
        width = np.array([layer.inputs[1].type.shape[0] for layer in layers])
        sizes = np.array([[len(group.channels.get(layer, ())) for layer in layers] for group in best])
        lost = sizes.sum(0) - np.cumsum(sizes, 0)
        fits = ((lost == 0) | ((width - lost) % step == 0)).all(1)
        return count + int(np.argmax(fits[count - 1 :]))


def _staying(count: int, ratio: float) -> int:
    return count - math.floor(ratio * count + SLACK)


def _sparing(channels: Channels, chosen: list[Group], rank: Mapping[int, float], context: Context) -> list[Group]:
    """Without the best group of every set that would all go: no value may be left without elements."""
    gone = {group.number: group for group in chosen}
    for whole in channels.wholes:
        if whole <= gone.keys():
            spared = gone.pop(max(whole, key=lambda number: (rank[number], number)))
            context.notes.append(f"one channel stays of {_name(spared)}")
    return list(gone.values())


def _name(group: Group) -> str:
    layer = next(iter(group.channels))
    return (layer.loc.module if layer.loc else "") or f"{layer.op.name} {layer.type}"


def _summary(channels: Channels, groups: Sequence[Group]) -> str:
    can, gone = sum(group.size for group in channels.groups), sum(group.size for group in groups)
    every = sum(map(len, channels.flow.layers.values()))
    layers = len(removed_by(groups))
    return f"{gone} of {every} channels removed, in {layers} of {len(channels.flow.layers)} layers; {can} could go"
