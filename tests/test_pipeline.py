"""Whole pipelines: random graphs bit for bit at every stage, fuel, ledger, dumps, determinism, and time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from paring.backends.targets import TARGETS
from paring.ir import Graph, Input, Loc, Node, interpret, parse, same, show
from paring.ir.errors import ArgumentError, IRTypeError, ParingError, ParseError
from paring.ir.op import Array
from paring.ir.ops import binary, conv, pool, reduce, shape, unary
from paring.ir.verify import verify
from paring.passes.base import Pass
from paring.passes.contract import (
    Close,
    Contract,
    Exact,
    Lossy,
    Steps,
    accumulate,
    allowed_ulps,
    compose,
    difference,
    parse_contract,
    weakest,
)
from paring.passes.ledger import Ledger
from paring.passes.manager import Result, run_pipeline
from paring.passes.pattern import Match, Rule, any_, op
from paring.passes.pipelines import LOSSY, PASSES, PIPELINES, parse_pipeline, pipeline, show_pipeline
from paring.passes.rewriter import Context, apply_rules
from paring.passes.util import constant
from paring.testing import check_round_trip, random_graph, random_inputs

pytestmark = pytest.mark.fast

BLOCKS = (4, 8, 16)


def equal(a: Array, b: Array) -> bool:
    """The same bits but for the signs of zeros, which folding a negative scale into weights does change."""
    return a.dtype == b.dtype and bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))


def blocked(block: int) -> tuple[Pass, ...]:
    return pipeline("blocked", {**TARGETS["x86-avx2"].pipeline_options(), "block": block})


def run_checked(graph: Graph, block: int, *, every: bool = True) -> Result:
    """The whole pipeline, each stage (or the last one alone) read back from its text."""
    result = run_pipeline(graph, blocked(block))
    for _, stage in result.stages if every else result.stages[-1:]:
        check_round_trip(stage)
    return result


def test_random_graphs_give_the_same_bits_at_every_stage(seeds: range) -> None:
    for seed in seeds:
        rng = np.random.default_rng((7, seed))
        graph = random_graph(rng, int(rng.integers(1, 13)))
        result = run_checked(graph, BLOCKS[seed % len(BLOCKS)], every=seed % 4 == 0)
        arrays = random_inputs(graph, rng)
        expected = interpret(graph, arrays)
        for name, stage in result.stages[1:]:
            found = interpret(stage, arrays)
            assert all(map(equal, expected, found)), f"seed {seed}, after {name}:\n{show(graph)}"


def test_random_float_graphs_keep_the_promise_of_the_whole_pipeline(seeds: range) -> None:
    for seed in seeds[::5]:
        rng = np.random.default_rng((11, seed))
        graph = random_graph(rng, 10, exact=False)
        result = run_pipeline(graph, blocked(BLOCKS[seed % len(BLOCKS)]))
        found = difference(graph, result.graph, random_inputs(graph, rng, exact=False))
        assert found.ulps <= allowed_ulps(result.ledger.contract), f"seed {seed}: {found}\n{show(graph)}"


@pytest.mark.parametrize("seed", range(4))
def test_any_amount_of_fuel_gives_the_right_result(seed: int) -> None:
    rng = np.random.default_rng((13, seed))
    graph = random_graph(rng, 8)
    arrays = random_inputs(graph, rng)
    expected = interpret(graph, arrays)
    total = sum(sum(e.rewrites.values()) for e in run_pipeline(graph, blocked(4)).ledger.entries)
    assert 0 < total < 20 * len(graph)
    for fuel in range(total + 3):
        result = run_pipeline(graph, blocked(4), fuel=fuel)
        spent = sum(sum(e.rewrites.values()) for e in result.ledger.entries)
        assert spent == min(fuel, total)
        verify(result.graph)
        assert all(map(equal, expected, interpret(result.graph, arrays))), f"fuel {fuel}"
    assert run_pipeline(graph, blocked(4), fuel=0).graph is graph


def test_passes_may_run_in_any_order() -> None:
    settings = (*PASSES, "const-fold{limit=16}", "layout{block=4}", "prepack{block=4}", "fuse{max_nodes=3}")
    for seed in range(40):
        rng = np.random.default_rng((17, seed))
        graph = random_graph(rng, 8)
        order = [settings[int(i)] for i in rng.integers(0, len(settings), 8)]
        result = run_pipeline(graph, parse_pipeline(order))
        arrays = random_inputs(graph, rng)
        expected = interpret(graph, arrays)
        for name, stage in result.stages[1:]:
            assert all(map(equal, expected, interpret(stage, arrays))), f"seed {seed}, {order}, after {name}"


def test_the_same_program_gives_the_same_text_twice() -> None:
    for seed in range(10):
        first, second = (run_checked(random_graph(np.random.default_rng(seed), 10), 8) for _ in range(2))
        assert [(name, show(stage)) for name, stage in first.stages] == [(name, show(stage)) for name, stage in second.stages]
        assert first.ledger.as_json(times=False) == second.ledger.as_json(times=False)


def test_a_second_run_changes_nothing_more() -> None:
    for seed in range(20):
        simplify = pipeline("simplify", {})
        graph = run_pipeline(random_graph(np.random.default_rng(seed), 10), simplify).graph
        again = run_pipeline(graph, parse_pipeline("const-fold, cse")).graph
        assert same(graph, again)


def test_a_folded_value_keeps_its_shape() -> None:
    x = Node(Input("x", "float32", (0, 3)))
    graph = Graph((x,), tuple(Node(reduce.Sum((0, 1), keep), (x,)) for keep in (False, True)))
    folded = run_pipeline(graph, parse_pipeline("const-fold")).graph
    assert [node.type for node in folded.outputs] == [node.type for node in graph.outputs]
    assert folded.outputs[0].op.name == "const"


def test_what_fuse_declines_comes_in_the_order_of_the_program() -> None:
    x = y = Node(Input("x", "float32", (1, 4, 6, 6)))
    for number in range(3):
        weight = constant(np.ones((4, 4, 3, 3), "float32"))
        product = Node(conv.Conv2d(padding=((1, 1), (1, 1))), (y, weight))
        y = Node(binary.Add(), (Node(unary.Relu(), (product,)), y), Loc(f"step.{number}"))
    result = run_pipeline(Graph((x,), (y,)), parse_pipeline("fuse"))
    assert [rewrite.node.rpartition(" ")[2] for _, rewrite, _ in result.declined] == ["step.0", "step.1"]


# --- text -----------------------------------------------------------------------------------------------------------


def test_true_in_small_letters_is_set_right() -> None:
    with pytest.raises(ParseError, match="'true' is not a literal, True is"):
        parse_pipeline("decompose{attention=true}")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_reads_back(name: str) -> None:
    passes = pipeline(name, TARGETS["x86-avx2"].pipeline_options())
    assert parse_pipeline(show_pipeline(passes)) == passes
    assert len(passes) == len(PIPELINES[name])


@pytest.mark.parametrize("cls", PASSES.values(), ids=PASSES)
def test_a_pass_prints_its_name_and_says_what_it_does(cls: type[Pass]) -> None:
    assert str(cls()) == cls.name
    assert cls.summary().endswith(".")
    assert isinstance(cls.contract, Exact | Close | Steps), "lossy passes live in passes/compress"
    assert not cls.lossy


def test_the_contract_of_a_pass_is_the_weakest_of_its_rules() -> None:
    for transformation in parse_pipeline(("decompose{attention=True}", *PASSES)):
        rules = transformation.rules()
        if rules and str(transformation) != "decompose":
            assert transformation.contract == weakest([rule.contract for rule in rules]), str(transformation)


@pytest.mark.parametrize("cls", LOSSY.values(), ids=LOSSY)
def test_lossy_passes_are_quarantined(cls: type[Pass]) -> None:
    assert str(cls()) == cls.name
    assert cls.summary().endswith(".")
    assert cls.lossy
    assert cls.__module__.startswith("paring.passes.compress.")
    assert not {step.partition("{")[0] for steps in PIPELINES.values() for step in steps} & set(LOSSY)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("canonicalise", ArgumentError, "did you mean 'canonicalize'?"),
        ("layout{blok=4}", ArgumentError, "did you mean 'block'?"),
        ("layout{block='x'}", ArgumentError, "block should be of type int, not 'x'"),
        ("layout{block=True}", ArgumentError, "block should be of type int, not True"),
        ("layout{block=4", ParseError, "expected"),
        ("layout{block=4}}", ParseError, "expected end"),
        ("cse{x=1}", ArgumentError, "options: none"),
    ],
)
def test_a_bad_pipeline_is_refused(text: str, error: type[ParingError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_pipeline(text)


def test_an_unknown_pipeline_is_refused() -> None:
    with pytest.raises(ArgumentError, match="known: none, simplify, prepare, blocked"):
        pipeline("bloked", {})


# --- contracts ------------------------------------------------------------------------------------------------------


CONTRACTS = (
    *(Exact(), Exact(finite=True), Close(0), Close(4), Close(0.5, finite=True), Lossy("accuracy", 0.1), Lossy("noise", math.inf)),
    *(Steps(1), Steps(2, 4), Steps(1, 0.5, finite=True)),
)


@pytest.mark.parametrize("contract", CONTRACTS, ids=str)
def test_a_contract_reads_back(contract: Contract) -> None:
    assert parse_contract(str(contract)) == contract


@pytest.mark.parametrize(
    "text", ["", "Exactly", "Close()", "Close(x)", "Close(1) for", "Steps(0.5)", "Lossy(a, 1) for finite values"]
)
def test_what_is_no_contract_is_refused(text: str) -> None:
    with pytest.raises(ParseError, match="is not a contract"):
        parse_contract(text)


def test_promises_add_up() -> None:
    assert compose([]) == Exact()
    assert compose([Exact(), Close(2), Close(3)]) == Close(5)
    assert compose([Exact(finite=True), Close(2)]) == Close(2, finite=True)
    assert compose([Exact(finite=True), Exact()]) == Exact(finite=True)
    assert compose([Steps(1), Close(2), Steps(1, 4)]) == Steps(2, 6)
    assert weakest([Steps(1), Close(2), Steps(1, 4, finite=True)]) == Steps(1, 4, finite=True)
    assert accumulate([Steps(1), Close(2), Steps(1, 4)]) == Steps(1, 6)
    assert accumulate([Close(4, finite=True)] * 3) == Close(12, finite=True)
    assert accumulate([Lossy("noise", 1)] * 2) == Lossy("noise", 1)
    assert compose([Lossy("accuracy", 0.1), Lossy("noise", 3)]) == Lossy("accuracy and noise", math.inf)
    assert compose([Close(2), Lossy("accuracy", 0.1), Lossy("accuracy", 0.2)]) == Lossy("accuracy", pytest.approx(0.3))


def test_the_ledger_promises_what_fired() -> None:
    x = Node(Input("x", "float32", (4,)))
    graph = Graph((x,), (Node(binary.Mul(), (x, Node(unary.Sigmoid(), (x,)))),))
    assert run_pipeline(graph, parse_pipeline("canonicalize")).ledger.contract == Close(2)
    kept = Graph((x,), (Node(unary.Neg(), (Node(unary.Neg(), (x,)),)),))
    assert run_pipeline(kept, parse_pipeline("canonicalize")).ledger.contract == Exact()


def test_what_holds_for_finite_values_only_is_promised_where_it_fired() -> None:
    x = Node(Input("x", "float32", (1, 2, 3, 3)))
    weight = constant(np.ones((2, 1, 2, 2), "float32"))
    layer = Node(conv.ConvTranspose2d(stride=(2, 2)), (x, weight))
    for output, promise in ((layer, Close(1, finite=True)), (Node(pool.AdaptiveAvgPool2d((1, 1)), (x,)), Close(1))):
        ledger = run_pipeline(Graph((x,), (output,)), parse_pipeline("decompose, dce")).ledger
        assert ledger.contract == promise
        assert Ledger.from_json(json.loads(json.dumps(ledger.as_json()))) == ledger
        assert str(promise) in str(ledger)


# --- rewriting ------------------------------------------------------------------------------------------------------


def test_rules_that_never_rest_are_stopped() -> None:
    def back_and_forth(m: Match) -> Node | None:
        """neg(x) -> neg(neg(neg(x)))"""
        return m.make(unary.Neg(), m.make(unary.Neg(), m.make(unary.Neg(), m.root.inputs[0])))

    x = Node(Input("x", "float32", (4,)))
    with pytest.raises(ParingError, match="rules"):
        apply_rules(Graph((x,), (Node(unary.Neg(), (x,)),)), [Rule(op(unary.Neg), back_and_forth, Exact())], Context())


def test_a_rewrite_that_changes_a_type_is_named_with_pass_rule_node_and_types() -> None:
    def changes_the_type(m: Match) -> Node | None:
        """relu(x) -> sum(x)"""
        return m.make(shape.Reshape((4, 1)), m["x"])

    class Bad(Pass):
        name = "bad"

        def rules(self) -> list[Rule]:
            return [Rule(op(unary.Relu, any_("x")), changes_the_type, Exact())]

    x = Node(Input("x", "float32", (4,)))
    with pytest.raises(IRTypeError) as caught:
        run_pipeline(Graph((x,), (Node(unary.Relu(), (x,)),)), [*parse_pipeline("cse"), Bad()])
    for fragment in ("float32[4,1]", "float32[4]", "pass 2 bad", "rule changes-the-type", "relu float32[4]"):
        assert fragment in str(caught.value)


def test_a_declined_rewrite_says_why() -> None:
    x = Node(Input("x", "float32", (4,)))
    inner = Node(unary.Clamp(-1.0, 1.0), (x,))
    result = run_pipeline(Graph((x,), (Node(unary.Clamp(2.0, 3.0), (inner,)),)), parse_pipeline("canonicalize"))
    ((name, rewrite, why),) = result.declined
    assert (name, rewrite.rule, why) == ("canonicalize", "merge-clamps", "the ranges do not overlap")


# --- dumps ----------------------------------------------------------------------------------------------------------


def test_dumps_hold_the_changed_stages_and_the_ledger(tmp_path: Path) -> None:
    graph = random_graph(np.random.default_rng(3), 12)
    (tmp_path / "099_old.ir").write_text("left over")
    result = run_pipeline(graph, blocked(8), dump=tmp_path, metric=lambda g: float(len(g)))
    arrays = load_file(tmp_path / "constants.safetensors")
    files = sorted(tmp_path.glob("*.ir"))
    assert files[0].name == "000_import.ir"
    assert len(files) == len(result.stages)
    changed = [e.step for e in result.ledger.entries if e.changed]
    assert [int(f.name[:3]) for f in files] == [0, *changed]
    for file, (_, stage) in zip(files, result.stages, strict=True):
        assert show(parse(file.read_text(), arrays)) == show(stage)
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert [e["name"] for e in ledger["entries"]] == [str(p) for p in blocked(8)]
    assert ledger["contract"] == str(result.ledger.contract)
    for entry, found in zip(ledger["entries"], result.ledger.entries, strict=True):
        assert entry["after"]["nodes"] == found.after.nodes
        assert (entry["metric"] is not None) == entry["changed"]
    assert "in all:" in (tmp_path / "ledger.txt").read_text()


def test_dumps_that_cannot_be_written_are_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot write the dumps"):
        run_pipeline(random_graph(np.random.default_rng(0), 2), (), dump=tmp_path / "file")
