"""Runs a pipeline: verifies, counts, dumps, and stops at the pass that broke something."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

from safetensors.numpy import save_file

from paring.ir import Graph, Input, constants, interpret, same, show
from paring.ir.errors import ArgumentError, ContractError, InternalError, ParingError, PassError, a_kind
from paring.ir.op import Array
from paring.ir.text import quote
from paring.ir.verify import verify
from paring.passes.base import Pass
from paring.passes.contract import Exact
from paring.passes.ledger import Entry, Ledger, measure
from paring.passes.machine import SOME_MACHINE, Machine, Time
from paring.passes.rewriter import Context, Finetune, Gradients, Rewrite, Run, Tell, failure, silent


@dataclass
class Result:
    """The outcome of a pipeline: the graph, the ledger, and each stage by number (0 is the import)."""

    graph: Graph
    ledger: Ledger
    stages: list[tuple[str, Graph]] = field(default_factory=list)
    declined: list[tuple[str, Rewrite, str]] = field(default_factory=list)


def run_pipeline(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    dump: str | Path | None = None,
    fuel: int | None = None,
    metric: Callable[[Graph], float] | None = None,
    progress: Callable[[str], None] | None = None,
    calibration: Sequence[Sequence[Array]] = (),
    run: Run = interpret,
    tell: Tell = silent,
    finetune: Finetune | None = None,
    gradients: Gradients | None = None,
    machine: Machine = SOME_MACHINE,
    time: Time | None = None,
) -> Result:
    """Run passes in order, each verified.

    `dump`: a folder for the text after each changing pass, written when a pass fails too. `fuel`: how many rewrites may be
    made in all. `metric`: given the graph after each changing pass, its figure goes into the ledger; where some passes are
    lossy, after these only. Lossy passes run without a metric too; the ledger then says so. `progress` is told each pass's
    name. `calibration`, `run`, `tell`, `finetune`, `gradients`, `machine` and `time` are for lossy passes: see Context.
    Raises ParingError with the pass named where one fails.
    """
    verify(graph)
    result = Result(graph, Ledger(), [("import", graph)])
    measured = _Metric(metric, any(p.lossy for p in passes))
    tools = partial(Context, finetune=finetune, gradients=gradients, machine=machine, time=time)
    context = partial(tools, calibration=calibration, run=run, metric=measured.function, tell=tell)
    try:
        for step, transformation in enumerate(passes, 1):
            if progress:
                progress(transformation.name)
            fuel = _advance(result, step, transformation, context(fuel), measured)
    except Exception as error:
        if dump is not None:
            _dump_what_there_is(result, Path(dump), error)
        raise
    if dump is not None:
        write_dumps(result, Path(dump))
    return result


def _advance(result: Result, step: int, transformation: Pass, context: Context, measured: _Metric) -> int | None:
    """Run one pass on the graph reached so far, and write down what it did; gives the fuel that is left."""
    graph, entries = result.graph, result.ledger.entries
    size = entries[-1].after if entries else measure(graph)
    context.earlier = [stage for _, stage in result.stages]
    start = perf_counter()
    after = _run_one(transformation, graph, context, step)
    changed = after is not graph and bool(context.rewrites)
    if after is not graph and not changed and not same(after, graph):
        what = f"pass {transformation.name} changed the program without spending fuel"
        raise InternalError(what, hint="call context.spend(rule, node) before each change")
    after = after if changed else graph
    new_size = measure(after) if changed else size
    seconds = perf_counter() - start
    fired = dict(sorted(Counter(r.rule for r in context.rewrites).items()))
    figure = measured.after(transformation, graph, after, context) if changed else None
    promise = transformation.promise(context) if changed else Exact()
    entry = Entry(step, str(transformation), promise, fired, seconds, size, new_size, changed, figure)
    entries.append(replace(entry, sqnr=context.sqnr, conversion=context.conversion, notes=tuple(context.notes)))
    result.declined.extend((transformation.name, rewrite, why) for rewrite, why in context.declined)
    if changed:
        result.stages.append((str(transformation), after))
    result.graph = after
    return context.fuel


def _dump_what_there_is(result: Result, folder: Path, error: Exception) -> None:
    """Write the stages before a failure; the error says where they are."""
    try:
        write_dumps(result, folder)
    except ArgumentError as other:
        said = f"{other.what}: {other.why}"
    else:
        said = f"the stages before it are in {folder}"
    if isinstance(error, ParingError):
        error.hint = f"{error.hint}; {said}" if error.hint else said


def run_pass(transformation: Pass, graph: Graph, context: Context) -> Graph:
    """One pass over a graph. Raises ParingError unless it gives a well-formed program that is called like the one before."""
    try:
        after: object = transformation.run(graph, context)
        if not isinstance(after, Graph):
            raise PassError(f"the pass gives a {type(after).__name__}, not a graph")
        verify(after)
    except ParingError:
        raise
    except Exception as error:
        raise failure("the pass", error) from error
    for what, before, now in (
        ("inputs", _inputs(graph), _inputs(after)),
        ("type of an output", _outputs(graph), _outputs(after)),
    ):
        if before != now:
            raise ContractError(f"{transformation} changed the {what}", why=f"it was {before}, is {now}")
    return after


def _inputs(graph: Graph) -> str:
    return ", ".join(f"{quote(n.op.label)}: {n.type}" for n in graph.inputs if isinstance(n.op, Input)) or "none"


def _outputs(graph: Graph) -> str:
    return ", ".join(str(n.type) for n in graph.outputs)


class _Metric:
    """The user's metric of a graph, computed once for each."""

    def __init__(self, metric: Callable[[Graph], float] | None, lossy_only: bool) -> None:
        self.metric, self.lossy_only = metric, lossy_only
        self.known: tuple[Graph, float] | None = None

    @property
    def function(self) -> Callable[[Graph], float] | None:
        return self.of if self.metric else None

    def of(self, graph: Graph) -> float:
        """Raises ArgumentError where the user's code fails or gives no number."""
        assert self.metric is not None
        if self.known is None or self.known[0] is not graph:
            try:
                result: object = self.metric(graph)
            except ParingError:
                raise
            except Exception as error:
                raise ArgumentError(f"the metric raised {type(error).__name__}", why=str(error)) from error
            try:
                figure = float(result)  # type: ignore[arg-type]
            except (TypeError, ValueError, RuntimeError):
                raise ArgumentError(f"the metric gives {a_kind(result)}", hint="a number, higher is better") from None
            if not math.isfinite(figure):
                raise ArgumentError(f"the metric is {figure}", hint="it should return a number, higher is better")
            self.known = graph, figure
        return self.known[1]

    def after(self, transformation: Pass, before: Graph, graph: Graph, context: Context) -> float | None:
        """The figure for the ledger; that of the graph before goes into the notes of a lossy pass."""
        if self.metric is None or (self.lossy_only and not transformation.lossy):
            if transformation.lossy:
                context.notes.append("no metric was given")
            return None
        if transformation.lossy:
            context.notes.insert(0, f"metric {self.of(before):g} before")
        return self.of(graph)


