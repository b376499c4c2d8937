"""Floats that come from integers: the constants between the two, and how large the floats may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops import binary, pool, quantized, shape, unary
from paring.ir.ops.quantized import limits
from paring.ir.types import TensorType
from paring.passes.qdq import FLOAT32, INT32, float_constant, ordinary, quantized_of
from paring.passes.util import is_const

# How many roundings a chain may have, and how many moves, which round nothing.
DEEP = 16
FAR = 128
TO_SUMS = unary.Cast("int32")


@dataclass(frozen=True)
class Affine:
    """x * factor + shift: integers with float64 constants that broadcast to them; `peak` bounds |shift| on the way."""

    x: Node
    factor: Array
    shift: Array
    peak: float

    def times(self, c: Array) -> Affine:
        return Affine(self.x, self.factor * c, self.shift * c, self.peak * _size(c))

    def plus(self, c: Array) -> Affine:
        shift = self.shift + c
        return Affine(self.x, self.factor, shift, max(self.peak, _size(c), _size(shift)))

    @property
    def is_small(self) -> bool:
        """Whether the constants are no larger than the integers, and precise in float32."""
        return max(self.factor.size, self.shift.size) <= self.x.type.size and ordinary(self.factor)


def affine_of(node: Node) -> Affine | None:
    """Integers, times a constant, plus a constant; None for anything else.

    What only moves or joins values is done with the integers, and with the constants too: in a concat each part keeps its own, so
    that parts with different scales need no rounding to a common one.
    """
    return _Reading().of(node, DEEP, FAR)


@dataclass
class _Reading:
    """One walk from a node to its integers, each node looked at once."""

    known: dict[Node, Affine | None] = field(default_factory=dict)

    def of(self, node: Node, depth: int, moves: int) -> Affine | None:
        if node not in self.known:
            self.known[node] = self._read(node, depth, moves)
        return self.known[node]

    def _read(self, node: Node, depth: int, moves: int) -> Affine | None:
        match node.op:
            case quantized.Dequantize(scale=scale, zero_point=zero) if not is_const(node.inputs[0]):
                shift = np.float64(-zero * scale)
                return Affine(node.inputs[0], np.asarray(np.float64(scale)), np.asarray(shift), abs(float(shift)))
            case quantized.Descale():
                factor, shift = (float_constant(operand) for operand in node.inputs[1:])
                if factor is None or shift is None:
                    return None
                return Affine(node.inputs[0], factor.astype(np.float64), shift.astype(np.float64), _size(shift))
            case unary.Neg() if depth:
                inner = self.of(node.inputs[0], depth - 1, moves)
                return inner and inner.times(np.asarray(-1.0))
            case binary.Mul() | binary.Div() | binary.Add() | binary.Sub() if depth:
                return self._combined(node, depth, moves)
            case shape.Concat() | shape.Reshape() | shape.Transpose() | shape.Slice() if moves:
                return self._moved(node, depth, moves)
        return None

    def _combined(self, node: Node, depth: int, moves: int) -> Affine | None:
        """Of an arithmetic node with a constant on one side."""
        x, c = node.inputs
        turned = float_constant(c) is None
        value = float_constant(x if turned else c)
        inner = None if value is None else self.of(c if turned else x, depth - 1, moves)
        if inner is None or value is None or not np.isfinite(value).all() or value.ndim > inner.x.type.rank:
            return None
        value = value.astype(np.float64)
        match node.op:
            case binary.Mul():
                return inner.times(value)
            case binary.Div():
                return None if turned or not value.all() else inner.times(1 / value)
            case binary.Add():
                return inner.plus(value)
        return inner.times(np.asarray(-1.0)).plus(value) if turned else inner.plus(-value)

    def _moved(self, node: Node, depth: int, moves: int) -> Affine | None:
        """Of a move. Integers of different kinds are joined as int32: no more bytes than the floats were."""
        parts = []
        for operand in node.inputs:
            part = self.of(operand, depth, moves - 1)
            if part is None:
                return None
            parts.append(part)
        types = [part.x.type for part in parts]
        factor = _moved_constant(node, [part.factor for part in parts], types)
        shift = _moved_constant(node, [part.shift for part in parts], types)
        if factor is None or shift is None:
            return None
        same = len({t.dtype for t in types}) == 1
        integers = [part.x if same or part.x.type.dtype == "int32" else Node(TO_SUMS, (part.x,), node.loc) for part in parts]
        return Affine(Node(node.op, integers, node.loc), factor, shift, max(part.peak for part in parts))


def _moved_constant(node: Node, values: list[Array], types: list[TensorType]) -> Array | None:
    """Constants that broadcast to the operands of a move, as they lie after it; None where more of them would be needed."""
    if node.type.size == 0:
        return None
    wide = [value.reshape((1,) * (t.rank - value.ndim) + value.shape) for value, t in zip(values, types, strict=True)]
    moved = _moved_wide(node, wide, types)
    return None if moved is None else moved.reshape(_trimmed(moved.shape))


def _moved_wide(node: Node, wide: list[Array], types: list[TensorType]) -> Array | None:
    """The same for constants that have all dimensions."""
    match node.op:
        case shape.Concat(axis=axis):
            outer = np.broadcast_shapes(*(w.shape[:axis] for w in wide))
            inner = np.broadcast_shapes(*(w.shape[axis + 1 :] for w in wide))
            spread = [np.broadcast_to(w, (*outer, t.shape[axis], *inner)) for w, t in zip(wide, types, strict=True)]
            return np.concatenate(spread, axis)
        case shape.Transpose(perm=perm):
            return wide[0].transpose(perm)
        case shape.Slice(starts=starts, stops=stops, steps=steps):
            ends = zip(starts, stops, steps, wide[0].shape, strict=True)
            return wide[0][tuple(slice(None) if size == 1 else slice(a, b, c) for a, b, c, size in ends)]
    return _reshaped(wide[0], types[0].shape, node.type.shape)


def _trimmed(dims: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its outer dimensions of size 1."""
    first = next((d for d, size in enumerate(dims) if size != 1), len(dims))
    return dims[first:]


