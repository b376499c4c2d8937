"""Plain images into blocks of four bytes: what products of bytes read of the first layer's image.

Four channels of neighbouring pixels are computed as vectors along a row, and put side by side as the bytes of 32-bit lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import or_

from paring.backends.kernel import Kernel, Lanes, Scalar, flatten
from paring.backends.schedules.elementwise import above, pieces, work_ns
from paring.backends.targets import Target
from paring.backends.vecmath import cast, full, reinterpret
from paring.ir import layout as lay
from paring.ir.graph import Graph, Node
from paring.ir.ops import POINTWISE
from paring.ir.ops.core import Const, Input
from paring.ir.ops.shape import Broadcast, LayoutTransform
from paring.ir.types import BYTES

# Bytes of a 32-bit lane.
DEPTH = 4


@dataclass(frozen=True)
class InterleaveKnobs:
    """`lanes`: neighbouring pixels of a vector."""

    lanes: int


def find(body: Graph, target: Target) -> Node | None:
    """The change of layout that a region ends in, if this family runs it: else None."""
    (node,) = body.outputs
    if not isinstance(node.op, LayoutTransform) or node.type.dtype not in BYTES or node.type.size == 0:
        return None
    if (lay.channel_block(node.op.src), lay.channel_block(node.op.dst), node.type.shape[1]) != (None, DEPTH, 1):
        return None
    before = [n for n in above(node) if n is not node]
    return node if all(isinstance(n.op, (*POINTWISE, Broadcast, Const, Input)) for n in before) else None


def knobs(anchor: Node, target: Target) -> InterleaveKnobs:
    return InterleaveKnobs(target.lanes)


def emit(kernel: Kernel, anchor: Node, settings: InterleaveKnobs) -> None:
    """Row by row."""
    images, _, height, width, _ = anchor.type.shape
    with kernel.parallel((images, height), work_ns(above(anchor))) as (n, y):
        for start, lanes, count in pieces(width, settings.lanes):
            with kernel.loop(count) as turn:
                _vector(kernel, anchor, (n, y, turn * lanes + start), lanes)


def _vector(kernel: Kernel, anchor: Node, at: tuple[Scalar, ...], lanes: int) -> None:
    """`lanes` pixels; at = (n, y, x)."""
    (plain,) = anchor.inputs
    n, y, x = at
    bytes_ = []
    for c in range(plain.type.shape[1]):
        byte = cast(kernel.value(plain, (n, c, y, Lanes(x, lanes) if lanes > 1 else x)), "int32")
        bytes_.append((byte & full(byte, 255)) << full(byte, 8 * c))
    words = reduce(or_, bytes_)
    place = flatten((n, 0, y, x, Lanes(0, DEPTH * lanes)), anchor.type.shape)
    kernel.store(kernel.result, place, reinterpret(kernel.bind(words), anchor.type.dtype, lanes=DEPTH * lanes))
