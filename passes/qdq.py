"""What the rules of fold-qdq share: quantized values, constant weights, float constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops import quantized, shape
from paring.ir.ops.quantized import limits
from paring.ir.types import BYTES, TensorType
from paring.passes.pattern import Match
from paring.passes.util import const_value, constant, is_const

INT32 = 2**31 - 1
FLOAT32 = np.finfo(np.float32)
# Past this many steps a float32 may be off by a good part of one, and two ways to round by more than one.
MANY_STEPS = 2.0**20


@dataclass(frozen=True)
class Quantized:
    """A real tensor by its 8-bit integers: (q - zero_point) * scale."""

    q: Node
    scale: float
    zero_point: int

    @property
    def reach(self) -> int:
        """The greatest |q - zero_point|."""
        low, high = limits(self.q.type.dtype)
        return max(high - self.zero_point, self.zero_point - low)


def quantized_of(node: Node) -> Quantized | None:
    """What a dequantize of 8-bit integers reads; None for any other node."""
    if not isinstance(node.op, quantized.Dequantize) or node.inputs[0].type.dtype not in BYTES:
        return None
    return Quantized(node.inputs[0], node.op.scale, node.op.zero_point)


def is_dequantize(node: Node) -> bool:
    return quantized_of(node) is not None


def steps_per_unit(quantize: Node) -> float:
    assert isinstance(quantize.op, quantized.Quantize)
    return quantize.op.steps_per_unit


def rounding_of(quantize: Node, residual_scale: float = 1.0, residual_zero: int = 0) -> quantized.Requantize:
    """To the integers of a quantize, from those of a sum and a residual."""
    q = quantize.op
    assert isinstance(q, quantized.Quantize)
    return quantized.Requantize(q.zero_point, q.dtype, q.low, q.high, residual_scale, residual_zero)


# --- weights --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Constant int8 weights around zero, with a float32 scale for each output (dimension 0)."""

    q: Array
    scale: Array

    @property
    def sums(self) -> Array:
        """The sum of each output's weights."""
        return self._rows.sum(1, dtype=np.int64)

    @property
    def sizes(self) -> Array:
        """The sum of the absolute values of each output's weights."""
        return np.abs(self._rows.astype(np.int16)).sum(1, dtype=np.int64)

    @property
    def _rows(self) -> Array:
        return self.q.reshape(self.q.shape[0], math.prod(self.q.shape[1:]))


def weights_of(node: Node) -> Weights | str:
    """The weights behind a dequantize, or the reason why integers cannot be multiplied with them."""
    match node.op:
        case quantized.DequantizeChannels(axis=axis):
            if axis != 0:
                return "the weights have their scales along an inner dimension"
            q, scale = node.inputs
        case quantized.Dequantize(scale=one, zero_point=zero):
            (q,) = node.inputs
            if q.type.dtype != "int8" or zero != 0:
                return "the weights are not signed 8-bit integers around zero"
            scale = constant(np.full(q.type.shape[0], one, np.float32))
        case _:
            return "the weights are not 8-bit integers"
    if not (is_const(q) and is_const(scale)):
        return "the weights are not constant"
    if not np.isfinite(const_value(scale)).all():
        return "a scale of the weights is not finite"
    return Weights(const_value(q), const_value(scale))


# --- constants ------------------------------------------------------------------------------------------------------


def float_constant(node: Node) -> Array | None:
    """The value of a float32 constant, of dequantized int32 too, before it is broadcast; None for any other node."""
    source = node.inputs[0] if isinstance(node.op, shape.Broadcast) else node
    if isinstance(source.op, quantized.Dequantize) and is_const(source.inputs[0]):
        return source.op.ref(const_value(source.inputs[0])).astype(np.float32)
    return const_value(source) if is_const(source) and source.type.dtype == "float32" else None


def spread(m: Match, value: Array, type: TensorType) -> Node:
    """An array as a float32 constant broadcast to a type; one value where all are the same."""
    value = value.astype(np.float32)
    if value.size and bool((value == value.flat[0]).all()):
        value = value.reshape(-1)[0].reshape(())
    return m.make(shape.Broadcast(type.shape), constant(value))


def ordinary(*values: Array) -> bool:
    """Whether all values have the full precision of a float32, or are zero."""
    sizes = [np.abs(value) for value in values]
    return all(bool((((FLOAT32.tiny <= s) & (s <= FLOAT32.max)) | (s == 0)).all()) for s in sizes)
