"""Rules in numbers: long chains come to rest, readers are counted, promises add up, and nothing is acquitted unseen."""

from __future__ import annotations

import numpy as np
import pytest

from paring.ir import Const, Graph, Input, Node, interpret, magnitude_bound
from paring.ir.ops import binary, conv, quantized, reduce, shape, unary
from paring.ir.ops.core import Region
from paring.ir.ops.linear import Linear
from paring.passes.base import Pass
from paring.passes.bisect import bisect
from paring.passes.contract import Close, Exact, Lossy, same_bits
from paring.passes.cse import Cse
from paring.passes.ledger import Ledger
from paring.passes.manager import run_pipeline
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.pipelines import parse_pipeline
from paring.passes.rewriter import Context, apply_rules

pytestmark = pytest.mark.fast

X = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)


def image(*shape_: int, dtype: str = "float32") -> Node:
    return Node(Input("x", dtype, shape_))


def run(graph: Graph, passes: str) -> Graph:
    return run_pipeline(graph, parse_pipeline(passes)).graph


def test_a_long_chain_of_rewrites_at_one_node_comes_to_rest() -> None:
    x = image(2, 4)
    y = x
    for _ in range(100):
        part = Node(shape.Slice((0, 0), (2, 2), (1, 1)), (y,))
        y = Node(shape.Concat(1), (y, Node(unary.Relu(), (part,))))
    graph = Graph((x,), (Node(shape.Slice((0, 0), (2, 3), (1, 1)), (y,)),))
    after = run(graph, "canonicalize, dce")
    assert len(after) < 5
    assert same_bits(interpret(after, [X])[0], interpret(graph, [X])[0])


def test_a_value_moves_through_a_long_chain() -> None:
    x = image(2, 4, dtype="uint8")
    y = Node(quantized.Dequantize(0.5, 3), (x,))
    for _ in range(50):
        y = Node(shape.Reshape((4, 2)), (Node(shape.Transpose((1, 0)), (y,)),))
        y = Node(shape.Reshape((2, 4)), (y,))
    graph = Graph((x,), (Node(quantized.Quantize(3, scale=0.5), (y,)),))
    after = run(graph, "fold-qdq")
    assert not any(node.type.is_float for node in after.nodes())
    given = [np.arange(8, dtype=np.uint8).reshape(2, 4)]
    assert same_bits(interpret(after, given)[0], interpret(graph, given)[0])


def test_what_two_nodes_became_has_the_readers_of_both() -> None:
    def absolute(m: Match) -> Node | None:
        """relu(x) -> |x|"""
        return m["x"]

    def fused(m: Match) -> Node | None:
        """neg(exp(x)) -> exp(x), where nothing else reads exp"""
        return m["exp"]

    x = image(2, 4)
    exp = Node(unary.Exp(), (x,))
    relus = [Node(unary.Relu(), (exp,)), Node(unary.Abs(), (exp,))]
    graph = Graph((x,), (Node(unary.Neg(), (relus[0],)), Node(unary.Sqrt(), (relus[1],))))
    rules = (
        Rule(op((unary.Relu, unary.Abs), any_("x")), absolute, Exact()),
        Rule(op(unary.Neg, op(unary.Exp, name="exp", once=True)), fused, Exact()),
    )
    context = Context()
    apply_rules(graph, rules, context)
    assert [r.rule for r in context.rewrites] == ["absolute", "absolute"]


def test_a_large_constant_in_a_table_is_not_rounded() -> None:
    x = image(4, dtype="uint8")
    wide = Node(unary.Cast("int64"), (Node(quantized.Dequantize(), (x,)),))
    large, two = (Node(shape.Broadcast((4,)), (Node(Const(np.array(value, np.int64))),)) for value in (2**53 + 1, 2))
    odd = Node(binary.Remainder(), (Node(binary.Add(), (wide, large)), two))
    graph = Graph((x,), (Node(quantized.Quantize(), (Node(unary.Cast("float32"), (odd,)),)),))
    given = [np.arange(4, dtype=np.uint8)]
    assert interpret(run(graph, "fold-qdq"), given)[0].tolist() == interpret(graph, given)[0].tolist() == [1, 0, 1, 0]


def test_a_promise_counts_each_rule_as_often_as_it_fired() -> None:
    x = image(2, 4)
    y = Node(binary.Mul(), (x, Node(unary.Sigmoid(), (x,))))
    for _ in range(50):
        y = Node(unary.Neg(), (Node(unary.Neg(), (y,)),))
    (entry,) = run_pipeline(Graph((x,), (y,)), parse_pipeline("canonicalize")).ledger.entries
    assert sum(entry.rewrites.values()) > 50
    assert isinstance(entry.contract, Close)
    assert entry.contract.ulps < 10


