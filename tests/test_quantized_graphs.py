"""Random networks in Q/DQ form: fold-qdq keeps its promise, leaves nothing in float, and compiled they have the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from quantized_graphs import quantized_graph, together
from wrong_qdq import WRONG

from paring.ir import Graph, interpret, show
from paring.ir.op import Array
from paring.ir.verify import verify
from paring.passes import fold_qdq
from paring.passes.bisect import bisect
from paring.passes.contract import same_bits
from paring.passes.manager import run_pipeline
from paring.passes.pattern import Rule
from paring.passes.pipelines import parse_pipeline, pipeline
from paring.passes.winograd import Winograd

fast = pytest.mark.fast
# With VNNI, with AVX-512 but without it, with AVX2; with the dot product and with plain NEON.
TARGETS = ("x86-vnni", "x86-avx512", "x86-avx2")
ARM = ("arm", "arm-neon")
# Steps of a network that is compiled: each is some kernels, and a kernel takes as long as the interpreter on ten networks.
COMPILED_STEPS = 3
# One graph of so many is compiled where not all are.
IN_CI = 8
GRAPHS_ON_ARM = 16
# In turns, so many networks as users get them, and so many with all convolutions by tiles that can.
BY_TILES = 64
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


def compare_compiled(seeds: Sequence[int], names: Sequence[str], device: str | None = None) -> None:
    """Networks compiled as one library for each target, each against the interpreter on its own folded graph."""
    made = [quantized_graph(np.random.default_rng((5, seed)), COMPILED_STEPS) for seed in seeds]
    wanted = [interpret(run_pipeline(graph, FOLD).graph, [given]) for graph, given in made]
    everything = together([graph for graph, _ in made])
    wrong = []
    tiles = bool(seeds[0] // BY_TILES % 2)
    for name in names:
        found = iter(run_compiled(everything, [given for _, given in made], name, device, tiles))
        pairs = [[(array, next(found)) for array in arrays] for arrays in wanted]
        wrong += [(name, seed) for seed, both in zip(seeds, pairs, strict=True) if not all(same_bits(*pair) for pair in both)]
    assert not wrong, (
        f"other bits: quantized_graph(np.random.default_rng((5, seed)), {COMPILED_STEPS}) of these targets and seeds: {wrong}"
    )


def run_compiled(graph: Graph, given: Sequence[Array], name: str, device: str | None, tiles: bool) -> list[Array]:
    """With `tiles` all convolutions run by tiles that can, not just those that are faster."""
    from paring.backends.build import build
    from paring.backends.devices import open_executable
    from paring.backends.targets import resolve

    machine = resolve(name)
    passes = pipeline(machine.pipeline, machine.pipeline_options())
    if tiles and machine.winograd:
        passes = tuple(dataclasses.replace(each, ratio=1e6, far=0.0) if isinstance(each, Winograd) else each for each in passes)
    lowered = run_pipeline(graph, passes).graph
    with open_executable(build(lowered, machine), machine, device) as run:
        return run.run(given)


def lacking(name: str) -> list[str]:
    from paring.backends.targets import missing_flags, resolve

    return missing_flags(resolve(name))


def check_emulator() -> None:
    from paring.backends import emulator_build

    if emulator_build.missing():
        pytest.skip(f"no emulated ARM: {', '.join(emulator_build.missing())}")


@pytest.mark.parametrize("target", TARGETS)
def test_random_quantized_graphs_have_the_same_bits_compiled(target: str, seeds: range) -> None:
    """Some of each part, others for each target."""
    if lacking(target):
        pytest.skip(f"this host lacks {', '.join(lacking(target))}")
    compare_compiled(seeds[TARGETS.index(target) :: IN_CI], [target])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_random_quantized_graphs_have_the_same_bits_compiled(seeds: range) -> None:
    """All of each part for every target, made and interpreted once."""
    able = [target for target in TARGETS if not lacking(target)]
    compare_compiled(seeds, able)
    if able != list(TARGETS):
        pytest.skip(f"compared for {able or 'no target'} only: this host lacks what the others need")


@pytest.mark.parametrize("target", ARM)
def test_random_quantized_graphs_have_the_same_bits_on_emulated_arm(target: str) -> None:
    check_emulator()
    compare_compiled(range(ARM.index(target), GRAPHS_ON_ARM, len(ARM)), [target], "emulator")


@pytest.mark.parametrize("target", ARM)
def test_a_quantized_network_has_the_same_bits_on_emulated_arm(target: str) -> None:
    torch = pytest.importorskip("torch")
    check_emulator()
    import paring
    from paring.bench.networks import small_mobilenet

    model, (x,) = small_mobilenet()
    torch.manual_seed(0)
    batches = [torch.randn(x.shape) for _ in range(4)]
    with paring.compile(model, (x,), target=target, device="emulator", passes="quantize", calibration=batches) as net:
        assert not [n for n in net.graph.nodes() if n.op.macs(n.type, *(i.type for i in n.inputs)) and n.inputs[0].type.is_float]
        (wanted,) = interpret(net.graph, [x.numpy()])
        assert same_bits(net(x.numpy()), wanted)
