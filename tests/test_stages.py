"""The stage matrix: the same programs interpreted at every stage, compiled for each target this host runs, saved, loaded, and
run on the emulated ARM; small integers, so every result has the same bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

import paring
from paring.backends import emulator_build
from paring.backends.targets import TARGETS, missing_flags
from paring.ir import Const, Graph, Input, Node, interpret
from paring.ir.op import Array, Op
from paring.ir.ops import binary, shape, unary
from paring.ir.ops.conv import Conv2d
from paring.ir.ops.linear import Linear
from paring.ir.ops.shape import Broadcast
from paring.testing import random_graph, random_inputs

HOST = [name for name, target in TARGETS.items() if name != "reference" and not missing_flags(target)]
PROGRAMS = 25
NODES = 12


def programs(count: int, seed: int) -> list[tuple[Graph, list[Array]]]:
    """Random graphs whose every sum is exact, with inputs."""
    rng = np.random.default_rng(seed)
    graphs = [random_graph(rng, NODES, exact=True) for _ in range(count)]
    return [(graph, list(random_inputs(graph, rng, exact=True))) for graph in graphs]


def assert_same_values(found: list[Array], expected: list[Array], where: str) -> None:
    """Equal values; zeros may differ in sign, since compiled sums start from their bias or from 0."""
    for position, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype, where
        assert np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), f"output {position} of {where}"


def call(net: paring.Network, arrays: list[Array]) -> list[Array]:
    outputs = net(*arrays)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("target", HOST)
def test_compiled_programs_have_the_bits_of_the_reference(target: str, tmp_path: Path) -> None:
    for number, (graph, arrays) in enumerate(programs(PROGRAMS, 1)):
        expected = interpret(graph, arrays)
        with paring.compile(graph, target=target) as net:
            assert_same_values(call(net, arrays), expected, f"program {number}\n{net.ir()}")
            if number % 5 == 0:
                path = net.save(tmp_path / f"{number}.paring")
                with paring.load(path) as again:
                    assert_same_values(call(again, arrays), expected, f"program {number}, saved and loaded")


@pytest.mark.parametrize("target", HOST)
def test_special_values_come_out_as_in_the_reference(target: str) -> None:
    """NaN, infinities and signed zeros among the inputs; what is promised for finite values only is not in these programs."""
    rng = np.random.default_rng(4)
    for number in range(PROGRAMS):
        graph = random_graph(rng, NODES, exact=True)
        arrays = list(random_inputs(graph, rng, exact=True, special=0.1))
        with np.errstate(all="ignore"), paring.compile(graph, target=target) as net:
            if not net.ledger.contract.finite:
                assert_same_values(call(net, arrays), interpret(graph, arrays), f"program {number}\n{net.ir()}")


def _twice(label: str, dtype: str, size: int, ops: dict[type[Op], int]) -> Graph:
    """One output for each op, of one or two inputs."""
    inputs = [Node(Input(f"{label}{i}", dtype, (size,))) for i in range(2)]
    return Graph(tuple(inputs), tuple(Node(op(), inputs[:count]) for op, count in ops.items()))


@pytest.mark.parametrize("target", HOST)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64"])
def test_integers_wrap_around(target: str, dtype: str) -> None:
    info, rng = np.iinfo(dtype), np.random.default_rng(5)
    ends = [info.min, info.max, 0, 1]
    ops = {binary.Add: 2, binary.Sub: 2, binary.Mul: 2, unary.Abs: 1, unary.Neg: 1}
    for size in (1, 3, 133):
        graph = _twice("x", dtype, size, ops)
        (x, y), sums = graph.inputs, graph.outputs
        # What a compiler may conclude from a sum that it believes not to overflow.
        believed = [
            Node(binary.Greater(), (sums[0], x)),
            Node(binary.FloorDiv(), (sums[2], y)),
            Node(binary.Maximum(), (sums[1], x)),
        ]
        graph = Graph(graph.inputs, (*sums, *believed))
        any_ = rng.integers(info.min, info.max, (2, size), dtype, endpoint=True)
        arrays = list(np.where(rng.random((2, size)) < 0.4, rng.choice(ends, (2, size)), any_).astype(dtype))
        with np.errstate(all="ignore"), paring.compile(graph, target=target) as net:
            assert_same_values(call(net, arrays), interpret(graph, arrays), f"{dtype}[{size}]")


@pytest.mark.parametrize("target", HOST)
def test_logic_on_comparisons_of_nan(target: str) -> None:
    x, one = Node(Input("x", "float32", (5,))), Node(Broadcast((5,)), (Node(Const(np.float32(1)), ()),))
    less, more, equal = (Node(op(), (x, one)) for op in (binary.Less, binary.GreaterEqual, binary.Equal))
    outputs = [Node(unary.LogicalNot(), (n,)) for n in (less, more, equal)]
    outputs += [Node(op(), (less, more)) for op in (binary.LogicalAnd, binary.LogicalOr)]
    outputs.append(Node(binary.Where(), (outputs[0], x, one)))
    graph, arrays = Graph((x,), tuple(outputs)), [np.float32([np.nan, 1, 2, -np.inf, 0])]
    with paring.compile(graph, target=target) as net:
        assert_same_values(call(net, arrays), interpret(graph, arrays), net.ir())


def test_every_stage_of_a_pipeline_runs() -> None:
    for graph, arrays in programs(5, 2):
        expected = interpret(graph, arrays)
        net = paring.compile(graph, target="x86-avx2" if "x86-avx2" in HOST else HOST[0])
        for name, stage in net._only().result.stages:
            assert_same_values(interpret(stage, arrays), expected, name)
        # A stage that is not the last one compiles too: nodes outside regions are kernels of their own.
        plain = paring.compile(graph, target="native", pipeline="canonicalize, const-fold")
        assert_same_values(call(plain, arrays), expected, "unfused")


def _one_large_term(images: int) -> Graph:
    """For each of `images` rows a sum of 2**24 and 4095 ones, as a 1x1 convolution on one pixel and as a product."""
    x = Node(Input("x", "float32", (images, 4096)))
    weight = np.ones((40, 4096), np.float32)
    pixels = Node(shape.Reshape((images, 4096, 1, 1)), (x,))
    convolved = Node(Conv2d(), (pixels, Node(Const(weight.reshape(40, 4096, 1, 1)))))
    return Graph((x,), (Node(Linear(), (x, Node(Const(weight)))), convolved))


@pytest.mark.parametrize("target", HOST)
@pytest.mark.parametrize("images", [1, 2, 8])
def test_long_sums_of_few_pixels_are_taken_by_blocks(target: str, images: int) -> None:
    """One after the other, each 1 would be rounded away; a block loses its own alone."""
    terms = np.ones((images, 4096), np.float32)
    terms[:, 0] = 2**24
    with paring.compile(_one_large_term(images), target=target) as net:
        for result in call(net, [terms]):
            assert (result >= 2**24 + 4000).all()


needs_arm = pytest.mark.skipif(bool(emulator_build.missing()), reason=f"no emulated ARM: {', '.join(emulator_build.missing())}")


@needs_arm
def test_emulated_arm_has_the_bits_of_the_reference() -> None:
    for number, (graph, arrays) in enumerate(programs(PROGRAMS, 3)):
        with paring.compile(graph, target="arm", device="emulator") as net:
            assert_same_values(call(net, arrays), interpret(graph, arrays), f"program {number}\n{net.ir()}")


@needs_arm
@pytest.mark.parametrize("name", ["small_resnet", "small_mobilenet"])
def test_networks_on_emulated_arm_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from paring.backends.artifact import load as read
    from paring.bench import networks
    from paring.frontends.oracle import TORCH_FACTOR, reference, worst_ratio

    model, args = getattr(networks, name)()
    net = paring.compile(model, args, target="arm", device="emulator")
    assert worst_ratio([net(*args).numpy()], reference(model, args)) <= TORCH_FACTOR
    # The artifact is for ARM, loads where a device is given, and is refused where there is none.
    path = net.save(tmp_path / "net.paring")
    assert read(path, device="emulator").manifest.target.arch == "aarch64"
    again = paring.load(path, device="emulator")
    assert np.array_equal(again(*args).numpy(), net(*args).numpy())
    with pytest.raises(paring.errors.TargetError, match="emulator"):
        paring.load(path)
