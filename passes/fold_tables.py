"""fold-qdq, tables: a function of one 8-bit value is known for all of its 256 values, so what is put in its place is proven."""

from __future__ import annotations

import dataclasses

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.interpreter import interpret
from paring.ir.op import Array
from paring.ir.ops import ELEMENTWISE, quantized, shape, unary
from paring.ir.ops.core import Input
from paring.ir.ops.quantized import limits, narrowed
from paring.ir.types import BYTES
from paring.passes.affine import affine_of
from paring.passes.contract import Exact
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.qdq import is_dequantize, quantized_of, spread, steps_per_unit
from paring.passes.util import constant, is_const, splat_value

LONGEST = 64


def all_values(dtype: str) -> Array:
    low, high = limits(dtype)
    return np.arange(low, high + 1).astype(dtype)


def table_of(root: Node) -> tuple[Node, Array] | None:
    """The 8-bit tensor of which a node is an elementwise function, and the function's 256 values; None where there is none."""
    chain: dict[Node, None] = {}
    if not all(_collect(operand, chain) for operand in root.inputs):
        return None
    sources = [node for node in chain if _is_source(node)]
    if len(sources) != 1:
        return None
    given = Node(Input("q", sources[0].type.dtype, (256,)))
    new = {sources[0]: given}
    for node in (*chain, root):
        if node in new:
            continue
        if isinstance(node.op, quantized.Lookup):
            new[node] = Node(node.op, (new[node.inputs[0]], node.inputs[1]))
        elif isinstance(node.op, ELEMENTWISE):
            new[node] = Node(node.op, [new[operand] for operand in node.inputs])
        else:
            value = np.array(splat_value(node)).astype(node.type.dtype)
            new[node] = Node(shape.Broadcast((256,)), (constant(value),))
    return sources[0], interpret(Graph((given,), (new[root],)), [all_values(given.type.dtype)])[0]


def _is_table(node: Node) -> bool:
    return isinstance(node.op, quantized.Lookup) and is_const(node.inputs[1])


def _is_source(node: Node) -> bool:
    known = _is_table(node) or isinstance(node.op, unary.Clamp) or splat_value(node) is not None
    return node.type.dtype in BYTES and not known


def _collect(node: Node, chain: dict[Node, None]) -> bool:
    """Put a node and what it is computed from into `chain`, operands first, down to 8-bit tensors; False where that cannot be."""
    if node in chain:
        return True
    if not _is_source(node) and splat_value(node) is None:
        operands = node.inputs[:1] if _is_table(node) else node.inputs
        if not (_is_table(node) or isinstance(node.op, ELEMENTWISE)) or len(chain) >= LONGEST:
            return False
        if not all(_collect(operand, chain) for operand in operands):
            return False
    chain[node] = None
    return len(chain) <= LONGEST


def keep_steps(m: Match) -> Node | None:
    """quantize(f(dequantize(x))) that is x for all of its values -> x"""
    found = table_of(m.root)
    if found is None:
        return None
    x, table = found
    return x if x.type == m.root.type and np.array_equal(table, all_values(x.type.dtype)) else None


def clamp_steps(m: Match) -> Node | None:
    """quantize(f(dequantize(x))) that is clamp(x) for all of its values -> clamp(x)"""
    found = table_of(m.root)
    if found is None:
        return None
    x, table = found
    low, high = int(table.min()), int(table.max())
    same = x.type == m.root.type and np.array_equal(table, np.clip(all_values(x.type.dtype), low, high))
    return m.make(unary.Clamp(float(low), float(high)), x) if same else None


def change_steps(m: Match) -> Node | None:
    """quantize(relu|clamp(... dequantize(x))) that is a requantize for all values -> requantize(x, c / s, d / s)"""
    quantize, inner = m.root.op, m["x"]
    assert isinstance(quantize, quantized.Quantize)
    while isinstance(inner.op, unary.Relu | unary.Clamp):
        (inner,) = inner.inputs
    affine, found = affine_of(inner), table_of(m.root)
    if affine is None or found is None or affine.factor.size != 1 or affine.shift.size != 1:
        return None
    x, table = found
    affine = affine.times(np.asarray(steps_per_unit(m.root)))
    rounding = quantized.Requantize(quantize.zero_point, quantize.dtype, *narrowed(quantize.dtype, table.min(), table.max()))
    values = all_values(x.type.dtype)
    factors = [value.astype(np.float32).reshape(()) for value in (affine.factor, affine.shift)]
    bare = affine.x
    while isinstance(bare.op, unary.Clamp):
        (bare,) = bare.inputs
    if bare is not x or not np.array_equal(rounding.ref(values, *(np.full(256, f) for f in factors)), table):
        return m.decline("a requantize rounds some value in another way")
    return m.make(rounding, x, *(spread(m, value, m.root.type) for value in factors))


def look_up(m: Match) -> Node | None:
    """quantize(f(dequantize(x))), f elementwise -> lookup(x, table of f)"""
    found = table_of(m.root)
    return None if found is None else m.make(quantized.Lookup(), found[0], constant(found[1]))


def clamp_rounding(m: Match) -> Node | None:
    """clamp(requantize(x)) -> requantize{low, high}(x), likewise for all that rounds to 8 bits"""
    rounding, bounds = m["rounding"].op, m.root.op
    assert isinstance(rounding, quantized.Quantize | quantized.Requantize | quantized.QuantizedMul)
    assert isinstance(bounds, unary.Clamp)
    low, high = max(rounding.range[0], bounds.low), min(rounding.range[1], bounds.high)
    if m.uses[m["rounding"]] != 1 or low > high:
        return m.decline("the values are needed as they are too, or the ranges do not overlap")
    ends = narrowed(rounding.dtype, int(low), int(high))
    return m.make(dataclasses.replace(rounding, low=ends[0], high=ends[1]), *m["rounding"].inputs)


def clamp_integers(m: Match) -> Node | None:
    """relu|clamp(dequantize(x)), bounds on steps -> dequantize(clamp(x))"""
    x, found = quantized_of(m["x"]), table_of(m.root)
    assert x is not None
    if found is None:
        return None
    values = all_values(x.q.type.dtype)
    real = m["x"].op.ref(values)
    kept = values[found[1] == real]
    if not kept.size:
        return m.decline("its bounds lie between two steps")
    low, high = int(kept[0]), int(kept[-1])
    if found[1].tobytes() != m["x"].op.ref(np.clip(values, low, high)).tobytes():
        return m.decline("its bounds lie between two steps")
    return m.make(m["x"].op, m.make(unary.Clamp(float(low), float(high)), x.q))


_QUANTIZE = op(quantized.Quantize, any_("x"))

RULES: tuple[Rule, ...] = (
    Rule(op((unary.Relu, unary.Clamp), any_("x", is_dequantize)), clamp_integers, Exact()),
    Rule(
        op(unary.Clamp, op((quantized.Quantize, quantized.Requantize, quantized.QuantizedMul), name="rounding")),
        clamp_rounding,
        Exact(),
    ),
    Rule(_QUANTIZE, keep_steps, Exact()),
    Rule(_QUANTIZE, clamp_steps, Exact()),
    Rule(_QUANTIZE, change_steps, Exact()),
    Rule(_QUANTIZE, look_up, Exact()),
)
