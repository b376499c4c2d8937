"""How equal a pass's output is to its input, and the check of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paring.ir import Graph, interpret, magnitude_bound
from paring.ir.errors import ContractError, ParseError
from paring.ir.op import Array
from paring.passes.noise import MARGIN, Oracle, sway

EPS32 = float(np.finfo(np.float32).eps)
FOR_FINITE = " for finite values"


@dataclass(frozen=True)
class Exact:
    """The same bits whenever the sums are exact (small integers); elsewhere at most the rounding of a reordered sum.

    The reference accumulates in float64, so a reordered sum differs by far less than one float32 ulp of its magnitude
    bound: that one ulp is what is allowed. `finite`: nothing is promised once a value is infinite or NaN.
    """

    finite: bool = False

    def __str__(self) -> str:
        return "Exact" + (FOR_FINITE if self.finite else "")


@dataclass(frozen=True)
class Close:
    """Each rewrite moves each output by at most `ulps` float32 ulps of its magnitude bound; `finite` as for Exact."""

    ulps: float
    finite: bool = False

    def __str__(self) -> str:
        return f"Close({self.ulps:g})" + (FOR_FINITE if self.finite else "")


@dataclass(frozen=True)
class Lossy:
    """Changes the function on purpose: `metric` may fall by at most `budget`."""

    metric: str
    budget: float

    def __str__(self) -> str:
        return f"Lossy({self.metric}, {self.budget:g})"


@dataclass(frozen=True)
class Steps:
    """Each rewrite moves each integer that it computes, others than those of other rewrites, by at most `steps`.

    Floats and `finite` as for Close. What is computed from an integer that moved moves too: how far, is measured (`noise.sway`).
    """

    steps: int
    ulps: float = 0.0
    finite: bool = False

    def __str__(self) -> str:
        ulps = f", {self.ulps:g}" if self.ulps else ""
        return f"Steps({self.steps}{ulps})" + (FOR_FINITE if self.finite else "")


Contract = Exact | Close | Steps | Lossy


_NUMBER = r"([0-9.e+-]+|inf)"


def parse_contract(text: str) -> Contract:
    """The inverse of `str`. Raises ParseError."""
    if match := re.fullmatch(rf"Lossy\((.*), {_NUMBER}\)", text):
        return Lossy(match[1], float(match[2]))
    if match := re.fullmatch(rf"Steps\(([0-9]+)(?:, {_NUMBER})?\)({FOR_FINITE})?", text):
        return Steps(int(match[1]), float(match[2] or 0), match[3] is not None)
    if match := re.fullmatch(rf"(?:Exact|Close\({_NUMBER}\))({FOR_FINITE})?", text):
        finite = match[2] is not None
        return Close(float(match[1]), finite) if match[1] else Exact(finite)
    raise ParseError(f"{text!r} is not a contract")


def compose(contracts: Sequence[Contract]) -> Contract:
    """The promise of passes run one after the other: losses as soon as one is lossy, else the sum of the ulps."""
    lossy = [c for c in contracts if isinstance(c, Lossy)]
    if lossy:
        metrics = dict.fromkeys(c.metric for c in lossy)
        # Budgets of different metrics have no sum.
        return Lossy(" and ".join(metrics), sum(c.budget for c in lossy) if len(metrics) == 1 else math.inf)
    return _promise(sum(map(_steps, contracts)), sum(map(_ulps, contracts)), any(map(for_finite, contracts)))


def accumulate(contracts: Sequence[Contract]) -> Contract:
    """The promise of the rewrites of one pass: their ulps add up, and each moves integers of its own."""
    lossy = [c for c in contracts if isinstance(c, Lossy)]
    steps, ulps = max(map(_steps, contracts), default=0), sum(map(_ulps, contracts))
    return lossy[0] if lossy else _promise(steps, ulps, any(map(for_finite, contracts)))


def weakest(contracts: Sequence[Contract]) -> Exact | Close | Steps:
    """The promise that all of these keep, none of them being lossy."""
    steps, ulps = max(map(_steps, contracts), default=0), max(map(_ulps, contracts), default=0.0)
    return _promise(steps, ulps, any(map(for_finite, contracts)))


def for_finite(contract: Contract) -> bool:
    """Whether nothing is promised once a value is infinite or NaN."""
    return isinstance(contract, Exact | Close | Steps) and contract.finite


def _ulps(contract: Contract) -> float:
    return contract.ulps if isinstance(contract, Close | Steps) else 0.0


def _steps(contract: Contract) -> int:
    return contract.steps if isinstance(contract, Steps) else 0


def _promise(steps: int, ulps: float, finite: bool) -> Exact | Close | Steps:
    if steps:
        return Steps(steps, ulps, finite)
    return Close(ulps, finite) if ulps else Exact(finite)


@dataclass(frozen=True)
class Difference:
    """How far two graphs are apart on some inputs: the worst error in ulps of the bound, and where."""

    ulps: float
    output: int
    position: tuple[int, ...]
    before: float
    after: float

    def __str__(self) -> str:
        place = f"output {self.output} at {self.position}"
        return f"{self.ulps:.3g} ulps of its magnitude bound: {place} is {self.after!r}, was {self.before!r}"


def same_bits(a: Array, b: Array) -> bool:
    """Equal element by element: zeros in their signs too, NaN equal to any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype or not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
        return False
    return a.dtype.kind != "f" or bool(((np.signbit(a) == np.signbit(b)) | (a != 0)).all())


