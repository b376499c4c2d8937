"""Attention on integers: which can be, and how its weights are rounded.

A weight is exp(score - greatest score of its row) in steps of 1/255: rounded relative to its own row, whatever the length of
the row, and divided by the sum of the rounded ones. Softmaxes rounded in steps that all rows share would lose rows that look
at many keys alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from paring.ir.graph import Node
from paring.ir.ops import quantized
from paring.ir.ops.attention import IntegerAttention, ScaledDotProductAttention, sums_fit
from paring.passes.compress.quantization.observers import Affine
from paring.passes.util import constant

# Scores further below than this have weights that round to 0.
REACH = 6.25
TABLE = np.rint(255 * np.exp(np.arange(256) * (-REACH / 255))).astype(np.uint8)


def fits(node: Node) -> bool:
    """Whether an attention can be computed on integers: no float mask, sums within 32 bits, larger scores counting more."""
    attend, (q, k) = node.op, (operand.type.shape for operand in node.inputs[:2])
    assert isinstance(attend, ScaledDotProductAttention)
    return sums_fit(q[3], k[2]) and all(mask.type.dtype == "bool" for mask in node.inputs[3:]) and attend.scale_for(q[3]) > 0


def on_integers(node: Node, inputs: Sequence[Node], params: Sequence[Affine]) -> Node:
    """An attention of `inputs` in 8 bits; the float one of them where its constants are no ordinary numbers."""
    attend = node.op
    assert isinstance(attend, ScaledDotProductAttention)
    q, k, v = params
    with np.errstate(over="ignore"):
        steps = float(np.float32(q.scale * k.scale * attend.scale_for(node.inputs[0].type.shape[3]) * 255 / REACH))
    if not 0 < steps < math.inf:
        return node.with_inputs(inputs)
    op = IntegerAttention(q.zero_point, v.zero_point, steps, v.scale, attend.causal)
    integers = (quantize(x, each) for x, each in zip(inputs[:3], params, strict=True))
    return Node(op, (*integers, constant(TABLE), *inputs[3:]), node.loc)


def quantize(node: Node, params: Affine) -> Node:
    return Node(quantized.Quantize(params.zero_point, params.dtype, scale=params.scale), (node,), node.loc)
