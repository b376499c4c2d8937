"""Importer of torch.fx GraphModules (symbolic_trace): replays their nodes under torch.export, then goes the one way there is.

So modules, functions, methods and attributes need no second table: what torch.export makes of them is what the aten table knows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx.traceback

from paring.frontends.structure import Imported
from paring.frontends.torch_export import import_model
from paring.ir.errors import ArgumentError


def import_fx(module: torch.fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Imported:
    """Import a GraphModule on example inputs.

    Module paths come from its nodes; source lines too where it was traced with `Tracer.record_stack_traces`. Raises what
    `import_model` raises.
    """
    if not isinstance(module, torch.fx.GraphModule):
        raise ArgumentError(f"expected a torch.fx.GraphModule, got {type(module).__name__}", hint="use import_model")
    return import_model(_replayed(module), args, kwargs)


def _replayed(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A shallow copy whose forward runs node by node, so that what is traced carries the metadata of the node it came from."""
    copied = torch.fx.GraphModule(module, module.graph)
    copied.train(module.training)
    signature = inspect.signature(module.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        with torch.fx.traceback.preserve_node_meta():
            return torch.fx.Interpreter(copied).run(*bound.args, *bound.kwargs.values())

    forward.__signature__ = signature  # type: ignore[attr-defined]
    copied.forward = forward
    return copied
