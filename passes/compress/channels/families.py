"""Families of channels: how many of each stay, and the graph that comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from paring.ir.graph import Graph, Node
from paring.passes.compress.channels.channels import Channels, Group
from paring.passes.compress.channels.cut import without
from paring.passes.compress.channels.labels import along
from paring.passes.rewriter import Context
from paring.passes.util import channel_axis, layer_name


@dataclass(frozen=True, eq=False)
class Family:
    """Groups that share layers, those that matter most first. `step`: widths that change stay multiples of it."""

    groups: tuple[Group, ...]
    step: int

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def name(self) -> str:
        return layer_name(self.groups[0].layer)

    @cached_property
    def layers(self) -> tuple[Node, ...]:
        return tuple(dict.fromkeys(layer for group in self.groups for layer in group.channels))

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """How many groups may stay, the most first: each layer keeps its width, or a multiple of the step."""
        width = np.array([layer.inputs[1].type.shape[0] for layer in self.layers])
        sizes = np.array([[len(group.channels.get(layer, ())) for layer in self.layers] for group in self.groups])
        lost = sizes.sum(0) - np.cumsum(sizes, 0)
        fits = ((lost == 0) | ((width - lost) % self.step == 0)).all(1)
        return tuple((np.flatnonzero(fits)[::-1] + 1).tolist())

    def rounded(self, count: int) -> int:
        """The least number of groups, `count` or more, that may stay."""
        return min(level for level in self.levels if level >= max(count, 1))

    def width(self, count: int) -> int:
        """Of the first layer, when so many groups stay."""
        layer = self.layers[0]
        return layer.inputs[1].type.shape[0] - sum(len(group.channels.get(layer, ())) for group in self.groups[count:])


@dataclass(frozen=True, eq=False)
class Families:
    """All families of a graph, and how much each group matters by its number."""

    channels: Channels
    rank: Mapping[int, float]
    families: tuple[Family, ...]

    @staticmethod
    def of(channels: Channels, rank: Mapping[int, float], step: int) -> Families:
        ordered = (sorted(family, key=lambda group: -rank[group.number]) for family in channels.families())
        return Families(channels, rank, tuple(Family(tuple(family), max(1, step)) for family in ordered))

    @property
    def dense(self) -> list[int]:
        """All groups of each family."""
        return [len(family) for family in self.families]

    def read_by(self, layer: Node) -> list[int]:
        """The number of the group of each channel that a layer reads."""
        roots = self.channels.roots.get(layer.inputs[0])
        return [] if roots is None else along(roots, channel_axis(layer)).tolist()

    def chosen(self, keep: Sequence[int], context: Context | None = None) -> list[Group]:
        """The groups that go when so many stay of each family, no value being left without elements."""
        gone = {g.number: g for family, count in zip(self.families, keep, strict=True) for g in family.groups[count:]}
        for whole in self.channels.wholes:
            if whole <= gone.keys():
                spared = gone.pop(max(whole, key=lambda number: (self.rank[number], number)))
                if context:
                    context.notes.append(f"one channel stays of {layer_name(spared.layer)}")
        return list(gone.values())

    def graph(self, keep: Sequence[int]) -> Graph:
        """The graph in which so many groups of each family stay."""
        groups = self.chosen(keep)
        return without(self.channels, groups) if groups else self.channels.flow.graph
