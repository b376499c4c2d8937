"""Random networks in Q/DQ form: fold-qdq keeps its promise, leaves nothing in float, and compiled they have the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from quantized_graphs import quantized_graph

from paring.ir import interpret, show
from paring.ir.verify import verify
from paring.passes.contract import check, same_bits
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline, pipeline

fast = pytest.mark.fast
TARGETS = ("x86-avx512", "x86-avx2")
FOLD = parse_pipeline((*pipeline("simplify", {}), "decompose", "fold-qdq", "const-fold{dequantize=True}"))
ENDS = {"input", "const", "broadcast", "quantize", "dequantize", "descale"}
# What a softmax and a layer norm on integers round for each row.
ROWS = {"cast", "div", "sqrt", "add", "sub", "mul"}


@fast
def test_random_quantized_graphs_become_integers(seeds: range) -> None:
    for seed in seeds[::2]:
        graph, given = quantized_graph(np.random.default_rng((5, seed)))
        result = run_pipeline(graph, FOLD)
        verify(result.graph)
        left = {n.op.name for n in result.graph.nodes() if n.type.is_float} - ENDS - ROWS
        assert not left, f"seed {seed}\n{show(result.graph)}"
        check(result.ledger.contract, graph, result.graph, [given], who=f"seed {seed}")


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


@pytest.mark.parametrize("target", TARGETS)
def test_random_quantized_graphs_have_the_same_bits_compiled(target: str, seeds: range) -> None:
    for seed in seeds[::64]:
        compare_compiled(seed, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_random_quantized_graphs_have_the_same_bits_compiled(target: str, seeds: range) -> None:
    for seed in seeds:
        compare_compiled(seed, target)
