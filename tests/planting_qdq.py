"""Planters of what fold-qdq takes apart: dequantize, float operators, quantize."""

from __future__ import annotations

import numpy as np

from paring.generators import Builder
from paring.ir import Node, Op
from paring.ir.ops import binary, conv, index, linear, norm, pool, quantized, reduce, shape, unary
from paring.ir.ops.quantized import limits
from paring.passes import fold_qdq
from paring.passes.pattern import Rule
from paring.testing import Plant

RULES: tuple[Rule, ...] = fold_qdq.RULES


def steps(b: Builder, *dims: int, dtype: str = "") -> Node:
    """8-bit values of the whole range: inputs are small, so a table spreads them, behind a move that hides the table."""
    dtype = dtype or ("uint8", "int8")[b.choose(0, 1)]
    low, high = limits(dtype)
    table = b.const(b.rng.integers(low, high + 1, 256).astype(dtype))
    return Node(shape.Flip((0,)), (Node(quantized.Lookup(), (b.input(*dims, dtype="uint8"), table)),))


def scale(b: Builder, *, least: int = -4, most: int = 0) -> float:
    """A power of two where sums must be exact."""
    power = 2.0 ** b.choose(*range(least, most + 1))
    return power if b.exact else float(np.float32(power * b.rng.uniform(0.7, 1.4)))


def real(b: Builder, *dims: int, of: float = 0.0) -> Node:
    q = steps(b, *dims)
    low, high = limits(q.type.dtype)
    return known(b, Node(quantized.Dequantize(of or scale(b), int(b.rng.integers(low, high + 1))), (q,)))


def known(b: Builder, node: Node) -> Node:
    """A dequantize with its bounds, which later steps of the network go by."""
    step = node.op.scale if isinstance(node.op, quantized.Dequantize) else 2.0**-12
    b.bounds[node] = (256.0 * step, step) if b.exact else (1.0, 1.0)
    return node


def quantize(b: Builder, x: Node, of: float = 0.0) -> Node:
    dtype = ("uint8", "int8")[b.choose(0, 1)]
    low, high = limits(dtype)
    narrow = (low + 3, high - 5) if b.chance(0.3) else (None, None)
    return Node(quantized.Quantize(int(b.rng.integers(low, high + 1)), dtype, *narrow, of or scale(b)), (x,))


def weights(b: Builder, *dims: int) -> Node:
    """int8 weights: one scale in all, or one for each output, an output of zeros among them."""
    values = b.rng.integers(-127, 128, dims).astype(np.int8)
    if b.chance(0.3):
        return Node(quantized.Dequantize(scale(b)), (b.const(values),))
    values[0] = 0 if b.chance(0.3) else values[0]
    scales = np.array([0.0 if b.chance(0.1) else scale(b) for _ in range(dims[0])], np.float32)
    return Node(quantized.DequantizeChannels(0), (b.const(values), b.const(scales)))


def bias(b: Builder, size: int) -> list[Node]:
    kind = b.choose(0, 1, 2)
    if kind == 2:
        return [Node(quantized.Dequantize(2.0**-6), (b.const(b.rng.integers(-999, 999, size).astype(np.int32)),))]
    return [b.const((b.rng.standard_normal(size) * 3).astype(np.float32))] * kind


def sums(b: Builder, *dims: int) -> Node:
    """A descale of int32 sums, its constants along dimension 1 where there is one."""
    q = Node(unary.Cast("int32"), (steps(b, *dims),))
    column = (dims[1], *(1,) * (len(dims) - 2)) if len(dims) > 1 and b.chance(0.7) else ()
    factor = np.array(b.rng.choice([0.25, 0.5, -1.0, 2.0] if b.exact else b.rng.uniform(-2, 2, 9), column), np.float32)
    shift = np.array(b.rng.integers(-20, 20, column), np.float32)
    operands = [Node(shape.Broadcast(dims), (b.const(value),)) for value in (factor, shift)]
    return Node(quantized.Descale(), (q, *operands))


def _image(b: Builder) -> tuple[int, int, int, int]:
    return b.choose(1, 2), b.choose(1, 2, 4), b.choose(3, 5), b.choose(3, 4)


