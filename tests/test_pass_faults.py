"""Passes and rules that fail: each fault becomes a typed error that names pass, rule and node."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paring.ir import Graph, Input, Loc, Node, TensorType
from paring.ir.errors import ArgumentError, ContractError, ParingError, PassError, VerifyError
from paring.ir.ops import binary, shape, unary
from paring.passes.base import Pass
from paring.passes.bisect import bisect
from paring.passes.contract import Exact, Lossy
from paring.passes.ledger import Ledger
from paring.passes.manager import run_pipeline
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.pipelines import parse_pipeline
from paring.passes.rewriter import Context
from paring.testing import check_once

pytestmark = pytest.mark.fast


def program() -> Graph:
    x, y = (Node(Input(label, "float32", (2, 3))) for label in "xy")
    return Graph((x, y), (Node(unary.Relu(), (Node(binary.Add(), (x, y)),), Loc("body.1", "net.py:7")), x))


class Bad(Pass):
    """Does what its test says."""

    name = "bad"

    def __init__(self, run: Callable[[Graph], Any]) -> None:
        object.__setattr__(self, "change", run)

    def run(self, graph: Graph, context: Context) -> Graph:
        context.spend("change", graph.outputs[0])
        return self.change(graph)  # type: ignore[attr-defined, no-any-return]


def replaced(graph: Graph, index: int, node: Node) -> Graph:
    outputs = list(graph.outputs)
    outputs[index] = node
    return Graph(graph.inputs, tuple(outputs))


def other_inputs(graph: Graph, *inputs: Node) -> Graph:
    return Graph(inputs, (Node(unary.Relu(), (inputs[0],)), inputs[0]))


Z = Node(Input("z", "float32", (2, 3)))
SIGNATURES: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "output type": (lambda g: replaced(g, 1, Node(unary.Cast("float64"), (g.inputs[0],))), "type of an output"),
    "output shape": (lambda g: replaced(g, 0, Node(shape.Reshape((6,)), (g.outputs[0],))), "type of an output"),
    "output dropped": (lambda g: Graph(g.inputs, g.outputs[:1]), "type of an output"),
    "output added": (lambda g: Graph(g.inputs, (*g.outputs, g.outputs[0])), "type of an output"),
    "input dropped": (lambda g: other_inputs(g, g.inputs[0]), "inputs"),
    "input added": (lambda g: Graph((*g.inputs, Z), g.outputs), "inputs"),
    "input renamed": (lambda g: other_inputs(g, g.inputs[0], Z), "inputs"),
    "inputs swapped": (lambda g: Graph(g.inputs[::-1], g.outputs), "inputs"),
    "input retyped": (lambda g: other_inputs(g, g.inputs[0], Node(Input("y", "float64", (2, 3)))), "inputs"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_pass_that_changes_how_the_program_is_called_is_refused(name: str) -> None:
    change, what = SIGNATURES[name]
    with pytest.raises(ContractError, match=f"bad changed the {what}") as caught:
        run_pipeline(program(), [*parse_pipeline("cse"), Bad(change)])
    assert caught.value.where.startswith("pass 2 bad after change at relu float32[2,3] from body.1 (net.py:7)")
    with pytest.raises(ContractError, match=f"bad changed the {what}"):
        check_once(Bad(change), program())


def foreign(graph: Graph) -> Graph:
    return replaced(graph, 1, Z)


def forged(graph: Graph) -> Graph:
    node = Node(binary.Add(), graph.inputs, Loc("body.2", "net.py:8"))
    node.type = TensorType("float32", (3, 2))
    return replaced(graph, 1, node)


BROKEN: dict[str, tuple[Callable[[Graph], Any], type[ParingError], str]] = {
    "none": (lambda g: None, PassError, "the pass gives a NoneType, not a graph"),
    "node": (lambda g: g.outputs[0], PassError, "the pass gives a Node, not a graph"),
    "numpy": (lambda g: np.zeros(3).reshape(2, 2), PassError, r"the pass raised ValueError at tests/test_pass_faults\.py:"),
    "key": (lambda g: {}["x"], PassError, "the pass raised KeyError"),
    "no nodes": (lambda g: Graph(g.inputs, (None,)), PassError, "the pass raised AttributeError"),  # type: ignore[arg-type]
    "foreign input": (foreign, VerifyError, "input 'z' is read but not listed"),
    "forged": (forged, VerifyError, r"add\(float32\[2,3\], float32\[2,3\]\) from body.2 \(net.py:8\) in graph"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_pass_that_fails_is_named(name: str) -> None:
    change, error, message = BROKEN[name]
    with pytest.raises(error, match=message) as caught:
        run_pipeline(program(), [*parse_pipeline("cse, dce"), Bad(change)])
    assert caught.value.where.startswith("pass 3 bad after change at relu")
    found = bisect(program(), [Bad(change)], [np.zeros((2, 3), "float32")] * 2)
    assert found is not None
    assert found.name == "bad"


def gives_an_array(m: Match) -> Any:
    """relu(x) -> numbers"""
    return np.zeros((2, 3))


def asks_for_more(m: Match) -> Node | None:
    """relu(x) -> y"""
    return m["y"]


def reshapes_wrongly(m: Match) -> Node | None:
    """relu(x) -> nothing"""
    return Node(unary.Relu(), (np.zeros(6).reshape(4, 2),))  # type: ignore[arg-type]


def raises_a_key_error(m: Match) -> Node | None:
    """relu(x) -> nothing"""
    return {}[m.root]  # type: ignore[no-any-return]


RULES: dict[str, tuple[Callable[[Match], Node | None], str]] = {
    "gives-an-array": (gives_an_array, "a rewrite gives a ndarray, not a node"),
    "asks-for-more": (asks_for_more, r"the pattern captures no 'y'\n.*\n  why: it captures 'x'"),
    "reshapes-wrongly": (reshapes_wrongly, r"a rule raised ValueError at .*\n.*\n  why: cannot reshape"),
    "raises-a-key-error": (raises_a_key_error, r"a rule raised KeyError at tests/test_pass_faults\.py:"),
}


class OfOneRule(Pass):
    """Has one rule."""

    name = "of-one-rule"

    def __init__(self, rule: Rule) -> None:
        object.__setattr__(self, "rule", rule)

    def rules(self) -> list[Rule]:
        return [self.rule]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_fails_is_named_with_its_pass_and_node(name: str) -> None:
    rewrite, message = RULES[name]
    transformation = OfOneRule(Rule(op(unary.Relu, any_("x")), rewrite, Exact()))
    with pytest.raises(PassError, match=message) as caught:
        run_pipeline(program(), [transformation])
    assert caught.value.where == f"pass 1 of-one-rule: rule {name} at relu float32[2,3] from body.1 (net.py:7)"


def test_a_pattern_whose_condition_fails_is_named_too() -> None:
    rule = Rule(op(unary.Relu, any_("x", lambda node: bool(node.op.axis))), asks_for_more, Exact())  # type: ignore[attr-defined]
    with pytest.raises(PassError, match="a rule raised AttributeError") as caught:
        run_pipeline(program(), [OfOneRule(rule)])
    assert "rule asks-for-more at relu" in caught.value.where


# --- dumps of what failed -------------------------------------------------------------------------------------------


def doubled(graph: Graph) -> Graph:
    return replaced(graph, 0, Node(unary.Relu(), (graph.outputs[0],)))


def test_the_stages_before_a_failure_are_dumped_and_the_error_says_where(tmp_path: Path) -> None:
    with pytest.raises(PassError) as caught:
        run_pipeline(program(), [*parse_pipeline("cse"), Bad(doubled), Bad(lambda g: None)], dump=tmp_path / "dump")
    assert str(tmp_path / "dump") in caught.value.hint
    assert sorted(p.name for p in (tmp_path / "dump").glob("*.ir")) == ["000_import.ir", "002_bad.ir"]
    assert len(json.loads((tmp_path / "dump" / "ledger.json").read_text())["entries"]) == 2


def test_a_failure_that_cannot_be_dumped_is_still_the_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PassError, match="cannot write the dumps"):
        run_pipeline(program(), [Bad(lambda g: None)], dump=tmp_path / "file")


def test_a_metric_that_fails_leaves_the_stages(tmp_path: Path) -> None:
    def metric(graph: Graph) -> float:
        raise ZeroDivisionError

    with pytest.raises(ArgumentError, match="ZeroDivisionError"):
        run_pipeline(program(), [Bad(doubled)], dump=tmp_path, metric=metric)
    assert (tmp_path / "000_import.ir").exists()


# --- lossy passes ---------------------------------------------------------------------------------------------------


class Rounds(Bad):
    """Loses something."""

    name = "rounds"
    lossy = True
    contract = Lossy("accuracy", 0.1)


def test_a_lossy_pass_without_a_metric_says_so_in_the_ledger() -> None:
    passes = [*parse_pipeline("cse"), Rounds(doubled)]
    ledger = run_pipeline(program(), passes).ledger
    assert "no metric was given" in str(ledger)
    assert Ledger.from_json(ledger.as_json()).contract == ledger.contract == Lossy("accuracy", 0.1)
    measured = run_pipeline(program(), passes, metric=lambda graph: 1.0).ledger
    assert "no metric" not in str(measured)
