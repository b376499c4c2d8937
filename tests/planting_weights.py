"""Builders of what the passes that pack, scale, thin out and transform constant weights look for."""

from __future__ import annotations

import numpy as np

from paring.generators import Builder
from paring.ir import Node
from paring.ir import layout as lay
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, pack, quantized, shape, unary
from paring.passes import prepack, scale_weights, sparsify, winograd
from paring.passes.pattern import Rule
from paring.passes.util import const_value
from paring.testing import Plant

BLOCK, GROUP = 4, 2
# How often a layer is on 8 bits.
ON_BYTES = 0.3
# Products of 16 bits cost nothing: any layer pays.
WINOGRAD = winograd.Winograd(BLOCK, BLOCK, ratio=1000.0, far=0.0)
ROWS, VECTORS = (sparsify.Sparsify(BLOCK, BLOCK, GROUP, format=name) for name in ("rows", "vectors"))

RULES: dict[str, tuple[Rule, ...]] = {
    f"prepack{{block={BLOCK}}}": tuple(prepack.Prepack(BLOCK).rules()),
    "scale-weights": scale_weights.RULES,
    **{str(thinned): tuple(thinned.rules()) for thinned in (ROWS, VECTORS)},
    str(WINOGRAD): tuple(WINOGRAD.rules()),
}


def fold_packing(b: Builder) -> Node:
    out, per_group, kernel = b.choose(3, 4, 6), b.choose(1, 4, 5), b.choose(1, 2)
    kind = b.choose(0, 1, 2)
    if kind == 0:
        return b.node(pack.PackConvWeight(f"OIHW{BLOCK}i{BLOCK}o"), b.weights(out, per_group, kernel, kernel))
    if kind == 1:
        return b.node(pack.PackLinearWeight(f"OI{BLOCK}o"), b.weights(out, per_group))
    return b.node(shape.Pad(((0, 2),)), b.weights(out))


def pack_linear(b: Builder) -> Node:
    x = b.tensor(1, 2, 3)
    out = b.choose(1, 4, 6)
    return b.node(linear.Linear(), x, b.weights(out, x.type.shape[-1]), *([b.weights(out)] if b.chance(0.5) else []))


