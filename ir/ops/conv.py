"""Convolutions: plain and blocked layouts, one meaning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Op, Sample, exact_wide, product_dtype, require, wide
from paring.ir.types import TensorType

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def conv_extent(size: int, kernel: int, stride: int, padding: Pair, dilation: int) -> int:
    """Output size along one dimension; negative or zero where the kernel does not fit."""
    return (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Conv2d(Op):
    """Cross-correlation of x with weight (O, I/groups, KH, KW) and an optional bias (O,).

    `layout` is that of x, `out_layout` that of the result, `weight_layout` that of the weight. With a blocked `out_layout`
    the result's channels are the weight's padded ones and bias is padded likewise. Where blocks are not full, `in_channels`
    and `out_channels` are the plain numbers (0: all of them): what lies beyond is not read, and zero in the result.

    On floats, or on 8-bit integers x with int8 weights and int32 bias: then sums are int32, and `pad_value` is what stands in
    the padding (the zero point of x).
    """

    name = "conv2d"
    arity = (2, 3)
    stride: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    layout: str = "NCHW"
    out_layout: str = "NCHW"
    weight_layout: str = "OIHW"
    in_channels: int = 0
    out_channels: int = 0
    pad_value: int = 0

    def _plain_shapes(self, x: TensorType, w: TensorType) -> tuple[tuple[int, ...], tuple[int, ...]]:
        block, blocks = lay.channel_block(self.layout), lay.weight_blocks(self.weight_layout)
        require(x.rank == (5 if block else 4), f"x does not fit layout {self.layout}", why=f"it is {x}")
        rank = 4 + len(lay.weight_tail(self.weight_layout))
        require(w.rank == rank, f"weight does not fit layout {self.weight_layout}", why=f"it is {w}")
        if block:
            require(x.shape[4] == block, f"x does not fit layout {self.layout}", why=f"it is {x}")
        if blocks:
            fits = w.shape[4:] == lay.weight_tail(self.weight_layout)
            require(fits, f"weight does not fit layout {self.weight_layout}", why=f"it is {w}")
        xs = (x.shape[0], x.shape[1] * x.shape[4], *x.shape[2:4]) if block else x.shape
        ws = (w.shape[0] * blocks[1], w.shape[1] * blocks[0], *w.shape[2:4]) if blocks else w.shape
        return xs, ws

    def infer(self, *types: TensorType) -> TensorType:
        x, w = types[:2]
        dtype = product_dtype(*types)
        require(self.pad_value == 0 or dtype == "int32", "floats are padded with zeros only")
        require(min(*self.stride, *self.dilation, self.groups) >= 1, "stride, dilation and groups are positive")
        require(min(map(min, self.padding)) >= 0, "padding is not negative", hint="slice the input instead")
        (n, c, h, wd), (o, i, kh, kw) = self._plain_shapes(x, w)
        require(min(o, kh, kw) > 0, "the weight is empty", why=f"{w}")
        require(o % self.groups == 0, f"{o} output channels do not divide into {self.groups} groups")
        require(c == i * self.groups, "input channels do not match the weight", why=f"{c} against {i} x {self.groups} groups")
        if len(types) == 3:
            require(types[2].shape == (o,), "bias does not match the output channels", why=f"{types[2]} against {o}")
        oh = conv_extent(h, kh, self.stride[0], self.padding[0], self.dilation[0])
        ow = conv_extent(wd, kw, self.stride[1], self.padding[1], self.dilation[1])
        require(oh > 0 and ow > 0, "the kernel is larger than the padded input", why=f"{(kh, kw)} on {(h, wd)}")
        blocks = lay.weight_blocks(self.weight_layout) or (1, 1)
        for name, count, whole, size in (
            ("in_channels", self.in_channels, i, blocks[0]),
            ("out_channels", self.out_channels, o, blocks[1]),
        ):
            partial = count == 0 or (self.groups == 1 and whole - size < count <= whole)
            require(partial, f"{name} {count} does not end in the last block", why=f"{whole} in blocks of {size}")
        block = lay.channel_block(self.out_layout)
        if block is None:
            return TensorType(dtype, (n, o, oh, ow))
        require(o % block == 0, f"{o} output channels do not fill blocks of {block}")
        return TensorType(dtype, (n, o // block, oh, ow, block))

    def ref(self, *arrays: Array) -> Array:
        x, w = exact_wide(arrays[0]), exact_wide(arrays[1])
        x = lay.unblock_activation(x) if x.ndim == 5 else x
        w = lay.unblock_conv_weight(w) if w.ndim > 4 else w
        if self.in_channels:
            x, w = x[:, : self.in_channels], w[:, : self.in_channels]
        y = correlate(x, w, self.stride, self.padding, self.dilation, self.groups, self.pad_value)
        if len(arrays) == 3:
            y = y + exact_wide(arrays[2])[:, None, None]
        if self.out_channels:
            y[:, self.out_channels :] = 0
        block = lay.channel_block(self.out_layout)
        return lay.block_activation(y, block) if block else y

    def macs(self, result: TensorType, *types: TensorType) -> int:
        _, (o, i, kh, kw) = self._plain_shapes(types[0], types[1])
        return result.size // o * (self.out_channels or o) * (self.in_channels or i) * kh * kw

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        def f(*shape: int) -> TensorType:
            return TensorType("float32", shape)

        def i(dtype: str, *shape: int) -> TensorType:
            return TensorType(dtype, shape)

        return [
            (cls(padding=((1, 1), (1, 1))), (f(1, 3, 7, 6), f(4, 3, 3, 3), f(4))),
            (cls(stride=(2, 1), padding=((0, 1), (2, 0))), (f(2, 4, 8, 7), f(6, 4, 3, 2))),
            (cls(groups=4, padding=((1, 1), (1, 1))), (f(1, 4, 5, 5), f(4, 1, 3, 3), f(4))),
            (cls(groups=2, dilation=(2, 2)), (f(1, 4, 9, 9), f(6, 2, 3, 3))),
            (cls(), (f(1, 5, 4, 4), f(3, 5, 1, 1))),
            (
                cls(padding=((1, 1), (1, 1)), layout="NCHW4c", out_layout="NCHW4c", weight_layout="OIHW4i4o"),
                (f(1, 2, 6, 6, 4), f(3, 2, 3, 3, 4, 4), f(12)),
            ),
            (
                cls(layout="NCHW4c", out_layout="NCHW4c", weight_layout="OIHW4i4o", in_channels=5, out_channels=6),
                (f(1, 2, 3, 5, 4), f(2, 2, 2, 2, 4, 4), f(8)),
            ),
            (cls(padding=((1, 2), (0, 1)), pad_value=7), (i("uint8", 1, 3, 5, 6), i("int8", 4, 3, 3, 3), i("int32", 4))),
            (cls(groups=4, padding=((1, 1), (1, 1))), (i("int8", 1, 4, 5, 5), i("int8", 4, 1, 3, 3))),
            (
                cls(
                    padding=((1, 1), (1, 1)),
                    layout="NCHW8c",
                    out_layout="NCHW8c",
                    weight_layout="OIHW2i8o4i",
                    in_channels=13,
                    pad_value=130,
                ),
                (i("uint8", 1, 2, 5, 6, 8), i("int8", 3, 2, 3, 3, 2, 8, 4), i("int32", 24)),
            ),
        ]


def correlate(x: Array, w: Array, stride: Pair, padding: Padding, dilation: Pair, groups: int, fill: int = 0) -> Array:
    """Cross-correlation of float64 arrays x (N, C, H, W) and w (O, C/groups, KH, KW): one product per kernel position."""
    n, _, h, wd = x.shape
    o, i, kh, kw = w.shape
    oh = conv_extent(h, kh, stride[0], padding[0], dilation[0])
    ow = conv_extent(wd, kw, stride[1], padding[1], dilation[1])
    xp = np.pad(x, ((0, 0), (0, 0), *padding), constant_values=fill).reshape(
        n, groups, i, h + sum(padding[0]), wd + sum(padding[1])
    )
    wg = w.reshape(groups, o // groups, i, kh, kw)
    y = np.zeros((n, groups, o // groups, oh * ow))
    for r in range(kh):
        for s in range(kw):
            top, left = r * dilation[0], s * dilation[1]
            rows = slice(top, top + (oh - 1) * stride[0] + 1, stride[0])
            columns = slice(left, left + (ow - 1) * stride[1] + 1, stride[1])
            y += wg[:, :, :, r, s] @ xp[:, :, :, rows, columns].reshape(n, groups, i, oh * ow)
    return y.reshape(n, o, oh, ow)


@dataclass(frozen=True)
class ConvTranspose2d(Op):
    """The gradient of conv2d with respect to its input: x (N, I, H, W), weight (I, O/groups, KH, KW), optional bias (O,)."""

    name = "conv_transpose2d"
    arity = (2, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def infer(self, *types: TensorType) -> TensorType:
        x, w = types[:2]
        require(x.is_float and all(t.dtype == x.dtype for t in types), "operands are not of one float type")
        require(x.rank == 4 and w.rank == 4, "x and weight have four dimensions", why=f"{x}, {w}")
        require(w.size > 0, "the weight is empty", why=f"{w}")
        require(min(*self.stride, *self.dilation, self.groups) >= 1, "stride, dilation and groups are positive")
        n, c, *size = x.shape
        require(min(x.shape[1:]) > 0, "x has no channels or no pixels", why=f"{x}")
        require(c == w.shape[0] and c % self.groups == 0, "input channels do not match the weight", why=f"{x}, {w}")
        out = w.shape[1] * self.groups
        if len(types) == 3:
            require(types[2].shape == (out,), "bias does not match the output channels", why=f"{types[2]} against {out}")
        extent = [
            (s - 1) * st - 2 * p + d * (k - 1) + op + 1
            for s, st, p, d, k, op in zip(
                size, self.stride, self.padding, self.dilation, w.shape[2:], self.output_padding, strict=True
            )
        ]
        require(min(extent) > 0, "the result would be empty", why=f"extent {tuple(extent)}")
        return x.with_shape((n, out, *extent))

    def ref(self, *arrays: Array) -> Array:
        x, w = wide(arrays[0]), wide(arrays[1])
        n, _, h, wd = x.shape
        i, og, kh, kw = w.shape
        g, (sh, sw), (dh, dw), (ph, pw) = self.groups, self.stride, self.dilation, self.padding
        oh = (h - 1) * sh + dh * (kh - 1) + 1 + self.output_padding[0]
        ow = (wd - 1) * sw + dw * (kw - 1) + 1 + self.output_padding[1]
        full = np.zeros((n, g, og, oh, ow))
        xg, wg = x.reshape(n, g, i // g, h * wd), w.reshape(g, i // g, og, kh, kw)
        for r in range(kh):
            for s in range(kw):
                part = (wg[:, :, :, r, s].swapaxes(1, 2) @ xg).reshape(n, g, og, h, wd)
                full[..., r * dh : r * dh + (h - 1) * sh + 1 : sh, s * dw : s * dw + (wd - 1) * sw + 1 : sw] += part
        y = full[..., ph : oh - ph, pw : ow - pw].reshape(n, g * og, oh - 2 * ph, ow - 2 * pw)
        return y + wide(arrays[2])[:, None, None] if len(arrays) == 3 else y

    def macs(self, result: TensorType, *types: TensorType) -> int:
        x, w = types[:2]
        return x.size * w.size // w.shape[0]

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        def f(*shape: int) -> TensorType:
            return TensorType("float32", shape)

        return [
            (cls((2, 2), (1, 1), (1, 1)), (f(1, 4, 5, 4), f(4, 3, 3, 3), f(3))),
            (cls(stride=(2, 1), groups=2), (f(2, 4, 3, 3), f(4, 2, 2, 2))),
            (cls(dilation=(2, 2)), (f(1, 2, 4, 4), f(2, 2, 3, 3), f(2))),
        ]
