"""Matrix product schedules against the reference: on small integers every sum is exact, so results agree bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm

from paring.backends.kernel import build_primfunc, tvm_target
from paring.backends.lowering import LOWERINGS
from paring.backends.schedules import gemm
from paring.backends.targets import TARGETS, Target, missing_flags
from paring.ir import Graph, Input, Node, interpret
from paring.ir.ops.binary import Add
from paring.ir.ops.linear import Linear, Matmul
from paring.ir.ops.shape import Broadcast
from paring.ir.ops.unary import Clamp, Floor, Relu

X86 = ("x86-avx512", "x86-avx2")
Shape = tuple[int, ...]


def native(name: str) -> Target:
    target = TARGETS[name]
    missing = missing_flags(target)
    if missing:
        pytest.skip(f"this host lacks {', '.join(missing)}")
    return target


def inputs(*shapes: Shape) -> list[Node]:
    return [Node(Input(f"a{i}", "float32", shape)) for i, shape in enumerate(shapes)]


def close(given: list[Node], y: Node, epilogue: str) -> Graph:
    """The region of a product and an epilogue."""
    if epilogue == "none":
        return Graph(tuple(given), (y,))
    if epilogue == "relu":
        return Graph(tuple(given), (Node(Relu(), (y,)),))
    if epilogue == "floor":  # one that is written by way of memory
        return Graph(tuple(given), (Node(Floor(), (y,)),))
    other, row = inputs(y.type.shape, y.type.shape[-1:])
    y = Node(Add(), (Node(Add(), (y, other)), Node(Broadcast(y.type.shape), (row,))))
    return Graph((*given, other, row), (Node(Clamp(-300.0, 500.0), (y,)),))


def linear(block: int, leading: Shape, depth: int, features: int, bias: bool = True, epilogue: str = "relu") -> Graph:
    x, w, b = inputs((*leading, depth), (-(-features // block), depth, block), (features,))
    given = [x, w, b] if bias else [x, w]
    return close(given, Node(Linear(f"OI{block}o", features), given), epilogue)


def matmul(leading: Shape, rows: int, depth: int, columns: int, epilogue: str = "relu") -> Graph:
    given = inputs((*leading, rows, depth), (*leading, depth, columns))
    return close(given, Node(Matmul(), given), epilogue)


def check(bodies: list[Graph], target: Target, settings: Any = None) -> None:
    """Compile all of them in one module and compare each with the reference interpreter."""
    functions = {}
    for number, body in enumerate(bodies):
        anchor = gemm.find(body, target)
        assert anchor is not None, f"declined: {body.outputs[0]}"
        knobs = settings or gemm.knobs(anchor, target)
        name = f"k{number}"
        functions[name] = build_primfunc(body, target, name, LOWERINGS, lambda k, a=anchor, s=knobs: gemm.emit(k, a, s))
    library = tvm.compile(tvm.IRModule(functions), target=tvm_target(target))
    rng = np.random.default_rng(0)
    for name, body in zip(functions, bodies, strict=True):
        arrays = [rng.integers(-8, 9, node.type.shape).astype("float32") for node in body.inputs]
        (expected,) = interpret(body, arrays)
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a).ravel()) for a in arrays]
        # Whatever is written outside of the result shows in the guard behind it.
        result = tvm.runtime.tensor(np.full(expected.size + 64, 7.5, "float32"))
        library[name](*tensors, result._create_view((expected.size,)))
        got = result.numpy()
        assert (got[expected.size :] == 7.5).all(), f"{body.outputs[0]}: wrote behind the result"
        np.testing.assert_array_equal(got[: expected.size].reshape(expected.shape), expected, str([n.op for n in body.nodes()]))


@pytest.mark.parametrize("name", X86)
def test_random_linear(name: str) -> None:
    target = native(name)
    rng = np.random.default_rng(3)
    bodies = []
    for _ in range(32):
        leading = tuple(map(int, rng.integers(1, 9, rng.integers(0, 4))))
        depth, features = (int(rng.integers(1, high)) for high in (60, 150))
        bodies.append(
            linear(target.block, leading, depth, features, rng.random() < 0.7, str(rng.choice(["relu", "none", "add", "floor"])))
        )
    check(bodies, target)


@pytest.mark.parametrize("name", X86)
def test_random_matmul(name: str) -> None:
    target = native(name)
    rng = np.random.default_rng(4)
    bodies = []
    for _ in range(32):
        leading = tuple(map(int, rng.integers(1, 4, rng.integers(0, 3))))
        sizes = (int(rng.integers(1, high)) for high in (40, 40, 60))
        bodies.append(matmul(leading, *sizes, str(rng.choice(["relu", "none", "add", "floor"]))))
    check(bodies, target)


@pytest.mark.parametrize("name", X86)
def test_known_layers(name: str) -> None:
    target = native(name)
    b = target.block
    bodies = [
        linear(b, (1,), 512, 1000),
        linear(b, (1,), 511, 10),
        linear(b, (197,), 192, 48, epilogue="add"),
        linear(b, (2, 50), 96, 100, epilogue="add"),
        matmul((3,), 197, 64, 197),
        matmul((2,), 49, 49, 32, "add"),
        matmul((), 5, 3, 1),
        matmul((2,), 1, 7, 17),
    ]
    check(bodies, target)


def test_any_knobs_give_the_same() -> None:
    target = native("x86-avx512")
    bodies = [linear(16, (19,), 33, 75), matmul((2,), 19, 33, 75)]
    for settings in ((3, 3, 2), (1, 1), (28, 1), (2, 5, 5)):
        check(bodies, target, gemm.GemmKnobs(*settings))


def test_declines() -> None:
    target = TARGETS["x86-avx512"]
    x, w = inputs((3, 5), (7, 5))
    assert gemm.find(Graph((x, w), (Node(Linear(), (x, w)),)), target) is None
    assert gemm.find(linear(8, (3,), 4, 8), target) is None
    assert gemm.find(matmul((0,), 4, 4, 4), target) is None


def test_knobs_fit_the_registers() -> None:
    for target in (TARGETS["arm"], TARGETS["x86-avx2"], TARGETS["x86-avx512"]):
        for body in (linear(target.block, (197,), 192, 768), linear(target.block, (1,), 512, 1000), matmul((2,), 64, 64, 64)):
            anchor = gemm.find(body, target)
            assert anchor is not None
            knobs = gemm.knobs(anchor, target)
            width = target.block // target.lanes if isinstance(anchor.op, Linear) else 1
            assert knobs.rows * knobs.vectors * knobs.steps * width < target.registers
