"""Sensitivity: how much noise the quantization of one layer alone makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.interpreter import evaluate, walk
from paring.ir.op import Array
from paring.ir.ops.attention import ScaledDotProductAttention
from paring.ir.ops.quantized import Dequantize, Quantize
from paring.passes.compress.calibrate import BATCHES, evaluate_from
from paring.passes.compress.quantization.attention import on_integers
from paring.passes.compress.quantization.observers import Affine
from paring.passes.compress.quantization.units import Flow, Inserted, Unit, insert
from paring.passes.rewriter import Context

KINDS = ("layer", "network", "metric", "none")
# Where there is no noise at all; so that every figure is finite.
MOST_DB = 200.0


@dataclass(frozen=True)
class Recipe:
    """How each unit of a graph would be quantized: parameters of values, integer weights of layers."""

    flow: Flow
    units: Sequence[Unit]
    params: Mapping[Node, Affine]
    weights: Mapping[Node, Node]

    def apply(self, units: Iterable[Unit]) -> Inserted:
        """The graph with these units quantized and the others in float."""
        chosen = list(units)
        pairs = {value: self.params[value] for group in self.flow.groups(chosen) for value in group}
        weights = {u.anchor: self.weights[u.anchor] for u in chosen if u.anchor in self.weights}
        return insert(self.flow.graph, pairs, weights, self.attentions(chosen))

    def attentions(self, units: Iterable[Unit]) -> dict[Node, list[Affine]]:
        """The attentions among these units, with the parameters of what they read."""
        found = [unit.anchor for unit in units if isinstance(unit.anchor.op, ScaledDotProductAttention)]
        return {node: [self.params[self.flow.origins[i][0]] for i in node.inputs[:3]] for node in found}


class Ratio:
    """Signal to noise over everything that it is shown, in dB."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0

    def add(self, right: Array, found: Array) -> None:
        """Where the right value is not finite there is neither signal nor noise."""
        if right.dtype.kind == "f" and right.size:
            wide = np.where(np.isfinite(right), right, 0).astype(np.float64)
            apart = np.where(np.isfinite(right), found, 0).astype(np.float64) - wide
            self.signal += float((wide**2).sum())
            self.noise += float((apart**2).sum())

    @property
    def db(self) -> float:
        if self.noise == 0:
            return MOST_DB
        if not math.isfinite(self.noise) or self.signal == 0:
            return -MOST_DB
        return min(max(10 * math.log10(self.signal / self.noise), -MOST_DB), MOST_DB)

    @property
    def relative(self) -> float:
        """Noise over signal, as amplitudes, rounded up."""
        return math.ceil(10 ** (-self.db / 20) * 1e6) / 1e6 if self.noise else 0.0


def scan(recipe: Recipe, kind: str, context: Context) -> dict[str, float]:
    """The SQNR (dB) of each unit by name, over the first batches.

    `network`: of the network's outputs when only this unit is quantized; this runs half the network for each unit. Otherwise
    of the unit's own result, with operands of the float network.
    """
    ratios = {unit: Ratio() for unit in recipe.units}
    batches = context.calibration[:BATCHES] if kind != "none" else ()
    done, total = 0, len(batches) * len(ratios)
    for batch in batches:
        known = dict(walk(recipe.flow.graph, batch))
        for unit, ratio in ratios.items():
            context.tell("scan", done, total)
            done += 1
            if kind != "network":
                ratio.add(known[unit.end], alone(recipe, unit, known))
                continue
            graph = recipe.apply([unit]).graph
            found = evaluate_from(graph.outputs, known)
            for node, output in zip(recipe.flow.graph.outputs, found, strict=True):
                ratio.add(known[node], output)
    return {unit.name: ratio.db for unit, ratio in ratios.items()} if batches else {}


def metrics(recipe: Recipe, context: Context) -> dict[str, float]:
    """The user's metric when only one unit is quantized, by name."""
    found = {}
    for number, unit in enumerate(recipe.units):
        context.tell("scan", number, len(recipe.units))
        found[unit.name] = context.metric(recipe.apply([unit]).graph) if context.metric else 0.0
    return found


def alone(recipe: Recipe, unit: Unit, known: Mapping[Node, Array]) -> Array:
    """A quantized unit's result on operands of the float network; the rounding of the result is that of who reads it."""
    values: dict[Node, Array] = {}
    attentions = recipe.attentions([unit])
    for operand in recipe.flow.operands(unit):
        # What only moves values does not change how they round.
        params = recipe.params.get(recipe.flow.origins[operand][0])
        if params is not None:
            values[operand] = rounded(known[operand], params)
    for node in unit.nodes:
        inputs = [values.get(i, known[i]) for i in node.inputs]
        if node in recipe.weights:
            inputs[1] = evaluate_from([recipe.weights[node]], {})[0]
        if node in attentions:
            integer = on_integers(node, node.inputs, attentions[node])
            (values[node],) = evaluate_from([integer], dict(zip(node.inputs, inputs, strict=True)))
        else:
            values[node] = evaluate(node, inputs)
    return values[unit.end]


def rounded(values: Array, params: Affine) -> Array:
    """Real numbers through 8 bits and back."""
    q = Quantize(params.zero_point, params.dtype, scale=params.scale).ref(values)
    return Dequantize(params.scale, params.zero_point).ref(q)


def output_noise(before: Graph, after: Graph, context: Context) -> float:
    """Noise over signal of all outputs, as amplitudes, on the first batches."""
    ratio = Ratio()
    for batch in context.calibration[:BATCHES]:
        known = dict(zip(before.inputs, batch, strict=True))
        for right, found in zip(evaluate_from(before.outputs, known), evaluate_from(after.outputs, known), strict=True):
            ratio.add(right, found)
    return ratio.relative