def _run_one(transformation: Pass, graph: Graph, context: Context, step: int) -> Graph:
    try:
        return run_pass(transformation, graph, context)
    except ParingError as error:
        last = f" after {context.rewrites[-1]}" if context.rewrites else ""
        error.at(f"pass {step} {transformation}{last}")
        raise


def write_dumps(result: Result, folder: Path) -> None:
    """`000_import.ir`, then each changed stage, `ledger.json`, `ledger.txt`, and the constants, each stored once.

    Raises ArgumentError where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("[0-9][0-9][0-9]_*.ir"):
            old.unlink()
        arrays = {}
        numbers = [0, *(e.step for e in result.ledger.entries if e.changed)]
        for number, (name, graph) in zip(numbers, result.stages, strict=True):
            stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.partition("{")[0])
            (folder / f"{number:03d}_{stem}.ir").write_text(f"# {name}\n{show(graph)}")
            arrays.update(constants(graph))
        save_file(dict(sorted(arrays.items())), str(folder / "constants.safetensors"))
        (folder / "ledger.json").write_text(json.dumps(result.ledger.as_json(), indent=1) + "\n")
        (folder / "ledger.txt").write_text(str(result.ledger) + "\n")
    except OSError as error:
        raise ArgumentError("cannot write the dumps", where=str(folder), why=str(error)) from None
