"""A region that ends in a concatenation: each operand, with the elementwise ops before it, in a loop nest of its own.

What lies from the concatenated dimension on is contiguous in the operand and in the result, so it is copied in whole vectors.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Index, Kernel
from paring.backends.lowerings.loops import plus
from paring.backends.schedules.elementwise import ElementwiseKnobs, above, emit_rows, mergeable, work_ns
from paring.backends.schedules.elementwise import knobs as knobs
from paring.backends.targets import Target
from paring.ir.graph import Graph, Node
from paring.ir.ops import ELEMENTWISE, shape
from paring.ir.ops.core import Const, Input

ALLOWED = (Input, Const, shape.Broadcast, shape.Transpose, shape.Slice)


def find(body: Graph, target: Target) -> Node | None:
    output = body.outputs[0]
    if not isinstance(output.op, shape.Concat) or output.type.size == 0:
        return None
    others = [n for n in body.nodes() if n is not output]
    return output if all(isinstance(n.op, (*ELEMENTWISE, *ALLOWED)) for n in others) else None


def emit(kernel: Kernel, anchor: Node, settings: ElementwiseKnobs) -> None:
    start = 0
    T.evaluate(tirx.const(0, "int32"))
    for x in anchor.inputs:
        if x.type.size:
            _copy(kernel, anchor, x, start, settings)
        start += x.type.shape[anchor.op.axis]


def _copy(kernel: Kernel, anchor: Node, x: Node, start: int, settings: ElementwiseKnobs) -> None:
    axis, sizes, nodes = anchor.op.axis, x.type.shape, above(x)
    rank = len(sizes)
    first = axis if mergeable(nodes, rank) >= rank - axis else rank - 1
    # One position for all dimensions from `first` on counts along the last that is not 1.
    place = max((d for d in range(first, rank) if sizes[d] > 1), default=first)

    def finish(position: Index, at: Any) -> None:
        index = (*position, *(at if d == place else 0 for d in range(first, rank)))
        moved = (*index[:axis], plus(start, index[axis]), *index[axis + 1 :])
        with kernel.scope():
            kernel.store_output(moved, kernel.value(x, index))

    emit_rows(kernel, sizes[:first], prod(sizes[first:]), finish, settings, work_ns(nodes))
