"""Weights as signed integers, symmetric about zero."""

from __future__ import annotations

import numpy as np

from paring.ir.errors import ArgumentError, ModelError
from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops.quantized import Dequantize, DequantizeChannels
from paring.passes.compress.quantization.observers import LEAST_SCALE
from paring.passes.util import const_value, constant

METHODS = ("minmax", "mse")


def most_of(bits: int) -> int:
    """The greatest integer of symmetric weights of so many bits. Raises ArgumentError."""
    if not 2 <= bits <= 8:
        raise ArgumentError(f"weights of {bits} bits", hint="2 to 8")
    return (1 << bits - 1) - 1


def scales_for(weight: Array, most: int, per_channel: bool, method: str) -> Array:
    """One float32 scale for each row of `weight`, or one for all, shape (1,): by the greatest value, or by least squares."""
    rows = weight.reshape(weight.shape[0] if per_channel else 1, -1).astype(np.float64)
    greatest = np.abs(rows).max(1, initial=0.0)
    scales = _as_scales(greatest / most)
    if method == "minmax":
        return scales
    best, loss = scales, _losses(rows, scales, most)
    for share in np.linspace(0.98, 0.2, 40):
        tried = _as_scales(greatest * share / most)
        found = _losses(rows, tried, most)
        best, loss = np.where(found < loss, tried, best), np.minimum(found, loss)
    return best


def _as_scales(values: Array) -> Array:
    """Positive normal float32; an all-zero channel gets 1."""
    return np.where(values > 0, np.maximum(values.astype(np.float32), np.float32(LEAST_SCALE)), np.float32(1))


def _losses(rows: Array, scales: Array, most: int) -> Array:
    steps = scales.astype(np.float64)[:, None]
    return ((np.clip(np.rint(rows / steps), -most, most) * steps - rows) ** 2).sum(1)


def to_integers(weight: Array, scales: Array, most: int) -> Array:
    """Each weight's nearest step within [-most, most], int8."""
    along = scales.astype(np.float64).reshape((-1,) + (1,) * (weight.ndim - 1))
    return np.clip(np.rint(weight / along), -most, most).astype(np.int8)


def quantized_weight(node: Node, bits: int, per_channel: bool, method: str, layer: str) -> Node:
    """`dequantize_channels(integers, scales)`, or `dequantize(integers)`, in place of a constant weight.

    Raises ModelError where a weight is not finite.
    """
    weight, most = const_value(node), most_of(bits)
    if not np.isfinite(weight).all():
        raise ModelError("a weight is NaN or infinite", where=layer, hint="quantize a model whose weights are finite")
    scales = scales_for(weight, most, per_channel, method)
    return dequantized(to_integers(weight, scales, most), scales, per_channel, node)


def dequantized(integers: Array, scales: Array, per_channel: bool, source: Node) -> Node:
    """The node that a layer reads its weight from."""
    stored = constant(integers, source.loc)
    if per_channel:
        return Node(DequantizeChannels(0), (stored, constant(scales)), source.loc)
    return Node(Dequantize(float(scales[0])), (stored,), source.loc)
