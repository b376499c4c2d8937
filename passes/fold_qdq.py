"""fold-qdq: networks of dequantize, float operators and quantize become networks of integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paring.ir.graph import Graph, Node
from paring.ir.ops import quantized, shape
from paring.passes import fold_moves, fold_norms, fold_products, fold_steps, fold_tables
from paring.passes.base import Pass
from paring.passes.contract import Steps
from paring.passes.pattern import Rule
from paring.passes.qdq import is_dequantize
from paring.passes.rewriter import Context, apply_rules, describe

# Tables come before steps: what they prove is exact.
RULES: tuple[Rule, ...] = (
    *(*fold_moves.RULES, *fold_products.RULES, *fold_norms.RULES),
    *(*fold_tables.RULES, *fold_steps.RULES),
)


@dataclass(frozen=True)
class FoldQdq(Pass):
    """Float operators between dequantize and quantize become operators on integers; what stays in float is declined by name."""

    name = "fold-qdq"
    contract = Steps(1, 4)

    def rules(self) -> Sequence[Rule]:
        return RULES

    def run(self, graph: Graph, context: Context) -> Graph:
        graph = apply_rules(graph, self.rules(), context)
        explained = {rewrite.node for rewrite, _ in context.declined}
        for node in graph.nodes():
            reason = _stays_in_float(node)
            if reason and describe(node) not in explained:
                context.decline(self.name, node, reason)
        return graph


def _stays_in_float(node: Node) -> str:
    """Why a node that computes with what comes from integers does so in float; empty for any other node."""
    if isinstance(node.op, quantized.Quantize | shape.Movement):
        return ""
    if any(map(is_dequantize, node.inputs)):
        return f"no rule computes this {node.op.name} on integers"
    if any(isinstance(operand.op, quantized.Descale) for operand in node.inputs):
        return f"this {node.op.name} is of sums that are not rounded to 8 bits"
    return ""
