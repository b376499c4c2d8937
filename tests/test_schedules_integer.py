"""Products of bytes: each schedule with each instruction of this host, equal to the reference bit for bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import tvm

from paring.backends import emulator_build
from paring.backends.build import build
from paring.backends.devices import open_executable
from paring.backends.families import choose, lower_region
from paring.backends.kernel import tvm_target
from paring.backends.schedules.winograd import WinogradKnobs
from paring.backends.targets import TARGETS, Target, missing_flags
from paring.ir import Graph, Input, Node, interpret, show
from paring.ir.op import Array
from paring.ir.ops import pack, quantized, shape
from paring.ir.ops.attention import IntegerAttention
from paring.ir.ops.conv import Conv2d, Padding
from paring.ir.ops.core import Const, Region
from paring.ir.ops.linear import Linear
from paring.ir.ops.winograd import WinogradConv2d, transformed_weight
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline

HEADS = ((2, 1, 5, 3, 6, 5), (1, 2, 33, 50, 30, 18), (1, 1, 1, 9, 4, 70), (1, 3, 20, 64, 64, 64))
SIGNS = (("uint8",) * 3, ("int8", "uint8", "int8"), ("int8",) * 3)
MASKS = ("bool", "", "causal")
MACHINES = [name for name, target in TARGETS.items() if target.arch == "x86_64"]
# Channels, image, results, padding: whole and partial tiles and blocks, images of less than a tile, wide and missing borders.
TILED: tuple[tuple[int, tuple[int, int], int, Padding], ...] = (
    (16, (9, 12), 24, ((1, 1), (1, 1))),
    (33, (5, 3), 8, ((0, 1), (2, 0))),
    (40, (14, 30), 50, ((1, 1), (1, 1))),
    (6, (3, 70), 33, ((3, 2), (1, 4))),
    (64, (8, 8), 64, ((0, 0), (0, 0))),
)
# A border that the whole kernel fits into.
WIDE = 5
ACTIVATIONS = (("uint8", 0), ("uint8", 200), ("int8", 0), ("int8", -9))


def machine(name: str) -> Target:
    if missing_flags(TARGETS[name]):
        pytest.skip(f"this host lacks {', '.join(missing_flags(TARGETS[name]))}")
    return TARGETS[name]


def extremes(rng: np.random.Generator, dtype: str, size: tuple[int, ...]) -> Array:
    """Any values of 8 bits, a third of them the least or the greatest: sums of neighbours overflow 16 bits."""
    info = np.iinfo(dtype)
    any_ = rng.integers(info.min, info.max + 1, size)
    return np.where(rng.random(size) < 0.33, rng.choice([info.min, info.max], size), any_).astype(dtype)


def const(array: Array) -> Node:
    return Node(Const(array), ())


def requantized(sums: Node, x: Node, rng: np.random.Generator, depth: int) -> Graph:
    """The sums in 8 bits, scaled so that most lie within the range, as one fused region."""
    channels = (1, sums.type.shape[1], 1, 1, sums.type.shape[4]) if sums.type.rank == 5 else (sums.type.shape[-1],)
    multiplier = rng.uniform(0.5, 1.0, channels) * 4e-3 / depth**0.5
    factors = [const(np.asarray(a, np.float32)) for a in (multiplier, np.full(channels, 99))]
    node = Node(quantized.Requantize(), (sums, *(Node(shape.Broadcast(sums.type.shape), (f,)) for f in factors)))
    return run_pipeline(Graph((x,), (node,)), parse_pipeline("fuse")).graph


def convolution(
    target: Target, c: int, size: int, o: int, kernel: int, stride: int, dtype: str, zero: int, border: int | None = None
) -> Graph:
    rng, b = np.random.default_rng((c, size, o, kernel)), target.block
    block_in = target.group if c <= target.group else b
    x = Node(Input("x", dtype, (1, -(-c // block_in), size, size + 1, block_in)))
    layout = f"OIHW{block_in // target.group}i{b}o{target.group}i"
    weight = pack.PackConvWeight(layout).ref(extremes(rng, "int8", (o, c, kernel, kernel)))
    bias = np.pad(rng.integers(-3000, 3000, o), (0, -o % b)).astype(np.int32)
    padding = (kernel // 2, kernel // 2) if border is None else (border, border)
    op = Conv2d(
        (stride, stride),
        (padding, padding),
        layout=f"NCHW{block_in}c",
        out_layout=f"NCHW{b}c",
        weight_layout=layout,
        in_channels=c if c % block_in else 0,
        out_channels=o if o % b else 0,
        pad_value=zero,
    )
    return requantized(Node(op, (x, const(weight), const(bias))), x, rng, c * kernel * kernel)


def winograd(target: Target, c: int, size: tuple[int, int], o: int, pads: Padding, dtype: str, zero: int) -> Graph:
    """A 3x3 convolution by tiles of 4x4 results, two images."""
    rng, b = np.random.default_rng((c, *size, o)), target.block
    x = Node(Input("x", dtype, (2, -(-c // b), *size, b)))
    weight = transformed_weight(extremes(rng, "int8", (o, c, 3, 3)), b)
    bias = np.pad(rng.integers(-3000, 3000, o), (0, -o % b)).astype(np.int32)
    op = WinogradConv2d(pads, f"NCHW{b}c", zero)
    return requantized(Node(op, (x, const(weight), const(bias))), x, rng, c * 9)


def narrow(
    target: Target, c: int, size: int, kernel: int, stride: int, group: int, dtype: str, zero: int, border: int | None = None
) -> Graph:
    """Groups of so many channels."""
    rng, b = np.random.default_rng((c, size, kernel)), target.block
    blocks = -(-c // b)
    x = Node(Input("x", dtype, (1, blocks, size, size + 1, b)))
    layout, around = f"OIHW{group}i{b}o", kernel // 2 if border is None else border
    padding = (around, around)
    weight = pack.PackConvWeight(layout).ref(extremes(rng, "int8", (c, group, kernel, kernel)))
    bias = rng.integers(-1000, 1000, blocks * b).astype(np.int32)
    names = {"layout": f"NCHW{b}c", "out_layout": f"NCHW{b}c", "weight_layout": layout}
    op = Conv2d((stride, stride), (padding, padding), groups=blocks * b // group, pad_value=zero, **names)
    return requantized(Node(op, (x, const(weight), const(bias))), x, rng, group * kernel * kernel)


def linear(target: Target, rows: int, depth: int, out: int, dtype: str) -> Graph:
    rng = np.random.default_rng((rows, depth, out))
    x, layout = Node(Input("x", dtype, (rows, depth))), f"OI{target.block}o{target.group}i"
    weight = pack.PackLinearWeight(layout).ref(extremes(rng, "int8", (out, depth)))
    bias = const(rng.integers(-3000, 3000, out).astype(np.int32))
    return requantized(Node(Linear(layout, out), (x, const(weight), bias)), x, rng, depth)


def looked_up(target: Target, rows: int, depth: int, out: int, dtype: str) -> Graph:
    """The same through a table of 256 bytes, in the same region."""
    rng, bytes_ = np.random.default_rng(depth), linear(target, rows, depth, out, "uint8")
    (region,) = bytes_.outputs
    table = const(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, 256).astype(dtype))
    body = Graph(bytes_.inputs, (Node(quantized.Lookup(), (_inlined(region), table)),))
    return run_pipeline(body, parse_pipeline("fuse")).graph


def _inlined(region: Node) -> Node:
    """A region as the nodes of its body."""
    assert isinstance(region.op, Region)
    new: dict[Node, Node] = dict(zip(region.op.body.inputs, region.inputs, strict=True))
    for node in region.op.body.nodes():
        if node not in new:
            new[node] = node.with_inputs(tuple(new[i] for i in node.inputs))
    return new[region.op.body.outputs[0]]


def attention(sizes: tuple[int, ...], dtypes: tuple[str, ...], mask: str) -> Graph:
    """Split heads, attention, rounding, merged heads, as one region; sizes: batch, heads, queries, keys, inner, outer."""
    b, h, rows, keys, inner, outer = sizes
    dims = {"q": (b, rows, h, inner), "k": (b, keys, h, inner), "v": (b, keys, h, outer)}
    inputs = [Node(Input(name, dtype, d)) for dtype, (name, d) in zip(dtypes, dims.items(), strict=True)]
    split = [Node(shape.Transpose((0, 2, 1, 3)), (x,)) for x in inputs]
    # Its last entry, which stands for all far keys, is not 0: nothing behind the last key may have it.
    table = np.rint(255 * np.exp(-np.arange(256) / 50.0)).astype(np.uint8)
    zeros = (-5, 9) if dtypes[0] == "int8" else (77, 200)
    op = IntegerAttention(*zeros, float(np.float32(2e-3)), float(np.float32(0.3)), mask == "causal")
    masks = [Node(Input("m", "bool", (b, 1, rows, keys)))] if mask == "bool" else []
    wide = [Node(shape.Broadcast((b, h, rows, keys)), (m,)) for m in masks]
    rounded = Node(quantized.Quantize(3, "int8", scale=0.25), (Node(op, (*split, const(table), *wide)),))
    merged = Node(shape.Transpose((0, 2, 1, 3)), (rounded,))
    return run_pipeline(Graph((*inputs, *masks), (merged,)), parse_pipeline("fuse")).graph


def graphs(target: Target) -> list[tuple[str, Graph]]:
    convolutions = [(5, 7, 9, 3, 1), (16, 6, 24, 1, 1), (20, 9, 7, 3, 2), (33, 5, 40, 5, 1), (8, 4, 8, 1, 2), (3, 15, 20, 7, 2)]
    images = [(16, 7, 3, 1, 1), (20, 15, 3, 2, 1), (33, 6, 5, 1, 1), (24, 6, 3, 1, 2)]
    layers = [(1, 64, 40), (7, 50, 16), (30, 131, 50), (5, 3, 7), (65, 256, 96)]
    return [
        *(("conv", convolution(target, *c, *x)) for c, x in product(convolutions, ACTIVATIONS)),
        *(("conv", convolution(target, *c, *ACTIVATIONS[1], WIDE)) for c in [(20, 6, 9, 1, 1), (16, 5, 24, 3, 2)]),
        *(("depthwise", narrow(target, 16, 6, 3, stride, 1, *ACTIVATIONS[3], WIDE)) for stride in (1, 2)),
        *(("depthwise", narrow(target, *c, *x)) for c, x in product(images, ACTIVATIONS)),
        *(("winograd", winograd(target, *c, *x)) for c, x in product(TILED if target.winograd else (), ACTIVATIONS[1::2])),
        *(("gemm", linear(target, *c, x)) for c, x in product(layers, ("uint8", "int8"))),
        *(("gemm", looked_up(target, *c, x)) for c, x in product(layers[:3], ("uint8", "int8"))),
        *(("gemm", looked_up(target, 3, 9, out, "uint8")) for out in (1, 3, 11, 17, 30, 31)),
        *(("interleave", interleaved(*c, *x)) for c, x in product([(3, 2, 37), (1, 3, 5), (4, 1, 64)], ACTIVATIONS)),
        *(("integer-attention", attention(*case)) for case in zip(HEADS * 3, SIGNS * 4, MASKS * 4, strict=True)),
    ]


def interleaved(channels: int, height: int, width: int, dtype: str, zero: int) -> Graph:
    """A float image rounded to bytes, four channels side by side."""
    x = Node(Input("x", "float32", (2, channels, height, width)))
    rounded = Node(quantized.Quantize(zero, dtype, scale=0.5), (x,))
    blocked = Node(shape.LayoutTransform("NCHW", "NCHW4c", channels), (rounded,))
    return run_pipeline(Graph((x,), (blocked,)), parse_pipeline("fuse")).graph


def _values(rng: np.random.Generator, dtype: str, size: tuple[int, ...]) -> Array:
    if dtype == "float32":
        # Some are rounded to no int32, some are no number at all.
        wild = rng.choice([np.nan, np.inf, -np.inf, 3e9, -3e9, 63.75], size)
        return np.where(rng.random(size) < 0.2, wild, rng.uniform(-80, 80, size)).astype(np.float32)
    if dtype == "bool":
        # Some rows keep nothing.
        return (rng.random(size) < 0.7) & (rng.random((*size[:-1], 1)) < 0.9)
    return extremes(rng, dtype, size)


def assert_exact(target: Target, device: str | None, chosen: list[tuple[str, Graph]]) -> None:
    for family, graph in chosen:
        (region,) = graph.outputs
        assert choose(region.op.body, target)[0].name == family, show(graph)
        rng = np.random.default_rng(0)
        given = [_values(rng, i.type.dtype, i.type.shape) for i in graph.inputs]
        (wanted,) = interpret(graph, given)
        assert len(np.unique(wanted)) > min(12, wanted.size // 3), "the values say too little"
        with open_executable(build(graph, target), target, device) as run:
            np.testing.assert_array_equal(run.run(given)[0], wanted, err_msg=f"{family}: {show(graph)}")


@pytest.mark.parametrize("name", MACHINES)
def test_sums_of_bytes_are_exact(name: str) -> None:
    target = machine(name)
    assert_exact(target, None, graphs(target))


@pytest.mark.parametrize("knobs", [(1, 1, 1), (2, 3, 2), (4, 8, 3)])
def test_any_work_items_of_winograds_way_give_the_same_sums(knobs: tuple[int, int, int]) -> None:
    target = machine("x86-avx2")
    graph = winograd(target, 20, (14, 30), 33, ((1, 1), (1, 1)), "uint8", 7)
    (region,) = graph.outputs
    family, anchor = choose(region.op.body, target)
    name = "items"
    function = lower_region(region.op.body, target, name, WinogradKnobs(*knobs))
    call = tvm.compile(tvm.IRModule({name: function}), target=tvm_target(target))[name]
    rng = np.random.default_rng(0)
    given = [_values(rng, i.type.dtype, i.type.shape) for i in graph.inputs]
    (wanted,) = interpret(graph, given)
    operands = [given[0] if node in graph.inputs else node.op.value for node in region.inputs]
    result = tvm.runtime.tensor(np.zeros(wanted.size, wanted.dtype))
    call(*(tvm.runtime.tensor(np.ascontiguousarray(a).ravel()) for a in operands), result)
    assert family.name == "winograd"
    assert anchor.op.name == "winograd_conv2d"
    np.testing.assert_array_equal(result.numpy().reshape(wanted.shape), wanted)


@pytest.mark.skipif(bool(emulator_build.missing()), reason=f"no emulated ARM: {', '.join(emulator_build.missing())}")
@pytest.mark.parametrize("name", ["arm", "arm-neon"])
def test_sums_of_bytes_are_exact_on_emulated_arm(name: str) -> None:
    target = TARGETS[name]
    assert_exact(target, "emulator", graphs(target)[::3])


def test_a_target_without_such_instructions_takes_the_general_way() -> None:
    target = replace(TARGETS["arm"], dot="", group=1)
    x = Node(Input("x", "uint8", (3, 8)))
    sums = Node(Linear(), (x, const(np.ones((8, 8), np.int8))))
    body = requantized(sums, x, np.random.default_rng(0), 8).outputs[0].op.body
    assert choose(body, target)[0].name == "elementwise"
