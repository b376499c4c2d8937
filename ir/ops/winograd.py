"""Winograd's convolution F(4x4, 3x3) on 8-bit integers, exact (Lavin and Gray 2016, arXiv:1509.09308, section 4.1).

A tile of 6x6 pixels d and a kernel g of 3x3 give 4x4 results by 36 multiplications instead of 144:
`Y = A' [(G' g G'^T) * (B' d B'^T)] A'^T / 576`. The rows of G are scaled until they are integers, and those of A' make up for it,
so nothing is ever rounded. B' d B'^T fits 16 bits (d in 0..255 grows at most 50 times, |d| <= 128 100 times), and so does
G' g G'^T (|g| <= 128, 49 times).

Sums over the channels are taken modulo 2^32, and so is A': 576 = 9 * 64, where 9 has an inverse modulo 2^32 and 64 is a shift.
What comes out is the sum itself wherever that fits 26 bits: |Y| < 2^25. Whoever makes a node proves it from the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Op, Sample, require
from paring.ir.ops.conv import Padding, conv_extent
from paring.ir.ops.quantized import limits
from paring.ir.types import BYTES, TensorType

# Results of a tile along one dimension, taps of the kernel, pixels of a tile.
RESULTS, TAPS, PIXELS = 4, 3, 6
POSITIONS = PIXELS**2
# Y is known modulo 2^26.
LIMIT = 1 << 25
# 576 = 9 * 2^6, and 9 times this is 1 modulo 2^32.
NINTH, SHIFT = 954437177, 6

OF_PIXELS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
OF_WEIGHTS = np.array([[3, 0, 0], [-1, -1, -1], [-1, 1, -1], [1, 2, 4], [1, -2, 4], [0, 0, 3]])
OF_SUMS = np.array([[2, 4, 4, 1, 1, 0], [0, 4, -4, 2, -2, 0], [0, 4, 4, 4, 4, 0], [0, 4, -4, 8, -8, 8]])


def transformed_weight(weight: Array, block: int) -> Array:
    """An int8 weight (O, I, 3, 3) as int16 (blocks, 36, pairs of input channels, block, 2), zeros in what fills up the last."""
    o, i = weight.shape[:2]
    whole = np.pad(weight, ((0, -o % block), (0, i % 2), (0, 0), (0, 0))).astype(np.int64)
    tiles = (OF_WEIGHTS @ whole @ OF_WEIGHTS.T).reshape(-1, block, whole.shape[1] // 2, 2, POSITIONS)
    return np.ascontiguousarray(tiles.transpose(0, 4, 2, 1, 3).astype(np.int16))


@dataclass(frozen=True)
class WinogradConv2d(Op):
    """Convolution of 8-bit x by a 3x3 kernel, stride 1, into int32: x, the transformed weight, and an optional bias.

    x and the result have channels in blocks (`layout`), the weight is what `transformed_weight` gives and says how many channels
    of the last block are read; the bias is int32, padded to whole blocks. `pad_value` is what stands in the padding.
    """

    name = "winograd_conv2d"
    arity = (2, 3)
    padding: Padding = ((0, 0), (0, 0))
    layout: str = "NCHW16c"
    pad_value: int = 0

    def infer(self, *types: TensorType) -> TensorType:
        x, weight, *bias = types
        block = lay.channel_block(self.layout)
        require(block is not None and x.rank == 5 and x.shape[4] == block, f"x does not fit layout {self.layout}", why=f"{x}")
        require(x.dtype in BYTES and weight.dtype == "int16", "x is not of 8 bits, or the weight not of 16", why=f"{x}, {weight}")
        n, blocks, height, width, size = x.shape
        # Channels are read in pairs, none of them beyond the last block.
        require(size % 2 == 0, f"layout {self.layout} has blocks of an odd size")
        fits = weight.rank == 5 and (weight.shape[1], *weight.shape[3:]) == (POSITIONS, size, 2)
        require(fits and weight.size > 0, "the weight is not transformed for x", why=f"{weight}")
        read = 2 * weight.shape[2]
        require((blocks - 1) * size < read <= blocks * size, "the weight does not end in the last block", why=f"{weight}, {x}")
        require(min(map(min, self.padding)) >= 0, "padding is not negative")
        low, high = limits(x.dtype)
        require(low <= self.pad_value <= high, f"pad_value {self.pad_value} does not fit {x.dtype}")
        outputs = weight.shape[0] * size
        require(all(b == TensorType("int32", (outputs,)) for b in bias), "bias does not match", why=f"{types[-1]}, {outputs}")
        extents = self._extents((height, width))
        require(min(extents) > 0, "the kernel is larger than the padded input", why=f"{x}")
        return TensorType("int32", (n, weight.shape[0], *extents, size))

    def ref(self, *arrays: Array) -> Array:
        x, packed, *bias = arrays
        blocks, _, pairs, block, _ = packed.shape
        x = lay.unblock_activation(x.astype(np.float64))[:, : 2 * pairs]
        n, c, *size = x.shape
        extents = self._extents(size)
        tiles = [-(-extent // RESULTS) for extent in extents]
        # What tiles read beyond the padding changes no result that is kept.
        margins = [
            (before, max(0, count * RESULTS + 2 - s - before))
            for s, count, (before, _) in zip(size, tiles, self.padding, strict=True)
        ]
        x = np.pad(x, ((0, 0), (0, 2 * pairs - c), *margins), constant_values=self.pad_value)
        cut = np.lib.stride_tricks.sliding_window_view(x, (PIXELS, PIXELS), (2, 3))[:, :, ::RESULTS, ::RESULTS]
        pixels = (OF_PIXELS @ cut[:, :, : tiles[0], : tiles[1]] @ OF_PIXELS.T).transpose(4, 5, 0, 2, 3, 1)
        weight = packed.astype(np.float64).transpose(1, 2, 4, 0, 3).reshape(POSITIONS, 2 * pairs, blocks * block)
        # Products of 16 bits, and many thousands of them, are exact in float64.
        sums = (pixels.reshape(POSITIONS, -1, 2 * pairs) @ weight).astype(np.int64).reshape(PIXELS, PIXELS, n, *tiles, -1)
        scaled = OF_SUMS @ sums.transpose(2, 3, 4, 5, 0, 1) @ OF_SUMS.T
        y = _settled(scaled).transpose(0, 3, 1, 4, 2, 5).reshape(n, blocks * block, tiles[0] * RESULTS, tiles[1] * RESULTS)
        y = y[:, :, : extents[0], : extents[1]]
        y = y + bias[0].astype(np.int64)[:, None, None] if bias else y
        return lay.block_activation(y.astype(np.int32), block)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))

    def macs(self, result: TensorType, *types: TensorType) -> int:
        """By the usual counting, those of the direct convolution: 36 for 16 results are carried out where it has 144."""
        return result.size * 2 * types[1].shape[2] * TAPS**2

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        def of(dtype: str, *shape: int) -> TensorType:
            return TensorType(dtype, shape)

        pad = ((1, 1), (1, 1))
        return [
            (cls(pad, "NCHW4c", 7), (of("uint8", 1, 2, 6, 9, 4), of("int16", 3, 36, 4, 4, 2), of("int32", 12))),
            (cls(((2, 0), (0, 1)), "NCHW4c", -7), (of("int8", 2, 2, 5, 4, 4), of("int16", 2, 36, 3, 4, 2))),
        ]

    def _extents(self, size: Sequence[int]) -> list[int]:
        """Height and width of the result, of those of x."""
        return [conv_extent(s, TAPS, 1, pad, 1) for s, pad in zip(size, self.padding, strict=True)]


def _settled(scaled: Array) -> Array:
    """576 times a number as that number, from its value modulo 2^32."""
    ninth = (scaled & 0xFFFFFFFF).astype(np.uint64) * np.uint64(NINTH) & np.uint64(0xFFFFFFFF)
    return (ninth.astype(np.uint32).view(np.int32) >> SHIFT).astype(np.int64)
