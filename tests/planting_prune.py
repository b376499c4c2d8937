"""Networks with channels that hang together in one way each; every one ends in a layer, so that nothing planted is an output."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from paring.generators import Builder
from paring.ir import Node
from paring.ir.ops import attention, binary, conv, linear, norm, pool, reduce, shape, unary
from paring.testing import Plant


def _image(b: Builder) -> Node:
    return b.tame(b.input(b.choose(1, 1, 2), b.choose(1, 3), b.choose(2, 4, 5), b.choose(2, 4)))


def _width(b: Builder) -> int:
    return b.choose(2, 3, 4, 6, 8)


def _new(b: Builder, x: Node, width: int | None = None) -> Node:
    return b.layer(x, width or _width(b), b.choose(1, 3), bias=b.chance(0.5))


def _end(b: Builder, x: Node, kernel: int | None = None) -> Node:
    return b.layer(x, 3, kernel or b.choose(1, 3), bias=b.chance(0.5), stride=b.choose(1, 2))


def _relu(b: Builder, x: Node) -> Node:
    return b.node(unary.Relu(), x)


def _dense(b: Builder, x: Node, width: int, bias: bool = True) -> Node:
    return b.node(linear.Linear(), b.tame(x), b.weights(width, x.type.shape[-1]), *([b.weights(width)] if bias else []))


def _channel_constant(b: Builder, x: Node) -> Node:
    c = x.type.shape[1]
    return b.node(shape.Broadcast(x.type.shape), b.weights(c, 1, 1))


def two_layers(b: Builder) -> Node:
    ops = (unary.Relu(), unary.Clamp(0.0, 6.0), unary.LeakyRelu(0.5), unary.Abs(), unary.Clamp(-2.0, 2.0))
    return _end(b, b.node(ops[b.choose(*range(len(ops)))], _new(b, _image(b))))


def residual(b: Builder) -> Node:
    x = _relu(b, _new(b, _image(b)))
    for _ in range(b.choose(1, 2)):
        y = _new(b, _relu(b, _new(b, x)), x.type.shape[1])
        x = _relu(b, b.node(binary.Add(), *((y, x) if b.chance(0.5) else (x, y))))
    return _end(b, x)


def concatenated(b: Builder) -> Node:
    """As in a DenseNet: an earlier value beside a later one, both read again."""
    x = _relu(b, _new(b, _image(b)))
    y = b.node(shape.Concat(1), x, _new(b, x))
    z = b.node(shape.Concat(1), y, _new(b, y), *([_channel_constant(b, y)] if b.chance(0.3) else []))
    return _end(b, _relu(b, z))


def shifted(b: Builder) -> Node:
    """A norm that could not be folded, behind a concat: masked channels come to life again."""
    x = _image(b)
    y = b.node(shape.Concat(1), _new(b, x), _new(b, x))
    if b.chance(0.3):
        return _end(b, _relu(b, b.batch_norm(y)), 1)
    y = b.node(binary.Mul(), y, _channel_constant(b, y))
    return _end(b, _relu(b, b.node(binary.Add(), y, _channel_constant(b, y))), b.choose(1, 1, 3))


def revived(b: Builder) -> Node:
    y = b.node(unary.Clamp(1.0, 3.0) if b.exact or b.chance(0.5) else unary.Sigmoid(), _new(b, _image(b)))
    kind = b.choose(0, 1, 2)
    if kind == 0:
        return _end(b, y, 1)
    if kind == 1:
        return _dense(b, b.node(reduce.Max((2, 3)), y), 3, b.chance(0.5))
    return _dense(b, _flat(b, b.node(pool.MaxPool2d((2, 1), (1, 1)), y)), 3)


def split(b: Builder) -> Node:
    y = _relu(b, _new(b, _image(b), b.choose(4, 6, 8)))
    n, c, h, w = y.type.shape
    cut = b.choose(1, 2, c - 1)
    parts = [b.node(shape.Slice((0, a, 0, 0), (n, e, h, w), (1,) * 4), y) for a, e in ((0, cut), (cut, c))]
    if b.chance(0.5):
        return _end(b, b.node(shape.Concat(1), *parts[::-1]))
    return b.node(binary.Add(), *(b.layer(part, 3, 1) for part in parts))


def gated_halves(b: Builder) -> Node:
    """The first half of the channels times the second."""
    y = _new(b, _image(b), b.choose(4, 6, 8))
    n, c, h, w = y.type.shape
    left, right = (b.node(shape.Slice((0, a, 0, 0), (n, a + c // 2, h, w), (1,) * 4), y) for a in (0, c // 2))
    return _end(b, b.node(binary.Mul(), _relu(b, b.tame(left)), b.tame(right)))


def grouped(b: Builder) -> Node:
    groups = b.choose(2, 3, 4)
    x = _relu(b, _new(b, _image(b), groups * b.choose(1, 2)))
    y = b.layer(x, groups * b.choose(1, 2), b.choose(1, 3), groups=groups, bias=b.chance(0.5))
    return _end(b, _relu(b, y))


def depthwise(b: Builder) -> Node:
    x = b.node(unary.Clamp(0.0, 6.0) if b.chance(0.7) else unary.Clamp(1.0, 6.0), _new(b, _image(b)))
    c = x.type.shape[1]
    return _end(b, _relu(b, b.layer(x, c * b.choose(1, 2), 3, groups=c, bias=b.chance(0.5))))


def _flat(b: Builder, x: Node) -> Node:
    return b.node(shape.Reshape((x.type.shape[0], prod(x.type.shape[1:]))), x)


def flattened(b: Builder) -> Node:
    y = b.node(pool.MaxPool2d((2, 2), (1, 1), (1, 1)), _relu(b, _new(b, _image(b))))
    return _dense(b, _relu(b, _dense(b, _flat(b, y), b.choose(4, 8))), 3)


def averaged(b: Builder) -> Node:
    y = _relu(b, _new(b, b.input(1, 3, 4, 4)))
    kind = b.choose(0, 1, 2)
    if kind == 0:
        y = b.node(reduce.Mean((2, 3), b.chance(0.5)), y)
    elif kind == 1:
        y = b.node(pool.AvgPool2d((2, 2), (2, 2), (1, 1)), y)
    else:
        y = b.node(pool.AdaptiveAvgPool2d((2, 2)), y)
    return _dense(b, _flat(b, y) if y.type.rank == 4 else y, 3)


def padded(b: Builder) -> Node:
    y = _relu(b, _new(b, _image(b)))
    around = ((0, 0), (0, b.choose(0, 0, 2)), (1, 0), (0, 2))
    mode = ("constant", "replicate")[b.choose(0, 0, 1)]
    return _end(b, b.node(shape.Pad(around, mode, float(b.choose(0, 0, 2)) if mode == "constant" else 0.0), y), 1)


def turned(b: Builder) -> Node:
    """Channels last, then a layer over them."""
    y = b.node(shape.Transpose((0, 2, 3, 1)), _relu(b, _new(b, _image(b))))
    return _dense(b, b.node(shape.Flip((3,)), y) if b.chance(0.5) else y, 3)


def shuffled(b: Builder) -> Node:
    groups = b.choose(2, 3)
    y = _relu(b, _new(b, _image(b), groups * b.choose(2, 3)))
    n, c, h, w = y.type.shape
    y = b.node(shape.Reshape((n, groups, c // groups, h, w)), y)
    y = b.node(shape.Reshape((n, c, h, w)), b.node(shape.Transpose((0, 2, 1, 3, 4)), y))
    return _end(b, y)


def gate(b: Builder) -> Node:
    y = _relu(b, _new(b, _image(b), b.choose(4, 6)))
    small = b.layer(b.node(reduce.Max((2, 3), True), y), b.choose(2, 4), 1)
    scale = b.layer(_relu(b, small), y.type.shape[1], 1)
    scale = b.node(unary.Clamp(1.0, 2.0) if b.exact else unary.Sigmoid(), scale)
    wide = b.node(shape.Broadcast(y.type.shape), scale)
    return _end(b, b.node(binary.Mul(), *((y, wide) if b.chance(0.5) else (wide, y))))


def one_gate_for_all(b: Builder) -> Node:
    """A map that is the same for all channels, as spatial attention has it."""
    y = _relu(b, _new(b, _image(b)))
    scale = b.node(unary.Clamp(0.0, 2.0), b.layer(y, 1, 3))
    return _end(b, b.node(binary.Mul(), y, b.node(shape.Broadcast(y.type.shape), scale)))


def mixed(b: Builder) -> Node:
    """Channels that one operator reads all at once, and others that it does not."""
    y = _relu(b, _new(b, _image(b)))
    top = b.node(shape.Broadcast(y.type.shape), b.node(reduce.Max((1,), True), y))
    return _end(b, b.node(binary.Sub(), top, y))


def with_input(b: Builder) -> Node:
    x = b.input(1, 3, b.choose(2, 4), 4)
    y = b.node(binary.Add(), x, _new(b, _relu(b, _new(b, x)), x.type.shape[1]))
    return _end(b, y)


def tokens(b: Builder) -> Node:
    """A constant token beside those of an image, constants for each place, then one row taken."""
    y = _new(b, _image(b), b.choose(4, 6))
    n, c, h, w = y.type.shape
    y = b.node(shape.Transpose((0, 2, 1)), b.node(shape.Reshape((n, c, h * w)), y))
    first = b.node(shape.Broadcast((n, 1, c)), b.weights(1, c))
    y = b.node(shape.Concat(1), first, y) if b.chance(0.5) else y
    if b.chance(0.3):
        y = b.node(binary.Add(), y, b.node(shape.Broadcast(y.type.shape), b.weights(*y.type.shape[1:])))
    row = b.node(shape.Slice((0, y.type.shape[1] - 1, 0), y.type.shape, (1, 1, 1)), y)
    return _dense(b, row, 3)


def _heads(b: Builder, x: Node, count: int, size: int, bias: bool) -> Node:
    y = b.node(shape.Reshape((*x.type.shape[:2], count, size)), _dense(b, x, count * size, bias))
    return b.node(shape.Transpose((0, 2, 1, 3)), y)


def _for_queries(b: Builder, y: Node, repeat: int) -> Node:
    n, count, length, size = y.type.shape
    y = b.node(shape.Broadcast((n, count, repeat, length, size)), b.node(shape.Reshape((n, count, 1, length, size)), y))
    return b.node(shape.Reshape((n, count * repeat, length, size)), y)


def _rotated(b: Builder, y: Node) -> Node:
    """Rotary positions: each half of a head with the other."""
    *lead, size = y.type.shape
    starts = (0,) * len(lead)
    left, right = (b.node(shape.Slice((*starts, a), (*lead, a + size // 2), (1,) * 4), y) for a in (0, size // 2))
    turned = b.node(shape.Concat(3), b.node(unary.Neg(), right), left)
    cosine, sine = (b.node(shape.Broadcast(y.type.shape), b.weights(lead[-1], size)) for _ in range(2))
    return b.node(binary.Add(), b.node(binary.Mul(), b.tame(y), cosine), b.node(binary.Mul(), b.tame(turned), sine))


def _attention(repeat: int, rotary: bool) -> Plant:
    def plant(b: Builder) -> Node:
        n, length, width = b.choose(1, 2), b.choose(2, 3), b.choose(3, 4)
        count, size, bias = b.choose(2, 3, 4), 2, b.chance(0.5)
        x = b.input(n, length, width)
        q = _heads(b, x, count * repeat, size, bias)
        k, v = (_heads(b, x, count, size, bias) for _ in range(2))
        if rotary:
            q, k = _rotated(b, q), _rotated(b, k)
        if repeat > 1:
            k, v = (_for_queries(b, y, repeat) for y in (k, v))
        y = b.node(shape.Transpose((0, 2, 1, 3)), _attend(b, *map(b.tame, (q, k, v))))
        return _dense(b, b.node(shape.Reshape((n, length, count * repeat * size)), y), width, b.chance(0.5))

    return plant


def _attend(b: Builder, q: Node, k: Node, v: Node) -> Node:
    """Exact sums allow no softmax: a clamp takes its place."""
    scores = (*q.type.shape[:3], k.type.shape[2])
    if not b.exact and b.chance(0.6):
        mask = [b.node(shape.Broadcast(scores), b.weights(*scores[2:]))] if b.chance(0.5) else []
        return b.node(attention.ScaledDotProductAttention(causal=b.chance(0.3)), q, k, v, *mask)
    product = b.node(linear.Matmul(), q, b.node(shape.Transpose((0, 1, 3, 2)), k))
    product = b.node(binary.Add(), product, b.node(shape.Broadcast(scores), b.weights(*scores[2:])))
    weights = b.node(unary.Clamp(0.0, 2.0) if b.exact else norm.Softmax(3), product)
    return b.node(linear.Matmul(), weights, v)


def feed_forward(b: Builder) -> Node:
    """Gated: one layer's channels times another's."""
    x = b.input(1, b.choose(2, 3), 4)
    hidden = b.choose(4, 6, 8)
    left = b.tame(b.node(unary.Relu() if b.exact else unary.Silu(), _dense(b, x, hidden)))
    return _dense(b, b.node(binary.Mul(), left, b.tame(_dense(b, x, hidden))), 4)


def normalised(b: Builder) -> Node:
    """Norms over channels keep them; group norms lose whole groups. Exact graphs have none."""
    kind, groups = b.choose(0, 1, 2), b.choose(2, 4)
    if b.exact:
        return _end(b, _relu(b, b.batch_norm(_new(b, _image(b)))), 1)
    if kind == 0:
        y = _new(b, _image(b), 2 * groups)
        y = b.node(norm.GroupNorm(groups, 0.1), y, b.weights(2 * groups), b.weights(2 * groups))
        return _end(b, _relu(b, y), b.choose(1, 3))
    y = _dense(b, b.input(2, 3), 6)
    parameters = [b.weights(6), *([b.weights(6)] if kind == 1 else [])]
    return _dense(b, b.node(norm.LayerNorm(0.1) if kind == 1 else norm.RmsNorm(0.1), y, *parameters), 3)


def several_readers(b: Builder) -> Node:
    """A value that layers read in different ways."""
    y = _relu(b, _new(b, _image(b)))
    c = y.type.shape[1]
    wide = b.layer(y, 4, 3)
    deep = b.layer(b.layer(y, c, 3, groups=c), 4, 1)
    return _end(b, b.node(binary.Add(), wide, deep))


def transposed_conv(b: Builder) -> Node:
    """An operator that has no rule here keeps all that it reads."""
    y = _relu(b, _new(b, _image(b), 4))
    return b.node(conv.ConvTranspose2d(), y, b.weights(4, 2, 2, 2))


def pixels_from_channels(b: Builder) -> Node:
    """A pixel shuffle: what was channels lies side by side in rows and columns, and goes together."""
    x = _new(b, _image(b), 4 * b.choose(2, 3, 4))
    y = b.node(unary.Clamp(-2.0, 2.0), x) if b.chance(0.5) else b.node(binary.Add(), x, _channel_constant(b, x))
    n, c, h, w = y.type.shape
    apart = b.node(shape.Reshape((n, c // 4, 2, 2, h, w)), y)
    beside = b.node(shape.Transpose((0, 1, 4, 2, 5, 3)), apart)
    return _end(b, b.node(shape.Reshape((n, c // 4, 2 * h, 2 * w)), beside), 1)


PRUNE_PLANTERS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        *(two_layers, residual, concatenated, shifted, revived, split, gated_halves, grouped, depthwise, flattened, averaged),
        *(padded, turned, shuffled, gate, one_gate_for_all, tokens, feed_forward, normalised, several_readers),
        pixels_from_channels,
    )
}
PRUNE_PLANTERS |= {
    "attention": _attention(1, False),
    "rotary_attention": _attention(1, True),
    "grouped_query_attention": _attention(2, False),
    "rotary_grouped_query_attention": _attention(2, True),
}
"""Each has channels that can go, most of the time."""

KEPT_PLANTERS: dict[str, Callable[[Builder], Node]] = {f.__name__: f for f in (mixed, with_input, transposed_conv)}
"""Some channels of each have to stay."""
