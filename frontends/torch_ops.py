"""What computes each operator in torch, as a table: for graphs in plain layouts and floats, so that they can be trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paring.ir.op import Op
from paring.ir.ops import attention, binary, conv, index, linear, norm, pool, reduce, resize, scan, shape, unary

Function = Callable[..., Tensor]
"""The operator, then a tensor for each operand; the result is cast to the node's dtype where torch widens it."""


def dtype_of(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def _plain(function: Callable[..., Tensor]) -> Function:
    """A function of torch that needs nothing of the operator's attributes."""
    return lambda op, *tensors: function(*tensors)


# --- layers ---------------------------------------------------------------------------------------------------------


def _conv2d(op: conv.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    (top, bottom), (left, right) = op.padding
    even = top == bottom and left == right
    x = x if even else F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, bias, op.stride, (top, left) if even else 0, op.dilation, op.groups)


def _conv_transpose2d(op: conv.ConvTranspose2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv_transpose2d(x, weight, bias, op.stride, op.padding, op.output_padding, op.groups, op.dilation)


def _attention(op: attention.ScaledDotProductAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    if op.causal and mask is not None:
        below = torch.ones(mask.shape[2:], dtype=torch.bool).tril()
        mask = mask & below if mask.dtype == torch.bool else mask.masked_fill(~below, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=op.causal and mask is None, scale=op.scale)


# --- norms ----------------------------------------------------------------------------------------------------------


def _batch_norm(op: norm.BatchNorm, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, op.eps)


def _layer_norm(op: norm.LayerNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, op.eps)


def _rms_norm(op: norm.RmsNorm, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, op.eps)


def _group_norm(op: norm.GroupNorm, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, op.groups, weight, bias, op.eps)


# --- element by element ---------------------------------------------------------------------------------------------


def _clamp(op: unary.Clamp, x: Tensor) -> Tensor:
    low, high = (bound if math.isfinite(bound) else None for bound in (op.low, op.high))
    if low is None and high is None:
        return x
    if not x.is_floating_point():
        low, high = (None if bound is None else int(bound) for bound in (low, high))
    return x.clamp(low, high)


def _elu(op: unary.Elu, x: Tensor) -> Tensor:
    found: Tensor = torch.ops.aten.elu(x, op.alpha, op.scale, op.input_scale)
    return found


def _gelu(op: unary.Gelu, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh" if op.approximate else "none")


def _floor_div(op: binary.FloorDiv, x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return torch.div(x, y, rounding_mode="floor")
    small, divisor = _divisor(y)
    return torch.where(small, x * y, torch.div(x, divisor, rounding_mode="floor"))


def _remainder(op: binary.Remainder, x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return torch.remainder(x, y)
    small, divisor = _divisor(y)
    return torch.where(small, 0, torch.remainder(x, divisor))


def _divisor(y: Tensor) -> tuple[Tensor, Tensor]:
    """Where an integer is -1, 0 or 1, and 1 in its place: torch raises for 0, and the machine may for the least one by -1."""
    small = y == y.sign()
    return small, torch.where(small, 1, y)


# --- windows and reductions -----------------------------------------------------------------------------------------


def _max_pool2d(op: pool.MaxPool2d, x: Tensor) -> Tensor:
    return F.max_pool2d(x, op.kernel, op.stride, op.padding, op.dilation, op.ceil_mode)


def _avg_pool2d(op: pool.AvgPool2d, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, op.kernel, op.stride, op.padding, op.ceil_mode, op.count_include_pad)


def _reduction(function: Callable[..., Tensor]) -> Function:
    # To torch no axes mean all of them.
    return lambda op, x: function(x, op.axes, keepdim=op.keepdims) if op.axes else x


def _resize(op: resize.Resize, x: Tensor) -> Tensor:
    for axis in (2, 3):
        low, high, weight = op.taps(x.shape[axis], op.size[axis - 2], op.scales[axis - 2])
        below = x.index_select(axis, torch.from_numpy(low))
        if op.mode == "nearest":
            x = below
            continue
        share = torch.from_numpy(weight).to(x.dtype).reshape((-1, 1) if axis == 2 else (-1,))
        x = below * (1 - share) + x.index_select(axis, torch.from_numpy(high)) * share
    return x


# --- moves ----------------------------------------------------------------------------------------------------------


def _slice(op: shape.Slice, x: Tensor) -> Tensor:
    return x[tuple(slice(*r) for r in zip(op.starts, op.stops, op.steps, strict=True))]


def _concat(op: shape.Concat, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, op.axis)


def _pad(op: shape.Pad, x: Tensor) -> Tensor:
    if op.mode == "constant":
        return F.pad(x, [amount for pair in reversed(op.padding) for amount in pair], value=op.value)
    mode: Any = "reflect" if op.mode == "reflect" else "edge"
    for axis, pair in enumerate(op.padding):
        if any(pair):
            x = x.index_select(axis, torch.from_numpy(np.pad(np.arange(x.shape[axis]), pair, mode)))
    return x


def _within(indices: Tensor, size: int) -> Tensor:
    return indices.long().clamp(0, max(size - 1, 0))


def _gather(op: index.Gather, x: Tensor, indices: Tensor) -> Tensor:
    at = (*(slice(None),) * op.axis, _within(indices, x.shape[op.axis]))
    return x[at]


def _gather_elements(op: index.GatherElements, x: Tensor, indices: Tensor) -> Tensor:
    return torch.gather(x, op.axis, _within(indices, x.shape[op.axis]))


_SAME: dict[type[Op], Callable[..., Tensor]] = {
    linear.Linear: F.linear,
    linear.Matmul: torch.matmul,
    unary.Relu: torch.relu,
    unary.Silu: F.silu,
    unary.HardSwish: F.hardswish,
    unary.HardSigmoid: F.hardsigmoid,
    unary.Sigmoid: torch.sigmoid,
    unary.Tanh: torch.tanh,
    unary.Exp: torch.exp,
    unary.Log: torch.log,
    unary.Sqrt: torch.sqrt,
    unary.Rsqrt: torch.rsqrt,
    unary.Erf: torch.erf,
    unary.Sin: torch.sin,
    unary.Cos: torch.cos,
    unary.Abs: torch.abs,
    unary.Neg: torch.neg,
    unary.Floor: torch.floor,
    unary.Ceil: torch.ceil,
    unary.Round: torch.round,
    unary.Sign: torch.sign,
    unary.LogicalNot: torch.logical_not,
    binary.Add: torch.add,
    binary.Sub: torch.sub,
    binary.Mul: torch.mul,
    binary.Div: torch.div,
    binary.Pow: torch.pow,
    binary.Maximum: torch.maximum,
    binary.Minimum: torch.minimum,
    binary.Equal: torch.eq,
    binary.NotEqual: torch.ne,
    binary.Less: torch.lt,
    binary.LessEqual: torch.le,
    binary.Greater: torch.gt,
    binary.GreaterEqual: torch.ge,
    binary.LogicalAnd: torch.logical_and,
    binary.LogicalOr: torch.logical_or,
    binary.Where: torch.where,
}

TORCH: dict[type[Op], Function] = {
    **{op: _plain(function) for op, function in _SAME.items()},
    conv.Conv2d: _conv2d,
    conv.ConvTranspose2d: _conv_transpose2d,
    attention.ScaledDotProductAttention: _attention,
    norm.BatchNorm: _batch_norm,
    norm.LayerNorm: _layer_norm,
    norm.RmsNorm: _rms_norm,
    norm.GroupNorm: _group_norm,
    norm.Softmax: lambda op, x: F.softmax(x, op.axis),
    norm.LogSoftmax: lambda op, x: F.log_softmax(x, op.axis),
    unary.Clamp: _clamp,
    unary.LeakyRelu: lambda op, x: F.leaky_relu(x, op.alpha),
    unary.Elu: _elu,
    unary.Gelu: _gelu,
    unary.Cast: lambda op, x: x.to(dtype_of(op.dtype)),
    binary.FloorDiv: _floor_div,
    binary.Remainder: _remainder,
    pool.MaxPool2d: _max_pool2d,
    pool.AvgPool2d: _avg_pool2d,
    pool.AdaptiveAvgPool2d: lambda op, x: F.adaptive_avg_pool2d(x, op.size),
    reduce.Sum: _reduction(torch.sum),
    reduce.Mean: _reduction(torch.mean),
    reduce.Max: _reduction(torch.amax),
    reduce.Min: _reduction(torch.amin),
    reduce.ArgMax: lambda op, x: torch.argmax(x, op.axis, keepdim=op.keepdims),
    resize.Resize: _resize,
    scan.CumSum: lambda op, x: torch.cumsum(x, op.axis),
    shape.Broadcast: lambda op, x: x.expand(op.shape),
    shape.Reshape: lambda op, x: x.reshape(op.shape),
    shape.Transpose: lambda op, x: x.permute(op.perm),
    shape.Concat: _concat,
    shape.Slice: _slice,
    shape.Flip: lambda op, x: torch.flip(x, op.axes),
    shape.Roll: lambda op, x: torch.roll(x, op.shifts, op.axes),
    shape.Pad: _pad,
    shape.PixelShuffle: lambda op, x: F.pixel_shuffle(x, op.factor),
    index.Gather: _gather,
    index.GatherElements: _gather_elements,
    index.Tril: lambda op, x: torch.tril(x, op.diagonal),
    index.Triu: lambda op, x: torch.triu(x, op.diagonal),
}
"""By operator class. Integers of quantized networks have no gradients: their operators have no row."""

PLAIN = {"layout": ("NCHW",), "out_layout": ("NCHW",), "weight_layout": ("OIHW", "OI")}
"""What attributes that are layouts say before a graph is lowered to those of a target."""


def is_plain(op: Op) -> bool:
    """Whether an operator works in no target's layout."""
    return all(getattr(op, name, plain[0]) in plain for name, plain in PLAIN.items())


def compute(op: Op, tensors: Sequence[Tensor], dtype: str) -> Tensor:
    """One operator in torch, its result of the given dtype."""
    result = TORCH[type(op)](op, *tensors)
    wanted = dtype_of(dtype)
    return result if result.dtype == wanted else result.to(wanted)
