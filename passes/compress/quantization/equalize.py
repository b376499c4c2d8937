"""pass equalize: channels between two layers are brought to one range (Nagel et al. 2019, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import unary
from paring.passes.base import Pass
from paring.passes.compress.calibrate import check_calibration, peaks
from paring.passes.compress.layers import carries, is_layer
from paring.passes.compress.quantization.rescale import (
    Values,
    divide_outputs,
    input_ranges,
    multiply_inputs,
    output_ranges,
    values_of,
    with_values,
)
from paring.passes.compress.quantization.scan import output_noise
from paring.passes.contract import Close, Lossy
from paring.passes.rewriter import Context
from paring.passes.util import channel_axis

RANGES = ("weights", "activations")
SWEEPS = 30
# A channel is taken to stay below a clamp's bound where it did so in calibration with this much to spare.
HEADROOM = 1.25


@dataclass(frozen=True, eq=False)
class Link:
    """Two layers, and a clamp between them or None."""

    first: Node
    second: Node
    clamp: Node | None


@dataclass(frozen=True)
class Equalize(Pass):
    """Scales move between consecutive layers, so that the channels between them have one range.

    Through relu, leaky relu, poolings and means this changes nothing but rounding. A clamp at a bound has that bound for all
    channels: with calibration data, channels that reach it keep their scale and no other is made to reach it, so nothing
    changes on these data; without data such pairs are left alone.

    `ranges`: of a channel between two layers: by the weights before it, or by its activations in calibration.
    """

    name = "equalize"
    contract = Close(2)
    lossy = True
    calibrated = True
    before = ("quantize",)
    ranges: str = "weights"

    def check(self) -> None:
        super().check()
        if self.ranges not in RANGES:
            raise ArgumentError(f"pass equalize: ranges is {self.ranges!r}", hint=f"one of {', '.join(RANGES)}")

    def run(self, graph: Graph, context: Context) -> Graph:
        links = [link for link in _links(graph, context) if context.spend(self.name, link.second)]
        if self.ranges == RANGES[1] or (context.calibration and any(link.clamp for link in links)):
            check_calibration(graph, context, self.name)
        if not links:
            return graph
        after = with_values(graph, _equalized(links, _activations(graph, links, context), self.ranges))
        if any(link.clamp for link in links):
            context.promise = Lossy("noise", output_noise(graph, after, context))
        return after


def _links(graph: Graph, context: Context) -> list[Link]:
    """Pairs of layers with nothing between them that other nodes read or that mixes channels."""
    users, found = graph.users(), []
    for node in graph.outputs:
        # An output is read by whoever calls the network.
        users[node] = [*users[node], node]
    for first in filter(is_layer, graph.nodes()):
        link = _follow(first, users, bool(context.calibration))
        if isinstance(link, Link):
            found.append(link)
        else:
            context.decline("equalize", first, link)
    return found


def _follow(first: Node, users: Mapping[Node, Sequence[Node]], has_data: bool) -> Link | str:
    """The link that starts at a layer, or why there is none."""
    node, axis, clamp = first, channel_axis(first), None
    while len(users[node]) == 1:
        (reader,) = users[node]
        if reader is node:
            return "its result is an output"
        if is_layer(reader):
            fits = channel_axis(reader) == axis and _inputs_of(reader) == first.inputs[1].type.shape[0]
            return Link(first, reader, clamp) if fits else "the next layer reads its channels otherwise"
        if _clamps(reader) and not has_data:
            return "a clamp comes after it, and there are no calibration data"
        if _clamps(reader) and clamp is None:
            clamp = reader
        else:
            moved = carries(reader, axis)
            if moved is None:
                return f"{reader.op.name} comes after it, which does not keep scales of channels apart"
            axis = moved
        node = reader
    return "its result is read in several places"


def _clamps(node: Node) -> bool:
    return isinstance(node.op, unary.Clamp) and node.op.low == 0 and 0 < node.op.high < math.inf


def _inputs_of(layer: Node) -> int:
    return layer.inputs[0].type.shape[channel_axis(layer)]


def _activations(graph: Graph, links: list[Link], context: Context) -> dict[Node, Array]:
    """The greatest |value| of each channel of each first layer's result in calibration; empty without data."""
    return peaks(graph, {link.first: channel_axis(link.first) for link in links}, context) if context.calibration else {}


def _equalized(links: list[Link], peaks: dict[Node, Array], ranges: str) -> Values:
    """New constants of all layers: each link's scale is sqrt(range before / range after), until all are near 1."""
    values: Values = {node: values_of(node) for link in links for node in (link.first, link.second)}
    bounded = {link: _bounded(link, peaks) for link in links if link.clamp is not None}
    for _ in range(SWEEPS):
        moved = 0.0
        for link in links:
            first, second = values[link.first], values[link.second]
            before = peaks[link.first] if ranges == RANGES[1] else output_ranges(first[0])
            after = input_ranges(second[0], link.second)
            both = (before > 0) & (after > 0)
            scale = np.sqrt(np.where(both, before, 1.0) / np.where(both, after, 1.0))
            if link.clamp is not None:
                scale = _within(link.clamp, bounded[link], peaks[link.first], scale)
            divide_outputs(first, scale)
            multiply_inputs(second, link.second, scale)
            if link.first in peaks:
                peaks[link.first] = peaks[link.first] / scale
            moved = max(moved, float(np.abs(np.log(scale)).max(initial=0.0)))
        if moved < 1e-3:
            break
    return values


def _bounded(link: Link, peaks: dict[Node, Array]) -> Array:
    """Which channels come near the clamp's bound."""
    assert link.clamp is not None
    assert isinstance(link.clamp.op, unary.Clamp)
    return peaks[link.first] * HEADROOM >= link.clamp.op.high


def _within(clamp: Node, bounded: Array, peaks: Array, scale: Array) -> Array:
    """Scales that leave channels at the bound alone and bring no other there."""
    assert isinstance(clamp.op, unary.Clamp)
    return np.where(bounded, 1.0, np.maximum(scale, peaks * HEADROOM / clamp.op.high))
