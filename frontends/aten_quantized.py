"""Operators of quantized models: those of PT2E (`quantized_decomposed`), and fake quantization as QAT exports it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from paring.frontends.aten_builder import Builder, Missing, Table, Unsupported, dtype_name
from paring.ir import Node
from paring.ir.ops import quantized as qz

DYNAMIC = "dynamic quantization, where scales depend on the values of a call, is not supported: quantize statically"
PER_CHANNEL = "activations have one scale in all, only constant weights have one for each channel"
ASYMMETRIC = "weights with a zero point for each channel are not supported: quantize them symmetrically"
UNREAD = "gradients are not computed"
Number = float | Node


def _value(b: Builder, of: Any) -> np.ndarray:
    """A scale or zero point that is known now."""
    value = b.known(of) if isinstance(of, Node) else np.asarray(of)
    if value is None:
        raise Unsupported(DYNAMIC)
    return value


def _number(b: Builder, of: Number) -> float:
    value = _value(b, of)
    if value.size != 1:
        raise Unsupported(PER_CHANNEL)
    return float(value.reshape(-1)[0])


def _scale(b: Builder, of: Number) -> float:
    return float(np.float32(_number(b, of)))


def _bytes(dtype: torch.dtype) -> str:
    if dtype not in (torch.int8, torch.uint8):
        raise Unsupported(f"{str(dtype).removeprefix('torch.')} is not an 8-bit integer")
    return dtype_name(dtype)


def _fitting(low: int, high: int) -> str:
    """The 8-bit dtype that holds a range."""
    for dtype in ("uint8", "int8"):
        least, most = qz.limits(dtype)
        if least <= low <= high <= most:
            return dtype
    raise Unsupported(f"integers from {low} to {high} are more than 8 bits")


# --- PT2E -----------------------------------------------------------------------------------------------------------


def quantize(b: Builder, x: Node, scale: Number, zero: Number, low: Number, high: Number, dtype: torch.dtype) -> Node:
    name = _bytes(dtype)
    ends = qz.narrowed(name, int(_number(b, low)), int(_number(b, high)))
    return b.node(qz.Quantize(int(_number(b, zero)), name, *ends, _scale(b, scale)), x)


def dequantize(
    b: Builder, q: Node, scale: Number, zero: Number, low: Number, high: Number, dtype: torch.dtype, out: torch.dtype | None
) -> Node:
    _check_result(out)
    if q.type.dtype != "int32":
        _bytes(dtype)
    # Not folded: quantized constants are what layers on integers are made of.
    return Node(qz.Dequantize(_scale(b, scale), int(_number(b, zero))), (q,), b.loc)


def quantize_channels(b: Builder, x: Node, scales: Node, zeros: Node, axis: int, low: int, high: int, dtype: torch.dtype) -> Node:
    name, weights = _bytes(dtype), b.known(x)
    if weights is None:
        raise Unsupported(PER_CHANNEL)
    return b.parameter(_rounded(b, weights, scales, zeros, axis, (low, high)).astype(name), x.loc)


def dequantize_channels(
    b: Builder,
    q: Node,
    scales: Node,
    zeros: Node | None,
    axis: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    out: torch.dtype | None,
) -> Node:
    _check_result(out)
    integers = b.known(q)
    if integers is None:
        raise Unsupported(PER_CHANNEL)
    if q.type.dtype != "int32":
        _bytes(dtype)
    steps = integers.astype(np.int64) - (_along(b, zeros, axis, q).astype(np.int64) if zeros is not None else 0)
    if q.type.dtype == "int32":
        return b.constant((steps * _along(b, scales, axis, q).astype(np.float32)).astype(np.float32))
    return _weights(b, steps, scales, axis, q)


def _check_result(out: torch.dtype | None) -> None:
    if out not in (None, torch.float32):
        raise Unsupported(f"it gives {str(out).removeprefix('torch.')}, not float32")


def _along(b: Builder, values: Node, axis: int, like: Node) -> np.ndarray:
    """Values of one dimension, shaped to be broadcast to all."""
    return _value(b, values).reshape([-1 if d == axis % like.type.rank else 1 for d in range(like.type.rank)])


def _rounded(b: Builder, weights: np.ndarray, scales: Node, zeros: Node, axis: int, ends: tuple[int, int]) -> np.ndarray:
    """clamp(round(x / scale) + zero), in float32 as torch does it."""
    along = [-1 if d == axis % weights.ndim else 1 for d in range(weights.ndim)]
    scale, zero = (_value(b, v).reshape(along).astype(np.float32) for v in (scales, zeros))
    with np.errstate(all="ignore"):
        steps = np.rint(weights.astype(np.float32) * (np.float32(1) / scale)) + zero
    return np.clip(np.nan_to_num(steps), *ends)


def _weights(b: Builder, steps: np.ndarray, scales: Node, axis: int, source: Node) -> Node:
    """Weights from steps around zero."""
    least, most = qz.limits("int8")
    if steps.size and not least <= steps.min() <= steps.max() <= most:
        raise Unsupported(ASYMMETRIC)
    q = source if source.type.dtype == "int8" and np.array_equal(steps, _value(b, source)) else None
    q = q or b.parameter(steps.astype(np.int8), source.loc)
    scale = b.parameter(_value(b, scales).reshape(-1).astype(np.float32), scales.loc)
    return Node(qz.DequantizeChannels(axis % q.type.rank), (q, scale), b.loc)


# --- fake quantization ----------------------------------------------------------------------------------------------


def fake_quantize(b: Builder, x: Node, scale: Number, zero: Number, low: int, high: int, on: Number = 1) -> Node:
    """A quantize and a dequantize; x itself where it is switched off."""
    if not _number(b, on):
        return x
    name = _fitting(low, high)
    op = qz.Quantize(int(_number(b, zero)), name, *qz.narrowed(name, low, high), _scale(b, scale))
    return Node(qz.Dequantize(op.scale, op.zero_point), (b.node(op, x),), b.loc)


def fake_quantize_channels(b: Builder, x: Node, scales: Node, zeros: Node, axis: int, low: int, high: int) -> Node:
    weights = b.known(x)
    if weights is None:
        raise Unsupported(PER_CHANNEL)
    _fitting(low, high)
    steps = _rounded(b, weights, scales, zeros, axis, (low, high)).astype(np.int64)
    return _weights(b, steps - _along(b, zeros, axis, x).astype(np.int64), scales, axis, x)


def _masked(converter: Any) -> Any:
    """With the mask for gradients, which nobody reads."""
    return lambda b, *operands: (converter(b, *operands), Missing(UNREAD))


def _switched(b: Builder, x: Node, scale: Node, zero: Node, on: Node, low: int, high: int) -> Node:
    return fake_quantize(b, x, scale, zero, low, high, on)


def observed(b: Builder, x: Node, *operands: Any) -> tuple[Node, Missing, Node, Node, Node, Node]:
    """A fake quantizer that could observe too, and does not: its state stays what it is."""
    observer, on, least, most, scale, zero, _, low, high, axis, per_row, _ = operands
    if _number(b, observer):
        raise Unsupported("it observes what it is given: call model.apply(torch.ao.quantization.disable_observer) first")
    state = (Missing(UNREAD), least, most, scale, zero)
    if per_row and _number(b, on):
        return (fake_quantize_channels(b, x, scale, zero, axis, low, high), *state)
    return (fake_quantize(b, x, scale, zero, low, high, on), *state)


# --- the table ------------------------------------------------------------------------------------------------------


def _refused(reason: str, b: Builder, *_: Any) -> Node:
    raise Unsupported(reason)


_TOKENS = "quantization for each token or group is not supported: quantize per tensor, weights per channel"

TABLE: Table = {
    **{f"quantized_decomposed.quantize_per_tensor.{v}": quantize for v in ("default", "tensor", "tensor2")},
    **{f"quantized_decomposed.dequantize_per_tensor.{v}": dequantize for v in ("default", "tensor", "tensor2")},
    "quantized_decomposed.quantize_per_channel.default": quantize_channels,
    "quantized_decomposed.dequantize_per_channel.default": dequantize_channels,
    **{f"quantized_decomposed.{n}.tensor": partial(_refused, DYNAMIC) for n in ("choose_qparams", "choose_qparams_symmetric")},
    **{
        f"quantized_decomposed.{name}.default": partial(_refused, _TOKENS)
        for name in (
            *("quantize_per_token", "dequantize_per_token", "choose_qparams_per_token", "choose_qparams_per_token_asymmetric"),
            *("quantize_per_channel_group", "dequantize_per_channel_group"),
        )
    },
    "quantized_decomposed.fake_quant_per_channel.default": fake_quantize_channels,
    "aten.fake_quantize_per_tensor_affine.default": fake_quantize,
    "aten.fake_quantize_per_tensor_affine.tensor_qparams": fake_quantize,
    "aten.fake_quantize_per_tensor_affine_cachemask.default": _masked(fake_quantize),
    "aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default": _masked(_switched),
    "aten._fused_moving_avg_obs_fq_helper_functional.default": observed,
    "aten.fake_quantize_per_channel_affine.default": fake_quantize_channels,
    "aten.fake_quantize_per_channel_affine_cachemask.default": _masked(fake_quantize_channels),
}
