"""winograd: 3x3 convolutions of 8-bit integers by fewer multiplications, where that is faster, and as exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from paring.ir import layout as lay
from paring.ir.errors import ArgumentError
from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops import conv
from paring.ir.ops.quantized import limits
from paring.ir.ops.winograd import LIMIT, POSITIONS, RESULTS, TAPS, WinogradConv2d, transformed_weight
from paring.ir.types import BYTES
from paring.passes.base import Pass
from paring.passes.contract import Exact
from paring.passes.pattern import Match, Rule, op
from paring.passes.util import const_value, constant, is_const

# A layer has to be faster by this factor, which is about what the model errs by.
MARGIN = 1.1
# Measured on Zen 4, in products of vectors: what it takes to transform a tile of one block of input channels, and to make
# results of the sums of a tile in one block of output channels, beyond what the direct convolution takes for them.
TO_TRANSFORM, TO_SETTLE = 120.0, 130.0
# What moving the sums between registers and cache adds to their products.
MOVING = 1.08


@dataclass(frozen=True)
class Winograd(Pass):
    """3x3 convolutions of stride 1 on 8 bits with constant weights run by Winograd's F(4x4, 3x3) where that is faster.

    `block`: channels of a block. `group`: 8-bit channels whose products are summed at once. `ratio`: how many products of two
    16-bit channels take as long as one of these; 0 where the target has no kernel for them. `far`: how many take as long as a
    byte from memory, which is where weights are expected; transformed, they are eight times as large.
    """

    name = "winograd"
    contract = Exact()
    block: int = 16
    group: int = 4
    ratio: float = 1.0
    far: float = 0.25

    def check(self) -> None:
        super().check()
        if self.ratio < 0 or self.far < 0:
            what = f"pass winograd: ratio {self.ratio} or far {self.far} is negative"
            raise ArgumentError(what, hint="like winograd{ratio=1.0, far=0.25}")

    def rules(self) -> Sequence[Rule]:
        def winograd_conv2d(m: Match) -> Node | None:
            """conv2d(x, constant w, b) -> winograd_conv2d(x, transformed w, b)"""
            return self._conv2d(m)

        return (Rule(op(conv.Conv2d, where=_of_bytes), winograd_conv2d, self.contract),)

    def gain(self, node: Node) -> float:
        """How many times as fast a layer will be by this pass, by the model; 1 where it stays as it is."""
        if not isinstance(node.op, conv.Conv2d) or not _of_bytes(node) or self._obstacle(node):
            return 1.0
        return self._speedup(node.type.shape, *self._channels(node))

    def _conv2d(self, m: Match) -> Node | None:
        layer, (x, packed, *bias) = m.root.op, m.root.inputs
        assert isinstance(layer, conv.Conv2d)
        if reason := self._obstacle(m.root):
            return m.decline(reason)
        transformed = constant(transformed_weight(self._weight(m.root), self.block), packed.loc)
        # What fills up the last block of results is zero.
        if layer.out_channels and bias:
            real = np.where(np.arange(bias[0].type.size) < layer.out_channels, const_value(bias[0]), 0)
            bias = [constant(real.astype(np.int32), bias[0].loc)]
        return m.make(WinogradConv2d(layer.padding, layer.layout, layer.pad_value), x, transformed, *bias)

    def _obstacle(self, node: Node) -> str:
        """Why a layer is not computed by tiles; empty where it is."""
        layer, (x, packed, *bias) = node.op, node.inputs
        assert isinstance(layer, conv.Conv2d)
        if not self.ratio:
            return "the target has no kernel for products of 16 bits"
        if packed.type.shape[2:4] != (TAPS, TAPS) or layer.stride != (1, 1) or layer.dilation != (1, 1):
            return "its kernel is not 3x3 with stride 1"
        if layer.groups > 1:
            return "its channels are in groups"
        if {lay.channel_block(layer.layout), lay.channel_block(layer.out_layout)} != {self.block}:
            return f"it does not run in blocks of {self.block} channels"
        if layer.out_channels and not all(map(is_const, bias)):
            return "its bias is not constant"
        if (faster := self._speedup(node.type.shape, *self._channels(node))) < MARGIN:
            return f"it would be {faster:.2f} times as fast as the direct one, and the estimate errs by {MARGIN - 1:.0%}"
        if (most := greatest_sum(self._weight(node), x.type.dtype)) >= LIMIT:
            return f"its sums reach {most}, and only those below 2^25 come out right"
        return ""

    def _channels(self, node: Node) -> tuple[int, int]:
        """Of the input and of the result, padding left out."""
        layer = node.op
        assert isinstance(layer, conv.Conv2d)
        blocks = node.inputs[0].type.shape[1], node.type.shape[1]
        return layer.in_channels or blocks[0] * self.block, layer.out_channels or blocks[1] * self.block

    def _weight(self, node: Node) -> Array:
        """(O, I, 3, 3) without padding."""
        inputs, outputs = self._channels(node)
        return lay.unblock_conv_weight(const_value(node.inputs[1]))[:outputs, :inputs]

    def _speedup(self, result: tuple[int, ...], inputs: int, outputs: int) -> float:
        """How many times as fast as the direct convolution it is, by the model."""
        images, _, height, width, _ = result
        if not images:
            return 1.0
        tiles = ceil(height / RESULTS) * ceil(width / RESULTS)
        reads, writes = ceil(inputs / self.block), ceil(outputs / self.block)
        moved = self.far * inputs * writes * self.block
        direct = images * height * width * TAPS**2 * ceil(inputs / self.group) * writes * self.ratio + moved * TAPS**2
        products = MOVING * POSITIONS * ceil(inputs / 2) * writes
        own = images * tiles * (products + TO_TRANSFORM * reads + TO_SETTLE * writes) + moved * POSITIONS * 2
        return direct / own


def _of_bytes(node: Node) -> bool:
    return node.inputs[0].type.dtype in BYTES and is_const(node.inputs[1])


def greatest_sum(weight: Array, dtype: str) -> int:
    """The greatest magnitude that a sum of products with pixels of that dtype can have."""
    low, high = limits(dtype)
    flat = weight.reshape(weight.shape[0], -1).astype(np.int64)
    above, below = np.maximum(flat, 0).sum(1), np.minimum(flat, 0).sum(1)
    most = max((high * above + low * below).max(initial=0), -(low * above + high * below).min(initial=0))
    return int(most)
