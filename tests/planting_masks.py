"""Networks whose weights can have masks: convolutions of all kinds, linear layers, weights that are shared or partly zero."""

from __future__ import annotations

import numpy as np

from paring.generators import Builder
from paring.ir import Node
from paring.ir.ops import linear, reduce, unary
from paring.testing import Plant

WIDTHS = (3, 4, 6, 8, 12, 16, 17)


def _relu(b: Builder, x: Node) -> Node:
    return b.node(unary.Relu(), x)


def _image(b: Builder) -> Node:
    return b.input(1, b.choose(3, 4, 8), b.choose(3, 5), b.choose(3, 4))


def _conv(b: Builder, x: Node, out: int, kernel: int, **more: int) -> Node:
    return b.layer(x, out, kernel, bias=b.chance(0.5), **more)


def convolutions(b: Builder) -> Node:
    y = _relu(b, _conv(b, _image(b), b.choose(*WIDTHS), b.choose(1, 3)))
    return _conv(b, y, b.choose(*WIDTHS), b.choose(1, 3, 3), stride=b.choose(1, 2), dilation=b.choose(1, 1, 2))


def grouped(b: Builder) -> Node:
    """In groups, then one by one."""
    width = b.choose(8, 16)
    y = _relu(b, _conv(b, _image(b), width, 1))
    y = _relu(b, _conv(b, y, width, 3, groups=b.choose(2, 4)))
    return _conv(b, _conv(b, y, width, 3, groups=width), b.choose(4, 5), 1)


def perceptron(b: Builder) -> Node:
    y = b.input(b.choose(1, 2), b.choose(4, 8, 12))
    for _ in range(2):
        width = b.choose(*WIDTHS)
        y = _relu(b, b.node(linear.Linear(), b.tame(y), b.weights(width, y.type.shape[-1]), b.weights(width)))
    return b.node(linear.Linear(), b.tame(y), b.weights(5, y.type.shape[-1]))


def tied(b: Builder) -> Node:
    """One weight that two layers read."""
    width = b.choose(4, 8)
    weight = b.weights(width, width)
    y = _relu(b, b.node(linear.Linear(), b.input(2, width), weight))
    return b.node(linear.Linear(), b.tame(y), weight)


def pruned_before(b: Builder) -> Node:
    """Weights some of whose kernels, and some of whose taps, are zero."""
    width, x = b.choose(4, 8, 16), _image(b)
    dims = (width, x.type.shape[1], 3, 3)
    there = (b.rng.random(dims[:2]) < 0.7)[..., None, None] & (b.rng.random(dims) < 0.8)
    weight = b.const(np.where(there, b.weights(*dims).op.value, np.float32(0)))
    y = b.node(b.layer(x, width, 3).op, x, weight)
    flat = b.node(reduce.Max((2, 3)), y)
    return b.node(linear.Linear(), b.tame(flat), b.weights(4, width))


MASK_PLANTERS: dict[str, Plant] = {f.__name__: f for f in (convolutions, grouped, perceptron, tied, pruned_before)}
