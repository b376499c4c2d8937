"""equalize, smooth, adaround, correct-bias: what they keep, what they gain, and what they decline."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from test_quantize import Batches, batches_for, chain, layer, noise, run, weight

from paring.ir import Const, Graph, Input, Loc, Node, interpret, rebuild, show
from paring.ir.errors import ArgumentError
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, norm, pool, reduce, shape, unary
from paring.ir.ops.attention import IntegerAttention, ScaledDotProductAttention
from paring.passes.compress.layers import carries, is_quantized_weight
from paring.passes.compress.operands import operand_rows
from paring.passes.compress.quantization.rescale import by_group, input_ranges
from paring.passes.compress.quantization.twins import find_twins
from paring.passes.contract import Close, Exact, Lossy, check
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline
from paring.passes.rewriter import Context
from paring.testing import Builder, planted_graph, random_inputs

pytestmark = pytest.mark.fast

# Noise over signal: 26 dB, what 8 bits make of these few layers; -100 dB, which only float32 rounding makes.
LITTLE, ROUNDING = 0.05, 1e-5


def rng_for(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- equalize -------------------------------------------------------------------------------------------------------


def ladder(seed: int, middle: Callable[[Node], Node], spread: float = 0.0) -> Graph:
    """Pointwise, depthwise, pointwise, as mobile networks have them, with badly scaled channels between."""
    rng = rng_for(seed)
    image = x = Node(Input("x", "float32", (2, 6, 5, 5)))
    scale = 10 ** rng.uniform(-spread, spread, 12).astype("float32")
    for number in range(2):
        y = middle(_scaled(layer(rng, x, 12, f"{number}.expand", kernel=1), out=scale))
        y = middle(_scaled(layer(rng, y, 12, f"{number}.depthwise", groups=12), into=scale, out=scale[::-1]))
        x = Node(binary.Add(), [_scaled(layer(rng, y, 6, f"{number}.project", kernel=1), into=scale[::-1]), x])
    flat = Node(reduce.Mean((2, 3)), [x])
    return Graph((image,), (Node(linear.Linear(), [flat, weight(rng, 4, 6)], Loc("classifier")),))


def _scaled(node: Node, into: Array | None = None, out: Array | None = None) -> Node:
    w, b = (i.op.value.copy() for i in node.inputs[1:])
    if into is not None:
        w = (by_group(w, node) / into.reshape(node.op.groups, 1, -1, 1)).reshape(w.shape)
    if out is not None:
        w, b = w * out[:, None, None, None], b * out
    return node.with_inputs([node.inputs[0], Node(Const(np.ascontiguousarray(w))), Node(Const(np.ascontiguousarray(b)))])


def relu(x: Node) -> Node:
    return Node(unary.Relu(), [x])


def relu6(x: Node) -> Node:
    return Node(unary.Clamp(0.0, 6.0), [x])


def plain(x: Node) -> Node:
    return x


@pytest.mark.parametrize("middle", [relu, plain, lambda x: Node(unary.LeakyRelu(0.1), [x])])
@pytest.mark.parametrize("options", ["", "{ranges='activations'}"])
def test_equalize_changes_nothing_but_rounding(middle: Callable[[Node], Node], options: str) -> None:
    for seed in range(4):
        graph = ladder(seed, middle, spread=2.0)
        result = run(graph, f"equalize{options}", batches_for(graph, exact=False))
        (entry,) = result.ledger.entries
        assert entry.rewrites == {"equalize": 4}
        assert entry.contract == Close(8)
        check(entry.contract, graph, result.graph, random_inputs(graph, rng_for(seed), False))


def linked(b: Builder) -> Node:
    """Two layers with something between them that keeps channels apart, or nearly so."""
    y = b.layer(b.image(), b.choose(2, 4), b.choose(1, 3), bias=b.chance(0.5))
    between = (unary.Relu(), unary.LeakyRelu(0.25), unary.Abs(), unary.Tanh(), pool.MaxPool2d((1, 1), (1, 1)))
    for _ in range(b.choose(0, 1, 2)):
        y = b.node(between[b.choose(0, 0, 0, 1, 2, 3, 4, 4)], y)
    if b.chance(0.3):
        return b.node(linear.Linear(), b.node(reduce.Mean((2, 3)), y), b.weights(3, y.type.shape[1]))
    groups = y.type.shape[1] if b.chance(0.3) else 1
    return b.layer(y, y.type.shape[1], 1, groups=groups)


def test_planted_graphs_keep_their_values_through_equalize() -> None:
    fired = 0
    for seed in range(300):
        rng = rng_for(seed)
        graph = planted_graph(rng, linked, 2, exact=False)
        result = run_pipeline(graph, parse_pipeline("equalize"))
        (entry,) = result.ledger.entries
        count = sum(entry.rewrites.values())
        fired += count
        assert entry.contract == (Close(2 * count) if count else Exact())
        check(entry.contract, graph, result.graph, random_inputs(graph, rng, False))
    assert fired >= 50


@pytest.mark.parametrize("middle", [relu, relu6])
def test_hostile_channels_lose_much_without_and_little_with_equalize(middle: Callable[[Node], Node]) -> None:
    graph = ladder(1, middle, spread=0.0 if middle is relu6 else 1.5)
    if middle is relu6:
        graph = _shrunk(graph)
    calibration, fresh = batches_for(graph, 8, exact=False), batches_for(graph, 12, exact=False)[8:]
    without = noise(graph, run(graph, "quantize", calibration).graph, fresh)
    for options in ("", "{ranges='activations'}"):
        found = noise(graph, run(graph, f"equalize{options}, quantize", calibration).graph, fresh)
        assert found < without / 3, options
        assert found < LITTLE


def _shrunk(graph: Graph) -> Graph:
    """Half of the channels of each expansion a hundred times smaller: none of these reaches the clamp's bound."""
    factor = np.where(np.arange(12) % 2, 0.01, 1.0).astype("float32")

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        new = node.with_inputs(inputs)
        if node.loc and node.loc.module.endswith("expand"):
            return _scaled(new, out=factor)
        return _scaled(new, into=factor) if node.loc and node.loc.module.endswith("depthwise") else new

    return rebuild(graph, visit)


