"""fold-qdq on whole networks: integers from end to end, the same bits compiled, and a reason for all that stays in float."""

from __future__ import annotations

import numpy as np
import pytest

from paring.ir import Graph, Input, Node, Op, interpret
from paring.ir.errors import ContractError
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, norm, pool, quantized, reduce, shape, unary
from paring.ir.types import type_of
from paring.passes.contract import Steps, check
from paring.passes.fold_qdq import FoldQdq
from paring.passes.manager import Result, run_pipeline
from paring.passes.noise import sway
from paring.passes.pipelines import PIPELINES, parse_pipeline, pipeline
from paring.passes.rewriter import Context
from paring.passes.util import constant

fast = pytest.mark.fast
TARGETS = ("x86-avx512", "x86-avx2")
SAME: conv.Padding = ((1, 1), (1, 1))


def f32(value: float) -> float:
    return float(np.float32(value))


def node(op: Op, *inputs: Node) -> Node:
    return Node(op, inputs)


def rounded(x: Node, scale: float, zero: int = 0, dtype: str = "uint8") -> Node:
    """dequantize(quantize(x))"""
    scale = f32(scale)
    return node(quantized.Dequantize(scale, zero), node(quantized.Quantize(zero, dtype, scale=scale), x))


class Weights:
    """Random quantized layers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def weight(self, *dims: int) -> Node:
        q = constant(self.rng.integers(-127, 128, dims).astype(np.int8))
        return node(quantized.DequantizeChannels(0), q, constant(np.float32(self.rng.uniform(0.005, 0.015, dims[0]))))

    def conv(self, x: Node, out: int, kernel: int, **attributes: object) -> Node:
        per_group = x.type.shape[1] // int(attributes.get("groups", 1))  # type: ignore[call-overload]
        op = conv.Conv2d(padding=SAME if kernel == 3 else ((0, 0), (0, 0)), **attributes)  # type: ignore[arg-type]
        return node(op, x, self.weight(out, per_group, kernel, kernel), self.bias(out))

    def linear(self, x: Node, out: int) -> Node:
        return node(linear.Linear(), x, self.weight(out, x.type.shape[-1]), self.bias(out))

    def affine(self, channels: int) -> tuple[Node, Node]:
        """Factor and shift of a norm."""
        values = self.rng.uniform(0.5, 1.5, channels), self.rng.standard_normal(channels) * 0.2
        factor, shift = (constant(np.float32(value).reshape(-1, 1, 1)) for value in values)
        return factor, shift

    def bias(self, out: int) -> Node:
        return constant(np.float32(self.rng.standard_normal(out)))


def mobile_network() -> Graph:
    """A stem, a depthwise block with a residual, a gate, table look-ups, pools, a concat and a head, in Q/DQ form."""
    w = Weights(0)
    image = node(Input("x", "float32", (1, 3, 17, 16)))
    x = rounded(node(unary.Relu(), w.conv(rounded(image, 0.03, 128), 12, 3, stride=(2, 2))), 0.05)
    x = rounded(node(pool.MaxPool2d((3, 3), (2, 2), (1, 1)), x), 0.05)
    y = rounded(node(unary.Clamp(0.0, 6.0), w.conv(x, 12, 3, groups=12)), 6 / 255)
    y = rounded(w.conv(y, 12, 1), 0.4, 120)
    x = rounded(node(unary.Relu(), node(binary.Add(), y, x)), 0.3)
    gate = rounded(node(reduce.Mean((2, 3), True), x), 0.2)
    gate = rounded(node(unary.Relu(), w.conv(gate, 4, 1)), 0.1)
    gate = rounded(node(unary.HardSigmoid(), rounded(w.conv(gate, 12, 1), 0.1, 127)), 1 / 255)
    x = rounded(node(binary.Mul(), x, node(shape.Broadcast(x.type.shape), gate)), 0.25)
    x = rounded(node(unary.HardSwish(), x), 0.25, 3)
    pooled = rounded(node(pool.AvgPool2d((3, 3), (1, 1), (1, 1)), x), 0.2, 1)
    x = rounded(node(shape.Concat(1), x, pooled), 0.25, 3)
    x = rounded(node(reduce.Mean((2, 3)), x), 0.2, 5)
    return Graph((image,), (w.linear(x, 10),))


def transformer_network() -> Graph:
    """Tokens in signed integers: layer norms, heads, scores, their softmax, a residual, a GELU."""
    w = Weights(1)
    tokens = node(Input("x", "float32", (2, 5, 24)))
    x = rounded(tokens, 0.05, 4, "int8")

    def normed(x: Node, zero: int) -> Node:
        return rounded(node(norm.LayerNorm(), x, w.bias(24), w.bias(24)), 0.04, zero, "int8")

    def heads(x: Node, perm: tuple[int, ...]) -> Node:
        split = node(shape.Reshape((2, 5, 3, 8)), rounded(w.linear(x, 24), 0.05, -7, "int8"))
        return node(shape.Transpose(perm), split)

    first = normed(x, 3)
    scores = node(linear.Matmul(), heads(first, (0, 2, 1, 3)), heads(first, (0, 2, 3, 1)))
    half = node(shape.Broadcast(scores.type.shape), constant(np.array(0.5, np.float32)))
    shares = rounded(node(norm.Softmax(3), rounded(node(binary.Mul(), scores, half), 0.06, 10, "int8")), 1 / 256, -128, "int8")
    mixed = rounded(node(linear.Matmul(), shares, heads(first, (0, 2, 1, 3))), 0.05, 0, "int8")
    mixed = node(shape.Reshape((2, 5, 24)), node(shape.Transpose((0, 2, 1, 3)), mixed))
    x = rounded(node(binary.Add(), x, rounded(w.linear(mixed, 24), 0.05, 0, "int8")), 0.1, 1, "int8")
    wide = rounded(node(unary.Gelu(), rounded(w.linear(normed(x, 0), 30), 0.1, -5, "int8")), 0.06, -120, "int8")
    x = rounded(node(binary.Add(), x, rounded(w.linear(wide, 24), 0.1, 0, "int8")), 0.15, 1, "int8")
    return Graph((tokens,), (x,))


def dense_network() -> Graph:
    """Each layer reads all before it, each with its own scale, through a norm, as importers leave DenseNet; a pool in between."""
    w = Weights(4)
    image = node(Input("x", "float32", (1, 3, 9, 8)))
    parts = [rounded(w.conv(rounded(image, 0.03, 128), 5, 3), 0.06, 120)]
    for number, (step, zero) in enumerate(((0.3, 130), (0.05, 7), (0.2, 90))):
        joined = node(shape.Concat(1), *parts) if number else parts[0]
        factor, shift = (node(shape.Broadcast(joined.type.shape), c) for c in w.affine(joined.type.shape[1]))
        normed = node(unary.Relu(), node(binary.Add(), node(binary.Mul(), joined, factor), shift))
        parts.append(rounded(w.conv(rounded(normed, 0.02), 4, 3), step, zero))
        if number == 0:
            parts = [node(pool.AvgPool2d((2, 2), (2, 2)), part) for part in parts]
    last = node(shape.Concat(1), *parts)
    return Graph((image,), (w.linear(rounded(node(reduce.Mean((2, 3)), rounded(last, 0.2, 99)), 0.2, 99), 10),))


def shuffling_network() -> Graph:
    """Half of the channels passes by each block, as in ShuffleNet: joined with parts of other scales, shuffled, cut again."""
    w = Weights(5)
    image = node(Input("x", "float32", (1, 3, 8, 7)))
    x = rounded(node(unary.Relu(), w.conv(rounded(image, 0.03, 128), 12, 3)), 0.04)
    for step in (0.05, 0.03, 0.09):
        left, right = (node(shape.Slice((0, a, 0, 0), (1, a + 6, 8, 7), (1,) * 4), x) for a in (0, 6))
        right = rounded(node(unary.Relu(), w.conv(rounded(right, 0.05), 6, 3, groups=6)), step)
        joined = node(shape.Reshape((1, 2, 6, 8, 7)), node(shape.Concat(1), left, right))
        x = node(shape.Reshape((1, 12, 8, 7)), node(shape.Transpose((0, 2, 1, 3, 4)), joined))
    return Graph(
        (image,), (w.linear(rounded(node(reduce.Mean((2, 3)), rounded(w.conv(rounded(x, 0.06), 8, 1), 0.2, 9)), 0.1, 3), 10),)
    )


NETWORKS = {
    "mobile": mobile_network,
    "transformer": transformer_network,
    "dense": dense_network,
    "shuffling": shuffling_network,
}
STEPS = parse_pipeline(("decompose", *pipeline("simplify", {}), "fold-qdq", "const-fold{dequantize=True}"))
ENDS = ("input", "const", "broadcast", "quantize", "dequantize", "descale")
# What a softmax and a layer norm on integers round for each row.
ROWS = ("cast", "div", "sqrt", "add", "sub", "mul")


def folded(graph: Graph) -> Result:
    return run_pipeline(graph, STEPS)


def floats(graph: Graph) -> list[str]:
    """Names of what computes with floats, the ends left out."""
    return [n.op.name for n in graph.nodes() if n.type.is_float and n.op.name not in ENDS]


def reasons(result: Result) -> str:
    return "; ".join(f"{rewrite}: {why}" for name, rewrite, why in result.declined if name == "fold-qdq")


def arrays_for(graph: Graph, seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [np.float32(rng.standard_normal(n.type.shape) * 2) for n in graph.inputs]


@fast
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_integers_from_end_to_end(name: str) -> None:
    graph = NETWORKS[name]()
    result = folded(graph)
    assert set(floats(result.graph)) <= (set(ROWS) if name == "transformer" else set())
    assert sum(n.op.name == "quantize" for n in result.graph.nodes()) == 1
    assert sum(n.op.name in ("dequantize", "descale") for n in result.graph.nodes()) == 1
    assert not reasons(result)
    before = run_pipeline(graph, STEPS[:-2]).graph
    context = Context()
    after = FoldQdq().run(before, context)
    promise = FoldQdq().promise(context)
    for seed in range(5):
        check(promise, before, after, arrays_for(graph, seed), who=name)
    again = run_pipeline(result.graph, parse_pipeline("fold-qdq"))
    assert again.graph is result.graph


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_has_the_same_bits_compiled(name: str, target: str) -> None:
    from paring.backends.build import build
    from paring.backends.devices import open_executable
    from paring.backends.targets import missing_flags, resolve

    machine = resolve(target)
    if missing_flags(machine):
        pytest.skip(f"this host lacks {', '.join(missing_flags(machine))}")
    graph = NETWORKS[name]()
    integers = folded(graph).graph
    compiled = run_pipeline(graph, pipeline(machine.pipeline, machine.pipeline_options())).graph
    with open_executable(build(compiled, machine), machine, None) as run:
        for seed in range(3):
            arrays = arrays_for(graph, seed)
            (wanted,), (got,) = interpret(integers, arrays), run.run(arrays)
            assert type_of(got) == type_of(wanted)
            np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


@fast
def test_float_networks_are_left_alone() -> None:
    x = node(Input("x", "float32", (1, 2, 4, 4)))
    layer = node(conv.Conv2d(), x, constant(np.ones((2, 2, 1, 1), "float32")))
    result = folded(Graph((x,), (node(unary.Relu(), layer),)))
    assert not reasons(result)
    assert all(not e.rewrites for e in result.ledger.entries)
    assert "fold-qdq" in PIPELINES["blocked"]


# --- proofs and refusals --------------------------------------------------------------------------------------------


def linear_of(weights: Array, scales: Array | None = None, bias: Array | None = None, zero: int = 0) -> Result:
    x = node(Input("x", "uint8", (1, weights.shape[1])))
    scales = np.full(weights.shape[0], 0.01, np.float32) if scales is None else scales
    w = node(quantized.DequantizeChannels(0), constant(weights.astype(np.int8)), constant(scales))
    operands = [node(quantized.Dequantize(1.0, zero), x), w, *([] if bias is None else [constant(bias)])]
    return folded(Graph((x,), (node(linear.Linear(), *operands),)))


@fast
def test_a_sum_that_may_overflow_stays_in_float() -> None:
    # 66,312 products of 255 * 127, and one more: on either side of 2^31 - 1.
    assert "linear" not in floats(linear_of(np.full((1, 66_311), 127)).graph)
    found = linear_of(np.full((1, 66_312), 127))
    assert "linear" in floats(found.graph)
    assert "a sum may reach 2147514120, more than 32 bits hold" in reasons(found)


@fast
def test_the_zero_point_counts_in_the_proof() -> None:
    weights = np.full((1, 60_000), 127)
    assert "linear" not in floats(linear_of(weights).graph)
    assert "more than 32 bits hold" in reasons(linear_of(weights, zero=255))


@fast
@pytest.mark.parametrize("scale", [0.0, 1e-44, 3e38, 1e-10])
def test_weights_of_zeros_are_zeros_whatever_their_scale(scale: float) -> None:
    weights = np.array([[0, 0, 0], [1, -2, 3]])
    result = linear_of(weights, np.float32([scale, 0.5]), np.float32([1.5, 0.0]), zero=3)
    assert "linear" not in floats(result.graph)
    np.testing.assert_array_equal(interpret(result.graph, [np.uint8([[3, 5, 9]])])[0], [[1.5, 7.0]])


@fast
@pytest.mark.parametrize(
    ("scales", "bias", "reason"),
    [
        ([np.nan], None, "a scale of the weights is not finite"),
        ([1e-44], None, "the product of the scales is too small or too large"),
        ([1.0], [np.inf], "the bias is not constant and finite"),
    ],
)
def test_numbers_that_are_none_are_refused(scales: list[float], bias: list[float] | None, reason: str) -> None:
    result = linear_of(np.ones((1, 3)), np.float32(scales), None if bias is None else np.float32(bias))
    assert "linear" in floats(result.graph)
    assert reason in reasons(result)


@fast
def test_what_stays_in_float_says_why() -> None:
    w = Weights(2)
    x = node(Input("x", "float32", (1, 4, 8)))
    ones = constant(np.ones(8, np.float32))
    y = node(norm.LogSoftmax(2), rounded(x, 0.1))
    y = w.linear(node(norm.RmsNorm(), rounded(y, 0.1), ones), 8)
    result = folded(Graph((x,), (node(unary.Sin(), rounded(y, 0.2)),)))
    said = reasons(result)
    for expected in (
        "no rule computes this log_softmax on integers",
        "no rule computes this rms_norm on integers",
        "its input is not quantized",
        "no rule computes this sin on integers",
    ):
        assert expected in said


@fast
def test_quantized_constants_wait_for_their_layer() -> None:
    w = Weights(3)
    x = node(Input("x", "float32", (1, 8)))
    graph = Graph((x,), (w.linear(x, 4),))
    kept = run_pipeline(graph, parse_pipeline("const-fold"))
    assert kept.graph is graph
    settled = run_pipeline(graph, parse_pipeline("const-fold{dequantize=True}")).graph
    assert [n.op.name for n in settled.nodes()] == ["input", "const", "const", "linear"]
    (array,) = arrays_for(graph, 0)
    np.testing.assert_array_equal(interpret(graph, [array])[0], interpret(settled, [array])[0])


# --- the contract ---------------------------------------------------------------------------------------------------


@fast
def test_steps_are_counted() -> None:
    x = node(Input("x", "float32", (64,)))
    before, after, far = (Graph((x,), (node(quantized.Quantize(z, scale=0.5), x),)) for z in (9, 10, 11))
    arrays = arrays_for(before, 0)
    check(Steps(1), before, after, arrays)
    check(Steps(2), before, far, arrays)
    with pytest.raises(ContractError, match=r"promised Steps\(1\)"):
        check(Steps(1), before, far, arrays)


@fast
def test_a_step_inside_moves_what_comes_later() -> None:
    x = node(Input("x", "float32", (64,)))
    inner = rounded(x, 0.5, 100)
    graph = Graph((x,), (inner, node(quantized.Quantize(scale=0.125), inner), node(unary.Neg(), x)))
    moved = sway(graph, arrays_for(graph, 0))
    assert moved[0] == 0.5
    assert moved[1] == 4.0
    assert moved[2] == 0.0
