"""Random networks in Q/DQ form: what is computed is rounded to 8 bits before it is read, as quantizers leave it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod

import numpy as np

from paring.ir import Const, Graph, Input, Node, Op
from paring.ir.errors import IRTypeError
from paring.ir.interpreter import evaluate
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, norm, pool, quantized, reduce, shape, unary
from paring.ir.ops.attention import IntegerAttention

TABLES: tuple[Op, ...] = (unary.HardSwish(), unary.Gelu(), unary.Silu(), unary.Tanh(), unary.Abs(), unary.LeakyRelu(0.1))

# Elements of an image that further steps read.
LARGEST = 6000


def f32(value: float) -> float:
    return float(np.float32(value))


@dataclass
class Quantizing:
    """Builds one network: `pool` holds dequantized images, each with its greatest value on the way it was measured."""

    rng: np.random.Generator
    dtype: str
    x: Node = field(init=False)
    given: Array = field(init=False)
    values: dict[Node, Array] = field(default_factory=dict)
    images: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        n, c, h, w = self.choose(1, 2), self.choose(3, 4, 8, 17), self.choose(4, 7, 9), self.choose(5, 8)
        self.x = Node(Input("x", "float32", (n, c, h, w)))
        self.given = self.rng.standard_normal((n, c, h, w)).astype(np.float32)
        self.values[self.x] = self.given
        self.images.append(self.rounded(self.x))

    def choose(self, *options: int) -> int:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def const(self, array: Array) -> Node:
        return Node(Const(array))

    def value(self, node: Node) -> Array:
        """What a node is on the given input."""
        for below in Graph((self.x,), (node,)).nodes():
            if below not in self.values:
                self.values[below] = evaluate(below, [self.values[operand] for operand in below.inputs])
        return self.values[node]

    def rounded(self, x: Node) -> Node:
        """dequantize(quantize(x)) with a range that x was seen to have, or nearly."""
        seen = self.value(x)
        low, high = min(0.0, float(seen.min(initial=0))), max(0.0, float(seen.max(initial=0)))
        least, most = quantized.limits(self.dtype)
        step = f32(max(high - low, 1e-3) / 255 * self.rng.uniform(0.8, 1.1))
        zero = int(np.clip(round(least - low / step), least, most))
        q = Node(quantized.Quantize(zero, self.dtype, scale=step), (x,))
        return Node(quantized.Dequantize(step, zero), (q,))

    def weight(self, *dims: int) -> Node:
        q = self.const(self.rng.integers(-127, 128, dims).astype(np.int8))
        step = 0.02 / prod(dims[1:]) ** 0.5
        if self.chance(0.2):
            return Node(quantized.Dequantize(f32(step)), (q,))
        return Node(quantized.DequantizeChannels(0), (q, self.const(np.float32(self.rng.uniform(0.3, 1, dims[0]) * step))))

    def bias(self, size: int) -> list[Node]:
        return [self.const(np.float32(self.rng.standard_normal(size) * 0.2))] if self.chance(0.7) else []

    def image(self) -> Node:
        return self.images[-1] if self.chance(0.6) else self.images[int(self.rng.integers(len(self.images)))]

    def node(self, op: Op, *inputs: Node) -> Node:
        return Node(op, inputs)

    def activated(self, x: Node) -> Node:
        kind = self.choose(0, 1, 2)
        return self.node((unary.Relu(), unary.Clamp(0.0, 6.0))[kind], x) if kind < 2 else x


def layer(b: Quantizing) -> Node:
    x = b.image()
    c, kernel = x.type.shape[1], b.choose(1, 1, 2, 3)
    groups = c if b.chance(0.3) else 1
    out = c if groups > 1 else b.choose(1, 3, 8, 16, 20)
    pad = (kernel - 1) // 2
    op = conv.Conv2d((b.choose(1, 1, 2), 1), ((pad, kernel - 1 - pad), (pad, pad + 1)), groups=groups)
    return b.activated(b.node(op, x, b.weight(out, c // groups, kernel, kernel), *b.bias(out)))


def window(b: Quantizing) -> Node:
    """A 3x3 convolution between images of 16 to 40 channels that keeps their size, as Winograd's way computes it."""
    x = b.image()
    n, _, h, w = x.type.shape
    rows, columns = max(h, b.choose(7, 11, 14, 17)), max(w, b.choose(6, 9, 13))
    inner = b.choose(16, 20, 32, 40)
    out = b.choose(*(c for c in (16, 20, 32, 40) if n * c * rows * columns <= LARGEST or c == 16))
    op = conv.Conv2d(padding=((0, rows - h), (columns - w, 0)))
    wide = b.rounded(b.activated(b.node(op, x, b.weight(inner, x.type.shape[1], 1, 1), *b.bias(inner))))
    return b.activated(b.node(conv.Conv2d(padding=((1, 1), (1, 1))), wide, b.weight(out, inner, 3, 3), *b.bias(out)))