def test_a_pass_that_found_nothing_promises_nothing_lossy() -> None:
    graph = Graph((x := image(2, 4),), (Node(unary.Exp(), (x,)),))
    ledger = run_pipeline(graph, parse_pipeline("quantize"), calibration=[[X]]).ledger
    assert not ledger.entries[0].changed
    assert Ledger.from_json(ledger.as_json()).contract == Exact()


class Fails(Pass):
    """Raises."""

    name = "fails"
    contract = Lossy("noise", 1.0)

    def run(self, graph: Graph, context: Context) -> Graph:
        raise ValueError("on purpose")


def test_a_lossy_pass_that_fails_is_the_culprit() -> None:
    x = image(2, 4)
    graph = Graph((x,), (Node(unary.Relu(), (x,)),))
    assert Fails.lossy, "a Lossy contract says so"
    culprit = bisect(graph, [Cse(), Fails(), Cse()], [X])
    assert culprit is not None
    assert (culprit.step, culprit.name) == (2, "fails")
    assert "on purpose" in culprit.reason


def test_passes_that_look_at_data_are_given_them() -> None:
    x = image(2, 4)
    weight = Node(Const(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)))
    graph = Graph((x,), (Node(unary.Relu(), (Node(Linear(), (x, weight)),)),))
    passes = parse_pipeline("quantize, fold-qdq, cse")
    assert bisect(graph, passes, [X], fresh=lambda fuel: Context(fuel, calibration=[[X]])) is None
    culprit = bisect(graph, passes, [X])
    assert culprit is not None
    assert "calibration" in culprit.reason


def test_the_magnitude_bound_looks_into_regions_in_regions() -> None:
    inner_x, outer_x, x = image(2, 4), image(2, 4), image(2, 4)
    inner = Graph((inner_x,), (Node(unary.Exp(), (inner_x,)),))
    outer = Graph((outer_x,), (Node(unary.Neg(), (Node(Region("outer", inner), (outer_x,)),)),))
    values, bounds = magnitude_bound(Graph((x,), (Node(Region("outer", outer), (x,)),)), [X])
    flat = Graph((x,), (Node(unary.Neg(), (Node(unary.Exp(), (x,)),)),))
    expected, expected_bounds = magnitude_bound(flat, [X])
    assert same_bits(values[0], expected[0])
    assert same_bits(bounds[0], expected_bounds[0])


def reasons(graph: Graph, passes: str) -> str:
    """A line for each time that a pass declined: its name, the operator, why."""
    declined = run_pipeline(graph, parse_pipeline(passes)).declined
    return "\n".join(f"{name} {rewrite.node.split()[0]}: {why}" for name, rewrite, why in declined)


def test_layout_and_fuse_say_why_not() -> None:
    x = image(1, 8, 4, 4)
    weights = [Node(Const(np.ones(dims, np.float32))) for dims in ((8, 8, 1, 1), (9, 8, 1, 1), (12, 3, 1, 1))]
    first, odd = (Node(conv.Conv2d(), (x, w)) for w in weights[:2])
    joined = Node(shape.Concat(1), (odd, first))
    cut = Node(shape.Slice((0, 1, 0, 0), (1, 7, 4, 4), (1, 1, 1, 1)), (first,))
    summed = Node(reduce.Sum((1,)), (first,))
    uneven = Node(conv.Conv2d(groups=3), (Node(shape.Slice((0, 0, 0, 0), (1, 9, 4, 4), (1, 1, 1, 1)), (joined,)), weights[2]))
    found = reasons(Graph((x,), (joined, cut, summed, uneven)), "layout{block=4}, fuse")
    for line in (
        "layout concat: an operand before the last does not fill its blocks of 4 channels",
        "layout slice: it does not cut whole blocks of 4 channels",
        "layout sum: only a reduction over rows and columns",
        "layout conv2d: groups of 3 to 4 channels neither fill blocks of 4 or 2",
        "several kernels read it",
    ):
        assert line in found


def residual_of_two_products() -> Graph:
    """The sum of two products of bytes, both rounded to bytes: neither is there before the other."""
    x = Node(Input("x", "uint8", (1, 4, 5, 5)), ())
    one = Node(Const(np.float32(0.01)))

    def rounded(*residual: Node) -> Node:
        sums = Node(conv.Conv2d(), (x, Node(Const(np.ones((6, 4, 1, 1), np.int8)))))
        factors = [Node(shape.Broadcast(sums.type.shape), (one,)) for _ in range(2)]
        return Node(quantized.Requantize(), (sums, *factors, *residual))

    return Graph((x,), (rounded(rounded()),))


def test_what_narrows_a_product_is_computed_behind_it() -> None:
    result = run_pipeline(residual_of_two_products(), parse_pipeline("fuse"))
    regions = [n for n in result.graph.nodes() if isinstance(n.op, Region)]
    assert [n.type.dtype for n in regions] == ["uint8", "uint8"]
    assert any("fewer bytes" in why for _, _, why in result.declined)
