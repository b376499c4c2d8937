"""What the lowerings share: positions in lanes, and reductions that keep their error small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from tvm import sym, tirx

from paring.backends.kernel import Index, Kernel, Lanes, Lowering, Scalar, Value, as_int, constant
from paring.backends.vecmath import bind, cast, full, lanes_in
from paring.ir.graph import Node
from paring.ir.types import DTYPES

# Longer chains of additions are cut into partial sums, whose errors do not pile up.
CHAIN = 64


class Straddles(Exception):
    """Neighbouring positions of the result are not evenly spaced positions of an operand."""


def by_lane(lowering: Lowering) -> Lowering:
    """Where the lowering finds that a vector straddles, it is computed one lane at a time."""

    @wraps(lowering)
    def wrapped(kernel: Kernel, node: Node, index: Index) -> Value:
        try:
            return lowering(kernel, node, index)
        except Straddles:
            return each_lane(kernel, node.type.dtype, index, lambda scalars: lowering(kernel, node, scalars))

    return wrapped


def each_lane(kernel: Kernel, dtype: str, index: Index, compute: Callable[[Index], Value]) -> Value:
    """A vector gathered from scalars, in a loop over its lanes."""
    place = next(d for d, i in enumerate(index) if isinstance(i, Lanes))
    lanes: Lanes = index[place]
    register = kernel.local(lanes.count, dtype)
    with kernel.loop(lanes.count) as lane:
        position = lanes.base + lane * lanes.stride
        kernel.store(register, lane, compute((*index[:place], position, *index[place + 1 :])))
    return kernel.load(register, Lanes(0, lanes.count))


def scalar_only(index: Index) -> None:
    """Raise Straddles for a vector."""
    if any(isinstance(i, Lanes) for i in index):
        raise Straddles


def multiple_of(position: Scalar, factor: int) -> bool:
    """Whether an index is known to be a multiple of `factor`."""
    if isinstance(position, int):
        return position % factor == 0
    known = sym.Analyzer().modular_set(position)
    return int(known.coeff) % factor == 0 and int(known.base) % factor == 0


def split(position: Any, inner: int) -> tuple[Any, Any]:
    """(position // inner, position % inner). Raises Straddles for lanes that may cross a multiple of `inner`."""
    if inner == 1:
        return position, 0
    if not isinstance(position, Lanes):
        return position // inner, position % inner
    lanes = position
    if lanes.count == 1 or lanes.stride == 0:
        return lanes.base // inner, Lanes(lanes.base % inner, lanes.count, lanes.stride)
    step = lanes.count * lanes.stride
    if lanes.stride > 0 and inner % step == 0 and multiple_of(lanes.base, step):
        return lanes.base // inner, Lanes(lanes.base % inner, lanes.count, lanes.stride)
    if lanes.stride % inner == 0:
        return Lanes(lanes.base // inner, lanes.count, lanes.stride // inner), lanes.base % inner
    raise Straddles


def clamp(position: Scalar, size: int) -> Scalar:
    """A position moved into [0, size)."""
    if isinstance(position, int):
        return min(max(position, 0), size - 1)
    dtype = str(position.ty.dtype)
    return tirx.max(tirx.min(position, tirx.const(size - 1, dtype)), tirx.const(0, dtype))


def within(position: Scalar, size: int) -> Value:
    """Whether a scalar position lies in [0, size)."""
    position = as_int(position)
    return tirx.And(position >= 0, position < size)


def as_index(position: Any) -> Value:
    """A component as an expression: lanes become a vector."""
    return position.expand() if isinstance(position, Lanes) else as_int(position)


def choose(condition: Value, x: Value, y: Value) -> Value:
    """x where a scalar or vector condition holds, else y."""
    lanes = max(lanes_in(v) for v in (condition, x, y))
    wide = [v if lanes_in(v) == lanes else tirx.Broadcast(v, lanes) for v in (condition, x, y)]
    return tirx.Select(*wide)


def sum_type(dtype: str) -> str:
    """The type that elements of a dtype are summed in."""
    kind = DTYPES[dtype].kind
    if kind == "float":
        return "float64" if dtype == "float64" else "float32"
    return "int64" if dtype == "int64" else "int32"


def total(
    kernel: Kernel, extents: Sequence[Scalar], lanes: int, dtype: str, term: Callable[[tuple[Scalar, ...]], Value]
) -> Value:
    """The sum of `term` over all positions; each loop has its own partial sum."""
    if not extents:
        return term(())
    extent, *rest = extents
    if isinstance(extent, int) and extent > CHAIN:
        whole = extent // CHAIN * CHAIN
        head = total(kernel, (extent // CHAIN, CHAIN, *rest), lanes, dtype, lambda p: term((p[0] * CHAIN + p[1], *p[2:])))
        if whole == extent:
            return head
        tail = total(kernel, (extent - whole, *rest), lanes, dtype, lambda p: term((p[0] + whole, *p[1:])))
        return bind(head) + tail
    register, where = accumulator(kernel, lanes, dtype, constant(0, dtype, lanes))
    with kernel.loop(extent) as position:
        part = total(kernel, rest, lanes, dtype, lambda p: term((position, *p)))
        kernel.store(register, where, kernel.load(register, where) + part)
    return kernel.load(register, where)


def accumulator(kernel: Kernel, lanes: int, dtype: str, start: Value) -> tuple[Any, Any]:
    """A register with its first value, and the place of that value in it."""
    register = kernel.local(lanes, dtype)
    where = Lanes(0, lanes) if lanes > 1 else 0
    kernel.store(register, where, start)
    return register, where


def fold(
    kernel: Kernel,
    extents: Sequence[Scalar],
    start: Sequence[tuple[str, Value]],
    step: Callable[[tuple[Value, ...], tuple[Scalar, ...]], Sequence[Value]],
) -> tuple[Value, ...]:
    """A loop-carried state, given as (dtype, first value), after `step` at all positions in row-major order."""
    state = [accumulator(kernel, lanes_in(value), dtype, value) for dtype, value in start]

    def nest(left: Sequence[Scalar], position: tuple[Scalar, ...]) -> None:
        if left:
            with kernel.loop(left[0]) as variable:
                nest(left[1:], (*position, variable))
            return
        new = [bind(v) for v in step(tuple(kernel.load(*s) for s in state), position)]
        for (register, where), value in zip(state, new, strict=True):
            kernel.store(register, where, value)

    nest(extents, ())
    return tuple(kernel.load(*s) for s in state)


def greater(x: Value, best: Value, is_float: bool) -> Value:
    """The greater one; NaN wins. `x` and `best` are names."""
    chosen = tirx.Select(x > best, x, best)
    return tirx.Select(tirx.isnan(x), x, chosen) if is_float else chosen


def lesser(x: Value, best: Value, is_float: bool) -> Value:
    chosen = tirx.Select(x < best, x, best)
    return tirx.Select(tirx.isnan(x), x, chosen) if is_float else chosen


def horizontal(value: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes of a vector combined into a scalar, by halves."""
    lanes, dtype = lanes_in(value), str(value.ty.dtype).rsplit("x", 1)[0]
    while lanes > 1:
        value = bind(value)
        lanes //= 2
        halves = [_half(value, start, lanes) for start in (0, lanes)]
        value = combine(bind(halves[0]), bind(halves[1]))
    return cast(value, dtype)


def _half(value: Value, start: int, lanes: int) -> Value:
    return tirx.Shuffle([value], [tirx.const(start + i, "int32") for i in range(lanes)])


def number(like: Value, count: Scalar) -> Value:
    """A count as a number of the type of `like`."""
    return full(like, count) if isinstance(count, int) else tirx.Cast(str(like.ty.dtype), count)


def plus(x: Any, y: Any) -> Any:
    """The sum of two components of an index, of which at most one is Lanes."""
    return y + x if isinstance(y, Lanes) else x + y