def residual(b: Quantizing) -> Node:
    x = b.image()
    c = x.type.shape[1]
    y = b.node(conv.Conv2d(), x, b.weight(c, c, 1, 1), *b.bias(c))
    y = y if b.chance(0.5) else b.rounded(y)
    op = binary.Add() if b.chance(0.8) else binary.Sub()
    return b.activated(b.node(op, *((y, x) if b.chance(0.5) else (x, y))))


def gate(b: Quantizing) -> Node:
    x = b.image()
    mean = b.rounded(b.node(reduce.Mean((2, 3), True), x))
    c = x.type.shape[1]
    share = b.rounded(b.node(conv.Conv2d(), mean, b.weight(c, c, 1, 1), *b.bias(c)))
    share = b.rounded(b.node(unary.HardSigmoid() if b.chance(0.5) else unary.Sigmoid(), share))
    return b.node(binary.Mul(), x, b.node(shape.Broadcast(x.type.shape), share))


def table(b: Quantizing) -> Node:
    x = b.image()
    op = TABLES[int(b.rng.integers(len(TABLES)))]
    return b.node(op, x) if b.chance(0.7) else b.node(binary.Mul(), x, b.node(unary.Sigmoid(), x))


def pooling(b: Quantizing) -> Node:
    x = b.image()
    if b.chance(0.5):
        return b.node(pool.MaxPool2d((2, 3), (b.choose(1, 2), 1), (b.choose(0, 1), 1)), x)
    return b.node(pool.AvgPool2d((2, 2), (1, b.choose(1, 2)), (b.choose(0, 1), 0)), x)


