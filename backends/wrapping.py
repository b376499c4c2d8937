"""Sums and products of integers that wrap around.

TVM, and LLVM behind it, take it for granted that int32 and int64 never overflow. So int32 is computed in int64 and cut off,
which LLVM turns back into the plain instruction, and int64 in parts that cannot overflow.
"""

from __future__ import annotations

from collections.abc import Callable

from paring.backends.kernel import Value
from paring.backends.vecmath import bind, cast, dtype_of, full

# The lower 62 bits: two such numbers add up to less than 2^63.
LOW = 62


def add(x: Value, y: Value) -> Value:
    return _widened(lambda a, b: a + b, x, y) if dtype_of(x) != "int64" else _add64(x, y)


def sub(x: Value, y: Value) -> Value:
    if dtype_of(x) != "int64":
        return _widened(lambda a, b: a - b, x, y)
    return _add64(_add64(x, y ^ full(y, -1)), full(x, 1))


def mul(x: Value, y: Value) -> Value:
    return _widened(lambda a, b: a * b, x, y) if dtype_of(x) != "int64" else _mul64(x, y)


def _widened(operation: Callable[[Value, Value], Value], x: Value, y: Value) -> Value:
    """Shorter integers than int32 wrap as they are."""
    if dtype_of(x) != "int32":
        return operation(x, y)
    return cast(operation(cast(x, "int64"), cast(y, "int64")), "int32")


def _add64(x: Value, y: Value) -> Value:
    x, y = bind(x), bind(y)
    mask, top = full(x, (1 << LOW) - 1), full(x, LOW)
    low = bind((x & mask) + (y & mask))
    high = (x >> top) + (y >> top) + (low >> top)
    return (low & mask) | (high << top)


def _mul64(x: Value, y: Value) -> Value:
    """Schoolbook multiplication in base 2^31, of whose three digits the last has two bits; shifts drop what overflows."""
    x, y = bind(x), bind(y)
    mask = full(x, (1 << 31) - 1)
    (a0, a1), (b0, b1) = ([bind((v >> full(v, 31 * i)) & mask) for i in range(2)] for v in (x, y))
    a2, b2 = ((v >> full(v, LOW)) & full(v, 3) for v in (x, y))
    middle = (a0 * b1 + a1 * b0) << full(x, 31)
    upper = (a0 * b2 + a1 * b1 + a2 * b0) << full(x, LOW)
    return _add64(_add64(a0 * b0, middle), upper)
