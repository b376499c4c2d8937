"""Regions: an anchor with what is fused before and behind it, in each family that takes such regions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm

from paring.backends.families import choose, lower_region
from paring.backends.kernel import tvm_target
from paring.backends.targets import TARGETS, Target, missing_flags
from paring.ir import Const, Graph, Input, Node, interpret, magnitude_bound
from paring.ir.op import Array, Op
from paring.ir.ops import binary, norm, reduce, scan, shape, unary
from paring.ir.ops.attention import ScaledDotProductAttention

HOST = [t for t in TARGETS.values() if t.arch == "x86_64" and not missing_flags(t)]
EPS = float(np.finfo(np.float32).eps)
# Roundings of all nodes of a region; the longest has eight.
K = 4.0


class Builder:
    """Writes a region's body: calls give nodes, inputs are named as they come."""

    def __init__(self) -> None:
        self.inputs: list[Node] = []

    def input(self, *sizes: int, dtype: str = "float32") -> Node:
        self.inputs.append(Node(Input(f"a{len(self.inputs)}", dtype, sizes)))
        return self.inputs[-1]

    def __call__(self, op: Op, *operands: Node) -> Node:
        return Node(op, operands)

    def spread(self, node: Node, *sizes: int) -> Node:
        return Node(shape.Broadcast(sizes), (node,))

    def number(self, value: float, *sizes: int) -> Node:
        return self.spread(Node(Const(np.float32(value)), ()), *sizes)


def softmax_masked(b: Builder) -> Node:
    size = (2, 3, 19, 37)
    scaled = b(binary.Mul(), b.input(*size), b.number(0.125, *size))
    y = b(norm.Softmax(3), b(binary.Add(), scaled, b.spread(b.input(2, 1, 19, 37), *size)))
    return b(binary.Mul(), y, b.spread(b.input(3, 1, 1), *size))


def softmax_channels(b: Builder) -> Node:
    x = b(binary.Add(), b.input(1, 21, 9, 11), b.spread(b.input(1, 21, 1, 1), 1, 21, 9, 11))
    return b(unary.Sqrt(), b(norm.Softmax(1), x))


def layer_norm_residual(b: Builder) -> Node:
    size = (5, 7, 100)
    x = b(binary.Add(), b.input(*size), b.spread(b.input(100), *size))
    return b(binary.Add(), b(norm.LayerNorm(), x, b.input(100), b.input(100)), b.input(*size))


def layer_norm_images(b: Builder) -> Node:
    size = (2, 6, 5, 7)
    x = b(binary.Mul(), b.input(*size), b.spread(b.input(6, 1, 1), *size))
    return b(norm.LayerNorm(), x, b.input(6, 5, 7), b.input(6, 5, 7))


def group_norm_silu(b: Builder) -> Node:
    y = b(norm.GroupNorm(3), b(unary.Neg(), b.input(2, 12, 5, 7)), b.input(12), b.input(12))
    return b(unary.Silu(), b(binary.Mul(), y, b.spread(b.input(12, 1, 1), 2, 12, 5, 7)))


def long_rows(b: Builder) -> Node:
    y = b(norm.LayerNorm(), b.input(2, 40_001), b.input(40_001), b.input(40_001))
    return b(binary.Add(), y, b.input(2, 40_001))


def long_softmax(b: Builder) -> Node:
    return b(norm.Softmax(1), b(unary.Neg(), b.input(2, 40_001)))


def long_softmax_across(b: Builder) -> Node:
    return b(norm.Softmax(1), b(unary.Neg(), b.input(2, 5_003, 17)))


def running_sum(b: Builder) -> Node:
    return b(unary.Neg(), b(scan.CumSum(1), b(unary.Abs(), b.input(3, 50, 21))))


def running_sum_of_rows(b: Builder) -> Node:
    return b(unary.Neg(), b(scan.CumSum(1), b(unary.Abs(), b.input(3, 50))))


def short_softmax(b: Builder) -> Node:
    return b(norm.LogSoftmax(2), b.input(3, 5, 1))


def blocked_mean(b: Builder) -> Node:
    x = b(unary.Relu(), b.input(1, 3, 7, 7, 16))
    return b(unary.HardSigmoid(), b(reduce.Mean((2, 3), True), x))


def blocked_mean_by_channel(b: Builder) -> Node:
    x = b(binary.Add(), b.input(1, 3, 7, 7, 16), b.spread(b.input(3, 1, 1, 16), 1, 3, 7, 7, 16))
    return b(reduce.Mean((2, 3)), x)