def test_a_clamp_that_bites_keeps_its_function_on_the_data() -> None:
    for seed in range(4):
        graph = ladder(seed, lambda x: Node(unary.Clamp(0.0, 0.8), [x]), spread=1.0)
        calibration = batches_for(graph, 8, exact=False)
        result = run(graph, "equalize", calibration)
        (entry,) = result.ledger.entries
        assert isinstance(entry.contract, Lossy)
        assert entry.contract.budget < ROUNDING
        assert noise(graph, result.graph, calibration) < ROUNDING


def test_clamps_are_left_alone_without_data() -> None:
    result = run_pipeline(ladder(0, relu6), parse_pipeline("equalize"))
    assert not result.ledger.entries[0].changed
    assert any("no calibration data" in why for _, _, why in result.declined)


def test_channels_are_followed_through_pools_means_and_reshapes() -> None:
    x = Node(Input("x", "float32", (2, 3, 4, 4)))
    cases = (
        (pool.MaxPool2d((2, 2), (2, 2)), 1, 1),
        (reduce.Mean((2, 3)), 1, 1),
        (reduce.Mean((0, 2), True), 1, 1),
        (reduce.Mean((1,)), 1, None),
        (shape.Reshape((2, 3, 16)), 1, 1),
        (shape.Reshape((6, 4, 4)), 1, None),
        (shape.Reshape((2, 12, 4)), 1, None),
        (shape.Pad(((0, 0), (0, 0), (1, 1), (0, 0))), 1, 1),
        (shape.Pad(((0, 0), (1, 0), (0, 0), (0, 0))), 1, None),
        (shape.Pad(((0, 0), (0, 0), (1, 1), (0, 0)), value=1.0), 1, None),
        (unary.Gelu(), 1, None),
        (unary.Clamp(0.0, 6.0), 1, None),
    )
    for op, axis, wanted in cases:
        assert carries(Node(op, [x]), axis) == wanted, op


def test_dead_channels_and_zero_weights_keep_their_scale() -> None:
    graph = ladder(3, relu)

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        if isinstance(node.op, conv.Conv2d):
            w = inputs[1].op.value.copy()
            w[0], w[:, 0] = 0, 0
            return node.with_inputs((inputs[0], Node(Const(w)), *inputs[2:]))
        return node.with_inputs(inputs)

    dead = rebuild(graph, visit)
    batch = batches_for(dead, 1, exact=False)[0]
    assert np.isfinite(interpret(run(dead, "equalize").graph, batch)[0]).all()
    assert noise(dead, run(dead, "equalize").graph, [batch]) < ROUNDING


# --- smooth ---------------------------------------------------------------------------------------------------------


