"""What `paring ops` shows: each operator with its attributes, examples, and the schedule families that run it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from paring.backends import targets
from paring.backends.targets import Target
from paring.cli.frame import Report, progress, table, text
from paring.cli.inputs import find
from paring.ir import OPS, Const, Graph, Input, Node, Op, Region, TensorType
from paring.ir.text import attributes
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import pipeline


def report(name: str | None, target: str) -> Report:
    """All operators, or one with examples."""
    machine = targets.resolve(target)
    chosen = OPS if name is None else {name: find(name, OPS, "operator")}
    entries = []
    with progress() as tell:
        for done, cls in enumerate(chosen.values()):
            tell(f"asking the backend: {cls.name}", done, len(chosen))
            entries.append(_entry(cls, _families(cls, machine)))
    if name is not None:
        return _one(chosen[name], entries[0])
    columns = ("name", ">operands", "attributes", "families", "what it is")
    rows = [(e["name"], e["operands"], _signature(e), ", ".join(e["families"]) or "-", e["summary"]) for e in entries]
    return Report(entries, [table("", columns, rows)])


def _entry(cls: type[Op], families: list[str]) -> dict[str, Any]:
    low, high = cls.arity
    operands = str(low) if low == high else f"{low}+" if high is None else f"{low} to {high}"
    fields = [
        {
            "name": f.name,
            "type": getattr(f.type, "__name__", f.type),
            "default": None if f.default is dataclasses.MISSING else str(f.default),
        }
        for f in dataclasses.fields(cls)
    ]
    doc = inspect.cleandoc(cls.__doc__ or "")
    # A dataclass without a docstring gets its signature for one, which says nothing new.
    summary = "" if doc.startswith(f"{cls.__name__}(") or not doc else doc.splitlines()[0]
    return {"name": cls.name, "operands": operands, "attributes": fields, "families": families, "summary": summary}


def _signature(entry: Mapping[str, Any]) -> str:
    return ", ".join(a["name"] + (f"={a['default']}" if a["default"] is not None else "") for a in entry["attributes"])


def _one(cls: type[Op], entry: dict[str, Any]) -> Report:
    entry["doc"] = inspect.cleandoc(cls.__doc__ or "")
    entry["examples"] = [
        f"{node.op.name}({', '.join(str(i.type) for i in node.inputs)}){attributes(node.op)} -> {node.type}"
        for node in _samples(cls)[:4]
    ]
    head = f"{cls.name}  operands: {entry['operands']}  families: {', '.join(entry['families']) or '-'}"
    view: list[Any] = [text(head), text(entry["doc"])]
    if entry["attributes"]:
        rows = [(a["name"], a["type"], a["default"]) for a in entry["attributes"]]
        view.append(table("attributes", ("name", "type", "default"), rows))
    return Report(entry, [*view, *map(text, entry["examples"])])


def _samples(cls: type[Op], *, weights: bool = False) -> list[Node]:
    """Nodes of the operator's own samples; with `weights`, float operands behind the first are constants."""
    if cls in (Const, Input, Region):
        return []

    def operand(position: int, t: TensorType) -> Node:
        constant = weights and position > 0 and t.is_float
        return Node(Const(np.ones(t.shape, t.dtype)) if constant else Input(f"x{position}", t.dtype, t.shape))

    rng = np.random.default_rng(0)
    return [Node(op, [operand(i, t) for i, t in enumerate(types)]) for op, types in cls.samples(rng)]


def _families(cls: type[Op], target: Target) -> list[str]:
    """The schedule families that run the operator's samples, once the target's passes have been over them."""
    try:
        from paring.backends.families import choose
    except ImportError:  # TVM is not at hand
        return []
    from paring.backends.memory import plan

    passes = pipeline(target.pipeline, target.pipeline_options())
    found: dict[str, None] = {}
    for node in [*_samples(cls), *_samples(cls, weights=True)]:
        graph = Graph(tuple(i for i in node.inputs if isinstance(i.op, Input)), (node,))
        for step in plan(run_pipeline(graph, passes).graph).order:
            found[choose(step.body, target)[0].name] = None
    return list(found)