def max_of_sum(b: Builder) -> Node:
    return b(reduce.Max((1,)), b(binary.Add(), b.input(4, 50, 21), b.input(4, 50, 21)))


def argmax_of_sum(b: Builder) -> Node:
    return b(reduce.ArgMax(1), b(binary.Mul(), b.input(9, 50), b.input(9, 50)))


def scattered_sum(b: Builder) -> Node:
    return b(unary.Relu(), b(reduce.Sum((0, 2)), b(unary.Abs(), b.input(4, 5, 33))))


def bias_relu_residual(b: Builder) -> Node:
    size = (2, 9, 5, 7)
    x = b(binary.Add(), b.input(*size), b.spread(b.input(9, 1, 1), *size))
    return b(binary.Add(), b(unary.Relu(), x), b.input(*size))


def one_column(b: Builder) -> Node:
    return b(binary.Mul(), b.input(37, 1), b.spread(b.input(1, 1), 37, 1))


def transposed_sum(b: Builder) -> Node:
    x = b(shape.Transpose((0, 2, 1)), b(unary.Neg(), b.input(2, 35, 21)))
    return b(binary.Add(), x, b.spread(b.input(35), 2, 21, 35))


def padded_slice(b: Builder) -> Node:
    x = b(shape.Slice((0, 1, 0), (2, 8, 40), (1, 3, 1)), b.input(2, 9, 40))
    return b(shape.Pad(((0, 0), (1, 0), (0, 0)), value=2.0), b(unary.Exp(), x))


def concat_of_chains(b: Builder) -> Node:
    left = b(unary.Relu(), b.input(2, 5, 33))
    return b(shape.Concat(1), left, b(shape.Transpose((0, 2, 1)), b.input(2, 33, 4)), b.input(2, 1, 33))


def concat_of_channels(b: Builder) -> Node:
    left = b(binary.Add(), b.input(2, 5, 7, 9), b.spread(b.input(5, 1, 1), 2, 5, 7, 9))
    return b(shape.Concat(1), left, b.input(2, 3, 7, 9))


def attention_of_heads(b: Builder) -> Node:
    """q, k and v lie in one tensor (B, L, 3, H, E); the result goes back to (B, L, H, E)."""
    packed = b.input(2, 35, 3, 2, 24)
    parts = []
    for i in range(3):
        part = b(shape.Slice((0, 0, i, 0, 0), (2, 35, i + 1, 2, 24), (1,) * 5), packed)
        parts.append(b(shape.Transpose((0, 2, 1, 3)), b(shape.Reshape((2, 35, 2, 24)), part)))
    return b(shape.Transpose((0, 2, 1, 3)), b(ScaledDotProductAttention(), *parts))


def attention_masked(b: Builder) -> Node:
    q, k, v = b.input(2, 3, 20, 8), b.input(2, 3, 37, 8), b.input(2, 3, 37, 20)
    mask = b.spread(b.input(2, 1, 1, 37), 2, 3, 20, 37)
    y = b(ScaledDotProductAttention(0.3), q, k, v, mask)
    return b(binary.Add(), y, b.input(2, 3, 20, 20))


def attention_shared_keys(b: Builder) -> Node:
    q = b.input(1, 4, 33, 16)
    k, v = (b.spread(b.input(1, 1, 33, 16), 1, 4, 33, 16) for _ in range(2))
    return b(ScaledDotProductAttention(causal=True), q, k, v)


def attention_one_query(b: Builder) -> Node:
    return b(ScaledDotProductAttention(), b.input(1, 5, 1, 64), b.input(1, 5, 300, 64), b.input(1, 5, 300, 64))


# The family that each body is for; the last one takes what the others decline.
BODIES: dict[Callable[[Builder], Node], str] = {
    **dict.fromkeys((softmax_masked, softmax_channels, layer_norm_residual, layer_norm_images, group_norm_silu), "rows"),
    **dict.fromkeys((long_rows, long_softmax, short_softmax, blocked_mean, blocked_mean_by_channel), "rows"),
    **dict.fromkeys((max_of_sum, argmax_of_sum, long_softmax_across, running_sum, running_sum_of_rows), "rows"),
    **dict.fromkeys((concat_of_chains, concat_of_channels), "concat"),
    **dict.fromkeys((attention_of_heads, attention_masked, attention_shared_keys, attention_one_query), "attention"),
    **dict.fromkeys((scattered_sum, bias_relu_residual, one_column, transposed_sum, padded_slice), "elementwise"),
}


