"""Which schedule family runs a region: a table, tried in order; the last entry takes everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from paring.backends.kernel import Kernel, build_primfunc
from paring.backends.lowering import LOWERINGS
from paring.backends.schedules import (
    attention,
    concat,
    conv,
    depthwise,
    elementwise,
    gemm,
    integer_attention,
    interleave,
    rows,
    sparse_rows,
    sparse_vectors,
    winograd,
)
from paring.backends.targets import Target
from paring.ir.graph import Graph, Node


@dataclass(frozen=True)
class Family:
    """`find` gives the anchor node of a region that this family runs on a target, or None where it declines.

    `knobs` gives the analytic default settings for that anchor; `emit` writes the loops.
    """

    name: str
    find: Callable[[Graph, Target], Node | None]
    knobs: Callable[[Node, Target], Any]
    emit: Callable[[Kernel, Node, Any], None]


FAMILIES: tuple[Family, ...] = (
    Family("depthwise", depthwise.find, depthwise.knobs, depthwise.emit),
    Family("conv", conv.find, conv.knobs, conv.emit),
    Family("winograd", winograd.find, winograd.knobs, winograd.emit),
    Family("gemm", gemm.find, gemm.knobs, gemm.emit),
    Family("sparse-vectors", sparse_vectors.find, sparse_vectors.knobs, sparse_vectors.emit),
    Family("sparse-rows", sparse_rows.find, sparse_rows.knobs, sparse_rows.emit),
    Family("attention", attention.find, attention.knobs, attention.emit),
    Family("integer-attention", integer_attention.find, integer_attention.knobs, integer_attention.emit),
    Family("rows", rows.find, rows.knobs, rows.emit),
    Family("concat", concat.find, concat.knobs, concat.emit),
    Family("interleave", interleave.find, interleave.knobs, interleave.emit),
    Family("elementwise", elementwise.find, elementwise.knobs, elementwise.emit),
)


def choose(body: Graph, target: Target) -> tuple[Family, Node]:
    """The first family that takes the region, with the anchor it found."""
    for family in FAMILIES:
        anchor = family.find(body, target)
        if anchor is not None:
            return family, anchor
    raise AssertionError("the last family takes every region")


def lower_region(body: Graph, target: Target, name: str, knobs: Any = None) -> tirx.PrimFunc:
    """The PrimFunc `name` that computes a region: flat buffers, the body's inputs in order, then the result."""
    family, anchor = choose(body, target)
    settings = family.knobs(anchor, target) if knobs is None else knobs
    return build_primfunc(body, target, name, LOWERINGS, lambda kernel: family.emit(kernel, anchor, settings))