def outlier_block(seed: int = 0, kind: str = "layer") -> Graph:
    """A norm with a few features of a hundred times the others' size before two linear layers."""
    rng = rng_for(seed)
    x = Node(Input("x", "float32", (1, 12, 32)))
    gain = np.where(np.arange(32) % 11 == 3, 60.0, 1.0).astype("float32")
    constants = [Node(Const(gain)), *([Node(Const(np.zeros(32, "float32")))] if kind == "layer" else [])]
    y = Node(norm.LayerNorm() if kind == "layer" else norm.RmsNorm(), [x, *constants], Loc("norm"))
    small = np.where(np.arange(32) % 11 == 3, 1 / 60, 1.0).astype("float32")
    weights = [Node(Const((w.op.value * small).astype("float32"))) for w in (weight(rng, 32, 32), weight(rng, 32, 32))]
    q, k = (Node(linear.Linear(), [y, w], Loc(name)) for w, name in zip(weights, "qk", strict=True))
    return Graph((x,), (Node(binary.Add(), [q, Node(unary.Tanh(), [k])]),))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_smooth_keeps_the_function_and_saves_the_activations(kind: str) -> None:
    graph = outlier_block(kind=kind)
    calibration, fresh = batches_for(graph, 8, exact=False), batches_for(graph, 12, exact=False)[8:]
    result = run(graph, "smooth", calibration)
    (entry,) = result.ledger.entries
    assert entry.rewrites == {"smooth": 1}
    check(entry.contract, graph, result.graph, fresh[0])
    without = noise(graph, run(graph, "quantize{skip='norm'}", calibration).graph, fresh)
    found = noise(graph, run(graph, "smooth, quantize{skip='norm'}", calibration).graph, fresh)
    assert found < without / 3


