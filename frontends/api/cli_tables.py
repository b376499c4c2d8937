"""`paring passes` and `paring ops`: what there is, read off the tables of passes, targets and operators."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paring.cli_frame import Report, progress, table, text
from paring.cli_options import Plugins, TargetName

if TYPE_CHECKING:
    from rich.table import Table

    from paring.ir.op import Op
    from paring.passes.base import Pass
    from paring.passes.ledger import Ledger


def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, with its options and rules.", show_default=False)] = None,
    plugin: Plugins = None,
) -> Report:
    """List the passes with their contracts, and the pipeline of each target; or show one pass with its rules."""
    from paring.cli_inputs import load_plugins
    from paring.passes.pipelines import PASSES

    known = {**PASSES, **load_plugins(plugin or ())}
    if name is not None:
        return _one_pass(_find(name, known, "pass"))
    rows = [{"name": cls.name, "contract": str(cls.contract), "summary": cls.summary()} for cls in known.values()]
    pipelines = _target_pipelines()
    view = [
        table("passes", ("name", "contract", "what it does"), [tuple(row.values()) for row in rows]),
        table("targets", ("name", "pipeline"), pipelines.items()),
    ]
    return Report({"passes": rows, "pipelines": pipelines}, view)


def _target_pipelines() -> dict[str, str]:
    from paring.backends import targets
    from paring.passes.pipelines import parse_pipeline, pipeline, show_pipeline

    found = {}
    for name in targets.names():
        target = targets.resolve(name)
        found[name] = show_pipeline(parse_pipeline(pipeline(target.pipeline, target.pipeline_options())))
    return found


def _one_pass(cls: type[Pass]) -> Report:
    options = [
        {"name": f.name, "type": str(f.type), "default": None if f.default is dataclasses.MISSING else f.default}
        for f in dataclasses.fields(cls)
    ]
    rules = [
        {
            "name": rule.name,
            "contract": str(rule.contract),
            "formula": rule.formula,
            "ops": [each.name for each in rule.pattern.ops],
        }
        for rule in cls().rules()
    ]
    doc = inspect.cleandoc(cls.__doc__ or "")
    view: list[Any] = [text(f"{cls.name}  {cls.contract}"), text(doc)]
    if options:
        view.append(table("options", ("name", "type", "default"), [tuple(option.values()) for option in options]))
    if rules:
        rows = [(rule["name"], rule["contract"], rule["formula"]) for rule in rules]
        view.append(table("rules, in the order in which they are tried", ("name", "contract", "formula"), rows))
    data = {"name": cls.name, "contract": str(cls.contract), "doc": doc, "options": options, "rules": rules}
    return Report(data, view)


def ops(
    name: Annotated[str | None, typer.Argument(help="One operator, with examples of its types.", show_default=False)] = None,
    target: TargetName = "native",
) -> Report:
    """List the operators with their attributes and the schedule families that run them; or show one, with examples."""
    from paring.ir.ops import OPS

    chosen = OPS if name is None else {name: _find(name, OPS, "operator")}
    with progress() as tell:
        tell("asking the backend", 0, 0)
        families = {op: _families(cls, target) for op, cls in chosen.items()}
    entries = [_op_entry(cls, families[op]) for op, cls in chosen.items()]
    if name is not None:
        return _one_op(chosen[name], entries[0])
    columns = ("name", ">operands", "attributes", "families", "what it is")
    rows = [(e["name"], e["operands"], _attribute_list(e), ", ".join(e["families"] or ["-"]), e["summary"]) for e in entries]
    return Report(entries, [table("", columns, rows)])


def _op_entry(cls: type[Op], families: list[str]) -> dict[str, Any]:
    low, high = cls.arity
    operands = str(low) if low == high else f"{low}+" if high is None else f"{low} to {high}"
    attributes = [
        {"name": f.name, "type": str(f.type), "default": None if f.default is dataclasses.MISSING else str(f.default)}
        for f in dataclasses.fields(cls)
    ]
    doc = inspect.cleandoc(cls.__doc__ or "")
    generated = doc.startswith(f"{cls.__name__}(")
    return {
        "name": cls.name,
        "operands": operands,
        "attributes": attributes,
        "families": families,
        "summary": "" if generated or not doc else doc.splitlines()[0],
    }


def _attribute_list(entry: Mapping[str, Any]) -> str:
    return ", ".join(a["name"] + (f"={a['default']}" if a["default"] is not None else "") for a in entry["attributes"])


def _one_op(cls: type[Op], entry: dict[str, Any]) -> Report:
    entry["doc"] = inspect.cleandoc(cls.__doc__ or "")
    entry["examples"] = _examples(cls)
    rows = [(a["name"], a["type"], a["default"]) for a in entry["attributes"]]
    head = f"{cls.name}  operands: {entry['operands']}  families: {', '.join(entry['families']) or '-'}"
    view: list[Any] = [text(head), text(entry["doc"])]
    if rows:
        view.append(table("attributes", ("name", "type", "default"), rows))
    return Report(entry, [*view, *map(text, entry["examples"])])


def _examples(cls: type[Op]) -> list[str]:
    """A few uses, with the type that comes out."""
    from paring.ir.text import attributes

    return [
        f"{node.op.name}({', '.join(str(i.type) for i in node.inputs)}){attributes(node.op)} -> {node.type}"
        for node in _samples(cls)[:4]
    ]


def _samples(cls: type[Op]) -> list[Any]:
    """Nodes of the operator's own samples; none for those that have no operands."""
    import numpy as np

    from paring.ir.graph import Node
    from paring.ir.ops.core import Const, Input, Region

    if cls in (Const, Input, Region):
        return []
    return [
        Node(op, [Node(Input(f"x{i}", t.dtype, t.shape)) for i, t in enumerate(types)])
        for op, types in cls.samples(np.random.default_rng(0))
    ]


def _families(cls: type[Op], target: str) -> list[str]:
    """The schedule families that take the operator's samples; none where TVM is not at hand."""
    from paring.backends import targets
    from paring.ir.graph import Graph

    found = targets.resolve(target)
    try:
        from paring.backends.families import choose
    except ImportError:
        return []
    bodies = [Graph(node.inputs, (node,)) for node in _samples(cls)]
    return list(dict.fromkeys(choose(body, found)[0].name for body in bodies))


def _find(name: str, known: Mapping[str, Any], kind: str) -> Any:
    import difflib

    from paring.errors import ArgumentError

    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        raise ArgumentError(f"no {kind} {name!r}", hint=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
    return known[name]


def ledger_table(ledger: Ledger) -> Table:
    """What each pass did."""
    columns = ("step", "pass", "contract", ">rewrites", ">nodes", ">MMACs", ">weights KiB", ">peak KiB", ">ms")
    rows = [
        (
            e.step,
            e.name,
            e.contract,
            sum(e.rewrites.values()) or "-",
            e.after.nodes,
            f"{e.after.macs / 1e6:.1f}",
            f"{e.after.parameter_bytes / 1024:.1f}",
            f"{e.after.peak_activation_bytes / 1024:.1f}",
            f"{e.seconds * 1e3:.1f}",
        )
        for e in ledger.entries
    ]
    return table("", columns, rows)
