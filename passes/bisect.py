"""From a wrong output to the first pass, and the first rewrite, that breaks its contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paring.ir.errors import ParingError
from paring.ir.graph import Graph
from paring.ir.op import Array
from paring.ir.verify import verify
from paring.passes.base import Pass
from paring.passes.contract import Difference, Exact, Lossy, allowed_ulps, difference
from paring.passes.rewriter import Context, Rewrite


@dataclass(frozen=True)
class Culprit:
    """The first pass that broke its promise and, within it, the rewrite at which it did."""

    step: int
    name: str
    promise: str
    rewrite_number: int
    rewrite: Rewrite | None
    difference: Difference | None
    error: str = ""

    def __str__(self) -> str:
        who = f"pass {self.step} ({self.name}, {self.promise})"
        where = f", rewrite {self.rewrite_number}: {self.rewrite}" if self.rewrite else ""
        return f"{who}{where}: {self.error or f'moved the result by {self.difference}'}"


def bisect(
    graph: Graph,
    passes: Sequence[Pass],
    arrays: Sequence[Array],
    progress: Callable[[str], None] | None = None,
) -> Culprit | None:
    """Run passes one by one against their contracts on given inputs; None where all keep them.

    The graph before each pass is its oracle. A Lossy pass is not judged; it sets a new oracle. Within the first pass that
    fails, fuel is bisected: about log2(rewrites) further runs of the interpreter.
    """
    for step, transformation in enumerate(passes, 1):
        if progress:
            progress(f"{step} {transformation.name}")
        after, context, error = _attempt(transformation, graph, None)
        if isinstance(transformation.contract, Lossy):
            graph = after or graph
            continue
        if error or (after is not None and _broken(transformation, graph, after, context, arrays)):
            return _first_rewrite(step, transformation, graph, arrays, len(context.rewrites), progress)
        assert after is not None
        graph = after
    return None


def _attempt(transformation: Pass, graph: Graph, fuel: int | None) -> tuple[Graph | None, Context, str]:
    context = Context(fuel)
    try:
        after = transformation.run(graph, context)
        verify(after)
    except ParingError as error:
        return None, context, str(error)
    return after, context, ""


def _broken(transformation: Pass, before: Graph, after: Graph, context: Context, arrays: Sequence[Array]) -> Difference | None:
    if not context.rewrites:
        return None
    found = difference(before, after, arrays)
    promise = transformation.promise(context)
    limit = allowed_ulps(promise if not isinstance(promise, Lossy) else Exact(), len(context.rewrites))
    return None if found.ulps <= limit else found


def _first_rewrite(
    step: int,
    transformation: Pass,
    graph: Graph,
    arrays: Sequence[Array],
    total: int,
    progress: Callable[[str], None] | None,
) -> Culprit:
    """The least fuel at which the pass fails."""

    def fails(fuel: int) -> tuple[bool, Context, Difference | None, str]:
        if progress:
            progress(f"{step} {transformation.name} with fuel {fuel}")
        after, context, error = _attempt(transformation, graph, fuel)
        found = None if after is None else _broken(transformation, graph, after, context, arrays)
        return bool(error) or found is not None, context, found, error

    good, bad = 0, total
    while bad - good > 1:
        middle = (good + bad) // 2
        if fails(middle)[0]:
            bad = middle
        else:
            good = middle
    _, context, found, error = fails(bad)
    rewrite = context.rewrites[-1] if context.rewrites else None
    return Culprit(step, str(transformation), str(transformation.promise(context)), bad, rewrite, found, error)
