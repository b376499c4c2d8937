"""decompose: operators that no schedule family wants become operators that one does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops import attention, binary, conv, linear, norm, pool, reduce, shape
from paring.passes.base import Pass
from paring.passes.contract import Close, Exact
from paring.passes.pattern import Match, Rule, op
from paring.passes.util import const_value, constant, is_const


def adaptive_pool_to_mean(m: Match) -> Node | None:
    """adaptive_avg_pool2d(x, 1x1) -> mean(x, rows and columns)"""
    pooling = m.root.op
    assert isinstance(pooling, pool.AdaptiveAvgPool2d)
    if pooling.size != (1, 1) or pooling.layout != "NCHW":
        return m.decline("the result is not 1x1")
    return m.make(reduce.Mean((2, 3), True), *m.root.inputs)


def adaptive_pool_to_pool(m: Match) -> Node | None:
    """adaptive_avg_pool2d(x, a divisor of the size) -> avg_pool2d(x)"""
    pooling, size = m.root.op, m.root.inputs[0].type.shape[2:4]
    assert isinstance(pooling, pool.AdaptiveAvgPool2d)
    if any(s % o for s, o in zip(size, pooling.size, strict=True)):
        return m.decline("the windows differ in size")
    kernel = (size[0] // pooling.size[0], size[1] // pooling.size[1])
    return m.make(pool.AvgPool2d(kernel, kernel, layout=pooling.layout), *m.root.inputs)


def whole_pool_to_mean(m: Match) -> Node | None:
    """avg_pool2d(x) over the whole image -> mean(x, rows and columns)"""
    pooling, x = m.root.op, m.root.inputs[0]
    assert isinstance(pooling, pool.AvgPool2d)
    whole = pooling.kernel == x.type.shape[2:4] and pooling.padding == (0, 0) and pooling.layout == "NCHW"
    return m.make(reduce.Mean((2, 3), True), x) if whole else None


def spell_out_pixel_shuffle(m: Match) -> Node | None:
    """pixel_shuffle(x, r) -> reshape(transpose(reshape(x)))"""
    shuffle, (x,) = m.root.op, m.root.inputs
    assert isinstance(shuffle, shape.PixelShuffle)
    r, (n, c, h, w) = shuffle.factor, x.type.shape
    split = m.make(shape.Reshape((n, c // (r * r), r, r, h, w)), x)
    return m.make(shape.Reshape(m.root.type.shape), m.make(shape.Transpose((0, 1, 4, 2, 5, 3)), split))


def _keeps_a_key(mask: Node) -> bool:
    """Whether a float mask is a constant that leaves each row something finite."""
    source = mask.inputs[0] if isinstance(mask.op, shape.Broadcast) else mask
    if not is_const(source) or not mask.type.is_float or source.type.rank == 0:
        return False
    return bool(np.isfinite(const_value(source)).any(-1).all())


def spell_out_attention(m: Match) -> Node | None:
    """attention(q, k, v, mask) -> matmul(softmax(matmul(q, transpose(k)) * scale + mask), v)

    Where infinite values make all scores of a row -inf, attention gives zeros and this gives NaN.
    """
    attend, (q, k, v, *mask) = m.root.op, m.root.inputs
    assert isinstance(attend, attention.ScaledDotProductAttention)
    if attend.causal or (mask and not _keeps_a_key(mask[0])):
        return m.decline("a row may keep no key, which only the operator itself gives zeros for")
    scores = m.make(linear.Matmul(), q, m.make(shape.Transpose((0, 1, 3, 2)), k))
    scale = constant(np.array(attend.scale_for(q.type.shape[3]), q.type.dtype))
    scores = m.make(binary.Mul(), scores, m.make(shape.Broadcast(scores.type.shape), scale))
    if mask:
        scores = m.make(binary.Add(), scores, mask[0])
    return m.make(linear.Matmul(), m.make(norm.Softmax(3), scores), v)


def transposed_conv_to_conv(m: Match) -> Node | None:
    """conv_transpose2d(x, w, b) -> slice(reshape(transpose(reshape(conv2d(x, w', b'))))), one output channel for each phase

    Result row q * stride + r is a sum over the taps r, r + stride, ... of the kernel: an ordinary convolution for each
    phase r of the stride (Shi et al. 2016, "Is the deconvolution layer the same as a convolutional layer?"). Phases with
    fewer taps are filled up with zeros, which an infinite x turns into NaN.
    """
    layer, (x, weight, *bias) = m.root.op, m.root.inputs
    assert isinstance(layer, conv.ConvTranspose2d)
    if layer.dilation != (1, 1) or not all(is_const(node) for node in (weight, *bias)):
        return m.decline("the taps are spread out, or the weights are not constant")
    (n, _, h, w), (out, oh, ow) = x.type.shape, m.root.type.shape[1:]
    (sh, sw), groups = layer.stride, layer.groups
    taps = [-(-k // s) for k, s in zip(weight.type.shape[2:], layer.stride, strict=True)]
    turns = [-(-(o + p) // s) for o, p, s in zip((oh, ow), layer.padding, layer.stride, strict=True)]
    padding = [(t - 1, q - size) for t, q, size in zip(taps, turns, (h, w), strict=True)]
    if min(map(min, padding)) < 0:
        return m.decline("the padding cuts off whole elements of x")
    op = conv.Conv2d(padding=(padding[0], padding[1]), groups=groups)
    phases = _phases(const_value(weight), groups, layer.stride, (taps[0], taps[1]))
    biases = [constant(np.repeat(const_value(b), sh * sw), b.loc) for b in bias]
    y = m.make(op, x, constant(phases, weight.loc), *biases)
    split = m.make(shape.Reshape((n, out, sh, sw, turns[0], turns[1])), y)
    woven = m.make(shape.Transpose((0, 1, 4, 2, 5, 3)), split)
    whole = m.make(shape.Reshape((n, out, turns[0] * sh, turns[1] * sw)), woven)
    (top, left) = layer.padding
    return m.make(shape.Slice((0, 0, top, left), (n, out, top + oh, left + ow), (1, 1, 1, 1)), whole)


def _phases(weight: Array, groups: int, stride: tuple[int, int], taps: tuple[int, int]) -> Array:
    """(I, O/g, KH, KW) -> (O * SH * SW, I/g, TH, TW): the taps of each phase, last one first."""
    i, per_group, kh, kw = weight.shape
    full = np.zeros((i, per_group, taps[0] * stride[0], taps[1] * stride[1]), weight.dtype)
    full[:, :, :kh, :kw] = weight
    # (g, I/g, O/g, TH, SH, TW, SW): tap t of phase r is kernel row t * stride + r.
    apart = full.reshape(groups, i // groups, per_group, taps[0], stride[0], taps[1], stride[1])[:, :, :, ::-1, :, ::-1, :]
    return apart.transpose(0, 2, 4, 6, 1, 3, 5).reshape(-1, i // groups, *taps)


RULES: tuple[Rule, ...] = (
    Rule(op(conv.ConvTranspose2d), transposed_conv_to_conv, Close(1, finite=True)),
    Rule(op(pool.AdaptiveAvgPool2d), adaptive_pool_to_mean, Close(1)),
    Rule(op(pool.AdaptiveAvgPool2d), adaptive_pool_to_pool, Close(1)),
    Rule(op(pool.AvgPool2d), whole_pool_to_mean, Close(1)),
    Rule(op(shape.PixelShuffle), spell_out_pixel_shuffle, Exact()),
)
ATTENTION_RULES: tuple[Rule, ...] = (Rule(op(attention.ScaledDotProductAttention), spell_out_attention, Close(4, finite=True)),)


@dataclass(frozen=True)
class Decompose(Pass):
    """Operators that no schedule family wants become ones that one does; `attention` also spells attention out."""

    name = "decompose"
    contract = Close(4, finite=True)
    attention: bool = False

    def rules(self) -> Sequence[Rule]:
        return (*RULES, *ATTENTION_RULES) if self.attention else RULES
