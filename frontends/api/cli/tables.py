"""`paring passes` and `paring ops`: what there is, read off the tables of passes, targets and operators."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paring.cli.frame import Report, table, text
from paring.cli.options import Plugins, TargetName

if TYPE_CHECKING:
    from rich.table import Table

    from paring.passes.base import Pass
    from paring.passes.ledger import Ledger


def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, with its options and rules.", show_default=False)] = None,
    plugin: Plugins = None,
) -> Report:
    """List the passes with their contracts, and the pipeline of each target; or show one pass with its rules."""
    from paring.cli.inputs import find, load_plugins
    from paring.passes.pipelines import LOSSY, PASSES

    known = {**PASSES, **LOSSY, **load_plugins(plugin or ())}
    if name is not None:
        return _one_pass(find(name, known, "pass"))
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
        {
            "name": f.name,
            "type": getattr(f.type, "__name__", f.type),
            "default": None if f.default is dataclasses.MISSING else f.default,
        }
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
    from paring.cli.ops import report

    return report(name, target)


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
