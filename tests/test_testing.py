"""`paring.testing` finds what is wrong with a user's own pass, and lets a right one through."""

from __future__ import annotations

import re
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from paring.ir import Graph, Input, Node
from paring.ir.errors import ContractError
from paring.ir.ops import binary, unary
from paring.ir.verify import verify
from paring.passes.base import Pass
from paring.passes.contract import Close, Exact
from paring.passes.pattern import Match, Pattern, Rule, any_, op
from paring.passes.rewriter import Context
from paring.passes.util import constant, splat_value
from paring.testing import Builder, Plant, check_pass, graphs, random_graph, random_inputs, shrink, work

pytestmark = pytest.mark.fast

X = any_("x")


def splat(value: float) -> Pattern:
    return any_("c", lambda node: splat_value(node) == value)


def plant(operation: binary.Binary, value: float) -> Plant:
    def build(b: Builder) -> Node:
        x = b.tensor(2, 3)
        return b.node(operation, x, b.splat(value, x.type.shape))

    return build


def doubled(m: Match) -> Node | None:
    """x * 2 -> x + x"""
    return m.make(binary.Add(), m["x"], m["x"])


def to_x(m: Match) -> Node | None:
    """x o c -> x"""
    return m["x"]


def to_zeros(m: Match) -> Node | None:
    """x o c -> 0"""
    return constant(np.zeros(m.root.type.shape, m.root.type.dtype))


def test_a_right_rule_passes() -> None:
    rule = Rule(op(binary.Mul, X, splat(2.0)), doubled, Exact())
    report = check_pass(rule, plant=plant(binary.Mul(), 2.0), trials=70, size=4)
    assert report.fired >= 50
    assert report.rewrites == {"doubled": report.fired}
    assert report.changed <= report.trials


@pytest.mark.parametrize(
    ("operation", "value", "rewrite"),
    [(binary.Add(), 0.0, to_x), (binary.Mul(), 0.0, to_zeros), (binary.Mul(), 2.0, to_x)],
    ids=["breaks -0.0", "breaks NaN", "breaks all"],
)
def test_a_wrong_rule_is_shown_by_a_small_graph(operation: binary.Binary, value: float, rewrite: object) -> None:
    rule = Rule(op(type(operation), X, splat(value)), rewrite, Exact())  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="promised Exact, but output") as caught:
        check_pass(rule, plant=plant(operation, value), trials=70, size=12)
    text = str(caught.value)
    assert "trial" in text
    assert text.count("(%") - text.count("graph(%") <= 2, text


def test_special_values_are_left_out_where_the_contract_is_for_finite_ones() -> None:
    for finite, faults in ((False, pytest.raises(ContractError, match="special values")), (True, nullcontext())):
        rule = Rule(op(binary.Mul, X, splat(0.0)), to_zeros, Close(1, finite))
        with faults:
            check_pass(rule, plant=plant(binary.Mul(), 0.0), trials=70, size=4)


class SwapsOutputs(Pass):
    """Gives the outputs in another order."""

    name = "swaps-outputs"

    def run(self, graph: Graph, context: Context) -> Graph:
        if len(graph.outputs) > 1:
            context.spend("swap", graph.outputs[0])
        return Graph(graph.inputs, graph.outputs[::-1])


class NeverRests(Pass):
    """Negates twice, each time it is run."""

    name = "never-rests"

    def rules(self) -> list[Rule]:
        return [Rule(op(unary.Neg, op(unary.Neg, X)), to_x, Exact())]

    def run(self, graph: Graph, context: Context) -> Graph:
        context.spend("twice", graph.outputs[0])
        outputs = [Node(unary.Neg(), (Node(unary.Neg(), (n,)),)) if n.type.is_float else n for n in graph.outputs]
        return Graph(graph.inputs, tuple(outputs))


@pytest.mark.parametrize(("wrong", "message"), [(SwapsOutputs(), "output"), (NeverRests(), "has not come to rest")])
def test_a_wrong_pass_is_found_out(wrong: Pass, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        check_pass(wrong, trials=70, size=4)


def test_shrinking_keeps_what_fails_and_drops_the_rest() -> None:
    def has_a_convolution(graph: Graph) -> bool:
        return any(node.op.name == "conv2d" for node in graph.nodes())

    for seed in range(40):
        graph = random_graph(np.random.default_rng(seed), 12)
        if has_a_convolution(graph):
            small = shrink(graph, has_a_convolution)
            verify(small)
            assert has_a_convolution(small)
            assert work(small) <= 5


@settings(max_examples=50)
@given(graphs(max_size=10))
def test_the_strategy_gives_well_formed_graphs(graph: Graph) -> None:
    verify(graph)


def test_random_inputs_fit_and_hold_special_values_when_asked() -> None:
    x = Node(Input("x", "float32", (1000,)))
    graph = Graph((x,), (x,))
    (plain,) = random_inputs(graph, np.random.default_rng(0))
    (special,) = random_inputs(graph, np.random.default_rng(0), special=0.5)
    assert np.isfinite(plain).all()
    assert (plain == np.rint(plain)).all()
    assert np.isnan(special).any()
    assert np.isinf(special).any()
    assert (np.signbit(special) & (special == 0)).any()


def test_the_example_of_the_readme_runs() -> None:
    """A rule, a pass of it, and what is planted for its check."""
    text = (Path(__file__).parent.parent / "passes" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("readme_example")
    sys.modules[module.__name__] = module  # where a dataclass looks up its annotations
    try:
        exec(code, module.__dict__)
    finally:
        del sys.modules[module.__name__]
