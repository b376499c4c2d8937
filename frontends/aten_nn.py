"""aten operators of network layers: convolutions, products, norms, pooling, resizing, attention."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from paring.frontends.aten_builder import Builder, Missing, Table, Unsupported
from paring.frontends.aten_elementwise import ADD, DIV, MUL
from paring.frontends.aten_pool import images, spread
from paring.frontends.aten_reduce import variance
from paring.ir import Node
from paring.ir.ops import conv as cv
from paring.ir.ops import linear as ln
from paring.ir.ops import norm as nm
from paring.ir.ops import reduce as rd
from paring.ir.ops import unary as un
from paring.ir.ops.attention import ScaledDotProductAttention

Ints = Sequence[int]
SAVED = Missing("values kept for training are not computed")


# --- convolutions ---------------------------------------------------------------------------------------------------


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """torch's padding='same': the odd element goes to the right."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2


def conv(
    b: Builder,
    x: Node,
    weight: Node,
    bias: Node | None = None,
    stride: Ints = (1,),
    padding: Ints | str = (0,),
    dilation: Ints = (1,),
    groups: int = 1,
) -> Node:
    spatial = weight.type.rank - 2
    x, weight = images(b, x, spatial), images(b, weight, spatial)
    dilations = spread(dilation, spatial, 1)
    pads: cv.Padding = ((0, 0), (0, 0))
    if padding == "same":
        pads = tuple(same_padding(k, d) for k, d in zip(weight.type.shape[2:], dilations, strict=True))  # type: ignore[assignment]
    elif not isinstance(padding, str):
        pads = tuple((p, p) for p in spread(padding, spatial, 0))  # type: ignore[assignment]
    op = cv.Conv2d(spread(stride, spatial, 1), pads, dilations, groups)
    return b.reshape(b.node(op, x, weight, *(() if bias is None else (bias,))), b.type.shape)


def conv_transpose(
    b: Builder,
    x: Node,
    weight: Node,
    bias: Node | None = None,
    stride: Ints = (1,),
    padding: Ints = (0,),
    output_padding: Ints = (0,),
    groups: int = 1,
    dilation: Ints = (1,),
) -> Node:
    spatial = weight.type.rank - 2
    x, weight = images(b, x, spatial), images(b, weight, spatial)
    op = cv.ConvTranspose2d(
        spread(stride, spatial, 1),
        spread(padding, spatial, 0),
        spread(output_padding, spatial, 0),
        spread(dilation, spatial, 1),
        groups,
    )
    return b.reshape(b.node(op, x, weight, *(() if bias is None else (bias,))), b.type.shape)