def test_smooth_reaches_through_relu_between_linear_layers() -> None:
    rng = rng_for(5)
    x = Node(Input("x", "float32", (4, 8)))
    rows = rng.standard_normal((16, 8)) * 10 ** rng.uniform(-2, 2, (16, 1))
    first = Node(linear.Linear(), [x, Node(Const(rows.astype("float32")))])
    graph = Graph((x,), (Node(linear.Linear(), [relu(first), weight(rng, 3, 16)]),))
    result = run(graph, "smooth", batches_for(graph, exact=False))
    assert result.ledger.contract == Close(2)
    check(Close(2), graph, result.graph, random_inputs(graph, rng, False))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("smooth{strength=-0.1}", "strength is -0.1"),
        ("smooth{strength=1.5}", "strength is 1.5"),
        ("equalize{ranges='all'}", "ranges is 'all'"),
        ("quantize, adaround{iterations=0}", "iterations is 0"),
        ("quantize, adaround{rate=0.0}", "rate is positive"),
    ],
)
def test_bad_options_are_refused(pipeline: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(outlier_block(), pipeline)


# --- adaround and correct-bias --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [3, 4])
def test_adaround_beats_rounding_to_nearest(weights: str, bits: int) -> None:
    graph = chain(depth=3)
    calibration, fresh = batches_for(graph, 24, exact=False), batches_for(graph, 32, exact=False)[24:]
    options = f"quantize{{bits={bits}, weights='{weights}'}}"
    nearest, best = (run(graph, text, calibration).graph for text in (options, f"{options}, adaround"))
    assert noise(graph, best, fresh) < 0.8 * noise(graph, nearest, fresh)
    most = 2 ** (bits - 1) - 1
    for one, two in zip(nearest.nodes(), best.nodes(), strict=True):
        if is_quantized_weight(two):
            q, r = (n.inputs[0].op.value.astype(int) for n in (one, two))
            assert np.abs(r).max() <= most
            assert np.abs(q - r).max() <= 1


def test_grouped_and_strided_layers_see_the_rows_that_their_weights_meet() -> None:
    rng = rng_for(0)
    for groups, stride, dilation, pads in ((1, 1, 1, 1), (2, 2, 1, 0), (4, 1, 2, 2)):
        op = conv.Conv2d((stride, stride), ((pads, pads), (pads, 0)), (dilation, dilation), groups)
        x, w = rng.standard_normal((2, 4, 7, 8)), rng.standard_normal((8, 4 // groups, 3, 2))
        node = Node(op, [Node(Input("x", "float64", x.shape)), Node(Const(w))])
        rows = operand_rows(node, x)
        found = rows @ by_group(w, node).reshape(groups, 8 // groups, -1).swapaxes(1, 2)
        (right,) = interpret(Graph((node.inputs[0],), (node,)), [x])
        n, o, h, wd = right.shape
        given = found.reshape(groups, n, h, wd, o // groups).transpose(1, 0, 4, 2, 3).reshape(right.shape)
        assert np.abs(given - right).max() < 1e-12


def test_correct_bias_brings_the_mean_back() -> None:
    for graph, share in ((single(), 0.2), (chain(depth=2), 1.0)):
        calibration = [[np.abs(array) for array in batch] for batch in batches_for(graph, 24, exact=False)]
        results = [run(graph, text, calibration) for text in ("quantize{bits=3}", "quantize{bits=3}, correct-bias")]
        before, after = (mean_shift(graph, result.graph, calibration) for result in results)
        assert after < before * share
        assert any("noise over signal" in note for note in results[1].ledger.entries[1].notes)


def mean_shift(before: Graph, after: Graph, batches: Batches) -> float:
    apart = [interpret(after, b)[0].astype(float) - interpret(before, b)[0] for b in batches]
    return float(np.abs(np.mean(apart, (0, 1))).max())


def single() -> Graph:
    rng = rng_for(2)
    x = Node(Input("x", "float32", (4, 6)))
    return Graph((x,), (Node(linear.Linear(), [x, weight(rng, 3, 6)]),))


def test_layers_without_a_bias_get_one() -> None:
    graph = single()
    calibration: Batches = [[np.abs(b[0]) + 1] for b in batches_for(graph, exact=False)]
    after = run(graph, "quantize{bits=3}, correct-bias", calibration).graph
    (node,) = (n for n in after.nodes() if isinstance(n.op, linear.Linear))
    assert len(node.inputs) == 3


@pytest.mark.parametrize("name", ["adaround", "correct-bias"])
def test_they_come_after_quantize(name: str) -> None:
    graph = chain(depth=1)
    alone = run(graph, name)
    assert alone.graph is graph
    assert "name it after quantize" in alone.ledger.entries[0].notes[0]
    with pytest.raises(ArgumentError, match="needs the weights before quantization"):
        run(run(graph, "quantize").graph, name)
    with pytest.raises(ArgumentError, match="does not know the graph"):
        find_twins(run(graph, "quantize").graph, Context(earlier=[chain(depth=2)]), name)


def test_all_of_them_together() -> None:
    graph = ladder(4, relu, spread=1.0)
    calibration, fresh = batches_for(graph, 16, exact=False), batches_for(graph, 20, exact=False)[16:]
    result = run(graph, "equalize, smooth, quantize{bits=4, calibrator='mse'}, adaround, correct-bias", calibration)
    assert isinstance(result.ledger.contract, Lossy)
    nearest = run(graph, "quantize{bits=4}", calibration)
    assert noise(graph, result.graph, fresh) < noise(graph, nearest.graph, fresh) / 2


def test_layers_around_attention_on_integers_are_found_again() -> None:
    rng = np.random.default_rng(3)
    x, keep = Node(Input("x", "float32", (2, 5, 8))), Node(Input("keep", "bool", (2, 1, 5, 5)))
    q, k, v = (_heads(Node(linear.Linear(), (x, weight(rng, 8, 8)))) for _ in range(3))
    graph = Graph((x, keep), (Node(ScaledDotProductAttention(), (q, k, v, Node(shape.Broadcast((2, 2, 5, 5)), (keep,)))),))
    data = [[rng.standard_normal((2, 5, 8)).astype(np.float32), rng.random((2, 1, 5, 5)) < 0.8] for _ in range(3)]
    result = run_pipeline(graph, parse_pipeline("quantize, adaround, correct-bias"), calibration=data)
    assert any(isinstance(node.op, IntegerAttention) for node in result.graph.nodes())
    assert noise(graph, result.graph, data) < 0.03


def _heads(x: Node) -> Node:
    return Node(shape.Transpose((0, 2, 1, 3)), (Node(shape.Reshape((2, 5, 2, 4)), (x,)),))


def test_the_same_data_give_the_same_program() -> None:
    graph = ladder(4, relu, spread=1.0)
    passes = "equalize, smooth, quantize{bits=4, calibrator='kl'}, adaround{iterations=50}, correct-bias"
    first, second = (run(graph, passes, batches_for(graph, 3, exact=False)) for _ in range(2))
    assert show(first.graph) == show(second.graph)
    assert first.ledger.as_json(times=False) == second.ledger.as_json(times=False)


def test_ranges_of_inputs_follow_groups() -> None:
    w = np.arange(1, 25, dtype=float).reshape(4, 2, 3, 1)
    x = Node(Input("x", "float64", (1, 4, 5, 5)))
    node = Node(conv.Conv2d(groups=2), [x, Node(Const(w))])
    assert input_ranges(w, node).tolist() == [9.0, 12.0, 21.0, 24.0]