def difference(before: Graph, after: Graph, arrays: Sequence[Array]) -> Difference:
    """The greatest difference between two graphs on given inputs, judged by the magnitude bound of `before`."""
    expected, found = interpret(before, arrays), interpret(after, arrays)
    _, bounds = magnitude_bound(before, arrays)
    worst = Difference(0.0, 0, (), 0.0, 0.0)
    for position, (x, y, bound) in enumerate(zip(expected, found, bounds, strict=True)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return Difference(float("inf"), position, (), 0.0, 0.0)
        if x.size == 0:
            continue
        ulps = ulps_apart(x, y, bound)
        index = np.unravel_index(int(np.argmax(ulps)), ulps.shape)
        if ulps[index] > worst.ulps:
            worst = Difference(float(ulps[index]), position, tuple(int(i) for i in index), x[index].item(), y[index].item())
    return worst


def ulps_apart(x: Array, y: Array, bound: Array) -> Array:
    """|x - y| in float32 ulps of `bound`, per element; equal values (infinities, NaN) are 0 apart."""
    if x.dtype.kind != "f":
        return np.where(x == y, 0.0, np.inf)
    with np.errstate(all="ignore"):
        wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
        same = (wide_x == wide_y) | (np.isnan(wide_x) & np.isnan(wide_y))
        # Results below the smallest normal number are rounded absolutely, not relatively.
        apart = np.abs(wide_x - wide_y) / np.maximum(bound * EPS32, np.finfo(np.float32).tiny * EPS32)
        return np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))


def allowed_ulps(contract: Contract) -> float:
    """How many ulps of the bound, or times its noise, an output may move by this promise."""
    return 1.0 + _ulps(contract)


def check(
    contract: Contract,
    before: Graph,
    after: Graph,
    arrays: Sequence[Array],
    *,
    exact: bool = False,
    who: str = "pass",
    metric: Callable[[Graph], float] | None = None,
) -> None:
    """Raise ContractError where `after` differs from `before` on these inputs by more than the contract allows.

    `exact`: inputs and weights are such that every sum is exact; Exact then means the same bits. A Lossy contract is
    judged by `metric`.
    """
    if isinstance(contract, Lossy):
        _check_metric(contract, before, after, metric, who)
        return
    if isinstance(contract, Steps):
        _check_steps(contract, before, after, arrays, who)
        return
    if exact and isinstance(contract, Exact):
        for position, (x, y) in enumerate(zip(interpret(before, arrays), interpret(after, arrays), strict=True)):
            if not same_bits(x, y):
                raise ContractError(f"{who} promised {contract}, but output {position} has other bits")
        return
    found = difference(before, after, arrays)
    limit = allowed_ulps(contract)
    if not found.ulps <= limit:
        raise ContractError(f"{who} promised {contract} ({limit:g} ulps), but moved by {found}")
    if bound_is_vacuous(before, arrays, limit):
        distance = Oracle.of(before, arrays).distance_of(after)
        if not distance <= MARGIN * limit:
            raise ContractError(f"{who} promised {contract}, but moved the result by {distance:.3g} times its float32 noise")


def _check_steps(contract: Steps, before: Graph, after: Graph, arrays: Sequence[Array], who: str) -> None:
    pairs = zip(interpret(before, arrays), interpret(after, arrays), magnitude_bound(before, arrays)[1], strict=True)
    ulps = allowed_ulps(contract)
    for position, ((x, y, bound), moved) in enumerate(zip(pairs, sway(before, arrays), strict=True)):
        with np.errstate(invalid="ignore"):
            apart = np.where((x == y) | ((x != x) & (y != y)), 0.0, np.abs(x.astype(np.float64) - y.astype(np.float64)))
            own = bound * EPS32 * ulps if x.dtype.kind == "f" else float(contract.steps)
            kept = (apart == 0) | (apart <= own + MARGIN * contract.steps * moved)
        if not kept.all():
            index = tuple(int(i) for i in np.argwhere(~kept)[0])
            what = f"output {position} at {index} is {y[index].item()!r}, was {x[index].item()!r}"
            raise ContractError(f"{who} promised {contract}, but {what}")


def bound_is_vacuous(graph: Graph, arrays: Sequence[Array], ulps: float) -> bool:
    """Whether the magnitude bound has grown so far that some output could be anything and still lie within it."""
    values, bounds = magnitude_bound(graph, arrays)
    for value, bound in zip(values, bounds, strict=True):
        finite = np.abs(value[np.isfinite(value)], dtype=np.float64) if value.dtype.kind == "f" else np.zeros(0)
        if finite.size and float(np.median(bound)) * EPS32 * ulps > float(finite.max()):
            return True
    return False


def _check_metric(contract: Lossy, before: Graph, after: Graph, metric: Any, who: str) -> None:
    if metric is None:
        raise ContractError(f"{who} is {contract}", why="no metric was given", hint="pass metric=...")
    lost = metric(before) - metric(after)
    if not lost <= contract.budget:
        raise ContractError(f"{who} promised {contract}, but lost {lost:g}")
