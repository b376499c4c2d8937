"""Convolution schedules against the reference: on small integers every sum is exact, so results agree bit for bit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

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
from paring.ir.ops.unary import Clamp, Floor, Relu

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
    narrow: int = 1,
) -> Graph:
    """A convolution with an epilogue; `channels` in blocks (`plain`: the input's as they are).

    Where groups is 0 they have `narrow` channels each.
    """
    ci, co = channels
    deep = groups == 0
    i = narrow if deep else 1 if plain else block
    groups = co * block // narrow if deep else groups
    x = (batch, ci, *size) if plain else (batch, ci, *size, block)
    x, w, b = inputs(x, (co, 1 if deep else ci // groups, *kernel, i, block), (co * block,))
    op = Conv2d(stride, padding, dilation, groups, "NCHW" if plain else f"NCHW{block}c", f"NCHW{block}c", f"OIHW{i}i{block}o")
    given = (x, w, b) if bias else (x, w)
    y = Node(op, given)
    if epilogue == "relu":
        return Graph(given, (Node(Relu(), (y,)),))
    if epilogue == "floor":  # one that is written by way of memory
        return Graph(given, (Node(Floor(), (y,)),))
    if epilogue == "none":
        return Graph(given, (y,))
    other, scale = inputs(y.type.shape, (co, 1, 1, block))
    y = Node(Add(), (Node(Add(), (y, other)), Node(Broadcast(y.type.shape), (scale,))))
    return Graph((*given, other, scale), (Node(Clamp(-100.0, 200.0), (y,)),))


def check(bodies: list[Graph], target: Target, family: ModuleType, settings: Any = None) -> None:
    """Compile all of them in one module and compare each with the reference interpreter."""
    functions = {}
    for number, body in enumerate(bodies):
        anchor = family.find(body, target)
        assert anchor is not None, f"declined: {body.outputs[0]}"
        knobs = settings or family.knobs(anchor, target)
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
        library[name](*tensors, result._create_view((expected.size,)))
        got = result.numpy()
        assert (got[expected.size :] == 7.5).all(), f"{body.outputs[0]}: wrote behind the result"
        np.testing.assert_array_equal(got[: expected.size].reshape(expected.shape), expected, str([n.op for n in body.nodes()]))


def draw(rng: np.random.Generator, block: int, deep: bool) -> Graph | None:
    """A random convolution; None where its kernel does not fit its image."""
    size, kernel = (tuple(map(int, rng.integers(1, high, 2))) for high in (28, 8))
    if rng.random() < 0.3:
        kernel = (1, 1)
    stride, dilation = (tuple(map(int, rng.integers(1, high, 2))) for high in (4, 3))
    padding = tuple(tuple(map(int, rng.integers(0, 4, 2))) for _ in range(2))
    if rng.random() < 0.3:
        stride, dilation, padding = (1, 1), (1, 1), ((0, 0), (0, 0))
    if any(conv_extent(size[d], kernel[d], stride[d], padding[d], dilation[d]) <= 0 for d in range(2)):
        return None
    groups = int(rng.choice([1, 1, 1, 2]))
    channels = tuple(int(c) * groups for c in rng.integers(1, 4, 2))
    plain = not deep and groups == 1 and rng.random() < 0.3
    return region(
        block,
        (channels[0], channels[0]) if deep else channels,
        size,
        kernel,
        stride,
        padding,
        dilation,
        0 if deep else groups,
        int(rng.integers(1, 3)),
        plain,
        rng.random() < 0.7,
        str(rng.choice(["relu", "none", "add", "floor"])),
        int(rng.choice([1, 1, 2, 4, block // 2])),
    )


def some(count: int, block: int, deep: bool, seed: int) -> list[Graph]:
    rng = np.random.default_rng(seed)
    found: list[Graph] = []
    while len(found) < count:
        body = draw(rng, block, deep)
        if body is not None:
            found.append(body)
    return found


@pytest.mark.parametrize("name", X86)
def test_random_convolutions(name: str) -> None:
    target = native(name)
    check(some(32, target.block, False, 1), target, conv)


@pytest.mark.parametrize("name", X86)
def test_random_narrow_groups(name: str) -> None:
    target = native(name)
    check(some(24, target.block, True, 2), target, depthwise)


@pytest.mark.parametrize("name", X86)
def test_widths(name: str) -> None:
    target = native(name)
    widths = (1, 2, 7, 8, 13, 15, 17, 27, 35, 37, 40)
    padded = ((1, 1), (1, 1))
    check([region(target.block, (1, 2), (3, w), (3, 3), padding=padded) for w in widths], target, conv)
    check([region(target.block, (2, 3), (2, w), (1, 1), epilogue="add") for w in widths], target, conv)
    check([region(target.block, (2, 2), (3, w), (3, 3), padding=padded, groups=0) for w in widths], target, depthwise)


@pytest.mark.parametrize("name", X86)
def test_half_blocks(name: str) -> None:
    target, padded = native(name), ((1, 1), (1, 1))
    half = target.block // 2
    bodies = [region(half, (3, 6), (7, w), (3, 3), padding=padded, groups=3, epilogue="add") for w in (5, 17)]
    check([*bodies, region(half, (2, 2), (3, 40), (1, 1))], target, conv)


@pytest.mark.parametrize("name", X86)
def test_known_layers(name: str) -> None:
    target = native(name)
    b = target.block
    bodies = [
        region(b, (3, 2), (45, 45), (7, 7), (2, 2), ((3, 3), (3, 3)), plain=True),
        region(b, (8, 8), (7, 7), (3, 3), padding=((1, 1), (1, 1))),
        region(b, (8, 16), (14, 14), (1, 1), (2, 2)),
        region(b, (5, 7), (17, 17), (1, 7), padding=((0, 0), (3, 3))),
        region(b, (5, 7), (17, 17), (7, 1), padding=((3, 3), (0, 0))),
        region(b, (4, 4), (9, 9), (3, 3), padding=((1, 1), (1, 1)), groups=4, batch=2),
    ]
    check(bodies, target, conv)


def test_padding_beyond_the_kernel() -> None:
    """Rows and columns that see nothing but padding hold the bias."""
    target = native("x86-avx512")
    bodies = [
        region(target.block, (1, 1), (3, 3), (1, 1), padding=((2, 3), (3, 2))),
        region(target.block, (1, 1), (2, 2), (3, 3), padding=((5, 4), (6, 5)), dilation=(2, 1)),
    ]
    check(bodies, target, conv)
    check([region(target.block, (2, 2), (3, 3), (3, 3), padding=((5, 4), (6, 5)), groups=0)], target, depthwise)


def test_any_knobs_give_the_same() -> None:
    target = native("x86-avx512")
    bodies = [region(16, (2, 5), (5, 19), (3, 3), padding=((1, 1), (1, 1))), region(16, (2, 5), (5, 19), (1, 1))]
    for settings in (conv.ConvKnobs(3, 3), conv.ConvKnobs(1, 1), conv.ConvKnobs(28, 1)):
        check(bodies, target, conv, settings)


def test_declines() -> None:
    target = TARGETS["x86-avx512"]
    declined = [
        region(4, (1, 1), (4, 4), (3, 3)),  # neither a block of the target nor half of one
        region(16, (1, 1), (4, 4), (3, 3), groups=0),  # depthwise
    ]
    x, w = inputs((1, 3, 4, 4), (5, 3, 3, 3))
    declined.append(Graph((x, w), (Node(Conv2d(), (x, w)),)))
    assert [conv.find(body, target) for body in declined] == [None] * 3
    assert depthwise.find(region(16, (2, 2), (4, 4), (3, 3)), target) is None
    body = region(16, (1, 1), (4, 4), (3, 3), epilogue="none")
    twice = Node(Relu(), (body.inputs[0],))
    anchor = body.outputs[0]
    assert conv.find(Graph(body.inputs, (Node(anchor.op, (twice, *anchor.inputs[1:])),)), target) is None


@pytest.mark.parametrize("name", ["arm", "x86-avx2"])
def test_knobs_fit_the_registers(name: str) -> None:
    target = TARGETS[name]
    body = region(target.block, (8, 8), (14, 14), (3, 3), padding=((1, 1), (1, 1)))
    anchor = conv.find(body, target)
    assert anchor is not None
    knobs = conv.knobs(anchor, target)
    assert knobs.columns * knobs.blocks * (target.block // target.lanes) < target.registers


@pytest.mark.parametrize("name", X86)
@pytest.mark.parametrize(("inner", "outer"), [(0, 3), (5, 0), (3, 6), (1, 1)])
def test_what_lies_beyond_the_plain_channels_does_not_matter(name: str, inner: int, outer: int) -> None:
    """Weights, bias and image that are not zero there: they are not read, and the result is zero."""
    target = native(name)
    b = target.block
    x, w, bias = inputs((1, 2, 5, 4, b), (2, 2, 3, 3, b, b), (2 * b,))
    layout = f"NCHW{b}c"
    op = Conv2d(
        padding=((1, 1), (1, 1)),
        layout=layout,
        out_layout=layout,
        weight_layout=f"OIHW{b}i{b}o",
        in_channels=b + inner if inner else 0,
        out_channels=b + outer if outer else 0,
    )
    graph = Graph((x, w, bias), (Node(op, (x, w, bias)),))
    check([graph], target, conv)
