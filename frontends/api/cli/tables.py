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
    """List the passes with their contracts, and the pipeline of each target; or show one pass with its rules.

    A target like `native` stands for the best one that this machine runs, which is shown with it.
    """
    from paring.cli.inputs import find, load_plugins
    from paring.passes.pipelines import LOSSY, PASSES

    known = {**PASSES, **LOSSY, **load_plugins(plugin or ())}
    if name is not None:
        return _one_pass(find(name, known, "pass"))
    rows = [{"name": cls.name, "contract": str(cls.contract), "summary": cls.summary()} for cls in known.values()]
    pipelines, here = _target_pipelines()
    shown = [(name + (f" ({here[name]} here)" if name in here else ""), steps) for name, steps in pipelines.items()]
    view = [
        table("passes", ("name", "contract", "what it does"), [tuple(row.values()) for row in rows]),
        table("targets", ("name", "pipeline"), shown),
    ]
    return Report({"passes": rows, "pipelines": pipelines, "here": here}, view)


def _target_pipelines() -> tuple[dict[str, str], dict[str, str]]:
    """The pipeline of each target, and what names that stand for another target stand for on this machine."""
    from paring.backends import targets
    from paring.passes.pipelines import pipeline, show_pipeline

    resolved = {name: targets.resolve(name) for name in targets.names()}
    pipelines = {n: show_pipeline(pipeline(t.pipeline, t.pipeline_options())) for n, t in resolved.items()}
    return pipelines, {name: target.name for name, target in resolved.items() if name != target.name}


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


def ledger_table(ledger: Ledger, *, times: bool = True) -> Table:
    """What each pass did, in the columns of the ledger's own text; a saved one has no times."""
    columns = ("step", "pass", "contract", ">fired", ">nodes", ">MMACs", ">param KiB", ">peak KiB", ">ms")
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
    count = len(columns) - (not times)
    return table("", columns[:count], [row[:count] for row in rows])
