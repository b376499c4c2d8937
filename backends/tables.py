"""Tables of 256 bytes that are looked up in registers, a vector at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Kernel, Lanes, Value, splat
from paring.backends.vecmath import bind, cast, full, lanes_in, part, reinterpret

ENTRIES = 256

ByteTable = Callable[[Kernel, Any, str, Value], Value]


def _in_parts(width: int, look_up: ByteTable) -> ByteTable:
    """For vectors of any number of lanes, what works on `width` of them: a wider one is cut, and a narrower part repeated."""

    def any_width(kernel: Kernel, table: Any, dtype: str, places: Value) -> Value:
        lanes = lanes_in(places)
        if lanes == width:
            return look_up(kernel, table, dtype, places)
        places, whole = bind(places), kernel.local(lanes, dtype)
        for start in range(0, lanes, width):
            count = min(width, lanes - start)
            indices = [tirx.const(start + i % count, "int32") for i in range(width)]
            # A shuffle gives no more lanes than it is given.
            chosen = tirx.Shuffle([places] * -(-width // lanes), indices) if lanes > 1 else splat(places, width)
            found = bind(look_up(kernel, table, dtype, bind(chosen)))
            kernel.store(whole, Lanes(start, count), found if count == width else part(found, 0, count))
        return kernel.load(whole, Lanes(0, lanes))

    return any_width


def _vpermi2d(kernel: Kernel, table: Any, dtype: str, places: Value) -> Value:
    """AVX-512: the four bytes around the entry out of 64 of 32 bits, of which an instruction knows 32, and then the one."""
    quads = bind(places >> full(places, 2))

    def half(number: int) -> Value:
        registers = [reinterpret(kernel.load(table, Lanes(64 * (2 * number + i), 64)), "int32", lanes=16) for i in range(2)]
        return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpermi2var.d.512", registers[0], quads, registers[1])

    found = tirx.Select(places < full(places, ENTRIES // 2), half(0), half(1))
    return cast(found >> ((places & full(places, 3)) << full(places, 3)), dtype)


def _tbl(kernel: Kernel, table: Any, dtype: str, places: Value) -> Value:
    """ARM: 64 bytes at a time; a place outside of them gives 0."""
    places = bind(cast(places, "uint8"))
    found = full(places, 0)
    for quarter in range(4):
        registers = [kernel.load(table, Lanes(64 * quarter + 16 * i, 16)) for i in range(4)]
        name, moved = "llvm.aarch64.neon.tbl4.v8i8", places - full(places, 64 * quarter)
        found = found | T.call_llvm_pure_intrin("uint8x8", name, *registers, moved)
    return reinterpret(found, dtype)


def _by_lane(kernel: Kernel, table: Any, dtype: str, places: Value) -> Value:
    """Anywhere: one byte after the other, by way of memory."""
    lanes = lanes_in(places)
    where, whole = kernel.local(lanes, "int32"), kernel.local(lanes, dtype)
    kernel.store(where, Lanes(0, lanes), places)
    with kernel.loop(lanes) as lane:
        kernel.store(whole, lane, kernel.load(table, kernel.load(where, lane)))
    return kernel.load(whole, Lanes(0, lanes))


TABLES: dict[str, ByteTable] = {"vpermi2d": _in_parts(16, _vpermi2d), "tbl": _in_parts(8, _tbl)}
"""By the name that a target has for it."""


def look_up(kernel: Kernel, table: Any, dtype: str, places: Value) -> Value:
    """The bytes of a buffer of 256, of that dtype, at a vector of int32 places."""
    return TABLES.get(kernel.target.tables, _by_lane)(kernel, table, dtype, places)
