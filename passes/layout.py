"""layout: convolutions, and what lies between them, in blocked channels (NCHW16c)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.layout import blocks_of
from paring.ir.op import Op
from paring.ir.ops import ALL, ELEMENTWISE, binary, conv, pool, quantized, reduce, shape
from paring.ir.ops.core import Const
from paring.ir.ops.pack import PackConvWeight
from paring.passes.base import Pass
from paring.passes.rewriter import Context

SMALLEST_BLOCK, LARGEST_BLOCK = 4, 1024
# Lanes of padding hold anything, and an integer divided by it would trap.
_TRAPS: tuple[type[Op], ...] = (binary.FloorDiv, binary.Remainder)


@dataclass(frozen=True)
class Layout(Pass):
    """Convolutions with constant weights run on blocked channels; what follows them stays blocked as long as it can.

    `block` is the number of channels in a block, a multiple of the target's vector width. `group` is the number of neighbouring
    8-bit channels whose products the target sums at once (1: it does not, and integer convolutions stay as they are). Images
    change layout only where a blocked part of the network begins or ends; a transformation is shared by all its readers. What
    lanes of padding hold does not matter: no op reads them for a result that counts.
    """

    name = "layout"
    block: int = 16
    group: int = 1

    def check(self) -> None:
        super().check()
        if max(self.block, self.group) > LARGEST_BLOCK:
            raise ArgumentError(f"pass layout: blocks of {self.block} by {self.group}", hint=f"at most {LARGEST_BLOCK}")

    def run(self, graph: Graph, context: Context) -> Graph:
        walker = _Walker(self.block, self.group, context)
        for node in graph.nodes():
            walker.visit(node)
        if not context.rewrites:
            return graph
        return Graph(tuple(map(walker.plain, graph.inputs)), tuple(map(walker.plain, graph.outputs)))


class _Walker:
    """Keeps for each node of the old graph its plain and its blocked form; either is made from the other on demand."""

    def __init__(self, block: int, group: int, context: Context) -> None:
        self.block, self.group = block, group
        self.layout = f"NCHW{block}c"
        self.context = context
        self.plain_of: dict[Node, Node] = {}
        self.blocked_of: dict[Node, Node] = {}

    def visit(self, node: Node) -> None:
        rule = BLOCKED.get(type(node.op))
        if rule is None and any(map(self.is_blocked, node.inputs)):
            self.decline(node, "it takes plain images only")
        blocked = rule(self, node) if rule else None
        if blocked is not None and self.context.spend(f"layout-{node.op.name}", node):
            self.blocked_of[node] = blocked
            return
        inputs = tuple(self.plain(operand) for operand in node.inputs)
        self.plain_of[node] = node.with_inputs(inputs)

    def decline(self, node: Node, reason: str) -> Node | None:
        """For `return w.decline(...)`: the node stays as it is, and why."""
        self.context.decline(f"layout-{node.op.name}", node, reason)
        return None

    def plain(self, node: Node) -> Node:
        if node not in self.plain_of:
            op = shape.LayoutTransform(self.layout, "NCHW", node.type.shape[1])
            self.plain_of[node] = Node(op, (self.blocked_of[node],), node.loc)
        return self.plain_of[node]

    def is_blocked(self, node: Node) -> bool:
        return node in self.blocked_of

    def blocked(self, node: Node) -> Node | None:
        """The blocked form of a four-dimensional node, made where that is possible."""
        if node in self.blocked_of:
            return self.blocked_of[node]
        if node.type.rank != 4:
            return None
        if isinstance(node.op, shape.Broadcast) and self._is_channel_vector(node):
            return self._block_broadcast(node, self.plain(node.inputs[0]))
        op = shape.LayoutTransform("NCHW", self.layout, node.type.shape[1])
        self.blocked_of[node] = Node(op, (self.plain(node),), node.loc)
        return self.blocked_of[node]

    def in_blocks_of(self, size: int, node: Node) -> Node:
        """An image in blocks of another size."""
        source, layout = (self.blocked_of[node], self.layout) if self.is_blocked(node) else (self.plain(node), "NCHW")
        return Node(shape.LayoutTransform(layout, f"NCHW{size}c", node.type.shape[1]), (source,), node.loc)

    def _is_channel_vector(self, node: Node) -> bool:
        """Whether a broadcast repeats something that has channels at most, not rows or columns."""
        (source,) = node.inputs
        dims = (1,) * (4 - source.type.rank) + source.type.shape
        return dims[0] in (1, node.type.shape[0]) and dims[2:] == (1, 1)

    def _block_broadcast(self, node: Node, source: Node) -> Node:
        n, c, h, w = node.type.shape
        target = (n, blocks_of(c, self.block), h, w, self.block)
        if source.type.size > 1:
            dims = (1,) * (4 - source.type.rank) + source.type.shape
            source = source if source.type.rank == 4 else Node(shape.Reshape(dims), (source,), node.loc)
            if dims[1] != 1:
                source = Node(shape.LayoutTransform("NCHW", self.layout, dims[1]), (source,), node.loc)
            else:
                source = Node(shape.Reshape((*dims, 1)), (source,), node.loc)
        self.blocked_of[node] = Node(shape.Broadcast(target), (source,), node.loc)
        return self.blocked_of[node]


def _conv(w: _Walker, node: Node) -> Node | None:
    x, weight, *bias = node.inputs
    op = node.op
    assert isinstance(op, conv.Conv2d)
    if op.layout != "NCHW" or op.weight_layout != "OIHW":
        return w.decline(node, "it is blocked already")
    if not all(isinstance(n.op, Const) for n in (weight, *bias)):
        return w.decline(node, "its weights are not constant")
    out, per_group = weight.type.shape[:2]
    channels, block = x.type.shape[1], w.block
    whole_groups = per_group % block == 0 and (out // op.groups) % block == 0
    # Groups as wide as their results, of which a block holds several: depthwise ones, for instance.
    narrow = op.groups > 1 and channels == out and per_group < block and block % per_group == 0
    if op.groups > 1 and not narrow and not whole_groups:
        return _conv_in_half_blocks(w, node)
    integer = weight.type.dtype == "int8" and not narrow
    if integer and w.group == 1:
        return w.decline(node, "the target has no products of bytes")
    # A plain image of few channels (the first layer's) is read as it is, or in blocks of what is summed at once: its channels
    # would not fill a block.
    few = not w.is_blocked(x) and channels < block and op.groups == 1
    from_plain = few and not integer
    block_in = 1 if from_plain else per_group if narrow else w.group if few and channels <= w.group else block
    source = w.plain(x) if from_plain else w.blocked(x) if narrow or block_in == block else w.in_blocks_of(block_in, x)
    if source is None:
        return None
    groups = blocks_of(out, block) * block // per_group if narrow else op.groups
    weight_layout = f"OIHW{block_in // w.group}i{block}o{w.group}i" if integer else f"OIHW{block_in}i{block}o"
    layout = "NCHW" if from_plain else w.layout if narrow else f"NCHW{block_in}c"
    # Bytes are read in whole groups: the weights of what fills up the last one are zeros.
    read = blocks_of(channels, w.group) * w.group if integer else channels
    in_channels = read if op.groups == 1 and read % block_in else 0
    out_channels = out if op.groups == 1 and out % block else 0
    new = dataclasses.replace(op, layout=layout, out_layout=w.layout, weight_layout=weight_layout, groups=groups)
    new = dataclasses.replace(new, in_channels=in_channels, out_channels=out_channels)
    packed = Node(PackConvWeight(weight_layout), (w.plain(weight),), weight.loc)
    return Node(new, (source, packed, *(_padded(w.plain(b), block) for b in bias)), node.loc)


def _conv_in_half_blocks(w: _Walker, node: Node) -> Node | None:
    """Groups of 24 channels, for instance, fill blocks of 8 where those of the rest are 16."""
    x, weight, *bias = node.inputs
    assert isinstance(node.op, conv.Conv2d)
    half, groups = w.block // 2, node.op.groups
    sizes = weight.type.shape[1], weight.type.shape[0] // groups
    if half < SMALLEST_BLOCK or not x.type.is_float or any(size % half for size in sizes):
        return w.decline(
            node, f"groups of {sizes[0]} to {sizes[1]} channels neither fill blocks of {w.block} or {half} nor share them out"
        )
    layout, weight_layout = f"NCHW{half}c", f"OIHW{half}i{half}o"
    packed = Node(PackConvWeight(weight_layout), (w.plain(weight),), weight.loc)
    new = dataclasses.replace(node.op, layout=layout, out_layout=layout, weight_layout=weight_layout)
    result = Node(new, (w.in_blocks_of(half, x), packed, *map(w.plain, bias)), node.loc)
    return Node(shape.LayoutTransform(layout, w.layout, node.type.shape[1]), (result,), node.loc)


def _padded(bias: Node, block: int) -> Node:
    extra = -bias.type.shape[0] % block
    return Node(shape.Pad(((0, extra),)), (bias,), bias.loc) if extra else bias


def _elementwise(w: _Walker, node: Node) -> Node | None:
    """Blocked where an operand already is; the others follow."""
    if node.type.rank != 4 or not any(w.is_blocked(operand) for operand in node.inputs):
        return None
    operands = [blocked for operand in node.inputs if (blocked := w.blocked(operand)) is not None]
    return Node(node.op, operands, node.loc) if len(operands) == len(node.inputs) else None


def _lookup(w: _Walker, node: Node) -> Node | None:
    q, table = node.inputs
    return Node(node.op, (w.blocked_of[q], w.plain(table)), node.loc) if w.is_blocked(q) else None


def _pool(w: _Walker, node: Node) -> Node | None:
    (x,) = node.inputs
    if not w.is_blocked(x):
        return None
    assert isinstance(node.op, pool.Pool2d | pool.AdaptiveAvgPool2d)
    return Node(dataclasses.replace(node.op, layout=w.layout), (w.blocked_of[x],), node.loc)


def _reduce(w: _Walker, node: Node) -> Node | None:
    """Over the image, dimensions kept: the result is blocked as well."""
    (x,) = node.inputs
    assert isinstance(node.op, reduce.Reduction)
    if not w.is_blocked(x):
        return None
    if node.op.axes != (2, 3) or not node.op.keepdims:
        return w.decline(node, "only a reduction over rows and columns that keeps them stays blocked")
    return Node(node.op, (w.blocked_of[x],), node.loc)


def _broadcast(w: _Walker, node: Node) -> Node | None:
    """Of a blocked (N, C, 1, 1) to an image."""
    (x,) = node.inputs
    if not w.is_blocked(x):
        return None
    if node.type.rank != 4 or x.type.shape[:2] != node.type.shape[:2]:
        return w.decline(node, "it repeats images or channels")
    source = w.blocked_of[x]
    n, c, _, _, b = source.type.shape
    return Node(shape.Broadcast((n, c, *node.type.shape[2:], b)), (source,), node.loc)


def _concat(w: _Walker, node: Node) -> Node | None:
    """Along channels where all but the last operand fill their blocks; along rows or columns always."""
    assert isinstance(node.op, shape.Concat)
    if node.type.rank != 4 or not any(w.is_blocked(operand) for operand in node.inputs):
        return None
    if node.op.axis == 1 and any(operand.type.shape[1] % w.block for operand in node.inputs[:-1]):
        return w.decline(node, f"an operand before the last does not fill its blocks of {w.block} channels")
    operands = [blocked for operand in node.inputs if (blocked := w.blocked(operand)) is not None]
    return Node(node.op, operands, node.loc) if len(operands) == len(node.inputs) else None


def _slice(w: _Walker, node: Node) -> Node | None:
    """Of rows, columns, and whole blocks of channels."""
    (x,) = node.inputs
    op = node.op
    assert isinstance(op, shape.Slice)
    if not w.is_blocked(x):
        return None
    if op.steps[1] != 1 or op.starts[1] % w.block or (op.stops[1] % w.block and op.stops[1] != x.type.shape[1]):
        return w.decline(node, f"it does not cut whole blocks of {w.block} channels")
    first, last = op.starts[1] // w.block, blocks_of(op.stops[1], w.block)
    starts = (op.starts[0], first, *op.starts[2:], 0)
    stops = (op.stops[0], last, *op.stops[2:], w.block)
    return Node(shape.Slice(starts, stops, (*op.steps, 1)), (w.blocked_of[x],), node.loc)


def _pad(w: _Walker, node: Node) -> Node | None:
    """Of rows and columns."""
    (x,) = node.inputs
    assert isinstance(node.op, shape.Pad)
    if not w.is_blocked(x):
        return None
    if any(p != (0, 0) for p in node.op.padding[:2]):
        return w.decline(node, "it pads images or channels")
    return Node(dataclasses.replace(node.op, padding=(*node.op.padding, (0, 0))), (w.blocked_of[x],), node.loc)


BLOCKED: dict[type[Op], Callable[[_Walker, Node], Node | None]] = {
    conv.Conv2d: _conv,
    pool.MaxPool2d: _pool,
    pool.AvgPool2d: _pool,
    pool.AdaptiveAvgPool2d: _pool,
    reduce.Mean: _reduce,
    reduce.Max: _reduce,
    reduce.Min: _reduce,
    reduce.Sum: _reduce,
    shape.Broadcast: _broadcast,
    shape.Concat: _concat,
    shape.Slice: _slice,
    shape.Pad: _pad,
    quantized.Lookup: _lookup,
    **{op: _elementwise for op in ALL if issubclass(op, ELEMENTWISE) and not issubclass(op, _TRAPS)},
}
