"""The last family, which takes every region: one loop nest over the result, vectors along its last dimension.

Trailing dimensions that no op of the region tells apart are run as one. Where a transposition or a change of layout makes
neighbours of the result lie far apart in the operand, the loop runs through tiles, so that each cache line is used up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Index, Kernel, Lanes, Scalar
from paring.backends.targets import Target
from paring.ir import layout as lay
from paring.ir.graph import Graph, Node
from paring.ir.ops import ELEMENTWISE, POINTWISE, binary, index, norm, pool, shape, unary
from paring.ir.ops.core import Const, Input
from paring.ir.types import DTYPES


@dataclass(frozen=True)
class ElementwiseKnobs:
    """`lanes`: elements of a vector. `unroll`: vectors of one turn. `tile`: rows of a tile of a transposing region."""

    lanes: int
    unroll: int
    tile: int = 16


def find(body: Graph, target: Target) -> Node | None:
    return body.outputs[0]


def knobs(anchor: Node, target: Target) -> ElementwiseKnobs:
    nodes = above(anchor)
    widest = max(4 if n.type.dtype == "float16" else DTYPES[n.type.dtype].bytes for n in nodes)
    costly = any(_nanoseconds(n) > 0.3 for n in nodes)
    return ElementwiseKnobs(max(target.lanes * 4 // widest, 1), 2 if costly else 4)


def emit(kernel: Kernel, anchor: Node, settings: ElementwiseKnobs) -> None:
    sizes = anchor.type.shape
    if anchor.type.size == 0:
        T.evaluate(tirx.const(0, "int32"))
        return
    nodes = above(anchor)
    work = work_ns(nodes)
    across = _fast_dimension(anchor)
    if across is not None:
        _emit_tiled(kernel, sizes, across, settings, work)
        return
    first = len(sizes) - mergeable(nodes, len(sizes))
    # The one position counts along the last dimension that has more than one: those behind it do not change the offset.
    place = max((d for d in range(first, len(sizes)) if sizes[d] > 1), default=first)

    def finish(position: Index, at: Any) -> None:
        with kernel.scope():
            kernel.finish((*position, *(at if d == place else 0 for d in range(first, len(sizes)))))

    outer, inner = sizes[:first], prod(sizes[first:])
    emit_rows(kernel, outer, inner, finish, settings, work)


def emit_rows(
    kernel: Kernel,
    outer: tuple[int, ...],
    inner: int,
    finish: Callable[[Index, Any], None],
    settings: ElementwiseKnobs,
    work: int,
) -> None:
    """`finish(outer position, lanes)` all over; threads share the outer dimensions, or the vectors where those are few."""
    step = settings.lanes * settings.unroll
    turns = inner // step
    if prod(outer) >= 4 * kernel.target.cores or not turns:
        # Positions of few vectors each get a loop of their own along the last outer dimension: no division for each.
        nested = turns < 4 and prod(outer[:-1]) >= 4 * kernel.target.cores
        with kernel.parallel(outer[:-1] if nested else outer, work) as position, kernel.loop(outer[-1] if nested else 1) as last:
            position = (*position, last) if nested else position
            if turns:
                with kernel.loop(turns) as turn:
                    _turn(position, turn * step, settings, finish)
            _tail(kernel, position, turns * step, inner, settings, finish)
        return
    with kernel.parallel((*outer, turns), work) as (*position, turn):
        _turn(tuple(position), turn * step, settings, finish)
    if inner % step:
        with kernel.parallel(outer, 0) as position:
            _tail(kernel, position, turns * step, inner, settings, finish)


def _turn(position: Index, start: Scalar, settings: ElementwiseKnobs, finish: Callable[[Index, Any], None]) -> None:
    for u in range(settings.unroll):
        finish(position, Lanes(start + u * settings.lanes, settings.lanes))


def _tail(
    kernel: Kernel, position: Index, start: int, inner: int, settings: ElementwiseKnobs, finish: Callable[[Index, Any], None]
) -> None:
    """What is left of a row: whole vectors, then vectors of half the width, and so on."""
    width = settings.lanes
    while start < inner:
        turns = (inner - start) // width
        if turns:
            first = start
            with kernel.loop(turns) as turn:
                at = turn * width + first
                finish(position, Lanes(at, width) if width > 1 else at)
            start += turns * width
        width = max(width // 2, 1)


def _emit_tiled(kernel: Kernel, sizes: tuple[int, ...], across: int, settings: ElementwiseKnobs, work: int) -> None:
    """Vectors along the last dimension, `tile` of them side by side along `across` before the next."""
    last = len(sizes) - 1
    others = [d for d in range(last) if d != across]
    tile = min(settings.tile, sizes[across])
    widths = [(start, w, n) for start, w, n in pieces(sizes[last], settings.lanes)]
    for base, height, tiles in ((0, tile, sizes[across] // tile), (sizes[across] // tile * tile, sizes[across] % tile, 1)):
        if height == 0 or tiles == 0:
            continue
        with kernel.parallel((*(sizes[d] for d in others), tiles), work) as (*position, block):
            for start, width, count in widths:
                with kernel.loop(count) as turn, kernel.loop(height) as row:
                    components: list[Any] = [0] * len(sizes)
                    for d, i in zip(others, position, strict=True):
                        components[d] = i
                    components[across] = block * tile + base + row
                    at = turn * width + start
                    components[last] = Lanes(at, width) if width > 1 else at
                    kernel.finish(tuple(components))


def pieces(extent: int, lanes: int) -> list[tuple[int, int, int]]:
    """(start, width, count) of the vectors that cover a row, wide ones first."""
    pieces, start, width = [], 0, lanes
    while start < extent:
        count = (extent - start) // width
        if count:
            pieces.append((start, width, count))
            start += count * width
        width = max(width // 2, 1)
    return pieces


def above(anchor: Node) -> list[Node]:
    return Graph((), (anchor,)).nodes()


def _fast_dimension(output: Node) -> int | None:
    """The dimension of the result along which a transposed operand is contiguous, if that is not the last one."""
    node = output
    while isinstance(node.op, ELEMENTWISE):
        moved = [
            i for i in node.inputs if i.type.shape == node.type.shape and not isinstance(i.op, Input | Const | shape.Broadcast)
        ]
        if not moved:
            return None
        node = moved[0]
    rank = node.type.rank
    if isinstance(node.op, shape.Transpose) and rank > 1:
        fast = node.op.perm.index(rank - 1)
        return fast if fast != rank - 1 and node.type.shape[fast] > 1 else None
    if isinstance(node.op, shape.LayoutTransform):
        src, dst = lay.channel_block(node.op.src), lay.channel_block(node.op.dst)
        if bool(src) != bool(dst):
            return 1 if src else 3
    return None


def mergeable(nodes: Sequence[Node], rank: int) -> int:
    """How many trailing dimensions can be run as one: at least 1, unless there is none."""
    merged = min(rank, 1)
    while merged < rank and all(_keeps(node, merged + 1) for node in nodes):
        merged += 1
    return merged


def _keeps(node: Node, count: int) -> bool:
    """Whether an op reads its operands at the same position along the last `count` dimensions, or not along any of them."""
    op, x = node.op, node.inputs[0].type if node.inputs else None
    first = node.type.rank - count
    if isinstance(op, (*POINTWISE, Input, Const)):
        return True
    if isinstance(op, shape.Broadcast):
        tail = x.shape[-count:]
        return all(s == 1 for s in tail) or tail == node.type.shape[first:]
    if isinstance(op, shape.Transpose):
        return first >= 0 and op.perm[first:] == tuple(range(first, node.type.rank))
    if isinstance(op, shape.Slice | shape.Pad):
        return first >= 0 and x.shape[first:] == node.type.shape[first:]
    if isinstance(op, shape.Flip | shape.Roll):
        return all(a < first for a in op.axes)
    if isinstance(op, shape.Concat):
        return op.axis < first
    if isinstance(op, norm.BatchNorm):
        return first >= 2
    return False


# What an element costs beyond reading and writing it, where that is more than a few instructions.
_EXP_LIKE = (*(unary.Exp, unary.Log, unary.Tanh, unary.Sigmoid, unary.Silu, unary.Gelu, unary.Erf, unary.Elu),)
_BY_SCALARS = (unary.Sin, unary.Cos, binary.Pow, binary.FloorDiv, binary.Remainder, index.Gather, index.GatherElements)


def _nanoseconds(node: Node) -> float:
    """About what one element of a node's result costs on one thread."""
    op = node.op
    if isinstance(op, _EXP_LIKE):
        return 0.5
    if isinstance(op, _BY_SCALARS):
        return 5.0
    if isinstance(op, pool.Pool2d):
        return 0.1 * prod(op.kernel)
    if isinstance(op, (*ELEMENTWISE, Input, Const, shape.Broadcast)):
        return 0.03
    macs = node.macs
    if macs:
        return max(macs / max(node.type.size, 1), 1.0)
    # Reductions as a fallback read their operand again for each element.
    largest = max((i.type.size for i in node.inputs), default=0)
    return 0.3 + largest / max(node.type.size, 1)


def work_ns(nodes: list[Node]) -> int:
    """About what a region takes on one thread, in nanoseconds: 10 bytes a nanosecond and each op's own cost."""
    moved = sum(n.type.bytes for n in nodes if isinstance(n.op, Input)) + nodes[-1].type.bytes
    return int(moved / 10 + sum(_nanoseconds(n) * n.type.size for n in nodes))
