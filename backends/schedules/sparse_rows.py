"""Sparse layers whose lists store single weights: vectors hold pixels, so any mask costs what it stores.

Elsen, Dukhan, Gale, Simonyan, Fast Sparse ConvNets (CVPR 2020): each weight is repeated in a vector and multiplies one input
channel of some neighbouring pixels. Activations lie in blocks of channels, so a tile of pixels is transposed into a buffer
first, for one kernel position and one span of input channels at a time: that buffer stays in the first cache, where each
entry of a list finds its channel in `width` vectors side by side. Sums are transposed back and take the usual epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from paring.backends.kernel import Kernel, Lanes, Scalar, Value, as_int, constant
from paring.backends.schedules.conv import Shape
from paring.backends.schedules.sparse import Results, each_entry, find_anchor, lists_of, shape_of
from paring.backends.schedules.tiles import Accumulators, Block, Run, balanced, dispatch, duration, finish, runs, tile_count
from paring.backends.targets import PIXELS, Target
from paring.ir.graph import Graph, Node
from paring.ir.ops.sparse import Lists, SparseLinear

# Sums under way: one alone waits for the multiply-add before it; more than two leave remainders as long as the lists.
CHAINS = 2


@dataclass(frozen=True)
class RowKnobs:
    """The pixels in so many `tiles`; the output channels in `parts`, each with a copy of the pixels."""

    tiles: int
    parts: int = 1


def find(body: Graph, target: Target) -> Node | None:
    """The sparse layer of a region that this family runs, or None."""
    node = find_anchor(body, target)
    if node is None or node.type.dtype != "float32":
        return None
    cut, shape, block = lists_of(node), shape_of(node, target), target.block
    whole = cut.spans == 1 or cut.span % block == 0
    # Rows of a matrix are read a block of channels at a time, the last one from further left.
    readable = shape.block_in == block or (shape.in_blocks == 1 and cut.inputs - (cut.spans - 1) * cut.span >= block)
    return node if cut.block == 1 and whole and readable else None


def knobs(node: Node, target: Target) -> RowKnobs:
    """The default settings: as many tiles of at most PIXELS for each thread; of fewer tiles, each thread has some channels."""
    shape = shape_of(node, target)
    vectors = -(-shape.out_height * shape.out_width // shape.block)
    tiles = -(-vectors // max(1, PIXELS // shape.block))
    if shape.images * tiles < target.cores:
        return RowKnobs(tiles, min(target.cores, shape.out_blocks))
    return RowKnobs(min(vectors, -(-tiles // target.cores) * target.cores))


def emit(kernel: Kernel, anchor: Node, knobs: RowKnobs) -> None:
    """Write the loops of a region around that layer."""
    shape = shape_of(anchor, kernel.target)
    vectors = -(-shape.out_height * shape.out_width // shape.block)
    parts = runs(balanced(shape.out_blocks, -(-shape.out_blocks // knobs.parts)))
    with kernel.parallel((shape.images, tile_count(parts), knobs.tiles), duration(anchor)) as (n, part, tile):
        # Wide tiles and narrow ones in turns, so that neighbouring tiles, which one thread takes, are as many vectors.
        start, end = (kernel.bind((tile + side) * vectors // knobs.tiles) for side in (0, 1))

        def at_part(first: Scalar, blocks: Run) -> None:
            tiles = _Tile(kernel, anchor, shape, n, (first, blocks.width), start, end)
            narrow, wider = divmod(vectors, knobs.tiles)
            if not wider:
                tiles.emit(narrow)
                return
            with T.If(end - start == narrow):
                with T.Then(), kernel.scope():
                    tiles.emit(narrow)
                with T.Else(), kernel.scope():
                    tiles.emit(narrow + 1)

        dispatch(kernel, part, parts, at_part)


@dataclass
class _Tile:
    """The pixels of vectors [start, end), in `blocks` (first, count) of the output channels."""

    kernel: Kernel
    anchor: Node
    shape: Shape
    image: Scalar
    blocks: tuple[Scalar, int]
    start: Scalar
    end: Scalar

    def emit(self, width: int) -> None:
        """Code for tiles of `width` vectors."""
        k, s = self.kernel, self.shape
        self.cut: Lists = lists_of(self.anchor)
        self.lanes, self.width, self.row = s.block, width, width * s.block
        self.results = Results(k, self.anchor, s)
        # A matrix is written row by row, once all sums are there: column by column, the lines that are fetched ahead are those
        # that another thread writes. The sums of an image are written block by block as soon as there are no more to come.
        self.by_rows = isinstance(self.anchor.op, SparseLinear)
        self.kept = self.by_rows or self.cut.taps * self.cut.spans > 1
        first, count = self.blocks
        channels = -(-min(self.cut.span, self.cut.inputs) // self.lanes) * self.lanes
        self.pixels = k.local(channels * self.row, "float32")
        self.sums = k.local((count if self.kept else 1) * self.lanes * self.row, "float32")
        with k.loop(self.cut.taps) as tap, k.loop(self.cut.spans) as span:
            part = k.bind(tap * self.cut.spans + span)
            self._gather(tap, span)
            with k.loop(count) as number:
                block, place = k.bind(first + number), k.bind(number * self.lanes if self.kept else 0)
                with k.loop(self.lanes) as channel:
                    self._channel(part, span, k.bind(block * self.lanes + channel), k.bind((place + channel) * self.row))
                if not self.kept:
                    self._finish(block, 1, 0)
        if self.by_rows:
            self._finish(first, count, 0)
        elif self.kept:
            with k.loop(count) as number:
                self._finish(k.bind(first + number), 1, k.bind(number * self.lanes))

    def _channel(self, part: Scalar, span: Scalar, channel: Scalar, place: Scalar) -> None:
        """Add one list to the sums of its output channel, which lie at `place`."""
        k, cut, width, lanes = self.kernel, self.cut, self.width, self.lanes
        values, places = (k.buffers[operand] for operand in self.anchor.inputs[1:3])
        steps = max(1, CHAINS // width)
        sums, zero = Accumulators(k, width * steps, [lanes]), constant(0.0, "float32", lanes)
        sums.start(0)
        where = [Lanes(place + v * lanes, lanes) for v in range(width)]
        if self.kept:
            for v in range(width):
                k.store(sums.registers[v][0], Lanes(0, lanes), tirx.Select(part == 0, zero, k.load(self.sums, where[v])))

        def add(entry: Scalar, step: int) -> None:
            weight = k.bind(tirx.Broadcast(k.load(values, entry), lanes))
            origin = k.bind((k.load(places, entry) - span * cut.span) * self.row)
            for v in range(width):
                sums.add(step * width + v, 0, k.load(self.pixels, Lanes(origin + v * lanes, lanes)), weight)

        # What fills up the last block has no lists.
        ends = [tirx.min(end, cut.outputs) if cut.outputs % lanes else end for end in (channel, channel + 1)]
        each_entry(k, self.anchor, (part * cut.outputs + ends[0], part * cut.outputs + ends[1]), steps, add)
        for v in range(width):
            total = sums.value(v, 0)
            for step in range(1, steps):
                total = total + sums.value(step * width + v, 0)
            k.store(self.sums, where[v], total)

    def _gather(self, tap: Scalar, span: Scalar) -> None:
        """Bring what one kernel position reads of a span of input channels into the buffer, a row of pixels for each channel."""
        k, cut, lanes = self.kernel, self.cut, self.lanes
        x, zero = k.buffers[self.anchor.inputs[0]], constant(0.0, "float32", lanes)
        count = -(-cut.span // lanes)
        if cut.spans > 1:
            count = k.bind(tirx.min(count, -(-cut.inputs // lanes) - span * count))
        with k.loop(self.width) as v:
            origins = [self._pixel(tap, (self.start + v) * lanes + i) for i in range(lanes)]
            with k.loop(count) as number:
                start, row = self._channels(span, number)
                rows = []
                for offset, inside in origins:
                    vector = k.load(x, Lanes(offset + start, lanes))
                    rows.append(k.bind(vector if inside is None else tirx.Select(inside, vector, zero)))
                for i, vector in enumerate(transposed(k, rows)):
                    k.store(self.pixels, Lanes((row + i) * self.row + v * lanes, lanes), vector)

    def _channels(self, span: Scalar, number: Scalar) -> tuple[Scalar, Scalar]:
        """For block `number` of a span: how far its channels lie from the first of their pixel, and their row in the buffer."""
        k, s, cut, lanes = self.kernel, self.shape, self.cut, self.lanes
        first = span * cut.span + number * lanes
        if s.block_in == lanes:
            plane = s.height * s.width * lanes
            return k.bind((span * (cut.span // lanes) + number) * plane), k.bind(number * lanes)
        first = k.bind(tirx.min(first, cut.inputs - lanes) if cut.inputs % lanes else first)
        return first, k.bind(first - span * cut.span)

    def _pixel(self, tap: Scalar, pixel: Scalar) -> tuple[Scalar, Value | None]:
        """Where the first channel of what one kernel position reads for a result pixel lies, and whether that is in the image.

        Pixels behind the last one are read as the last one.
        """
        k, s = self.kernel, self.shape
        total = s.out_height * s.out_width
        pixel = tirx.min(pixel, total - 1) if total % self.lanes else pixel
        image = self.image * (s.in_blocks * s.height * s.width * s.block_in)
        if s.height == s.out_height == 1 and s.kernel == (1, 1) and s.width == s.out_width and not s.left:
            return k.bind(image + pixel * s.block_in), None
        pixel = k.opaque(pixel)
        kh, kw = k.bind(tap // s.kernel[1]), k.bind(tap % s.kernel[1])
        y = k.bind(pixel // s.out_width * s.stride[0] - s.top + kh * s.dilation[0])
        x = k.bind(pixel % s.out_width * s.stride[1] - s.left + kw * s.dilation[1])
        inside = k.bind(tirx.And(tirx.And(y >= 0, y < s.height), tirx.And(x >= 0, x < s.width)))
        return k.bind(image + tirx.Select(inside, y * s.width + x, 0) * s.block_in), inside

    def _finish(self, first: Scalar, count: int, place: Scalar) -> None:
        """Write the results of `count` blocks of output channels, whose sums begin with row `place`, vector after vector."""
        k, pixels = self.kernel, self.shape.out_height * self.shape.out_width

        def vector(v: Scalar, used: int) -> None:
            with k.loop(count) as number:
                self._write(first + number, place + number * self.lanes, v, used)

        whole, rest = divmod(pixels, self.lanes)
        with k.loop(self.width if not rest else k.bind(tirx.min(self.end, whole) - self.start)) as v:
            vector(v, self.lanes)
        if rest:
            with T.If(self.end > whole), T.Then(), k.scope():
                vector(self.width - 1, rest)

    def _write(self, block: Scalar, place: Scalar, v: Scalar, count: int) -> None:
        """The first `count` pixels of vector v."""
        k, s, lanes = self.kernel, self.shape, self.lanes
        tail = s.out_channels % lanes
        kinds = runs([1] * s.out_blocks, lambda first, _: tail if tail and first == s.out_blocks - 1 else lanes)
        first = k.bind((self.start + v) * lanes)

        def at_block(block: Scalar, run: Run) -> None:
            used, results = run.kind, self.results
            rows = [k.bind(k.load(self.sums, Lanes((place + i) * self.row + v * lanes, lanes))) for i in range(lanes)]
            totals, bias = transposed(k, rows), results.bias(block, used)

            def value(i: int, j: int) -> Any:
                return results.stored(totals[i] if bias is None else totals[i] + bias, used)

            def index(i: Scalar, j: int) -> Any:
                return results.index(self.image, block, *self._place(first + i), used)

            finish(k, self.anchor, Block(count, [results.width(used)], value, index))

        dispatch(k, block, kinds, at_block)

    def _place(self, pixel: Scalar) -> tuple[Scalar, Scalar]:
        """The row and column of a pixel as the loops see them."""
        width = self.shape.out_width
        return (0, pixel) if self.shape.out_height == 1 else (pixel // width, pixel % width)


def transposed(kernel: Kernel, rows: list[Value]) -> list[Value]:
    """n vectors of n lanes (a power of two) as columns: each round interleaves the lanes of vectors half of them apart."""
    n = len(rows)
    low, high = ([lane + n * side for lane in range(start, start + n // 2) for side in (0, 1)] for start in (0, n // 2))
    for _ in range(n.bit_length() - 1):
        pairs = [[rows[i], rows[i + n // 2]] for i in range(n // 2)]
        rows = [kernel.bind(tirx.Shuffle(pair, [as_int(lane) for lane in lanes])) for pair in pairs for lanes in (low, high)]
    return rows
