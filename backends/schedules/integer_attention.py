"""Attention on 8-bit integers: scores and mixtures by register tiles of `dot.py`, weights out of a table, one head at a time.

Keys are packed so that a vector of scores is a vector of neighbouring keys, values so that a vector is one of neighbouring
columns; each has four neighbours of the sum side by side. The bytes that an instruction wants with the other sign have their
highest bit flipped: of scores that changes whole rows only, of mixtures it is taken off again.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from paring.backends.kernel import Kernel, Lanes, Scalar, Value, constant, splat
from paring.backends.lowerings.loops import accumulator, horizontal
from paring.backends.lowerings.product import masked
from paring.backends.quantized import weight_place, weight_share
from paring.backends.schedules.attention import AttentionKnobs, Sizes, each_head, only_attention
from paring.backends.schedules.attention import knobs as knobs
from paring.backends.schedules.dot import FLIP, Dot, dot_for
from paring.backends.schedules.elementwise import pieces
from paring.backends.schedules.tiles import Accumulators, Run, balanced, duration, runs
from paring.backends.tables import look_up
from paring.backends.targets import Target
from paring.backends.vecmath import bind, cast, full, reinterpret
from paring.ir.graph import Graph, Node
from paring.ir.ops.attention import MOST_SUM, IntegerAttention
from paring.ir.types import BYTES


def find(body: Graph, target: Target) -> Node | None:
    anchor = only_attention(body, IntegerAttention)
    taken = anchor is not None and anchor.inputs[3] in body.inputs and _dot(target) is not None
    return anchor if taken else None


def _dot(target: Target) -> tuple[Dot, str] | None:
    """The instruction, and the type of the bytes that it takes as they are next to int8 ones."""
    dots = ((dot_for(dtype, target), dtype) for dtype in BYTES)
    return next(((dot, dtype) for dot, dtype in dots if dot is not None and not dot.uniform), None)


def emit(kernel: Kernel, anchor: Node, settings: AttentionKnobs) -> None:
    each_head(kernel, anchor, settings, Head, duration(anchor))


class Head:
    """One head of one sample, with its packed keys and values."""

    def __init__(self, kernel: Kernel, anchor: Node, sizes: Sizes, settings: AttentionKnobs, b: Scalar, h: Scalar) -> None:
        self.kernel, self.anchor, self.sizes, self.settings = kernel, anchor, sizes, settings
        self.at = (b, h)
        found = _dot(kernel.target)
        assert found is not None
        self.dot, self.dtype = found
        self.padded = sizes.key_vectors * sizes.lanes
        # Steps of four along the inner size, and along the keys.
        self.inner, self.steps = -(-sizes.inner // 4), -(-sizes.keys // 4)
        self.keys = kernel.local(self.padded * self.inner, "int32")
        self.biases = kernel.local(self.padded, "int32")
        self.values = kernel.local(sizes.value_vectors * sizes.lanes * self.steps, "int32")
        self.offsets = kernel.local(sizes.value_vectors * sizes.lanes, "int32")
        self.queries = kernel.local(settings.rows * self.inner * 4, self.dtype)
        self.scores = kernel.local(settings.rows * self.padded, "int32")
        self.weights = kernel.local(settings.rows * self.padded, self.dtype)
        self.shares = kernel.local(settings.rows, "float32")
        self.totals = kernel.local(settings.rows, "int32")

    def pack(self) -> None:
        """Keys and values; what is behind their ends, and behind those of queries, is 0."""
        kernel, lanes = self.kernel, self.sizes.lanes
        vectors = {self.keys: self.sizes.key_vectors * self.inner, self.values: self.sizes.value_vectors * self.steps}
        for buffer, count in vectors.items():
            with kernel.loop(count) as i:
                kernel.store(buffer, Lanes(i * lanes, lanes), constant(0, "int32", lanes))
        self._pack_keys()
        self._pack_values()
        if self.sizes.inner % 4:
            with kernel.loop(self.settings.rows * self.inner * 4) as i:
                kernel.store(self.queries, i, constant(0, self.dtype))

    def _pack_keys(self) -> None:
        """[vector of keys][step][lane][4], as int8, and what the zero point of q makes of each key."""
        kernel, sizes, lanes, k = self.kernel, self.sizes, self.sizes.lanes, self.anchor.inputs[1]
        flip = FLIP if k.type.dtype == "uint8" else 0
        line = kernel.local(self.inner * 4, k.type.dtype)
        with kernel.loop(self.inner * 4 - sizes.inner) as i:
            # What stands for 0 once it is flipped.
            kernel.store(line, i + sizes.inner, constant(128 if flip else 0, k.type.dtype))
        with kernel.loop(sizes.keys) as s:
            self._copy(line, 0, k, s, k.type.dtype)
            with kernel.loop(self.inner) as e:
                word = reinterpret(kernel.load(line, Lanes(e * 4, 4)), "int32", lanes=1)
                kernel.store(self.keys, (s // lanes * self.inner + e) * lanes + s % lanes, word ^ constant(flip, "int32"))
        zero = self.anchor.op.q_zero + _moved(self.anchor.inputs[0].type.dtype, self.dtype)
        with kernel.loop(sizes.key_vectors) as vector:
            total = self._sums(self.keys, vector * self.inner, self.inner)
            kernel.store(self.biases, Lanes(vector * lanes, lanes), total * full(total, -zero))
        with kernel.loop(self.padded - sizes.keys) as i:
            # Below any other score.
            kernel.store(self.biases, i + sizes.keys, constant(-MOST_SUM, "int32"))

    def _pack_values(self) -> None:
        """[vector of columns][step][lane][4], as int8, and what flipping the weights adds to each column."""
        kernel, sizes, lanes, v = self.kernel, self.sizes, self.sizes.lanes, self.anchor.inputs[2]
        whole, rest = divmod(sizes.keys, 4)
        flip = 128 if v.type.dtype == "uint8" else 0

        def word(step: Scalar, count: int, position: Any, width: int) -> Value:
            total = constant(0, "int32", width)
            for i in range(count):
                byte = cast(kernel.value(v, (*self.at, step * 4 + i, position)), "int32")
                byte = (byte ^ full(byte, flip)) & full(byte, 255)
                total = total | byte << full(byte, 8 * i)
            return total

        for start, width, count in pieces(sizes.outer, lanes):
            with kernel.loop(count) as turn:
                at = start + turn * width
                vector, first = (at // lanes, at % lanes) if width < lanes else (turn, 0)
                position = Lanes(at, width) if width > 1 else at
                with kernel.loop(whole) as step:
                    where = Lanes((vector * self.steps + step) * lanes + first, width)
                    kernel.store(self.values, where, word(step, 4, position, width))
                if rest:
                    where = Lanes((vector * self.steps + whole) * lanes + first, width)
                    kernel.store(self.values, where, word(whole, rest, position, width))
        with kernel.loop(sizes.value_vectors) as vector:
            place = Lanes(vector * lanes, lanes)
            if self.dtype == "int8":
                total = self._sums(self.values, vector * self.steps, self.steps)
                kernel.store(self.offsets, place, total * full(total, 128))
            else:
                kernel.store(self.offsets, place, constant(0, "int32", lanes))

    def _sums(self, packed: Any, first: Scalar, steps: int) -> Value:
        """The sum of the bytes of each lane over so many steps."""
        kernel, lanes = self.kernel, self.sizes.lanes
        register, where = accumulator(kernel, lanes, "int32", constant(0, "int32", lanes))
        with kernel.loop(steps) as step:
            added = self.dot.add(kernel.load(register, where), self.dot.fill(1, 4), self._bytes(packed, first + step))
            kernel.store(register, where, added)
        return bind(kernel.load(register, where))

    def _bytes(self, packed: Any, step: Scalar) -> Value:
        lanes = self.sizes.lanes
        return bind(reinterpret(self.kernel.load(packed, Lanes(step * lanes, lanes)), "int8", lanes=4 * lanes))

    def _copy(self, line: Any, start: Scalar, operand: Node, row: Scalar, dtype: str) -> None:
        """A row of q or k into a buffer, as bytes of that type."""
        kernel, sizes = self.kernel, self.sizes
        for first, width, count in pieces(sizes.inner, 4 * sizes.lanes):
            with kernel.loop(count) as turn:
                at = first + turn * width
                position = Lanes(at, width) if width > 1 else at
                value = kernel.value(operand, (*self.at, row, position))
                if operand.type.dtype != dtype:
                    value = cast(value ^ full(value, _HIGHEST[operand.type.dtype]), dtype)
                kernel.store(line, Lanes(start + at, width), value)

    def rows(self, start: Scalar, run: Run) -> None:
        """All of a tile of query rows."""
        kernel, first = self.kernel, 0
        with kernel.loop(run.width) as row:
            self._copy(self.queries, row * self.inner * 4, self.anchor.inputs[0], start + row, self.dtype)
        for part in runs(balanced(self.sizes.key_vectors, self.settings.vectors)):
            begin = first
            with kernel.loop(part.count) as turn:
                self._scores(run.width, begin + turn * part.width, part.width)
            first += part.count * part.width
        with kernel.loop(run.width) as row:
            self._weigh(start + row, row)
        column = 0
        for width in balanced(self.sizes.value_vectors, self.settings.vectors):
            self._mix(start, run.width, column, width)
            column += width

    def _tile(
        self, rows: int, starts: list[Value], left: Any, stride: int, packed: Any, first: Scalar, steps: int
    ) -> Accumulators:
        """rows x vectors sums over `steps` steps: rows of bytes `stride` apart, times packed vectors from number `first` on."""
        kernel = self.kernel
        sums = Accumulators(kernel, rows, [self.sizes.lanes] * len(starts), self.dot)
        for v, value in enumerate(starts):
            sums.start(v, value)
        with kernel.loop(steps) as step:
            vectors = [self._bytes(packed, (first + v) * steps + step) for v in range(len(starts))]
            for r in range(rows):
                pixel = self.dot.pixel(kernel, left, r * stride + step * 4, 4)
                for v, vector in enumerate(vectors):
                    sums.add(r, v, pixel, vector)
        return sums

    def _scores(self, rows: int, vector: Scalar, vectors: int) -> None:
        kernel, lanes = self.kernel, self.sizes.lanes
        starts = [kernel.load(self.biases, Lanes((vector + v) * lanes, lanes)) for v in range(vectors)]
        sums = self._tile(rows, starts, self.queries, self.inner * 4, self.keys, vector, self.inner)
        for r in range(rows):
            for v in range(vectors):
                kernel.store(self.scores, Lanes(r * self.padded + (vector + v) * lanes, lanes), sums.value(r, v))

    def _mask(self, query: Scalar, row: Scalar) -> None:
        """Scores of keys that do not count become those of what stands behind the last key."""
        kernel = self.kernel
        for start, width, count in pieces(self.sizes.keys, self.sizes.lanes):
            with kernel.loop(count) as turn:
                at = start + turn * width
                place = Lanes(row * self.padded + at, width)
                position = Lanes(at, width) if width > 1 else at
                score = masked(kernel, self.anchor, kernel.load(self.scores, place), (*self.at, query, position), -MOST_SUM)
                kernel.store(self.scores, place, score)

    def _weigh(self, query: Scalar, row: Scalar) -> None:
        """One row's weights, their sum, and what a sum of values is multiplied by."""
        kernel, lanes, op = self.kernel, self.sizes.lanes, self.anchor.op
        partly = op.causal or len(self.anchor.inputs) == op.arity[1]
        if partly:
            self._mask(query, row)
        top, where = accumulator(kernel, lanes, "int32", constant(-(2**31), "int32", lanes))
        with kernel.loop(self.sizes.key_vectors) as i:
            score = kernel.load(self.scores, Lanes(row * self.padded + i * lanes, lanes))
            kernel.store(top, where, tirx.max(kernel.load(top, where), score))
        most = splat(bind(horizontal(kernel.load(top, where), tirx.max)), lanes)
        total, where = accumulator(kernel, lanes, "int32", constant(0, "int32", lanes))
        table = kernel.buffers[self.anchor.inputs[3]]

        def visit(i: Scalar, partly: bool) -> None:
            place = Lanes(row * self.padded + i * lanes, lanes)
            score = kernel.load(self.scores, place)
            weight = bind(look_up(kernel, table, "uint8", bind(weight_place(op, most - score))))
            if partly:
                weight = bind(tirx.Select(score > full(score, -MOST_SUM), weight, full(weight, 0)))
            kernel.store(total, where, kernel.load(total, where) + cast(weight, "int32"))
            flipped = weight if self.dtype == "uint8" else cast(weight ^ full(weight, 128), "int8")
            kernel.store(self.weights, place, flipped)

        whole, rest = divmod(self.sizes.keys, lanes)
        if whole:
            with kernel.loop(whole) as i:
                visit(i, partly)
        if rest:
            visit(whole, True)
        weights = bind(horizontal(kernel.load(total, where), lambda x, y: x + y))
        kernel.store(self.totals, row, weights)
        kernel.store(self.shares, row, weight_share(op, weights))

    def _mix(self, start: Scalar, rows: int, column: int, vectors: int) -> None:
        """A tile of the result: weights times values, and the region's epilogue."""
        kernel, lanes = self.kernel, self.sizes.lanes
        starts = [kernel.load(self.offsets, Lanes((column + v) * lanes, lanes)) for v in range(vectors)]
        sums = self._tile(rows, starts, self.weights, self.padded, self.values, column, self.steps)
        zero = self.anchor.op.v_zero + _moved(self.anchor.inputs[2].type.dtype, "int8")
        for r in range(rows):
            total = kernel.load(self.totals, r) * constant(zero, "int32")
            for v in range(vectors):
                self._write(sums.registers[r][v], start + r, total, kernel.load(self.shares, r), (column + v) * lanes)

    def _write(self, register: Any, query: Scalar, total: Value, share: Value, column: int) -> None:
        kernel, lanes = self.kernel, self.sizes.lanes
        for first, width, count in pieces(min(lanes, self.sizes.outer - column), lanes):
            for turn in range(count):
                at = first + turn * width
                mixed = kernel.load(register, Lanes(at, width)) - splat(total, width)
                value = bind(cast(mixed, "float32") * splat(share, width))
                position = Lanes(column + at, width) if width > 1 else column + at
                with kernel.scope():
                    kernel.anchors[self.anchor] = lambda _, value=value: value
                    kernel.finish((*self.at, query, position))


_HIGHEST = {"uint8": 128, "int8": -128}


def _moved(dtype: str, to: str) -> int:
    """What flipping the highest bit, from one type of bytes to another, adds to a value."""
    return 0 if dtype == to else 128 if to == "uint8" else -128