def convolution(
    b: Builder,
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    *_: object,
) -> Node:
    if transposed:
        return conv_transpose(b, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(b, x, weight, bias, stride, padding, dilation, groups)


# --- products -------------------------------------------------------------------------------------------------------


def linear(b: Builder, x: Node, weight: Node, bias: Node | None = None) -> Node:
    if weight.type.rank == 1:
        return b.reshape(linear(b, x, b.unsqueezed(weight, [0]), None if bias is None else b.reshape(bias, (1,))), b.type.shape)
    return b.node(ln.Linear(), x, weight, *(() if bias is None else (bias,)))


def matmul(b: Builder, x: Node, y: Node) -> Node:
    """torch.matmul: vectors become matrices, leading dimensions are broadcast; constant matrices become linear layers."""
    left = b.unsqueezed(x, [0]) if x.type.rank == 1 else x
    right = b.unsqueezed(y, [1]) if y.type.rank == 1 else y
    if right.type.rank == 2 and right.type.is_float and b.known(y) is not None:
        return b.reshape(b.node(ln.Linear(), left, b.swap(right, 0, 1)), b.type.shape)
    if right.type.rank == 2 and left.type.rank > 2:
        left = b.flattened(left, 0, left.type.rank - 1)
    batch = tuple(np.broadcast_shapes(left.type.shape[:-2], right.type.shape[:-2]))
    left = b.broadcast(left, (*batch, *left.type.shape[-2:]))
    right = b.broadcast(right, (*batch, *right.type.shape[-2:]))
    return b.reshape(b.node(ln.Matmul(), left, right), b.type.shape)


def dot(b: Builder, x: Node, y: Node) -> Node:
    return b.node(rd.Sum((0,)), b.node(MUL, x, y))


def add_product(b: Builder, x: Node, y: Node, z: Node, beta: float = 1, alpha: float = 1) -> Node:
    """beta * x + alpha * (y @ z); a linear layer with bias where it is one (GPT-2's Conv1D)."""
    biased = beta == alpha == 1 and x.type.is_float and x.type.rank == 1 and x.type.shape == (z.type.shape[-1],)
    if biased and y.type.rank == z.type.rank == 2:
        return b.node(ln.Linear(), y, b.swap(z, 0, 1), x)
    product = matmul(b, y, z)
    product = product if alpha == 1 else b.apply(MUL, product, alpha, dtype=product.type.dtype)
    if beta == 0:
        return product
    return b.apply(ADD, x if beta == 1 else b.apply(MUL, x, beta, dtype=x.type.dtype), product)


def add_summed_product(b: Builder, x: Node, y: Node, z: Node, beta: float = 1, alpha: float = 1) -> Node:
    """addbmm: the products of all batches are summed, which is one product over batch and inner size together."""
    count, rows, inner = y.type.shape
    left = b.reshape(b.swap(y, 0, 1), (rows, count * inner))
    return add_product(b, x, left, b.reshape(z, (count * inner, z.type.shape[2])), beta, alpha)


def bilinear(b: Builder, x: Node, y: Node, weight: Node, bias: Node | None = None) -> Node:
    """sum over i, j of x[i] weight[o, i, j] y[j]: one linear layer, then one product with y for each row."""
    out, left, right = weight.type.shape
    flat = b.reshape(b.transpose(weight, (0, 2, 1)), (out * right, left))
    rows = b.reshape(b.node(ln.Linear(), x, flat), (-(-x.type.size // max(left, 1)), out, right))
    column = b.reshape(y, (rows.type.shape[0], right, 1))
    result = b.reshape(b.node(ln.Matmul(), rows, column), b.type.shape)
    return result if bias is None else b.apply(ADD, result, bias)


# --- norms ----------------------------------------------------------------------------------------------------------


def batch_norm_inference(
    b: Builder, x: Node, weight: Node | None, bias: Node | None, mean: Node, var: Node, momentum: float, eps: float
) -> tuple[Node, Missing, Missing]:
    return _batch_norm(b, x, weight, bias, mean, var, eps), SAVED, SAVED


def _batch_norm(b: Builder, x: Node, weight: Node | None, bias: Node | None, mean: Node, var: Node, eps: float) -> Node:
    like = x.type.with_shape((x.type.shape[1],))
    scale, shift = b.optional(weight, 1, like), b.optional(bias, 0, like)
    mean, var = b.cast(mean, like.dtype), b.cast(var, like.dtype)
    return b.node(nm.BatchNorm(float(eps)), x, scale, shift, mean, var)


def batch_norm(
    b: Builder,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    mean: Node | None,
    var: Node | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: object,
) -> Node:
    if mean is not None and var is not None and not training:
        return _batch_norm(b, x, weight, bias, mean, var, eps)
    if mean is not None:
        raise Unsupported("batch norm in training mode")
    return batch_statistics(b, x, weight, bias, eps)


def batch_statistics(b: Builder, x: Node, weight: Node | None, bias: Node | None, eps: float) -> Node:
    """Batch norm without running statistics: those of this very batch."""
    axes = [d for d in range(x.type.rank) if d != 1]
    var, mean = variance(b, x, axes, 0, False)
    return _batch_norm(b, x, weight, bias, mean, var, eps)


def batch_norm_no_stats(
    b: Builder, x: Node, weight: Node | None, bias: Node | None, training: bool, momentum: float, eps: float
) -> tuple[Node, Missing, Missing]:
    return batch_statistics(b, x, weight, bias, eps), SAVED, SAVED


def native_batch_norm(b: Builder, *args: object) -> tuple[Node, Missing, Missing]:
    return batch_norm(b, *args), SAVED, SAVED  # type: ignore[arg-type]


def layer_norm(
    b: Builder, x: Node, shape: Ints, weight: Node | None = None, bias: Node | None = None, eps: float = 1e-5, *_: object
) -> Node:
    like = x.type.with_shape(tuple(shape))
    return b.node(nm.LayerNorm(float(eps)), x, b.optional(weight, 1, like), b.optional(bias, 0, like))


def native_layer_norm(b: Builder, *args: object) -> tuple[Node, Missing, Missing]:
    return layer_norm(b, *args), SAVED, SAVED  # type: ignore[arg-type]


def rms_norm(b: Builder, x: Node, shape: Ints, weight: Node | None = None, eps: float | None = None) -> Node:
    eps = float(np.finfo(x.type.dtype).eps) if eps is None else float(eps)
    return b.node(nm.RmsNorm(eps), x, b.optional(weight, 1, x.type.with_shape(tuple(shape))))


def fused_rms_norm(b: Builder, *args: object) -> tuple[Node, Missing]:
    return rms_norm(b, *args), SAVED  # type: ignore[arg-type]


def group_norm(
    b: Builder, x: Node, groups: int, weight: Node | None = None, bias: Node | None = None, eps: float = 1e-5, *_: object
) -> Node:
    like = x.type.with_shape((x.type.shape[1],))
    return b.node(nm.GroupNorm(groups, float(eps)), x, b.optional(weight, 1, like), b.optional(bias, 0, like))


def native_group_norm(
    b: Builder, x: Node, weight: Node | None, bias: Node | None, n: int, c: int, hw: int, groups: int, eps: float
) -> tuple[Node, Missing, Missing]:
    return group_norm(b, x, groups, weight, bias, eps), SAVED, SAVED


def instance_norm(
    b: Builder,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    mean: Node | None,
    var: Node | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    *_: object,
) -> Node:
    """A group norm of one channel a group, or with running statistics a batch norm."""
    if mean is not None and var is not None and not use_input_stats:
        return _batch_norm(b, x, weight, bias, mean, var, eps)
    return group_norm(b, x, x.type.shape[1], weight, bias, eps)


# --- attention ------------------------------------------------------------------------------------------------------


def attention(
    b: Builder,
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    grouped: bool = False,
) -> Node:
    """Leading dimensions are broadcast and become two, batch and heads; grouped queries repeat keys and values."""
    if grouped:
        k, v = (_repeat_heads(b, n, q.type.shape[-3]) for n in (k, v))
    rest = [n.type.shape[:-2] for n in (q, k, v)]
    lead = tuple(np.broadcast_shapes(*rest))
    heads = lead[-1] if lead else 1
    batch = prod(lead[:-1])
    q, k, v = (_four(b, n, lead, (batch, heads)) for n in (q, k, v))
    operands = [q, k, v]
    if mask is not None:
        length, keys = q.type.shape[2], k.type.shape[2]
        mask = mask if mask.type.dtype == "bool" else b.cast(mask, q.type.dtype)
        mask = b.broadcast(mask, (*lead, length, keys))
        operands.append(b.reshape(mask, (batch, heads, length, keys)))
    op = ScaledDotProductAttention(None if scale is None else float(scale), bool(causal))
    return b.reshape(b.node(op, *operands), b.type.shape)


def _four(b: Builder, x: Node, lead: tuple[int, ...], shape: tuple[int, int]) -> Node:
    last = x.type.shape[-2:]
    return b.reshape(b.broadcast(x, (*lead, *last)), (*shape, *last))


def _repeat_heads(b: Builder, x: Node, heads: int) -> Node:
    *lead, own, length, width = x.type.shape
    apart = b.reshape(x, (*lead, own, 1, length, width))
    return b.reshape(b.broadcast(apart, (*lead, own, heads // own, length, width)), (*lead, heads, length, width))


def flash_attention(
    b: Builder,
    q: Node,
    k: Node,
    v: Node,
    dropout: float = 0.0,
    causal: bool = False,
    mask: Node | None = None,
    scale: float | None = None,
) -> tuple[Node, Missing]:
    return attention(b, q, k, v, mask, dropout, causal, scale), SAVED


def cosine_similarity(b: Builder, x: Node, y: Node, axis: int = 1, eps: float = 1e-8) -> Node:
    """x . y over the product of their norms, each at least eps."""
    x, y = b.together(x, y)
    axes = (axis % x.type.rank,)

    def norm(z: Node) -> Node:
        return b.node(un.Clamp(low=float(eps)), b.node(un.Sqrt(), b.node(rd.Sum(axes), b.node(MUL, z, z))))

    return b.node(DIV, b.node(rd.Sum(axes), b.node(MUL, x, y)), b.node(MUL, norm(x), norm(y)))


TABLE: Table = {
    **{f"aten.conv{d}d.{overload}": conv for d in (1, 2, 3) for overload in ("default", "padding")},
    **{f"aten.conv_transpose{d}d.{overload}": conv_transpose for d, overload in ((1, "default"), (2, "input"), (3, "input"))},
    "aten.convolution.default": convolution,
    "aten.linear.default": linear,
    **{f"aten.{name}.default": matmul for name in ("matmul", "mm", "bmm", "mv")},
    **{f"aten.{name}.default": add_product for name in ("addmm", "baddbmm", "addmv")},
    "aten.addbmm.default": add_summed_product,
    "aten.bilinear.default": bilinear,
    "aten.dot.default": dot,
    "aten.vdot.default": dot,
    "aten._native_batch_norm_legit_no_training.default": batch_norm_inference,
    "aten._native_batch_norm_legit.no_stats": batch_norm_no_stats,
    "aten._native_batch_norm_legit.default": native_batch_norm,
    "aten.native_batch_norm.default": native_batch_norm,
    "aten.batch_norm.default": batch_norm,
    "aten.layer_norm.default": layer_norm,
    "aten.native_layer_norm.default": native_layer_norm,
    "aten.rms_norm.default": rms_norm,
    "aten._fused_rms_norm.default": fused_rms_norm,
    "aten.group_norm.default": group_norm,
    "aten.native_group_norm.default": native_group_norm,
    "aten.instance_norm.default": instance_norm,
    "aten.scaled_dot_product_attention.default": attention,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": flash_attention,
    "aten.cosine_similarity.default": cosine_similarity,
}
