"""What the schedules of convolutions and matrix products share: register tiles, splitting into tiles, epilogues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Index, Kernel, Lanes, Scalar, Value, constant
from paring.backends.schedules.dot import FLOAT, Dot
from paring.backends.targets import Target
from paring.ir.graph import Graph, Node
from paring.ir.op import Op
from paring.ir.ops import ELEMENTWISE, POINTWISE
from paring.ir.ops.binary import Add, Maximum, Minimum, Mul, Sub, Where
from paring.ir.ops.core import Const, Input
from paring.ir.ops.quantized import Dequantize, Descale, Quantize, QuantizedMul, Requantize
from paring.ir.ops.shape import Broadcast
from paring.ir.ops.unary import Abs, Cast, Clamp, HardSigmoid, HardSwish, LeakyRelu, Neg, Relu
from paring.ir.types import DTYPES

# Ops of a few instructions, and those that are no instructions at all.
CHEAP = (
    Relu,
    Clamp,
    LeakyRelu,
    HardSwish,
    HardSigmoid,
    Neg,
    Abs,
    Cast,
    Add,
    Sub,
    Mul,
    Maximum,
    Minimum,
    Where,
    Broadcast,
    Input,
    Const,
    Quantize,
    Dequantize,
    Descale,
    Requantize,
    QuantizedMul,
)


def takes_epilogue(body: Graph, anchor: Node) -> bool:
    """Whether the body is the anchor on inputs of the body, followed by elementwise ops of the anchor's shape.

    A bias of one element may be a constant inside the body.
    """
    inputs = set(body.inputs)
    read = [operand for operand in anchor.inputs if not isinstance(operand.op, Const) or operand in anchor.inputs[:2]]
    if len(body.outputs) != 1 or any(operand not in inputs for operand in read):
        return False
    behind = {anchor}
    for node in body.nodes():
        if node is anchor or node in inputs:
            continue
        if behind.isdisjoint(node.inputs):
            if not isinstance(node.op, (*ELEMENTWISE, Broadcast, Const)):
                return False
        elif isinstance(node.op, POINTWISE) and node.type.shape == anchor.type.shape:
            behind.add(node)
        else:
            return False
    return body.outputs[0] in behind


def only_anchor(body: Graph, ops: type[Op] | tuple[type[Op], ...]) -> Node | None:
    """The one node of these ops, in float32 or int32, of a region that is it with an elementwise epilogue; else None."""
    anchors = [node for node in body.nodes() if isinstance(node.op, ops)]
    if len(anchors) != 1 or not takes_epilogue(body, anchors[0]):
        return None
    (node,) = anchors
    return node if node.type.dtype in ("float32", "int32") and node.type.size else None


def duration(anchor: Node) -> int:
    """About how many nanoseconds one core takes: it only decides whether a kernel is worth several threads."""
    operands = [operand.type for operand in anchor.inputs]
    moved = sum(t.bytes for t in (anchor.type, *operands))
    return max(anchor.macs // MACS_PER_NS, moved // BYTES_PER_NS)


MACS_PER_NS, BYTES_PER_NS = 50, 25


@dataclass(frozen=True)
class Block:
    """rows x vectors results of an anchor: `value(row, vector)`, to stand at `index(row, vector)` of its shape.

    Vector j has `widths[j]` lanes. `value` takes numbers, `index` takes expressions too.
    """

    rows: int
    widths: Sequence[int]
    value: Callable[[int, int], Value]
    index: Callable[[Scalar, int], Index]


def finish(kernel: Kernel, anchor: Node, block: Block) -> None:
    """Run the region's epilogue on the results of an anchor and write them."""
    short = all(isinstance(node.op, CHEAP) for node in kernel.body.nodes() if node is not anchor)
    for j, width in enumerate(block.widths):
        if short:
            for i in range(block.rows):
                _finish_one(kernel, anchor, block.index(i, j), block.value(i, j))
            continue
        # A long epilogue is written out once: unrolled, it would take seconds to compile.
        for part in runs(balanced(block.rows, STACK_BYTES // (4 * width))):
            for first in range(part.start, part.start + part.count * part.width, part.width):
                _finish_loop(kernel, anchor, block, j, range(first, first + part.width))


def _finish_one(kernel: Kernel, anchor: Node, index: Index, value: Value) -> None:
    with kernel.scope():
        kernel.anchors[anchor] = lambda _: value
        kernel.finish(index)


def _finish_loop(kernel: Kernel, anchor: Node, block: Block, j: int, rows: range) -> None:
    """The rows of one vector by way of memory, in a loop."""
    width = block.widths[j]
    memory = kernel.local(len(rows) * width, anchor.type.dtype)
    for position, i in enumerate(rows):
        kernel.store(memory, Lanes(position * width, width), block.value(i, j))
    with kernel.loop(len(rows)) as position:
        _finish_one(kernel, anchor, block.index(position + rows.start, j), kernel.load(memory, Lanes(position * width, width)))


def widened(kernel: Kernel, value: Value, width: int, lanes: int, dtype: str) -> Value:
    """A vector of `width` lanes in one of `lanes`, zeros behind it."""
    if width == lanes:
        return value
    whole = kernel.local(lanes, dtype)
    kernel.store(whole, Lanes(0, lanes), constant(0, dtype, lanes))
    kernel.store(whole, Lanes(0, width), value)
    return kernel.load(whole, Lanes(0, lanes))


def narrowed(kernel: Kernel, value: Value, lanes: Lanes, whole: int, dtype: str) -> Value:
    """Some neighbouring lanes of a vector that has `whole`, by way of a copy.

    Reading parts of an accumulator would keep it in memory all along the reduction.
    """
    if lanes.count == whole:
        return value
    copy = kernel.local(whole, dtype)
    kernel.store(copy, Lanes(0, whole), value)
    return kernel.load(copy, lanes)


# TVM takes buffers of 1 KiB and more from the heap.
STACK_BYTES = 1023


@dataclass(frozen=True)
class Run:
    """`count` neighbouring tiles of one width and one kind, from position `start`."""

    start: int
    width: int
    count: int
    kind: Any = None


def balanced(total: int, most: int) -> list[int]:
    """Widths of at most `most` that sum to `total` and differ by one at most, wide ones first."""
    parts = -(-total // most)
    narrow, extra = divmod(total, parts)
    return [narrow + 1] * extra + [narrow] * (parts - extra)


def runs(widths: Sequence[int], kind: Callable[[int, int], Any] = lambda start, width: None) -> tuple[Run, ...]:
    """Tiles laid side by side, those alike grouped; `kind(start, width)` tells apart tiles that need their own code."""
    tiles, start = [], 0
    for width in widths:
        tiles.append((start, width, kind(start, width)))
        start += width
    grouped = [list(group) for _, group in groupby(tiles, key=lambda tile: tile[1:])]
    return tuple(Run(group[0][0], group[0][1], len(group), group[0][2]) for group in grouped)


def tile_count(parts: Sequence[Run]) -> int:
    return sum(run.count for run in parts)


def dispatch(kernel: Kernel, position: Scalar, parts: Sequence[Run], emit: Callable[[Scalar, Run], None]) -> None:
    """Code for each run, of which the one that tile number `position` lies in is executed: `emit(start of the tile, run)`."""
    run, *rest = parts
    if not rest:
        with kernel.scope():
            emit(position * run.width + run.start, run)
        return
    with T.If(position < run.count):
        with T.Then(), kernel.scope():
            emit(position * run.width + run.start, run)
        with T.Else():
            dispatch(kernel, position - run.count, rest, emit)


@dataclass(frozen=True)
class Ahead:
    """Brings the weights of the tiles to come into the cache, in equal shares, while those at hand are multiplied."""

    kernel: Kernel
    weights: Any
    start: Scalar
    share: int  # cache lines at each step
    line: int  # elements of a cache line

    @staticmethod
    def of(kernel: Kernel, operand: Node, start: Scalar, elements: int, steps: int) -> Ahead:
        """For `elements` from `start` on, in that many steps; nothing is fetched where these are far more than lines."""
        line = LINE_BYTES // DTYPES[operand.type.dtype].bytes
        return Ahead(kernel, kernel.buffers[operand], kernel.bind(start), round(elements / line / steps), line)

    def step(self, number: Scalar) -> None:
        for line in range(self.share):
            self.kernel.prefetch(self.weights, self.start + (number * self.share + line) * self.line)


LINE_BYTES = 64


class Accumulators:
    """Sums held in registers: rows x one vector of each of the `widths` (lanes), added to by steps of `dot`.

    Those of `pixels` uses of the weights: floats of a few are summed by blocks (Higham, Accuracy and Stability of Numerical
    Algorithms, section 4.2), whose rounding grows with the length of a block. Memory bounds them, so it costs no time.
    """

    def __init__(self, kernel: Kernel, rows: int, widths: Sequence[int], dot: Dot = FLOAT, pixels: int | None = None) -> None:
        self.kernel, self.widths, self.dot, self.dtype = kernel, tuple(widths), dot, dot.dtype
        # One buffer for each: TVM takes larger ones from the heap.
        self.registers = [[kernel.local(lanes, self.dtype) for lanes in self.widths] for _ in range(rows)]
        by_blocks = dot.depth == 1 and pixels is not None and pixels <= FEW
        self.totals = [[kernel.local(lanes, self.dtype) for lanes in self.widths] for _ in range(rows if by_blocks else 0)]

    def start(self, vector: int, value: Value | None = None, zero_from: int | None = None) -> None:
        """Set the rows of one vector: to the value, or to zero where none is given and from row `zero_from` on."""
        lanes = self.widths[vector]
        zero = constant(0, self.dtype, lanes)
        value = zero if value is None else self.kernel.bind(value)
        for number, row in enumerate(self.registers):
            first = zero_from is None or number < zero_from
            self.kernel.store(row[vector], Lanes(0, lanes), value if first else zero)
        for row in self.totals:
            self.kernel.store(row[vector], Lanes(0, lanes), zero)

    def add(self, row: int, vector: int, pixel: Value, weights: Value) -> None:
        """One step's products; `pixel` and `weights` as `dot` gives them (of floats also a vector as wide as the sums)."""
        new = self.dot.add(self._read(self.registers, row, vector), pixel, weights)
        self.kernel.store(self.registers[row][vector], Lanes(0, self.widths[vector]), new)

    def value(self, row: int, vector: int) -> Value:
        value = self._read(self.registers, row, vector)
        return value + self._read(self.totals, row, vector) if self.totals else value

    def reduce(self, turns: int, steps: int, body: Callable[[Scalar], None]) -> None:
        """A loop of `turns` turns, each of that many steps in one sum: `body(number of the turn)`."""
        most = max(1, BLOCK // steps) if self.totals else turns
        length = max(length for length in range(1, min(most, turns) + 1) if turns % length == 0)
        with self.kernel.loop(turns // length) as block:
            with self.kernel.loop(length) as turn:
                body(block * length + turn)
            for row, vector in product(range(len(self.totals)), range(len(self.widths))):
                lanes = Lanes(0, self.widths[vector])
                self.kernel.store(self.totals[row][vector], lanes, self.value(row, vector))
                self.kernel.store(self.registers[row][vector], lanes, constant(0, self.dtype, lanes.count))

    def _read(self, sums: list[list[Any]], row: int, vector: int) -> Value:
        return self.kernel.load(sums[row][vector], Lanes(0, self.widths[vector]))


def tile_height(target: Target, lanes: int, vectors: int) -> int:
    """How many rows of `vectors` sums of `lanes` elements stay in registers, beside the weights and one value of x."""
    width = -(-lanes // target.lanes)
    return max((target.registers - vectors * width - 1) // (vectors * width), 1)


def overlaps(target: Target, depth: int) -> bool:
    """Whether tiles of half the registers are better: after a short reduction the next one starts while one is written."""
    return depth <= SHORT and target.registers >= 32


# Terms of a reduction. Measured on Zen 4: from about here on, full tiles are as fast.
SHORT = 256
# Uses of the weights up to which sums are taken by blocks, and the steps of a block.
FEW, BLOCK = 16, 16
# Sums that must be under way at once to hide the latency of multiply-add: two units, four cycles.
CHAINS = 8
