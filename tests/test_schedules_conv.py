"""Convolution schedules against the reference: on small integers every sum is exact, so results agree bit for bit."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import tvm

from paring.backends.kernel import build_primfunc, tvm_target
from paring.backends.lowering import LOWERINGS
from paring.backends.schedules import conv, depthwise
from paring.backends.targets import TARGETS, Target, missing_flags
from paring.ir import Graph, Input, Node, interpret
from paring.ir.ops.binary import Add
from paring.ir.ops.conv import Conv2d, conv_extent
from paring.ir.ops.shape import Broadcast
from paring.ir.ops.unary import Clamp, Relu

X86 = ("x86-avx512", "x86-avx2")
Pair = tuple[int, int]


def native(name: str) -> Target:
    target = TARGETS[name]
    missing = missing_flags(target)
    if missing:
        pytest.skip(f"this host lacks {', '.join(missing)}")
    return target


def inputs(*shapes: tuple[int, ...]) -> list[Node]:
    return [Node(Input(f"a{i}", "float32", shape)) for i, shape in enumerate(shapes)]


def region(
    block: int,
    channels: Pair,
    size: Pair,
    kernel: Pair,
    stride: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((0, 0), (0, 0)),
    dilation: Pair = (1, 1),
    groups: int = 1,
    batch: int = 1,
    plain: bool = False,
    bias: bool = True,
    epilogue: str = "relu",
) -> Graph:
    """A convolution with an epilogue; `channels` in blocks (`plain`: the input's as they are), depthwise where groups is 0."""
    ci, co = channels
    deep = groups == 0
    i = 1 if plain or deep else block
    groups = co * block if deep else groups
    x = (batch, ci, *size) if plain else (batch, ci, *size, block)
    x, w, b = inputs(x, (co, 1 if deep else ci // groups, *kernel, i, block), (co * block,))
    op = Conv2d(stride, padding, dilation, groups, "NCHW" if plain else f"NCHW{block}c", f"NCHW{block}c", f"OIHW{i}i{block}o")
    given = (x, w, b) if bias else (x, w)
    y = Node(op, given)
    if epilogue == "relu":
        return Graph(given, (Node(Relu(), (y,)),))
    if epilogue == "none":
        return Graph(given, (y,))
    other, scale = inputs(y.type.shape, (co, 1, 1, block))
    y = Node(Add(), (Node(Add(), (y, other)), Node(Broadcast(y.type.shape), (scale,))))
    return Graph((*given, other, scale), (Node(Clamp(-100.0, 200.0), (y,)),))


def check(bodies: list[Graph], target: Target, family: ModuleType, alter: object = None) -> None:
    """Compile all of them in one module and compare each with the reference interpreter."""
    functions = {}
    for number, body in enumerate(bodies):
        anchor = family.find(body, target)
        assert anchor is not None, f"declined: {body.outputs[0]}"
        knobs = alter or family.knobs(anchor, target)
        name = f"k{number}"
        functions[name] = build_primfunc(body, target, name, LOWERINGS, lambda k, a=anchor, s=knobs: family.emit(k, a, s))
    library = tvm.compile(tvm.IRModule(functions), target=tvm_target(target))
    rng = np.random.default_rng(0)
    for name, body in zip(functions, bodies, strict=True):
        arrays = [rng.integers(-8, 9, node.type.shape).astype("float32") for node in body.inputs]
        (expected,) = interpret(body, arrays)
        # Whatever is written outside of the result shows in the guard behind it.
        memory = np.full(expected.size + 64, 7.5, "float32")
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(a).ravel()) for a in arrays]
        result = tvm.runtime.tensor(memory)
        library[name](*tensors, result.numpy() if False else _head(result, expected.size))
        got = result.numpy()
        assert (got[expected.size :] == 7.5).all(), f"{body.outputs[0]}: wrote behind the result"
        np.testing.assert_array_equal(got[: expected.size].reshape(expected.shape), expected, str([n.op for n in body.nodes()]))
