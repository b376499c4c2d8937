"""The pass prune-channels with one mistake each: the tests must tell these from the right one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np

from paring.ir import Node
from paring.ir.op import Op
from paring.ir.ops import conv, norm, shape, unary
from paring.passes.compress.channels import channel_rules, cut
from paring.passes.compress.channels.channels import Flow
from paring.passes.compress.channels.labels import Coupling, Value

Mistake = Callable[[], AbstractContextManager[Any]]


def _rule(op: type[Op], change: Callable[[Flow, Node, Value], Value]) -> Mistake:
    """What one operator does to labels, changed."""
    right = channel_rules.RULES[op]

    def wrong(flow: Flow, node: Node) -> Value:
        return change(flow, node, right(flow, node))

    return lambda: mock.patch.dict(channel_rules.RULES, {op: wrong})


def _shrink(op: type[Op], wrong: Any) -> Mistake:
    return lambda: mock.patch.dict(cut.SHRINK, {op: wrong})


def _with(value: Value, *, labels: Any = None, rest: Any = None) -> Value:
    return Value(value.labels if labels is None else labels, value.rest if rest is None else rest, value.free)


def reverses_the_parts(flow: Flow, node: Node, value: Value) -> Value:
    return _with(value, labels=np.roll(value.labels, 1, node.op.axis))


def flattens_the_other_way(flow: Flow, node: Node, value: Value) -> Value:
    before = node.inputs[0].type.shape
    if len(before) != 4 or len(node.op.shape) != 2 or before[1] == 1 or value.labels.shape[1] == 1:
        return value
    return _with(value, labels=np.tile(flow.value(node.inputs[0]).labels.ravel(), before[2] * before[3]).reshape(1, -1))


def takes_masked_for_zero(flow: Flow, node: Node, value: Value) -> Value:
    return _with(value, rest=np.zeros_like(value.rest))


def keeps_the_operand(flow: Flow, node: Node, value: Value) -> Value:
    return _with(value, rest=flow.value(node.inputs[0]).rest)


def forgets_the_rest() -> AbstractContextManager[Any]:
    return mock.patch.object(cut, "_with_rest", lambda weight, bias, rest: bias)


def folds_into_padding() -> AbstractContextManager[Any]:
    right = Flow.reads
    return mock.patch.object(Flow, "reads", lambda self, node, value, axis, padded: right(self, node, value, axis, False))


def ties_nothing() -> AbstractContextManager[Any]:
    return mock.patch.object(Coupling, "tie", return_value=None)


@contextlib.contextmanager
def pins_no_outputs() -> Iterator[None]:
    right = Coupling.pin

    def wrong(self: Coupling, labels: Any, why: str) -> None:
        if "output" not in why:
            right(self, labels, why)

    with mock.patch.object(Coupling, "pin", wrong):
        yield


def leaves_the_bounds(knife: Any, node: Node, inputs: Any) -> Any:
    op, size = node.op, inputs[0].type.shape
    stops = tuple(min(stop, most) for stop, most in zip(op.stops, size, strict=True))
    return shape.Slice(tuple(map(min, op.starts, stops)), stops, op.steps), inputs


def leaves_the_groups(knife: Any, node: Node, inputs: Any) -> Any:
    op, operands = cut._layer(knife, node, inputs)
    groups = 1 if operands[1].type.shape[1] == operands[0].type.shape[1] else node.op.groups
    return conv.Conv2d(op.stride, op.padding, op.dilation, groups), operands


def removes_the_first_inputs(knife: Any, node: Node, inputs: Any) -> Any:
    op, operands = cut._layer(knife, node, inputs)
    weight, count = operands[1].op.value, operands[1].type.shape[1]
    old = node.inputs[1].op.value
    if node.op.groups > 1 or weight.shape[0] != old.shape[0] or count == old.shape[1]:
        return op, operands
    return op, [operands[0], Node(type(operands[1].op)(old[:, :count])), *operands[2:]]


WRONG_PRUNES: dict[str, Mistake] = {
    "forgets_the_rest": forgets_the_rest,
    "folds_into_padding": folds_into_padding,
    "ties_nothing": ties_nothing,
    "pins_no_outputs": pins_no_outputs,
    "reverses_the_parts": _rule(shape.Concat, reverses_the_parts),
    "flattens_the_other_way": _rule(shape.Reshape, flattens_the_other_way),
    "takes_one_for_zero": _rule(unary.Unary, takes_masked_for_zero),
    "keeps_the_operand": _rule(unary.Unary, keeps_the_operand),
    "forgets_the_shift": _rule(norm.GroupNorm, takes_masked_for_zero),
    "pads_with_zeros": _rule(shape.Pad, takes_masked_for_zero),
    "leaves_the_bounds": _shrink(shape.Slice, leaves_the_bounds),
    "leaves_the_groups": _shrink(conv.Conv2d, leaves_the_groups),
    "removes_the_first_inputs": _shrink(conv.Conv2d, removes_the_first_inputs),
}
