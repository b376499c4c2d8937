"""Runs a pipeline: verifies, counts, dumps, and stops at the pass that broke something."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.numpy import save_file

from paring.ir import Graph, Input, constants, same, show
from paring.ir.errors import ArgumentError, ContractError, InternalError, ParingError, PassError
from paring.ir.text import quote
from paring.ir.verify import verify
from paring.passes.base import Pass
from paring.passes.contract import Lossy
from paring.passes.ledger import Entry, Ledger, measure
from paring.passes.rewriter import Context, Rewrite, failure

Hook = Callable[[int, Pass | None, Graph], None]


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
    unmeasured: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Run passes in order, each verified.

    `dump`: a folder for the text after each changing pass, written when a pass fails too. `fuel`: how many rewrites may be
    made in all. `metric`: given the graph after each changing pass, its figure goes into the ledger. `unmeasured`: lossy
    passes may run without a metric; the ledger then says so. `progress` is told each pass's name.
    Raises ParingError with the pass named where one fails.
    """
    verify(graph)
    lossy = [p for p in passes if isinstance(p.contract, Lossy)]
    if lossy and metric is None and not unmeasured:
        hint = "give a metric, or let it run without one (unmeasured=True)"
        raise ArgumentError(f"pass {lossy[0]} is {lossy[0].contract}, but there is no metric", hint=hint)
    result = Result(graph, Ledger(), [("import", graph)])
    try:
        _run_all(result, passes, fuel, metric, progress)
    except Exception as error:
        if dump is not None:
            _dump_what_there_is(result, Path(dump), error)
        raise
    if dump is not None:
        write_dumps(result, Path(dump))
    return result


def _run_all(
    result: Result,
    passes: Sequence[Pass],
    fuel: int | None,
    metric: Callable[[Graph], float] | None,
    progress: Callable[[str], None] | None,
) -> None:
    graph, size = result.graph, measure(result.graph)
    for step, transformation in enumerate(passes, 1):
        if progress:
            progress(transformation.name)
        context = Context(fuel)
        start = time.perf_counter()
        after = _run_one(transformation, graph, context, step)
        fuel = context.fuel
        changed = after is not graph and bool(context.rewrites)
        if after is not graph and not changed and not same(after, graph):
            what = f"pass {transformation.name} changed the program without spending fuel"
            raise InternalError(what, hint="call context.spend(rule, node) before each change")
        after = after if changed else graph
        new_size = measure(after) if changed else size
        seconds = time.perf_counter() - start
        fired = dict(sorted(Counter(r.rule for r in context.rewrites).items()))
        figure = metric(after) if metric and changed else None
        promise = transformation.promise(context)
        if isinstance(promise, Lossy) and metric is None:
            promise = dataclasses.replace(promise, metric=f"{promise.metric}: no metric was given")
        result.ledger.entries.append(Entry(step, str(transformation), promise, fired, seconds, size, new_size, changed, figure))
        result.declined.extend((transformation.name, rewrite, why) for rewrite, why in context.declined)
        if changed:
            result.stages.append((str(transformation), after))
        graph, size = after, new_size
    result.graph = graph


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


def _run_one(transformation: Pass, graph: Graph, context: Context, step: int) -> Graph:
    try:
        return run_pass(transformation, graph, context)
    except ParingError as error:
        last = f" after {context.rewrites[-1]}" if context.rewrites else ""
        place = f"pass {step} {transformation}{last}"
        error.where = f"{place}: {error.where}" if error.where else place
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
