"""`paring.to_torch` and `paring.from_torch`: any model as a torch module with weights to train, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from paring.compiler import as_tuple, import_any
from paring.ir.errors import ArgumentError, ParingError
from paring.ir.graph import Graph
from paring.network import SAVED, Network
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import pipeline

if TYPE_CHECKING:
    from paring.frontends.torch_module import TrainableGraph


def to_torch(
    model: Any, inputs: Any = None, kwargs: Mapping[str, Any] | None = None, *, keep_zeros: bool = False
) -> TrainableGraph:
    """A torch.nn.Module that computes what a network does, and can be trained.

    Args:
        model: an ir.Graph, taken as it is; a Network, of which the last stage before it was lowered is taken; or any model that
            `paring.compile` takes, with example `inputs` and `kwargs`: simplified and its batch norms folded, as lossy passes
            see it, so that the names of its parameters are those that a `finetune` hook meets.
        keep_zeros: weights of layers that are zero stay zero, whatever is learned, those of a matrix of zeros only as well:
            it may have been masked. Without it they learn; `del module.masks[name]` frees those of one parameter.

    Raises ArgumentError for a graph that is lowered to a target, UnsupportedOpsError naming all operators without gradients.
    """
    from paring.frontends import torch_module

    if isinstance(model, Graph):
        return torch_module.to_torch(model, keep_zeros=keep_zeros)
    if isinstance(model, Network):
        return torch_module.to_torch(_trainable_stage(model), keep_zeros=keep_zeros)
    imported = import_any(model, as_tuple(inputs), dict(kwargs or {}))
    return torch_module.to_torch(run_pipeline(imported.graph, pipeline("prepare", {})).graph, keep_zeros=keep_zeros)


def from_torch(module: Any) -> Graph:
    """The graph of a module that `to_torch` made, with the values that its parameters have now: compile it like any model.

    Raises ArgumentError for any other module, for parameters that are gone or of another type, and for values that are NaN or
    infinite.
    """
    from paring.frontends import torch_module

    return torch_module.from_torch(module)


def _trainable_stage(network: Network) -> Graph:
    """The last stage that torch can compute. Raises ArgumentError for a network that was loaded, which has one stage."""
    from paring.frontends.torch_module import check_trainable

    stages = network.stage_graphs
    if network.stages == [SAVED]:
        hint = "keep the model, or a dump of the stage before the pass layout"
        raise ArgumentError("a saved network keeps the program that runs, no stage to train", hint=hint)
    for graph in reversed(stages):
        try:
            check_trainable(graph)
        except ParingError:
            continue
        return graph
    check_trainable(stages[0])
    return stages[0]
