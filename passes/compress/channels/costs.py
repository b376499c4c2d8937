"""What layers cost at other widths, from counts of channels alone: what a search asks thousands of times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops import conv
from paring.passes.compress.channels.families import Families
from paring.passes.machine import Machine, staircase

KINDS = ("channels", "macs", "size", "latency")


@dataclass(frozen=True)
class Side:
    """Channels on one side of a layer: how many there are, and of each family the places that groups take in its order."""

    width: int
    places: dict[int, Array]

    def left(self, keep: Sequence[int]) -> int:
        """How many stay when so many groups of each family do."""
        return self.width - sum(len(p) - int(np.searchsorted(p, keep[family])) for family, p in self.places.items())


@dataclass(frozen=True)
class Row:
    """A layer: its channels read and made, the products of one pair of them, and bytes that grow with neither or one."""

    outputs: Side
    inputs: Side
    grouped: bool
    pixels: int
    pixels_read: int
    kernel: int

    def cost(self, kind: str, keep: Sequence[int], machine: Machine) -> float:
        made = self.outputs.left(keep)
        # In a convolution with groups each output reads as many inputs as before.
        read = self.inputs.width if self.grouped else self.inputs.left(keep)
        weights = made * read * self.kernel
        if kind == "channels":
            return float(made)
        if kind == "size":
            return 4.0 * weights
        if kind == "macs":
            return float(weights * self.pixels)
        padded = staircase(made, machine.block) * (read if self.grouped else staircase(read, machine.block)) * self.kernel
        moved = 4.0 * (weights + made * self.pixels + self.inputs.left(keep) * self.pixels_read)
        return max(2.0 * padded * self.pixels / machine.flops, moved / machine.bandwidth)


class Costs:
    """Costs of the layers that families touch."""

    def __init__(self, families: Families, kind: str, machine: Machine) -> None:
        self.kind, self.machine = kind, machine
        self.where = {g.number: (f, place) for f, family in enumerate(families.families) for place, g in enumerate(family.groups)}
        layers = families.channels.flow.layers
        roots = families.channels.flow.coupling.roots
        self.rows = [self._row(layer, roots(labels).tolist(), families.read_by(layer)) for layer, labels in layers.items()]
        self.touched: list[list[Row]] = [[] for _ in families.families]
        for row in self.rows:
            for family in {**row.outputs.places, **row.inputs.places}:
                self.touched[family].append(row)

    def of(self, family: int, keep: Sequence[int]) -> float:
        """Of the layers that make or read a family's channels."""
        return sum(row.cost(self.kind, keep, self.machine) for row in self.touched[family])

    def total(self, keep: Sequence[int]) -> float:
        return sum(row.cost(self.kind, keep, self.machine) for row in self.rows)

    def _row(self, layer: Node, made: list[int], read: list[int]) -> Row:
        weight, x = layer.inputs[1].type.shape, layer.inputs[0].type
        grouped = isinstance(layer.op, conv.Conv2d) and layer.op.groups > 1
        kernel = int(np.prod(weight[2:]))
        inputs = Side(weight[1], {} if grouped else self._places(read))
        return Row(
            Side(weight[0], self._places(made)), inputs, grouped, layer.type.size // weight[0], x.size // weight[1], kernel
        )

    def _places(self, numbers: list[int]) -> dict[int, Array]:
        found: dict[int, list[int]] = {}
        for number in numbers:
            if number in self.where:
                family, place = self.where[number]
                found.setdefault(family, []).append(place)
        return {family: np.sort(places) for family, places in found.items()}
