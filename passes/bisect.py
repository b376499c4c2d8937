"""From a wrong output to the first pass, and the first rewrite, that breaks its contract, on networks of any depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from paring.ir.errors import ParingError
from paring.ir.graph import Graph
from paring.ir.op import Array
from paring.passes.base import Pass
from paring.passes.contract import Lossy, allowed_ulps
from paring.passes.manager import run_pass
from paring.passes.noise import MARGIN, Oracle
from paring.passes.rewriter import Context, Rewrite


@dataclass(frozen=True)
class Culprit:
    """The first pass that broke its promise and, within it, the rewrite at which it did."""

    step: int
    name: str
    promise: str
    rewrite_number: int
    rewrite: Rewrite | None
    reason: str

    def __str__(self) -> str:
        who = f"pass {self.step} ({self.name}, {self.promise})"
        where = f", rewrite {self.rewrite_number}: {self.rewrite}" if self.rewrite else ""
        return f"{who}{where}: {self.reason}"


@dataclass(frozen=True)
class _Stage:
    """One pass that changed something, or failed; `allowed` counts from the oracle that it is judged by.

    Infinite behind a pass that is lossy: what it leaves is the oracle for the passes behind it.
    """

    step: int
    transformation: Pass
    earlier: tuple[Graph, ...]
    after: Graph | None
    rewrites: int
    allowed: float
    error: str = ""


Fresh = Callable[[int | None], Context]


def bisect(
    graph: Graph,
    passes: Sequence[Pass],
    arrays: Sequence[Array],
    tell: Callable[[str], None] = lambda what: None,
    fresh: Fresh = Context,
) -> Culprit | None:
    """The first pass and rewrite that move the result too far; None where there is none.

    Bisects over the passes, then over the rewrites of the first bad one, so it takes about log2(passes * rewrites) runs
    of the interpreter. How far a Lossy pass moves the result is not judged; what it leaves is the oracle for those behind it.
    `fresh`: what a pass is given for so much fuel, with calibration data for those that look at them.
    """
    tell("running the passes")
    stages = _run(graph, passes, fresh)
    while stages:
        lossy = next((i for i, stage in enumerate(stages) if math.isinf(stage.allowed) and stage.after is not None), len(stages))
        found = _first_bad(graph, stages[:lossy], arrays, tell, fresh)
        if found is not None or lossy == len(stages):
            return found
        reached = stages[lossy].after
        assert reached is not None
        graph, stages = reached, stages[lossy + 1 :]
    return None


def _run(graph: Graph, passes: Sequence[Pass], fresh: Fresh) -> list[_Stage]:
    stages: list[_Stage] = []
    earlier: tuple[Graph, ...] = (graph,)
    allowed = 0.0
    for step, transformation in enumerate(passes, 1):
        after, context, error = _attempt(transformation, earlier, None, fresh)
        promise = transformation.promise(context)
        allowed = math.inf if isinstance(promise, Lossy) else (0.0 if math.isinf(allowed) else allowed) + allowed_ulps(promise)
        if context.rewrites or error:
            stages.append(_Stage(step, transformation, earlier, after, len(context.rewrites), allowed, error))
        if after is None:
            break
        earlier = (*earlier, after) if context.rewrites else earlier
    return stages


def _attempt(transformation: Pass, earlier: Sequence[Graph], fuel: int | None, fresh: Fresh) -> tuple[Graph | None, Context, str]:
    context = fresh(fuel)
    context.earlier = earlier
    try:
        after = run_pass(transformation, earlier[-1], context)
    except ParingError as error:
        return None, context, str(error)
    return after, context, ""


def _first_bad(
    graph: Graph, stages: Sequence[_Stage], arrays: Sequence[Array], tell: Callable[[str], None], fresh: Fresh
) -> Culprit | None:
    if not stages:
        return None
    tell("the reference, in float64 and in float32")
    oracle = Oracle.of(graph, arrays)

    def bad(number: int) -> bool:
        stage = stages[number]
        tell(f"after pass {stage.step} {stage.transformation.name}")
        return stage.after is None or oracle.distance_of(stage.after) > MARGIN * stage.allowed

    last = len(stages) - 1
    if not bad(last):
        return None
    first = _least(-1, last, bad)
    return _first_rewrite(stages[first], oracle, tell, fresh)


def _first_rewrite(stage: _Stage, oracle: Oracle, tell: Callable[[str], None], fresh: Fresh) -> Culprit:
    @cache
    def judge(fuel: int) -> tuple[bool, Context, float, str]:
        tell(f"pass {stage.step} {stage.transformation.name}, rewrite {fuel} of {stage.rewrites}")
        after, context, error = _attempt(stage.transformation, stage.earlier, fuel, fresh)
        distance = float("inf") if after is None else oracle.distance_of(after)
        return bool(error) or distance > MARGIN * stage.allowed, context, distance, error

    number = _least(0, stage.rewrites, lambda fuel: judge(fuel)[0]) if stage.rewrites else 0
    _, context, distance, error = judge(number)
    said = error or f"moved the result by {distance:.3g} times its float32 noise, {MARGIN * stage.allowed:g} are allowed"
    promise = str(stage.transformation.promise(context))
    rewrite = context.rewrites[-1] if context.rewrites else None
    return Culprit(stage.step, str(stage.transformation), promise, number, rewrite, said)


def _least(good: int, bad: int, fails: Callable[[int], bool]) -> int:
    """The least number that fails, given one that does not and one that does."""
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return bad