def _reshaped(value: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array | None:
    """Constants that broadcast to `before`, as they lie when that is reshaped; None as above."""
    if value.size == 1:
        return value.reshape((1,) * len(after))
    most, front, back = min(len(before), len(after)), 0, 0
    # Outer and inner dimensions along which the constants are the same stay as they are.
    while back < most and before[-1 - back] == after[-1 - back] and value.shape[-1 - back] == 1:
        back += 1
    while front + back < most and before[front] == after[front] and value.shape[front] == 1:
        front += 1
    inner = before[front : len(before) - back]
    if math.prod(inner) > value.size:
        return None
    spread = np.broadcast_to(value.reshape(value.shape[front : len(before) - back]), inner)
    return spread.reshape((1,) * front + after[front : len(after) - back] + (1,) * back)


def _size(value: Array) -> float:
    return float(np.abs(value).max(initial=0.0))


# --- bounds ---------------------------------------------------------------------------------------------------------


def is_number(node: Node) -> bool:
    """Whether no element of a float32 tensor can be NaN, because it is made of integers and finite constants."""
    return _greatest(node, DEEP) <= float(FLOAT32.max)


def _greatest(node: Node, depth: int) -> float:
    """A bound of |value|; infinite where it is not known."""
    if depth == 0:
        return math.inf
    match node.op:
        case quantized.Dequantize(scale=scale):
            found = quantized_of(node)
            return (found.reach if found else INT32 + 1) * scale
        case quantized.Descale():
            affine = affine_of(node)
            if affine is None:
                return math.inf
            largest = max(map(abs, limits(node.inputs[0].type.dtype)))
            bound = largest * _size(affine.factor) + affine.peak
            return bound if math.isfinite(bound) else math.inf
        case binary.Add() | binary.Sub():
            return sum(_greatest(operand, depth - 1) for operand in node.inputs)
        case binary.Mul():
            # Zero times an unknown bound is unknown, not NaN.
            sizes = [_greatest(operand, depth - 1) for operand in node.inputs]
            return math.inf if math.inf in sizes else math.prod(sizes)
        case unary.Relu() | shape.Movement() | pool.MaxPool2d():
            if not isinstance(node.op, shape.Pad):
                return max(_greatest(operand, depth - 1) for operand in node.inputs)
    value = float_constant(node)
    return math.inf if value is None or not np.isfinite(value).all() else _size(value)