def body_of(make: Callable[[Builder], Node]) -> Graph:
    builder = Builder()
    output = make(builder)
    return Graph(tuple(builder.inputs), (output,))


def run(kernel: Callable[..., None], body: Graph, arrays: list[Array]) -> Array:
    output = body.outputs[0].type
    tensors = [tvm.runtime.tensor(a.reshape(-1)) for a in (*arrays, np.zeros(output.size, output.dtype))]
    kernel(*tensors)
    return tensors[-1].numpy().reshape(output.shape)


@pytest.mark.parametrize("target", HOST, ids=lambda t: t.name)
def test_regions(target: Target) -> None:
    bodies = {make.__name__: body_of(make) for make in BODIES}
    module = tvm.compile(
        tvm.IRModule({name: lower_region(body, target, name) for name, body in bodies.items()}), target=tvm_target(target)
    )
    rng = np.random.default_rng(0)
    for name, body in bodies.items():
        arrays = [rng.standard_normal(i.type.shape).astype(i.type.dtype) for i in body.inputs]
        got = run(module[name], body, arrays)
        (value,), (bound,) = magnitude_bound(body, arrays)
        excess = np.abs(got - value) - K * EPS * bound
        assert (excess <= 0).all(), f"{name}: {np.max(np.abs(got - value) / (EPS * bound)):.2f} ulps"


@pytest.mark.parametrize("make", BODIES, ids=lambda make: make.__name__)
def test_family(make: Callable[[Builder], Node]) -> None:
    assert choose(body_of(make), HOST[-1])[0].name == BODIES[make]


def test_arithmetic_is_not_rearranged() -> None:
    """What TVM would simplify as if floats were real numbers."""
    x, y = (Node(Input(name, "float32", (4,))) for name in "xy")
    zero = Node(shape.Broadcast((4,)), (Node(Const(np.float32(0))),))
    difference = Node(binary.Sub(), (Node(binary.Add(), (x, y)), y))
    outputs = {
        "cancel": difference,
        "nothing": Node(binary.Sub(), (x, x)),
        "zeros": Node(binary.Mul(), (x, zero)),
        "infinite": Node(binary.Div(), (x, zero)),
        "negative_zero": Node(binary.Add(), (x, zero)),
    }
    bodies = {name: Graph((x, y), (output,)) for name, output in outputs.items()}
    target = HOST[-1]
    module = tvm.compile(tvm.IRModule({n: lower_region(b, target, n) for n, b in bodies.items()}), target=tvm_target(target))
    a, big = np.array([1.0, np.nan, np.inf, -0.0], np.float32), np.full(4, 1e8, np.float32)
    got = {name: run(module[name], body, [a, big]) for name, body in bodies.items()}
    np.testing.assert_array_equal(got["cancel"], [0.0, np.nan, np.inf, 0.0])
    np.testing.assert_array_equal(got["nothing"], [0.0, np.nan, np.nan, 0.0])
    np.testing.assert_array_equal(got["zeros"], [0.0, np.nan, np.nan, 0.0])
    np.testing.assert_array_equal(got["infinite"], [np.inf, np.nan, np.inf, np.nan])
    assert not np.signbit(got["negative_zero"][3])


@pytest.mark.parametrize("dtype", ["bool", "float32"])
def test_a_query_without_keys_gives_zeros(dtype: str) -> None:
    b = Builder()
    q, k, v = b.input(1, 2, 7, 8), b.input(1, 2, 19, 8), b.input(1, 2, 19, 8)
    body = Graph((*b.inputs, b.input(1, 2, 7, 19, dtype=dtype)), (b(ScaledDotProductAttention(), q, k, v, b.inputs[-1]),))
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(i.type.shape).astype("float32") for i in b.inputs[:3]]
    kept = rng.random((1, 2, 7, 19)) < 0.5
    kept[:, :, 3] = False
    arrays.append(kept if dtype == "bool" else np.where(kept, np.float32(0), np.float32(-np.inf)))
    module = tvm.compile(tvm.IRModule({"k": lower_region(body, HOST[-1], "k")}), target=tvm_target(HOST[-1]))
    got = run(module["k"], body, arrays)
    np.testing.assert_array_equal(got[:, :, 3], 0.0)
    np.testing.assert_allclose(got, interpret(body, arrays)[0], atol=20 * EPS)
