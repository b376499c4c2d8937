"""pass finetune: the user's training, at its place among the steps of pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph
from paring.ir.ops.core import Const
from paring.passes.base import Pass
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context


@dataclass(frozen=True)
class FineTune(Pass):
    """Trains the weights by the user's hook; what was pruned stays pruned, weights that are zero stay zero.

    So do those of a layer initialised to zeros: nothing tells it from one that is masked. The hook can free them, by
    `del module.masks[name]`.

    Name it wherever training belongs: `prune-channels{ratio=0.3}, finetune, prune-channels{ratio=0.3}, finetune`.
    """

    name = "finetune"
    contract = Lossy("metric", math.inf)
    before = ("quantize",)

    def run(self, graph: Graph, context: Context) -> Graph:
        if context.finetune is None:
            hint = "paring.compile(..., finetune=function), which trains the torch module that it is given"
            raise ArgumentError("the pass finetune needs a hook that trains", hint=hint)
        context.tell(self.name, 0, 0)
        after = context.finetune(graph)
        if after is graph or not context.spend(self.name, graph.outputs[0]):
            return graph
        fresh = [node for node in set(after.nodes()) - set(graph.nodes()) if isinstance(node.op, Const)]
        context.notes.append(f"{sum(node.type.size for node in fresh)} weights trained, in {len(fresh)} constants")
        return after
