"""quantize: post-training quantization to 8 bits, in the form quantize - dequantize, which `fold-qdq` turns into integers."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.types import BYTES
from paring.passes.base import Pass
from paring.passes.compress.calibrate import check_calibration
from paring.passes.compress.layers import Names
from paring.passes.compress.quantization.observers import make_observer
from paring.passes.compress.quantization.ranges import calibrate
from paring.passes.compress.quantization.scan import KINDS, Recipe, metrics, output_noise, scan
from paring.passes.compress.quantization.units import LAYERS, Flow, Unit, find_units, insert
from paring.passes.compress.quantization.weights import METHODS, most_of, quantized_weight
from paring.passes.contract import Lossy
from paring.passes.ledger import SHOWN_LAYERS
from paring.passes.rewriter import Context

WEIGHTS = ("channel", "tensor")


@dataclass(frozen=True)
class Quantize(Pass):
    """Activations and weights become 8-bit integers, in ranges found with calibration data.

    Each value that a unit reads (a product with its residual sum and relu, an elementwise function, a mean, a norm) gets
    quantize and dequantize; weights become dequantize of int8. What no unit reads, graph outputs above all, stays float.

    `calibrator`: minmax, ema (with `momentum`), percentile (with `percentile`), kl or mse. `activations`: uint8 or int8.
    `weights`: one scale for each output channel, or one for the tensor; `bits` 2 to 8; `weight_range`: minmax or mse.
    `skip`: module paths and glob patterns, with commas: these layers stay float.
    `scan`: how bad a layer is: by the SQNR of its own result (layer), by that of the network's outputs when only this layer
    is quantized (network), by the metric then (metric), or not looked at (none). `budget`: the worst layers by that figure
    stay float until the metric has fallen by at most so much.
    """

    name = "quantize"
    contract = Lossy("metric", math.inf)
    calibrated = True
    calibrator: str = "mse"
    activations: str = "uint8"
    weights: str = "channel"
    bits: int = 8
    weight_range: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.9
    skip: str = ""
    scan: str = "layer"
    budget: float = math.inf

    def run(self, graph: Graph, context: Context) -> Graph:
        if context.metric is None and (math.isfinite(self.budget) or self.scan == "metric"):
            what = "a budget" if math.isfinite(self.budget) else "scan='metric'"
            raise ArgumentError(f"quantize: {what} needs a metric", hint="paring.compile(..., metric=f), higher is better")
        flow, skip = Flow(graph), Names(self.skip)
        units = find_units(flow, skip)
        skip.check(graph, self.name)
        if not units:
            return graph
        check_calibration(graph, context, self.name)
        recipe = self._recipe(flow, units, context)
        ratios = scan(recipe, self.scan, context)
        figures = metrics(recipe, context) if self.scan == "metric" else ratios
        worst = sorted(recipe.units, key=lambda unit: (figures.get(unit.name, 0.0), ratios.get(unit.name, 0.0)))
        left = self._left_in_float(recipe, worst, context)
        chosen = [unit for unit in recipe.units if unit not in left]
        context.sqnr.update(ratios)
        context.notes.extend(_notes(graph, chosen, left, ratios, self))
        if self.scan == "metric":
            shown = ", ".join(f"{unit.name} {figures[unit.name]:g}" for unit in worst[:SHOWN_LAYERS])
            context.notes.append(f"metric when only one layer is quantized, lowest: {shown}")
        after = self._apply(recipe, chosen, context)
        context.promise = Lossy("metric", self.budget)
        if math.isinf(self.budget):
            context.promise = Lossy("noise", output_noise(graph, after, context))
        return after

    def check(self) -> None:
        super().check()
        make_observer(self.calibrator, percentile=self.percentile, momentum=self.momentum)
        most_of(self.bits)
        choices = {"activations": BYTES, "weights": WEIGHTS, "weight_range": METHODS, "scan": KINDS}
        for option, known in choices.items():
            if getattr(self, option) not in known:
                raise ArgumentError(f"pass quantize: {option} is {getattr(self, option)!r}", hint=f"one of {', '.join(known)}")
        if math.isnan(self.budget) or self.budget < 0:
            raise ArgumentError(f"pass quantize: budget is {self.budget}", hint="how far the metric may fall: 0 or more")
        if math.isfinite(self.budget) and self.scan == "none":
            raise ArgumentError("pass quantize: a budget needs a scan", hint="scan='layer', 'network' or 'metric'")

    def _recipe(self, flow: Flow, units: Sequence[Unit], context: Context) -> Recipe:
        """Integers of all weights and ranges of all values; units with a value that is not finite stay float."""
        weights = {unit.anchor: self._weight(unit) for unit in units if isinstance(unit.anchor.op, LAYERS)}
        make = functools.partial(make_observer, self.calibrator, percentile=self.percentile, momentum=self.momentum)
        params, lost = calibrate(flow.graph, flow.groups(units), make, self.activations, context)
        kept = [unit for unit in units if lost.isdisjoint(flow.values_of(unit))]
        for unit in units:
            if unit not in kept:
                context.decline(self.name, unit.end, "it computes with values that are NaN, infinite or nearly so")
        return Recipe(flow, kept, params, weights)

    def _weight(self, unit: Unit) -> Node:
        return quantized_weight(unit.anchor.inputs[1], self.bits, self.weights == WEIGHTS[0], self.weight_range, unit.name)

    def _left_in_float(self, recipe: Recipe, worst: list[Unit], context: Context) -> list[Unit]:
        """As few of the worst units as keep the metric within the budget, found by bisection."""
        if math.isinf(self.budget) or context.metric is None:
            return []
        wanted = context.metric(recipe.flow.graph) - self.budget
        least, most = 0, len(worst)
        while least < most:
            middle = (least + most) // 2
            context.tell("budget", middle, len(worst))
            if context.metric(recipe.apply(worst[middle:]).graph) >= wanted:
                most = middle
            else:
                least = middle + 1
        return worst[:least]

    def _apply(self, recipe: Recipe, units: Sequence[Unit], context: Context) -> Graph:
        """One unit of fuel for each value, each weight and each attention."""
        values = [value for group in recipe.flow.groups(units) for value in group]
        layers = [unit.anchor for unit in units if unit.anchor in recipe.weights]
        pairs = {value: recipe.params[value] for value in values if context.spend("activation", value)}
        weights = {layer: recipe.weights[layer] for layer in layers if context.spend("weight", layer)}
        attentions = {node: params for node, params in recipe.attentions(units).items() if context.spend("attention", node)}
        return insert(recipe.flow.graph, pairs, weights, attentions).graph


def _notes(graph: Graph, chosen: Sequence[Unit], left: Sequence[Unit], ratios: dict[str, float], settings: Quantize) -> list[str]:
    total = sum(node.macs for node in graph.nodes())
    notes = [f"{sum(unit.macs for unit in chosen) / total:.1%} of multiply-adds between roundings to 8 bits"] if total else []
    if ratios:
        what = "the outputs when only it is quantized" if settings.scan == "network" else "its own result"
        notes.append(f"SQNR of a layer: of {what}")
    if left:
        names = ", ".join(f"{unit.name} ({ratios[unit.name]:.1f} dB)" for unit in left)
        notes.append(f"left in float to stay within {settings.budget:g} of the metric: {names}")
    return notes
