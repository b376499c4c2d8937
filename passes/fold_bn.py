"""fold-bn: batch norms, scales, shifts and zero padding go into the weights of the layer before (or after) them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Node
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, norm, shape
from paring.ir.types import TensorType
from paring.passes.base import Pass
from paring.passes.contract import Close, Exact
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.util import channel_axis, channel_values, const_value, constant, is_const

LAYERS = (conv.Conv2d, conv.ConvTranspose2d, linear.Linear)


def _foldable(layer: Node) -> bool:
    """Whether weights and bias are constants in their plain order, one row of the weight for each output."""
    match layer.op:
        case conv.Conv2d(out_layout="NCHW", weight_layout="OIHW") | conv.ConvTranspose2d():
            plain = True
        case linear.Linear(weight_layout="OI", features=features):
            plain = features in (None, layer.inputs[1].type.shape[0])
        case _:
            plain = False
    return plain and layer.type.is_float and all(is_const(node) for node in layer.inputs[1:])


def _scaled(m: Match, layer: Node, scale: Array, shift: Array) -> Node | None:
    """layer(x) * scale + shift as one layer; computed in float64, rounded once to the weights' dtype."""
    weight, dtype = const_value(layer.inputs[1]).astype(np.float64), layer.type.dtype
    bias = const_value(layer.inputs[2]).astype(np.float64) if len(layer.inputs) == 3 else 0.0
    if isinstance(layer.op, conv.ConvTranspose2d):
        # weight is (I, O/groups, KH, KW): the outputs of one group share the group's block of rows.
        groups = layer.op.groups
        by_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        weight = (by_group * scale.reshape(groups, 1, -1, 1, 1)).reshape(weight.shape)
    else:
        weight = weight * scale.reshape((-1,) + (1,) * (weight.ndim - 1))
    with np.errstate(over="ignore"):
        new_weight, new_bias = weight.astype(dtype), (bias * scale + shift).astype(dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return m.decline("the folded weights are not finite")
    return m.make(layer.op, layer.inputs[0], constant(new_weight, layer.inputs[1].loc), constant(new_bias), loc=layer.loc)


def fold_batch_norm(m: Match) -> Node | None:
    """batch_norm(layer(x, w, b), g, h, mean, var) -> layer(x, w * s, (b - mean) * s + h), s = g / sqrt(var + eps)"""
    norm_op = m.root.op
    assert isinstance(norm_op, norm.BatchNorm)
    if isinstance(m["layer"].op, linear.Linear) and m["layer"].type.rank != 2:
        return m.decline("the channels of a batch norm are not the features of this linear layer")
    if not all(is_const(node) for node in m.root.inputs[1:]):
        return m.decline("the statistics are not constant")
    gain, shift, mean, var = (const_value(node).astype(np.float64) for node in m.root.inputs[1:])
    with np.errstate(all="ignore"):
        scale = gain / np.sqrt(var + norm_op.eps)
    if not np.isfinite(scale).all():
        return m.decline("a variance is not positive, or a parameter is not finite")
    return _scaled(m, m["layer"], scale, shift - mean * scale)


def _channelwise(m: Match) -> Array | None:
    layer = m["layer"]
    axis = channel_axis(layer)
    values = channel_values(m["c"], layer.type.shape[axis], axis, layer.type.rank)
    return None if values is None or not np.isfinite(values).all() else values.astype(np.float64)


def fold_scale(m: Match) -> Node | None:
    """layer(x, w, b) * c, c constant per output -> layer(x, w * c, b * c)"""
    scale = _channelwise(m)
    return None if scale is None else _scaled(m, m["layer"], scale, np.zeros_like(scale))


def fold_shift(m: Match) -> Node | None:
    """layer(x, w, b) + c, c constant per output -> layer(x, w, b + c)"""
    shift = _channelwise(m)
    return None if shift is None else _scaled(m, m["layer"], np.ones_like(shift), shift)


def fold_pad(m: Match) -> Node | None:
    """conv2d(pad(x, v), w) -> conv2d(x, w) with more padding of that value (0 for floats)"""
    layer, pad = m.root.op, m["pad"].op
    assert isinstance(layer, conv.Conv2d)
    assert isinstance(pad, shape.Pad)
    plain = layer.layout == "NCHW" and pad.mode == "constant" and pad.value == layer.pad_value
    if not plain or any(p != (0, 0) for p in pad.padding[:2]):
        return m.decline("only what the convolution pads with, around the image, can become its padding")
    rows, columns = ((a + c, b + d) for (a, b), (c, d) in zip(layer.padding, pad.padding[2:], strict=True))
    return m.make(dataclasses.replace(layer, padding=(rows, columns)), m["x"], *m.root.inputs[1:])


def batch_norm_to_scale(m: Match) -> Node | None:
    """batch_norm(x, constants) -> x * s + t"""
    norm_op, x = m.root.op, m.root.inputs[0]
    assert isinstance(norm_op, norm.BatchNorm)
    if not all(is_const(node) for node in m.root.inputs[1:]):
        return m.decline("the statistics are not constant")
    gain, bias, mean, var = (const_value(node).astype(np.float64) for node in m.root.inputs[1:])
    with np.errstate(all="ignore"):
        scale = gain / np.sqrt(var + norm_op.eps)
        shift = bias - mean * scale
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        return m.decline("a variance is not positive, or a parameter is not finite")
    scaled = m.make(binary.Mul(), x, _per_channel(m, scale, x.type))
    return m.make(binary.Add(), scaled, _per_channel(m, shift, x.type))


def _per_channel(m: Match, values: Array, type: TensorType) -> Node:
    column = constant(values.astype(type.dtype).reshape((-1,) + (1,) * (type.rank - 2)))
    return m.make(shape.Broadcast(type.shape), column)


_C = any_("c")
_LAYER = op(LAYERS, name="layer", once=True, where=_foldable)

RULES: tuple[Rule, ...] = (
    Rule(op(norm.BatchNorm, _LAYER, any_("g"), any_("h"), any_("mean"), any_("var")), fold_batch_norm, Close(4, finite=True)),
    Rule(op(binary.Mul, _LAYER, _C, commutes=True), fold_scale, Close(2, finite=True)),
    Rule(op(binary.Add, _LAYER, _C, commutes=True), fold_shift, Close(2, finite=True)),
    Rule(op(conv.Conv2d, op(shape.Pad, any_("x"), name="pad"), any_("w")), fold_pad, Exact()),
    Rule(op(conv.Conv2d, op(shape.Pad, any_("x"), name="pad"), any_("w"), any_("b")), fold_pad, Exact()),
    Rule(op(norm.BatchNorm), batch_norm_to_scale, Close(4, finite=True)),
)


@dataclass(frozen=True)
class FoldBn(Pass):
    """Batch norms, constant scales and shifts go into the layer before them, zero padding into the convolution after it."""

    name = "fold-bn"
    contract = Close(4, finite=True)

    def rules(self) -> Sequence[Rule]:
        return RULES