def moving(b: Quantizing) -> Node:
    x = b.image()
    n, c, h, w = x.type.shape
    kind = b.choose(0, 1, 2, 3, 4)
    if kind == 4:
        return shuffled(b, x, b.rounded(b.node(unary.Relu(), b.node(unary.Neg(), x))))
    if kind == 0:
        return b.node(shape.Concat(1), x, b.rounded(b.node(unary.Neg(), x)) if b.chance(0.5) else x)
    if kind == 1:
        return b.node(shape.Slice((0, c // 3, 0, 0), (n, c, h, w), (1, 1, 1, 1)), x)
    if kind == 2:
        return b.node(shape.Pad(((0, 0), (0, 0), (1, 0), (0, 2))), x)
    return b.node(shape.Transpose((0, 1, 3, 2)), x)


def shuffled(b: Quantizing, x: Node, y: Node) -> Node:
    """Half of the channels of two images with scales of their own, in turns."""
    n, c, h, w = x.type.shape
    pairs = b.node(shape.Transpose((0, 2, 1, 3, 4)), b.node(shape.Reshape((n, 2, c, h, w)), b.node(shape.Concat(1), x, y)))
    both = b.node(shape.Reshape((n, 2 * c, h, w)), pairs)
    first = b.choose(0, c)
    return b.node(shape.Slice((0, first, 0, 0), (n, first + c, h, w), (1, 1, 1, 1)), both)


def attention(b: Quantizing) -> Node:
    x = b.image()
    n, c, h, w = x.type.shape
    tokens = b.node(shape.Transpose((0, 2, 1)), b.node(shape.Reshape((n, c, h * w)), x))
    if b.chance(0.6):
        gain, shift = (b.const(np.float32(b.rng.uniform(-1, 1, c))) for _ in range(2))
        tokens = b.rounded(b.node(norm.LayerNorm(), tokens, gain, shift))
    y = b.rounded(b.node(linear.Linear(), tokens, b.weight(c, c), *b.bias(c)))
    scores = b.rounded(b.node(linear.Matmul(), y, b.node(shape.Transpose((0, 2, 1)), tokens)))
    shares = b.rounded(b.node(norm.Softmax(2), scores))
    mixed = b.node(linear.Matmul(), shares, tokens)
    return b.node(shape.Reshape((n, c, h, w)), b.node(shape.Transpose((0, 2, 1)), mixed))


def heads(b: Quantizing) -> Node:
    x = b.image()
    n, c, h, w = x.type.shape
    tokens = b.node(shape.Reshape((n, c, 1, h * w)), x)
    split = b.node(shape.Transpose((0, 2, 3, 1)), tokens)
    q, k, v = (b.rounded(y).inputs[0] for y in (split, b.node(unary.Tanh(), split) if b.chance(0.5) else split, split))
    zeros = [y.op.zero_point for y in (q, v) if isinstance(y.op, quantized.Quantize)]
    table = b.const(np.rint(255 * np.exp(-np.arange(256) / b.rng.uniform(30, 60))).astype(np.uint8))
    op = IntegerAttention(*zeros, f32(b.rng.uniform(0.1, 1) / c**0.5 / 100), f32(0.02), b.chance(0.3))
    mixed = b.node(op, q, k, v, table)
    return b.node(shape.Reshape((n, c, h, w)), b.node(shape.Transpose((0, 3, 1, 2)), mixed))


STEPS: tuple[tuple[Callable[[Quantizing], Node], float], ...] = (
    *((step, 3.0) for step in (layer, residual)),
    *((step, 1.0) for step in (gate, table, pooling, moving)),
    *((step, 0.5) for step in (window, attention, heads)),
)


def quantized_graph(rng: np.random.Generator, size: int = 6) -> tuple[Graph, Array]:
    """A network of about `size` steps, and an input whose values the ranges were made for."""
    b = Quantizing(rng, ("uint8", "int8")[int(rng.integers(2))])
    weights = np.array([weight for _, weight in STEPS])
    for _ in range(size):
        step = STEPS[int(rng.choice(len(STEPS), p=weights / weights.sum()))][0]
        # An image may have become too small for a kernel.
        with suppress(IRTypeError):
            y = step(b)
            if 0 < y.type.size <= LARGEST:
                b.images.append(b.rounded(y))
    last = b.images[-1]
    if b.chance(0.5):
        flat = b.node(shape.Reshape((last.type.shape[0], prod(last.type.shape[1:]))), last)
        last = b.node(linear.Linear(), flat, b.weight(5, flat.type.shape[1]), *b.bias(5))
    return Graph((b.x,), (last, b.images[int(rng.integers(len(b.images)))])), b.given


def together(graphs: Sequence[Graph]) -> Graph:
    """One graph of many: their inputs and outputs one after the other, so that one library has them all."""
    new: dict[Node, Node] = {}
    for graph in graphs:
        for node in graph.nodes():
            if isinstance(node.op, Input):
                new[node] = Node(Input(f"x{len(new)}", node.type.dtype, node.type.shape))
            else:
                new[node] = node.with_inputs(tuple(new[i] for i in node.inputs))
    inputs = tuple(new[n] for graph in graphs for n in graph.inputs)
    return Graph(inputs, tuple(new[n] for graph in graphs for n in graph.outputs))
