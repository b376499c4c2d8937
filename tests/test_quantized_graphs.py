"""Random networks in Q/DQ form: fold-qdq keeps its promise, leaves nothing in float, and compiled they have the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from quantized_graphs import quantized_graph
from wrong_qdq import WRONG

from paring.ir import interpret, show
from paring.ir.verify import verify
from paring.passes import fold_qdq
from paring.passes.bisect import bisect
from paring.passes.contract import same_bits
from paring.passes.manager import run_pipeline
from paring.passes.pattern import Rule
from paring.passes.pipelines import parse_pipeline, pipeline

fast = pytest.mark.fast
TARGETS = ("x86-avx512", "x86-avx2")
FOLD = parse_pipeline((*pipeline("simplify", {}), "decompose", "fold-qdq", "const-fold{dequantize=True}"))
RULE = [rule.name for rule in fold_qdq.RULES].index("layer-on-integers")
ENDS = {"input", "const", "broadcast", "quantize", "dequantize", "descale", "integer_attention"}
# What a softmax and a layer norm on integers round for each row.
ROWS = {"cast", "div", "sqrt", "add", "sub", "mul"}


@fast
def test_random_quantized_graphs_become_integers(seeds: range) -> None:
    for seed in seeds[::2]:
        graph, given = quantized_graph(np.random.default_rng((5, seed)))
        folded = run_pipeline(graph, FOLD).graph
        verify(folded)
        left = {n.op.name for n in folded.nodes() if n.type.is_float} - ENDS - ROWS
        assert not left, f"seed {seed}\n{show(folded)}"
        found = bisect(graph, FOLD, [given])
        assert found is None, f"seed {seed}: {found}"


def compare_compiled(seed: int, target: str) -> None:
    from paring.backends.build import build
    from paring.backends.devices import open_executable
    from paring.backends.targets import missing_flags, resolve

    machine = resolve(target)
    if missing_flags(machine):
        pytest.skip(f"this host lacks {', '.join(missing_flags(machine))}")
    graph, given = quantized_graph(np.random.default_rng((5, seed)))
    wanted = interpret(run_pipeline(graph, FOLD).graph, [given])
    compiled = run_pipeline(graph, parse_pipeline(pipeline(machine.pipeline, machine.pipeline_options()))).graph
    with open_executable(build(compiled, machine), machine, None) as run:
        got = run.run([given])
    for x, y in zip(wanted, got, strict=True):
        assert same_bits(x, y), f"seed {seed} on {target}"


@fast
def test_a_wrong_rewrite_is_found_in_a_random_quantized_graph() -> None:
    wrong = dataclasses.replace(fold_qdq.RULES[RULE], rewrite=WRONG["layer-on-integers"][1])

    class Wrong(fold_qdq.FoldQdq):
        def rules(self) -> Sequence[Rule]:
            return (*fold_qdq.RULES[:RULE], wrong, *fold_qdq.RULES[RULE + 1 :])

    found = []
    for seed in range(10):
        graph, given = quantized_graph(np.random.default_rng((5, seed)))
        passes = [Wrong() if isinstance(p, fold_qdq.FoldQdq) else p for p in FOLD]
        found.append(bisect(graph, passes, [given]))
    assert sum(f is not None and str(f.rewrite).startswith("forgets-the-zero-point") for f in found) >= 9


@pytest.mark.parametrize("target", TARGETS)
def test_random_quantized_graphs_have_the_same_bits_compiled(target: str, seeds: range) -> None:
    for seed in seeds[::64]:
        compare_compiled(seed, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_random_quantized_graphs_have_the_same_bits_compiled(target: str, seeds: range) -> None:
    for seed in seeds:
        compare_compiled(seed, target)
