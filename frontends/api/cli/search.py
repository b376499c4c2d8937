"""`paring bisect` and `paring why-not`: from a wrong result to one rewrite or kernel, and why a rule did not fire."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paring.cli.frame import MISMATCH, Report, progress, table, text
from paring.cli.options import Calibration, Device, Model, Passes, Pipeline, Plugins, Seed, TargetName

if TYPE_CHECKING:
    from paring.cli.check import Verdict, WrongKernel
    from paring.cli.inputs import Example
    from paring.frontends.structure import Imported
    from paring.ir.graph import Graph
    from paring.passes.bisect import Culprit
    from paring.passes.rewriter import Tell


def bisect(
    model: Model,
    target: TargetName = "native",
    passes: Passes = None,
    pipeline: Pipeline = None,
    plugin: Plugins = None,
    calibration: Calibration = None,
    device: Device = None,
    seed: Seed = 0,
) -> Report:
    """Find the first pass, and in it the first rewrite, that breaks its contract on this model; if none, the first kernel.

    Runs the model's example inputs through the reference interpreter before and after each pass. Then the network is
    compiled, and each kernel is compared with what its region means. Exit 3 with the culprit named, 0 if there is none.

    Example: paring bisect net.py:make --target x86 --plugin mypass.py:MyPass
    """
    from paring.cli.inputs import chosen_passes, load_model
    from paring.compiler import import_any
    from paring.passes.bisect import bisect as first_culprit
    from paring.passes.manager import run_pipeline
    from paring.passes.rewriter import Context

    with progress() as tell:
        chosen = chosen_passes(target, passes, pipeline, plugin or ())
        tell(f"reading {model}", 0, 0)
        example = load_model(model, seed)
        imported = import_any(example.model, example.args, example.kwargs)
        arrays = imported.flatten_inputs(example.args, example.kwargs)
        batches = _batches(calibration, example, imported)
        fresh = partial(Context, calibration=batches, tell=tell)
        culprit = first_culprit(imported.graph, chosen, arrays, lambda name: tell(name, 0, 0), fresh)
        if culprit is not None:
            return _pass_report(culprit)
        lowered = run_pipeline(imported.graph, chosen, calibration=batches, tell=tell).graph
        verdict, wrong = _check_compiled(lowered, arrays, target, device, tell)
    if wrong is not None:
        return _kernel_report(wrong, verdict)
    data = {"culprit": None, "passes": len(chosen), "check": verdict.as_json() if verdict else None}
    lines = [f"all {len(chosen)} passes keep their contracts on these inputs"]
    if verdict is None:
        lines += [f"its kernels were not run: {target} needs a device (--device emulator)"] if target != "reference" else []
        return Report(data, [*map(text, lines)])
    lines.append(str(verdict) if not verdict.ok else f"and the compiled network agrees with the reference ({verdict})")
    return Report(data, [*map(text, lines)], 0 if verdict.ok else MISMATCH)


def _batches(calibration: str | None, example: Example, imported: Imported) -> Sequence[Sequence[Any]]:
    """What passes are shown that look at data: the example inputs where no others are given."""
    from paring.calibration import collect, flatten
    from paring.cli.calibration import read_calibration

    if calibration is None:
        return [imported.flatten_inputs(example.args, example.kwargs)]
    return flatten(collect(read_calibration(calibration, example.model)), imported.signature)


def _check_compiled(
    lowered: Graph, arrays: Sequence[Any], target: str, device: str | None, tell: Tell
) -> tuple[Verdict | None, WrongKernel | None]:
    """The compiled network against the interpreter, then its kernels; nothing for the reference, or without a device."""
    from paring.backends import targets
    from paring.cli.check import check_reference, wrong_kernel

    found = targets.resolve(target)
    if found.name == targets.REFERENCE.name or not (device or found.device == "host"):
        return None, None
    from paring.backends.build import build
    from paring.backends.devices import open_executable

    built = build(lowered, found, lambda done, total, name: tell("building kernels", done, total))
    with open_executable(built, found, device) as executable:
        tell("the network against the reference", 0, 0)
        verdict = check_reference(lowered, arrays, executable.run(arrays))
        # Kernels are looked at even when the whole agrees: its bound is wide, and hides a small mistake in a deep network.
        wrong = wrong_kernel(executable, arrays, tell) if hasattr(executable, "trace") else None
    return verdict, wrong


def _pass_report(culprit: Culprit) -> Report:
    data = {
        "kind": "pass",
        "step": culprit.step,
        "pass": culprit.name,
        "promise": culprit.promise,
        "rewrite_number": culprit.rewrite_number,
        "rule": culprit.rewrite.rule if culprit.rewrite else None,
        "node": culprit.rewrite.node if culprit.rewrite else None,
        "reason": culprit.reason,
    }
    rows = [(key.replace("_", " "), value) for key, value in data.items() if value is not None]
    view = [text(f"culprit: {culprit}", "bold red"), table("", ("", ""), rows)]
    return Report({"culprit": data}, view, MISMATCH)


def _kernel_report(wrong: WrongKernel, verdict: Verdict | None) -> Report:
    data = {"kind": "kernel", **dataclasses.asdict(wrong)}
    view = [text(f"culprit: {wrong}", "bold red"), text("all passes keep their contracts: the kernel is wrong, not the program")]
    view += [text(f"its region, with operands as inputs:\n{wrong.text}")] if wrong.text else []
    return Report({"culprit": data, "check": verdict.as_json() if verdict else None}, view, MISMATCH)


def why_not(
    model: Model,
    target: TargetName = "native",
    only: Annotated[str, typer.Option("--pass", help="Only this pass.")] = "",
    passes: Passes = None,
    pipeline: Pipeline = None,
    plugin: Plugins = None,
    calibration: Calibration = None,
    seed: Seed = 0,
) -> Report:
    """Show where rules fitted but declined, and why: the missed fusion that you wonder about.

    Example: paring why-not net.py:make --pass fuse
    """
    from paring.cli.inputs import chosen_passes, load_model
    from paring.compiler import import_any
    from paring.errors import ArgumentError
    from paring.passes.manager import run_pipeline

    chosen = chosen_passes(target, passes, pipeline, plugin or ())
    names = list(dict.fromkeys(each.name for each in chosen))
    if only and only not in names:
        raise ArgumentError(f"no pass {only!r} is in this pipeline", hint=f"in it: {', '.join(names)}")
    with progress() as tell:
        tell(f"reading {model}", 0, 0)
        example = load_model(model, seed)
        imported = import_any(example.model, example.args, example.kwargs)
        batches = _batches(calibration, example, imported)
        result = run_pipeline(imported.graph, chosen, progress=lambda name: tell(name, 0, 0), calibration=batches, tell=tell)
    declined = [(name, rewrite.rule, rewrite.node, why) for name, rewrite, why in result.declined if only in ("", name)]
    data = [{"pass": name, "rule": rule, "node": node, "why": why} for name, rule, node, why in declined]
    if not declined:
        return Report(data, [text(f"no rule declined anywhere: {'pass ' + only if only else 'all'} did all that it looks for")])
    counts = Counter(declined)
    rows = [(name, rule, why, node + (f"  (x{count})" if count > 1 else "")) for (name, rule, node, why), count in counts.items()]
    return Report(data, [table("", ("pass", "rule", "why not", "where"), rows)])