def layer_on_integers(b: Builder) -> Node:
    n, c, h, w = _image(b)
    if b.chance(0.3):
        x = real(b, n, h, c)
        y = Node(linear.Linear(), (x, weights(b, 3, c), *bias(b, 3)))
    else:
        x, groups = real(b, n, c, h, w), c if b.chance(0.3) else 1
        op = conv.Conv2d((b.choose(1, 2), 1), ((1, 0), (b.choose(0, 1), 1)), groups=groups)
        out = groups * b.choose(1, 2)
        y = Node(op, (x, weights(b, out, c // groups, b.choose(1, 2, 3), 2), *bias(b, out)))
    return known(b, y)


def matmul_on_integers(b: Builder) -> Node:
    k = b.choose(1, 3)
    return known(b, Node(linear.Matmul(), (real(b, 2, 3, k), real(b, 2, k, 4))))


def mean_on_integers(b: Builder) -> Node:
    x, axes = real(b, *_image(b)), ((2, 3), (1,), (0, 2))[b.choose(0, 1, 2)]
    return known(b, Node((reduce.Mean if b.chance(0.7) else reduce.Sum)(axes, b.chance(0.5)), (x,)))


def average_to_conv(b: Builder) -> Node:
    kernel, stride = (b.choose(1, 2, 3), b.choose(2, 3)), (b.choose(1, 2), 1)
    padding = (0 if kernel[0] < 2 else b.choose(0, 1), 1)
    return known(b, Node(pool.AvgPool2d(kernel, stride, padding, count_include_pad=b.chance(0.9)), (real(b, *_image(b)),)))


def narrow_range(b: Builder) -> Node:
    x = sums(b, *_image(b)) if b.chance(0.7) else b.node(unary.Relu(), b.tensor(2, 3))
    ops = (unary.Relu(), unary.Clamp(0.0, 6.0), unary.Clamp(-3.0, 2.5), unary.Clamp(low=1.0), unary.Clamp(5.0, 5.0))
    return quantize(b, Node(ops[b.choose(0, 0, 1, 2, 3, 4)], (x,)))


def joined(b: Builder) -> Node:
    """Parts with scales and zero points of their own, moved as a shuffle of channels moves them."""
    (n, _, h, w), size, dtype = _image(b), b.choose(1, 2), ("uint8", "int8")[b.choose(0, 1)]
    parts = [Node(quantized.Dequantize(scale(b), b.choose(0, 3, 100)), (steps(b, n, size, h, w, dtype=dtype),)) for _ in range(2)]
    if b.chance(0.3):
        parts[0] = sums(b, n, size, h, w) if b.chance(0.5) else real(b, n, size, h, w)
    if b.chance(0.3):
        parts[0] = Node(shape.Concat(1), (parts[0], Node(quantized.Dequantize(0.5), (steps(b, n, 2 * size, h, w, dtype=dtype),))))
    y = Node(shape.Concat(1), parts)
    c = y.type.shape[1]
    if b.chance(0.6):
        split = Node(shape.Reshape((n, 2, c // 2, h, w)), (y,))
        y = Node(shape.Reshape((n, c, h, w)), (Node(shape.Transpose((0, 2, 1, 3, 4)), (split,)),))
    if b.chance(0.5):
        y = Node(shape.Slice((0, c // 2, 0, 1), (n, c, h, w), (1, 1, 2, 1)), (y,))
    return y


def quantize_affine(b: Builder) -> Node:
    x = joined(b) if b.chance(0.4) else sums(b, *_image(b))
    if b.chance(0.3):
        x = Node(unary.Neg(), (x,))
    if b.chance(0.6):
        ops = (binary.Mul(), binary.Div(), binary.Add(), binary.Sub())
        c = Node(shape.Broadcast(x.type.shape), (b.const(b.rng.choice([-2.0, 0.5, 1.5], (x.type.shape[1], 1, 1)).astype("f4")),))
        x = Node(ops[b.choose(0, 1, 2, 3)], (x, c))
    return quantize(b, x)


def quantize_residual(b: Builder) -> Node:
    dims = _image(b)
    x, r = sums(b, *dims) if b.chance(0.5) else real(b, *dims), real(b, *dims)
    operands = (x, r) if b.chance(0.5) else (r, x)
    return quantize(b, Node(binary.Add() if b.chance(0.6) else binary.Sub(), operands), scale(b, least=-1, most=2))


def quantize_product(b: Builder) -> Node:
    dims = _image(b)
    product = Node(binary.Mul(), (real(b, *dims), real(b, *dims)))
    return quantize(b, product, scale(b, least=0, most=6))


def _chain(*ops: Op) -> Plant:
    """quantize(f(dequantize(x))) of one of these functions, or of none."""

    def plant(b: Builder) -> Node:
        x = real(b, *_image(b))
        zero, step, dtype = x.op.zero_point, x.op.scale, x.inputs[0].type.dtype
        op = ops[int(b.rng.integers(len(ops)))] if ops else None
        y = Node(op, (x,)) if op else x
        return Node(quantized.Quantize(zero, dtype, scale=step), (y,)) if b.chance(0.6) else quantize(b, y)

    return plant


def keep_steps(b: Builder) -> Node:
    x = real(b, *_image(b))
    same = quantized.Quantize(x.op.zero_point, x.inputs[0].type.dtype, scale=x.op.scale)
    near = quantized.Quantize(limits(same.dtype)[0], same.dtype, scale=x.op.scale)
    return Node(same if b.chance(0.8) else near, (Node(unary.Neg(), (Node(unary.Neg(), (x,)),)) if b.chance(0.3) else x,))


def look_up(b: Builder) -> Node:
    x = real(b, *_image(b), of=scale(b, least=-5, most=-3))
    kind = b.choose(0, 1, 2, 3)
    if kind == 0:
        inner = Node(unary.HardSigmoid(), (x,))
        return quantize(b, Node(binary.Mul(), (x, inner)))
    if kind == 3:
        table = b.const(b.rng.integers(0, 256, 256).astype(np.uint8))
        gate = Node(quantized.Dequantize(2.0**-8), (Node(quantized.Lookup(), (x.inputs[0], table)),))
        return quantize(b, Node(binary.Mul(), (x, gate)), 2.0**-4)
    half = Node(shape.Broadcast(x.type.shape), (b.const(np.array(0.5, np.float32)),))
    y = Node(unary.Sigmoid(), (x,)) if kind == 1 else Node(binary.Sub(), (half, Node(unary.Abs(), (x,))))
    return quantize(b, y, 2.0**-7)


def clamp_integers(b: Builder) -> Node:
    x = real(b, *_image(b), of=0.25 if b.exact else float(np.float32(0.1)))
    ops = (unary.Relu(), unary.Clamp(0.0, 6.0), unary.Clamp(-2.0, 2.5), unary.Clamp(high=1.0), unary.Clamp(low=0.3))
    return known_as(b, x, Node(ops[b.choose(0, 0, 1, 2, 3, 4)], (x,)))


def known_as(b: Builder, x: Node, node: Node) -> Node:
    b.bounds[node] = b.bounds[x]
    return node


def move_integers(b: Builder) -> Node:
    x = real(b, 2, 4, 3, 2)
    where = b.const(b.rng.integers(0, 4, 3))
    options: tuple[tuple[Op, tuple[Node, ...]], ...] = (
        (shape.Reshape((4, 12)), ()),
        (shape.Transpose((0, 2, 3, 1)), ()),
        (shape.Slice((0, 1, 0, 0), (1, 4, 3, 2), (1, 2, 1, 1)), ()),
        (shape.Flip((1, 2)), ()),
        (shape.Roll((1,), (2,)), ()),
        (shape.Broadcast((3, 2, 4, 3, 2)), ()),
        (shape.PixelShuffle(2), ()),
        (reduce.Max((1,)), ()),
        (reduce.Min((2, 3), True), ()),
        (index.Gather(1), (where,)),
    )
    op, others = options[int(b.rng.integers(len(options)))]
    return known_as(b, x, Node(op, (x, *others)))


def pad_integers(b: Builder) -> Node:
    x = real(b, *_image(b))
    mode = ("constant", "replicate")[b.choose(0, 0, 1)]
    value = float(np.float32(b.choose(-1, 0, 0, 1) * x.op.scale)) if mode == "constant" else 0.0
    if b.chance(0.1):
        value = 1000.0
    y = Node(shape.Pad(((0, 0), (0, 1), (2, 0), (1, 1)), mode, value), (x,))
    b.bounds[y] = (1024.0, b.bounds[x][1])
    return y


def concat_integers(b: Builder) -> Node:
    n, c, h, w = _image(b)
    op, dtype = quantized.Dequantize(scale(b), b.choose(0, 3, 100)), ("uint8", "int8")[b.choose(0, 1)]
    parts = [Node(op, (steps(b, n, size, h, w, dtype=dtype),)) for size in (c, 2, 1)]
    if b.chance(0.1):
        parts[1] = Node(quantized.Dequantize(op.scale, op.zero_point + 1), parts[1].inputs)
    return known_as(b, known(b, parts[0]), Node(shape.Concat(1), parts))


def pool_integers(b: Builder) -> Node:
    x = real(b, *_image(b))
    op = pool.MaxPool2d((3, 2), (b.choose(1, 2), 1), (b.choose(0, 1), 1), (b.choose(1, 1, 1, 2), 1), b.chance(0.3))
    return known_as(b, x, Node(op, (x,)) if op.dilation[0] == 1 or x.type.shape[2] > 4 else Node(unary.Neg(), (x,)))


def move_channels(b: Builder) -> Node:
    axis = b.choose(0, 1)
    size = (6, 4)[axis]
    scales = np.array([scale(b) for _ in range(size)], np.float32)
    x = Node(quantized.DequantizeChannels(axis), (steps(b, 6, 4, dtype="int8"), b.const(scales)))
    ops: tuple[Op, ...] = (
        shape.Transpose((1, 0)),
        shape.Slice((1, 2), (5, 4), (2, 1)),
        shape.Reshape((1, 6, 4)),
        shape.Reshape((2, 3, 4)),
    )
    y = Node(ops[b.choose(0, 0, 1, 1, 2, 3)], (x,))
    b.bounds[y] = (256.0, 2.0**-4)
    return y


def quantize_before_move(b: Builder) -> Node:
    x = b.tensor(2, 3)
    ops: tuple[Op, ...] = (
        shape.Reshape(x.type.shape[::-1]),
        shape.Transpose(tuple(range(x.type.rank))[::-1]),
        shape.Broadcast((2, *x.type.shape)),
    )
    return quantize(b, Node(ops[b.choose(0, 1, 2)], (x,)))


def quantize_parts(b: Builder) -> Node:
    n, c, h, w = _image(b)
    other = sums(b, n, 2, h, w) if b.chance(0.5) else b.input(n, 2, h, w)
    return quantize(b, Node(shape.Concat(1), (real(b, n, c, h, w), other)))


def quantize_before_pool(b: Builder) -> Node:
    x = sums(b, *_image(b))
    return quantize(b, Node(pool.MaxPool2d((2, 3), (1, 2), (b.choose(0, 1), 1)), (x,)))


def softmax_on_integers(b: Builder) -> Node:
    x = real(b, *_image(b), of=scale(b, least=-6, most=-3))
    return quantize(b, Node(norm.Softmax(b.choose(1, 2, 3)), (x,)), 2.0 ** -b.choose(7, 8))


def layer_norm_on_integers(b: Builder) -> Node:
    width = b.choose(3, 8)
    x, dims = real(b, 2, 3, width), (width,) if b.chance(0.7) else (3, width)
    parameters = [b.const(b.rng.uniform(-2, 2, dims).astype(np.float32)) for _ in range(2)]
    return quantize(
        b, Node(norm.LayerNorm(float(b.rng.choice([1e-6, 1e-5, 0.1]))), (x, *parameters)), scale(b, least=-6, most=-4)
    )


def clamp_rounding(b: Builder) -> Node:
    kind, dims = b.choose(0, 1, 2), _image(b)
    if kind == 0:
        x = quantize(b, b.tensor(2, 3))
    elif kind == 1:
        total = sums(b, *dims)
        x = Node(quantized.Requantize(9, "int8", -120, 100), total.inputs)
    else:
        x = Node(quantized.QuantizedMul(x_zero=3, scale=2.0**-6), (steps(b, *dims, dtype="uint8"), steps(b, *dims)))
    bounds = ((3.0, 90.0), (-np.inf, 70.0), (50.0, np.inf), (110.0, 120.0))
    return Node(unary.Clamp(*bounds[b.choose(0, 1, 2, 3)]), (x,))


PLANTERS: dict[str, tuple[Plant, ...]] = {
    "layer-on-integers": (layer_on_integers,),
    "matmul-on-integers": (matmul_on_integers,),
    "mean-on-integers": (mean_on_integers,),
    "average-to-conv": (average_to_conv,),
    "softmax-on-integers": (softmax_on_integers,),
    "layer-norm-on-integers": (layer_norm_on_integers,),
    "narrow-range": (narrow_range,),
    "quantize-affine": (quantize_affine,),
    "quantize-residual": (quantize_residual,),
    "quantize-product": (quantize_product,),
    "clamp-rounding": (clamp_rounding,),
    "clamp-integers": (clamp_integers,),
    "keep-steps": (keep_steps,),
    "clamp-steps": (_chain(unary.Relu(), unary.Clamp(-3.0, 0.3), unary.Clamp(low=-0.7)),),
    "change-steps": (_chain(unary.Relu(), unary.Clamp(-3.0, 2.5)),),
    "look-up": (look_up,),
    "move-integers": (move_integers,),
    "pad-integers": (pad_integers,),
    "concat-integers": (concat_integers,),
    "pool-integers": (pool_integers,),
    "move-channels": (move_channels,),
    "quantize-before-move": (quantize_before_move,),
    "quantize-parts": (quantize_parts,),
    "quantize-before-pool": (quantize_before_pool,),
}
