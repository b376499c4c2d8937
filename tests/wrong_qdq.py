"""For the rules of fold-qdq: what the right rewrite makes, with one mistake in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from paring.ir import Const, Node, Op
from paring.ir.graph import topological
from paring.ir.ops import binary, conv, linear, pool, quantized, reduce, shape, unary
from paring.ir.ops.quantized import limits
from paring.passes import fold_qdq
from paring.passes.pattern import Match
from paring.passes.util import constant

Rewrite = Callable[[Match], Node | None]
Change = Callable[[Node, tuple[Node, ...]], Node]
ROUNDING = (quantized.Quantize, quantized.Requantize, quantized.QuantizedMul)
LAYERS = (conv.Conv2d, linear.Linear)
RIGHT: dict[str, Rewrite] = {rule.name: rule.rewrite for rule in fold_qdq.RULES}


def _but(name: str, ops: type[Op] | tuple[type[Op], ...], change: Change, said: str) -> Rewrite:
    """The right rewrite, then `change(node, inputs)` on those of its new nodes that are of these classes."""

    def wrong(m: Match) -> Node | None:
        result = RIGHT[name](m)
        if result is None:
            return None
        old = set(topological([m.root]))
        new: dict[Node, Node] = {}
        for node in topological([result]):
            inputs = tuple(new[i] for i in node.inputs)
            if node in old:
                new[node] = node
            else:
                new[node] = change(node, inputs) if isinstance(node.op, ops) else node.with_inputs(inputs)
        return new[result]

    wrong.__name__ = said
    return wrong


def _sets(**values: Any) -> Change:
    """Attributes replaced; a callable is given the old value."""

    def change(node: Node, inputs: tuple[Node, ...]) -> Node:
        made = {k: v(getattr(node.op, k)) if callable(v) else v for k, v in values.items()}
        return Node(dataclasses.replace(node.op, **made), inputs)

    return change


def _drops(count: int) -> Change:
    return lambda node, inputs: Node(node.op, inputs[:count])


def _times(factor: float, operand: int) -> Change:
    """One operand, a broadcast constant, times a factor."""

    def change(node: Node, inputs: tuple[Node, ...]) -> Node:
        spread = inputs[operand]
        value = constant(np.float32(factor) * spread.inputs[0].op.value)  # type: ignore[attr-defined]
        return Node(node.op, (*inputs[:operand], Node(spread.op, (value,)), *inputs[operand + 1 :]))

    return change


def _turned(operand: int) -> Change:
    """One operand, a broadcast constant, from back to front."""

    def change(node: Node, inputs: tuple[Node, ...]) -> Node:
        spread = inputs[operand]
        value = constant(np.flip(spread.inputs[0].op.value).copy())  # type: ignore[attr-defined]
        return Node(node.op, (*inputs[:operand], Node(spread.op, (value,)), *inputs[operand + 1 :]))

    return change


def _turns(node: Node, inputs: tuple[Node, ...]) -> Node:
    return Node(node.op, inputs[::-1])


def _nothing(node: Node, inputs: tuple[Node, ...]) -> Node:
    return inputs[0]


def _least(node: Node, inputs: tuple[Node, ...]) -> Node:
    return Node(reduce.Min(node.op.axes, True), inputs)  # type: ignore[attr-defined]


def _shifts(node: Node, inputs: tuple[Node, ...]) -> Node:
    return Node(node.op, (Node(shape.Roll((1,), (3,)), inputs),))


def _rolls(node: Node, inputs: tuple[Node, ...]) -> Node:
    table = inputs[1].op
    assert isinstance(table, Const)
    return Node(node.op, (inputs[0], constant(np.roll(table.value, 1))))


def keeps_whatever_has_the_type(m: Match) -> Node | None:
    x = m.root.inputs[0]
    while x.inputs and x.type.is_float:
        x = x.inputs[0]
    return x if x.type == m.root.type else None


def clamps_whatever_has_the_type(m: Match) -> Node | None:
    x = keeps_whatever_has_the_type(m)
    return x and m.make(unary.Clamp(3.0, float(limits(x.type.dtype)[1])), x)


def looks_at_the_lower_bound_only(m: Match) -> Node | None:
    x = m["x"]
    return m.make(x.op, m.make(unary.Clamp(float(x.op.zero_point)), x.inputs[0]))  # type: ignore[attr-defined]


def takes_the_first_parameters(m: Match) -> Node | None:
    first = m.root.inputs[0]
    if any(n.inputs[0].type.dtype != first.inputs[0].type.dtype for n in m.root.inputs):
        return None
    return m.make(first.op, m.make(m.root.op, *(n.inputs[0] for n in m.root.inputs)))


def keeps_the_axis(m: Match) -> Node | None:
    x, scale = m["x"].inputs
    return m.make(m["x"].op, m.make(m.root.op, x), scale) if m.root.type.shape != x.type.shape else m.root


def forgets_to_slice_the_scales(m: Match) -> Node | None:
    result = RIGHT["move-channels"](m)
    if result is None or not isinstance(m.root.op, shape.Slice):
        return result
    q, scale = result.inputs
    rolled = Node(shape.Roll((1,), (0,)), (scale,))
    return m.make(result.op, q, rolled)


def pads_with_the_least(m: Match) -> Node | None:
    x, pad = m["x"], m.root.op
    if pad.mode != "constant" or pad.value > 500:  # type: ignore[attr-defined]
        return None
    return m.make(x.op, m.make(dataclasses.replace(pad, value=float(limits(x.inputs[0].type.dtype)[0])), x.inputs[0]))


WRONG: dict[str, tuple[Rewrite, ...]] = {
    "layer-on-integers": (
        _but("layer-on-integers", conv.Conv2d, _sets(pad_value=0), "pads_with_integer_zero"),
        _but("layer-on-integers", LAYERS, _drops(2), "forgets_the_zero_point"),
        _but("layer-on-integers", quantized.Descale, _times(0.0, 2), "forgets_the_bias"),
        _but("layer-on-integers", quantized.Descale, _times(1 + 2.0**-14, 1), "scales_a_little_more"),
    ),
    "matmul-on-integers": (
        _but("matmul-on-integers", linear.Matmul, _sets(x_zero=0), "forgets_a_zero_point"),
        _but("matmul-on-integers", quantized.Descale, _times(2.0, 1), "scales_twice"),
    ),
    "mean-on-integers": (
        _but("mean-on-integers", binary.Sub, _nothing, "forgets_the_zero_point"),
        _but("mean-on-integers", quantized.Descale, _times(0.5, 1), "counts_twice"),
    ),
    "average-to-conv": (
        _but("average-to-conv", conv.Conv2d, _sets(pad_value=lambda z: 0 if z else 1), "pads_with_integer_zero"),
        _but("average-to-conv", conv.Conv2d, _drops(2), "forgets_the_zero_point"),
    ),
    "softmax-on-integers": (
        _but("softmax-on-integers", quantized.Lookup, _rolls, "starts_at_the_wrong_entry"),
        _but("softmax-on-integers", reduce.Max, _least, "subtracts_from_the_least"),
        _but(
            "softmax-on-integers", quantized.Requantize, _sets(zero_point=lambda z: z - 2 if z > 0 else z + 2), "moves_the_zero"
        ),
    ),
    "layer-norm-on-integers": (
        _but("layer-norm-on-integers", quantized.Requantize, _times(0.0, 2), "forgets_the_bias"),
        _but("layer-norm-on-integers", unary.Sqrt, _nothing, "divides_by_the_variance"),
        _but("layer-norm-on-integers", binary.Sub, _nothing, "does_not_centre"),
    ),
    "narrow-range": (
        _but("narrow-range", quantized.Quantize, _sets(high=None), "forgets_the_upper_bound"),
        _but("narrow-range", quantized.Quantize, _sets(low=None), "forgets_the_lower_bound"),
    ),
    "quantize-affine": (
        _but("quantize-affine", quantized.Requantize, _times(0.0, 2), "forgets_the_shift"),
        _but("quantize-affine", quantized.Requantize, _sets(low=None, high=None), "forgets_the_range"),
        _but("quantize-affine", quantized.Requantize, _times(-1.0, 1), "turns_the_sign"),
        _but("quantize-affine", quantized.Requantize, _turned(1), "takes_the_scales_of_other_parts"),
        _but("quantize-affine", quantized.Requantize, _turned(2), "takes_the_zero_points_of_other_parts"),
    ),
    "quantize-residual": (
        _but("quantize-residual", quantized.Requantize, _sets(residual_zero=0), "forgets_a_zero_point"),
        _but("quantize-residual", quantized.Requantize, _sets(residual_scale=abs), "adds_where_it_subtracts"),
        _but("quantize-residual", quantized.Requantize, _drops(3), "forgets_the_residual"),
    ),
    "quantize-product": (
        _but("quantize-product", quantized.QuantizedMul, _sets(x_zero=0, y_zero=0), "forgets_the_zero_points"),
        _but("quantize-product", quantized.QuantizedMul, _sets(scale=lambda s: 2 * s), "scales_twice"),
    ),
    "clamp-rounding": (
        _but("clamp-rounding", ROUNDING, _sets(high=None), "forgets_the_upper_bound"),
        _but("clamp-rounding", ROUNDING, _sets(low=None), "forgets_the_lower_bound"),
    ),
    "clamp-integers": (looks_at_the_lower_bound_only,),
    "keep-steps": (keeps_whatever_has_the_type,),
    "clamp-steps": (clamps_whatever_has_the_type, keeps_whatever_has_the_type),
    "change-steps": (
        _but("change-steps", quantized.Requantize, _sets(low=None, high=None), "forgets_the_range"),
        _but("change-steps", quantized.Requantize, _times(0.0, 2), "forgets_the_zero_point"),
    ),
    "look-up": (_but("look-up", quantized.Lookup, _rolls, "starts_at_the_wrong_entry"),),
    "move-integers": (_but("move-integers", quantized.Dequantize, _sets(zero_point=1), "forgets_the_zero_point"),),
    "pad-integers": (pads_with_the_least,),
    "concat-integers": (
        takes_the_first_parameters,
        _but("concat-integers", shape.Concat, _turns, "turns_the_order"),
    ),
    "pool-integers": (
        _but("pool-integers", quantized.Dequantize, _sets(scale=lambda s: 2 * s), "scales_twice"),
        _but("pool-integers", pool.MaxPool2d, _shifts, "starts_a_column_later"),
    ),
    "move-channels": (keeps_the_axis, forgets_to_slice_the_scales),
    "quantize-before-move": (_but("quantize-before-move", quantized.Quantize, _sets(zero_point=1), "forgets_the_zero_point"),),
    "quantize-parts": (_but("quantize-parts", shape.Concat, _turns, "turns_the_order"),),
    "quantize-before-pool": (_but("quantize-before-pool", quantized.Quantize, _sets(zero_point=1), "forgets_the_zero_point"),),
}