def _gate_to_weights(bias: bool) -> Plant:
    def plant(b: Builder) -> Node:
        channels = 2 * BLOCK
        x = b.input(1, 2, b.choose(7, 8), b.choose(6, 9), BLOCK)
        kernel = b.choose(1, 3)
        gate = b.input(1, 2, 1, 1, BLOCK)
        gate = gate if b.chance(0.2) else b.node(unary.Clamp(-2.0, 2.0), gate)
        gated = b.node(binary.Mul(), *((x, b.node(shape.Broadcast(x.type.shape), gate))[:: b.choose(1, -1)]))
        blocks = f"OIHW{BLOCK}i{BLOCK}o"
        weight = b.node(pack.PackConvWeight(blocks), b.weights(BLOCK, channels, kernel, kernel))
        pad = (kernel // 2, kernel // 2)
        op = conv.Conv2d(padding=(pad, pad), layout=f"NCHW{BLOCK}c", out_layout=f"NCHW{BLOCK}c", weight_layout=blocks)
        return b.node(op, gated, weight, *([b.weights(BLOCK)] if bias else []))

    return plant


def thin(b: Builder, *dims: int) -> Array:
    """A weight with zeros: scattered ones, whole inputs, whole outputs, blocks of outputs at one input, or nothing else."""
    out, inputs = dims[:2]
    scattered = b.rng.random(dims) < 0.5
    by_input = np.broadcast_to((b.rng.random(inputs) < 0.5).reshape(1, inputs, *(1,) * (len(dims) - 2)), dims)
    by_output = np.broadcast_to((b.rng.random(out) < 0.5).reshape(out, *(1,) * (len(dims) - 1)), dims)
    blocks = np.repeat(b.rng.random((-(-out // BLOCK), *dims[1:])) < 0.5, BLOCK, 0)[:out]
    by_group = np.repeat(blocks[:, ::GROUP], GROUP, 1)[:, :inputs]
    masks = (scattered, by_input, by_output, blocks, scattered & blocks, np.zeros(dims, bool), by_group)
    return const_value(b.weights(*dims)) * masks[b.choose(0, 0, 1, 2, 3, 4, 4, 5, 6)].astype("float32")


def thin_conv2d(b: Builder) -> Node:
    """Whole blocks of channels and such that are partly padding, of a blocked image; strides, borders, dilation; bytes."""
    out, inputs, kernel, batch = b.choose(4, 6, 8), b.choose(3, 4, 8, 9), b.choose(1, 1, 2, 3), b.choose(1, 1, 2)
    dtype, sums = dtypes(b)
    inputs += inputs % GROUP if sums == "int32" else 0
    blocks = -(-inputs // BLOCK)
    x = b.input(batch, blocks, b.choose(5, 6), b.choose(5, 7), BLOCK, dtype=dtype)
    layout = f"OIHW{BLOCK // GROUP}i{BLOCK}o{GROUP}i" if sums == "int32" else f"OIHW{BLOCK}i{BLOCK}o"
    weight = packed(b, lay.block_conv_weight(thin(b, out, inputs, kernel, kernel), layout), sums)
    pads, step = ((kernel // 2, 0), (0, kernel // 2)), b.choose(1, 1, 2)
    image = f"NCHW{BLOCK}c"
    partial = (inputs if inputs % BLOCK else 0, out if out % BLOCK else 0)
    fill = b.choose(0, 3) if sums == "int32" else 0
    op = conv.Conv2d((step, 1), pads, (1, b.choose(1, 2)), 1, image, image, layout, *partial, pad_value=fill)
    bias = np.pad(const_value(b.weights(out)), (0, -out % BLOCK)).astype(sums)
    return b.node(op, x, weight, *([b.const(bias)] if b.chance(0.7) else []))


def thin_linear(b: Builder) -> Node:
    out, inputs = b.choose(3, 4, 6, 8), b.choose(4, 5, 8, 10)
    dtype, sums = dtypes(b)
    x = b.input(*((3, inputs), (2, 5, inputs), (inputs,))[b.choose(0, 0, 1, 2)], dtype=dtype)
    layout = f"OI{BLOCK}o{GROUP}i" if sums == "int32" else f"OI{BLOCK}o"
    weight = packed(b, lay.block_linear_weight(thin(b, out, inputs), layout), sums)
    bias = [b.const(const_value(b.weights(out)).astype(sums))] if b.chance(0.7) else []
    return b.node(linear.Linear(layout, out), x, weight, *bias)


def dtypes(b: Builder) -> tuple[str, str]:
    """Of what a layer reads, and of its sums."""
    return (("uint8", "int8")[b.choose(0, 1)], "int32") if b.chance(ON_BYTES) else ("float32", "float32")


def packed(b: Builder, weight: Array, sums: str) -> Node:
    """A packed weight as a constant; the weights of bytes are signed ones (small integers, whatever the lane)."""
    integers = np.clip(np.rint(weight * 4), -8, 8).astype("int8") if sums == "int32" else weight
    return b.const(np.ascontiguousarray(integers))


def conv2d_of_bytes(b: Builder) -> Node:
    """Blocked images of 8 bits by 3x3 kernels mostly, with channels of padding, borders of many kinds, extreme weights."""
    out, inputs, kernel = b.choose(3, 4, 8), b.choose(1, 3, 4, 6), b.choose(3, 3, 3, 3, 3, 1)
    blocks, dtype = -(-inputs // BLOCK), ("uint8", "int8")[b.choose(0, 1)]
    x = b.input(b.choose(1, 1, 2), blocks, b.choose(3, 5, 9), b.choose(4, 6, 7), BLOCK)
    q = b.node(quantized.Quantize(b.choose(0, 3, 100), dtype, scale=2.0**-4), x)
    layout, image = f"OIHW1i{BLOCK}o{BLOCK}i", f"NCHW{BLOCK}c"
    weight = b.rng.choice(np.array([-128, -127, -1, 0, 1, 50, 127], np.int8), (out, inputs, kernel, kernel))
    pads = ((b.choose(0, 1, 2), 1), (1, b.choose(0, 1, 3)))
    partial = (0, out if out % BLOCK else 0)
    op = conv.Conv2d((1, b.choose(1, 1, 1, 2)), pads, (1, 1), 1, image, image, layout, *partial, b.choose(0, 3, 100))
    # Lanes of padding hold anything.
    bias = b.rng.integers(-9999, 9999, out + -out % BLOCK).astype(np.int32)
    packed = b.const(pack.PackConvWeight(layout).ref(weight))
    return b.node(op, q, packed, *([b.const(bias)] if b.chance(0.7) else []))


PLANTERS: dict[str, tuple[Plant, ...]] = {
    "fold-packing": (fold_packing,),
    "pack-linear": (pack_linear,),
    "gate-to-weights": (_gate_to_weights(False), _gate_to_weights(True)),
    "sparsify-conv2d": (thin_conv2d, thin_conv2d),
    "sparsify-linear": (thin_linear, thin_linear),
    "winograd-conv2d": (conv2d_of_bytes,),
}
