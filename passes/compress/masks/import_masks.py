"""pass import-masks: masks from a file go into the weights that they name, and the zeros that a model came with are described."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from paring.ir.errors import ArgumentError, InputError, nearest
from paring.ir.graph import Graph, Node, substitute
from paring.ir.op import Array
from paring.ir.ops.core import Const
from paring.passes.base import Pass
from paring.passes.canonicalize import Canonicalize
from paring.passes.compress.layers import Names
from paring.passes.compress.masks.masks import Weight, listed, weights_of, zeros
from paring.passes.compress.masks.structure import structure
from paring.passes.const_fold import ConstFold
from paring.passes.contract import Lossy
from paring.passes.rewriter import Context
from paring.passes.util import const_value, constant

# What torch.nn.utils.prune calls the mask of a parameter.
SUFFIX = "_mask"
PARAMETER = "weight"
FORM = "safetensors, an array for each parameter"


@dataclass(frozen=True)
class ImportMasks(Pass):
    """Masks of a file are applied to the parameters that they name; the ledger says what structure the zeros of each layer have.

    `file`: safetensors with an array of zeros and ones for each parameter, of its shape, by the parameter's name in the torch
    model (`layer1.0.conv1.weight`), its module's (`layer1.0.conv1`) or the mask's (`layer1.0.conv1.weight_mask`). Without a
    file: models that torch.nn.utils.prune or torch.ao.pruning pruned compute mask times weight, which is constant.
    """

    name = "import-masks"
    contract = Lossy("metric", math.inf)
    unprepared = True
    file: str = ""

    def run(self, graph: Graph, context: Context) -> Graph:
        masks = _fitting(_read(self.file), _parameters(graph), self.file) if self.file else {}
        new: dict[Node, Node] = {}
        for node, mask in masks.items():
            value = const_value(node)
            masked = np.where(mask, value, np.zeros((), value.dtype))
            if (masked != value).any() and context.spend(self.name, node):
                new[node] = constant(masked, node.loc)
        after = substitute(graph, new) if new else graph
        context.notes.extend(_described(after, context))
        return after


def _read(file: str) -> dict[str, Array]:
    """Raises ArgumentError for a file that is not there or no safetensors, or that has no masks."""
    try:
        found = dict(load_file(str(Path(file).expanduser())))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ArgumentError("cannot read masks", where=file, why=str(error), hint=FORM) from None
    if not found:
        raise ArgumentError("there are no masks", where=file, hint=FORM)
    return found


def _parameters(graph: Graph) -> dict[str, Node]:
    """The constants that have the name of a parameter: where a float tensor of the model was read."""
    return {n.loc.module: n for n in graph.nodes() if isinstance(n.op, Const) and n.loc and n.loc.module and n.type.is_float}


def _fitting(masks: Mapping[str, Array], known: Mapping[str, Node], file: str) -> dict[Node, Array]:
    """By constant what stays of it. Raises InputError that says of every mask that does not fit why."""
    found: dict[Node, Array] = {}
    faults = []
    for name, mask in sorted(masks.items()):
        node = _named(name, known)
        if node is None:
            faults.append(f"{name!r} is no parameter" + (f" ({near})" if (near := nearest(name, known, "")) else ""))
        elif mask.shape != node.type.shape:
            faults.append(f"{name!r} is of shape {mask.shape}, its parameter of {node.type.shape}")
        elif not np.isin(mask, (0, 1)).all():
            faults.append(f"{name!r} has values that are neither 0 nor 1")
        elif node in found:
            faults.append(f"{name!r} is a second mask of one parameter")
        else:
            found[node] = mask != 0
    if faults:
        hint = f"parameters: {', '.join(list(known)[:20]) or 'none have names'}"
        raise InputError(f"{len(faults)} of {len(masks)} masks do not fit", where=file, why="; ".join(faults), hint=hint)
    return found


def _named(name: str, known: Mapping[str, Node]) -> Node | None:
    """The parameter that a mask's name means."""
    plain = name.removesuffix(SUFFIX)
    return next((known[n] for n in (name, plain, f"{plain}.{PARAMETER}") if n in known), None)


def _described(graph: Graph, context: Context) -> list[str]:
    """For each structure the layers that have it, with their share of zeros, once all that is constant has been computed."""
    for step in (Canonicalize(), ConstFold()):
        graph = step.run(graph, Context())
    by_structure: dict[str, list[Weight]] = {}
    for weight in weights_of(graph, Names(""), ImportMasks.name, context):
        by_structure.setdefault(structure(weight.value), []).append(weight)
    return [f"{what}: {listed([(zeros(w.value), w.name) for w in weights])}" for what, weights in by_structure.items()]
