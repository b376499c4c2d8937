"""What the schedules of sparse layers share: a linear layer is a pointwise convolution whose image is one row.

Its x (..., I) is an image of as many columns as x has rows, with all I channels in one block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from paring.backends.kernel import Index, Kernel, Lanes, Scalar, Value, unflatten
from paring.backends.schedules.conv import Shape
from paring.backends.schedules.dot import dot_for
from paring.backends.schedules.tiles import narrowed, only_anchor, widened
from paring.backends.targets import Target
from paring.ir import layout as lay
from paring.ir.graph import Graph, Node
from paring.ir.ops.sparse import Lists, SparseConv2d, SparseLinear


def find_anchor(body: Graph, target: Target) -> Node | None:
    """The sparse layer of a region, in the target's blocks and with its lists in memory; else None."""
    node = only_anchor(body, (SparseConv2d, SparseLinear))
    if node is None or not all(operand in body.inputs for operand in node.inputs[:4]):
        return None
    if isinstance(node.op, SparseConv2d) and lay.channel_block(node.op.out_layout) != target.block:
        return None
    dot = dot_for(node.inputs[0].type.dtype, target)
    # Whole groups are read, the last one too.
    whole = dot is not None and lists_of(node).group == dot.depth and shape_of(node, target).block_in % dot.depth == 0
    return node if whole and node.inputs[0].type.size else None


def lists_of(node: Node) -> Lists:
    assert isinstance(node.op, SparseConv2d | SparseLinear)
    return node.op.lists_of(node.inputs[0].type)


def shape_of(node: Node, target: Target) -> Shape:
    """The sizes of a sparse layer as its loops see them."""
    cut, x, block = lists_of(node), node.inputs[0].type.shape, target.block
    blocks = -(-cut.outputs // block)
    if isinstance(node.op, SparseConv2d):
        size = lay.channel_block(node.op.layout) or 1
        return Shape.around(node, 1, (cut.inputs, x[1], size), (cut.outputs, blocks), node.op.kernel)
    rows, one = prod(x[:-1]), (1, 1)
    return Shape(1, 1, cut.inputs, 1, cut.outputs, blocks, cut.inputs, block, 1, rows, 1, rows, one, one, one, 0, 0)


def each_entry(kernel: Kernel, node: Node, lists: tuple[Scalar, Scalar], steps: int, body: Callable[[Scalar, int], None]) -> None:
    """A loop over the entries of a range of lists, `steps` of them at a time: `body(entry, step)`."""
    k, starts = kernel, kernel.buffers[node.inputs[3]]
    first, last = (k.bind(k.load(starts, end)) for end in lists)
    if steps > 1:
        whole = k.bind((last - first) // steps)
        with k.loop(whole) as turn:
            for step in range(steps):
                body(first + turn * steps + step, step)
        first = k.bind(first + whole * steps)
    with k.loop(last, start=first) as entry:
        body(entry, 0)


@dataclass(frozen=True)
class Results:
    """Where sums of a block of output channels go in the result of a sparse layer, and what is added to them."""

    kernel: Kernel
    anchor: Node
    shape: Shape

    def width(self, used: int) -> int:
        """Lanes to be stored of a block of which `used` are not padding: rows of a matrix lie side by side."""
        return used if isinstance(self.anchor.op, SparseLinear) else self.shape.block

    def index(self, n: Scalar, block: Scalar, y: Scalar, x: Scalar, used: int) -> Index:
        """Of one vector: image n, column x of row y as the loops see them."""
        s, width = self.shape, self.width(used)
        if isinstance(self.anchor.op, SparseLinear):
            return (*unflatten(x, self.anchor.type.shape[:-1]), Lanes(block * s.block, width))
        columns = self.anchor.type.shape[3]
        y, x = (x // columns, x % columns) if s.out_width != columns else (y, x)
        return (n, block, y, x, Lanes(0, width))

    def bias(self, block: Scalar, used: int) -> Value | None:
        """That of a block of output channels, zeros in lanes that are not stored; None where there is none."""
        k, lanes, width = self.kernel, self.shape.block, self.width(used)
        if len(self.anchor.inputs) < 5:
            return None
        value = k.value(self.anchor.inputs[4], (Lanes(block * lanes, width),))
        return widened(k, value, width, lanes, self.anchor.type.dtype)

    def stored(self, total: Value, used: int) -> Value:
        """The lanes of a sum that are stored."""
        return narrowed(self.kernel, total, Lanes(0, self.width(used)), self.shape.block, self.anchor.type.dtype)
