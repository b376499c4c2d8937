"""From the layers of a quantized graph back to the float layers they were made of."""

from __future__ import annotations

from dataclasses import dataclass

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.ops.attention import IntegerAttention, ScaledDotProductAttention
from paring.ir.ops.core import Const
from paring.passes.compress.calibrate import evaluate_from
from paring.passes.compress.layers import is_quantized_weight
from paring.passes.compress.quantization.scan import output_noise
from paring.passes.compress.quantization.units import LAYERS, is_pair
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context


@dataclass(frozen=True)
class Twins:
    """A quantized graph, the float graph that it was made of, and the float layer of each quantized one."""

    before: Graph
    graph: Graph
    layers: dict[Node, Node]

    def promise(self, after: Graph, context: Context) -> Lossy:
        """How much more noise a changed graph makes than this one; noted with both figures."""
        old, new = (output_noise(self.before, graph, context) for graph in (self.graph, after))
        context.notes.append(f"noise over signal of the outputs: {old:g} before, {new:g} after")
        return Lossy("noise", max(0.0, round(new - old, 6)))


def find_twins(graph: Graph, context: Context, who: str) -> Twins | None:
    """None where nothing is quantized. Raises ArgumentError where the graph is not what `quantize` left."""
    if not any(is_quantized_weight(node) for node in graph.nodes()):
        context.notes.append("nothing is quantized: name it after quantize")
        return None
    stages = [stage for stage in context.earlier if not any(map(is_quantized_weight, stage.nodes()))]
    if not stages:
        raise ArgumentError(f"{who} needs the weights before quantization", hint=f"run it with quantize: 'quantize, {who}'")
    return Twins(stages[-1], graph, _match(stages[-1], graph, who))


def _match(before: Graph, after: Graph, who: str) -> dict[Node, Node]:
    """Both graphs walked from their outputs, past quantize and dequantize."""
    layers: dict[Node, Node] = {}
    seen: set[Node] = set()
    stack = list(zip(after.outputs, before.outputs, strict=True))
    while stack:
        new, old = stack.pop()
        while is_pair(new):
            new = new.inputs[0].inputs[0]
        if new in seen or is_quantized_weight(new) or isinstance(new.op, Const):
            continue
        seen.add(new)
        if isinstance(new.op, IntegerAttention) and isinstance(old.op, ScaledDotProductAttention):
            stack.extend((q.inputs[0], x) for q, x in zip(new.inputs[:3], old.inputs[:3], strict=True))
            continue
        if new.op != old.op or len(new.inputs) < len(old.inputs):
            why = f"{new.op.name} stands where {old.op.name} was"
            raise ArgumentError(f"{who} does not know the graph that it is given", why=why, hint=f"'quantize, {who}'")
        if isinstance(new.op, LAYERS) and is_quantized_weight(new.inputs[1]):
            layers[new] = old
        stack.extend(zip(new.inputs, old.inputs, strict=False))
    return {node: layers[node] for node in after.nodes() if node in layers}


def real_weight(layer: Node) -> Node:
    """The weight that a quantized layer computes with, as numbers."""
    return Node(Const(evaluate_from([layer.inputs[1]], {})[0]))
