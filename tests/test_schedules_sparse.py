"""Kernels of sparse layers against the reference: on small integers, and on bytes, sums are exact: results agree bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from test_schedules_integer import extremes

import paring
from paring.backends import emulator_build
from paring.backends.families import choose, lower_region
from paring.backends.kernel import tvm_target
from paring.backends.targets import TARGETS, Target, missing_flags
from paring.ir import Const, Graph, Input, Node, interpret, show
from paring.ir.op import Array
from paring.ir.ops.binary import Add
from paring.ir.ops.quantized import Lookup, Requantize
from paring.ir.ops.shape import Broadcast
from paring.ir.ops.sparse import Lists, SparseConv2d, SparseLinear
from paring.ir.ops.unary import Floor, Relu
from paring.ir.types import TensorType

X86 = ("x86-avx512", "x86-avx2")
WITH_BYTES = [name for name, target in TARGETS.items() if target.arch == "x86_64"]
Case = tuple[Graph, list[Array]]


def thinned(rng: np.random.Generator, density: float, *shape: int) -> Array:
    """Small integers, most of them zero; an output and an input channel without any."""
    weight = rng.integers(-4, 5, shape) * (rng.random(shape) < density)
    weight[shape[0] // 2], weight[:, shape[1] // 3] = 0, 0
    return weight.astype("float32")


def case(op: SparseConv2d | SparseLinear, x: tuple[int, ...], density: float = 0.3, epilogue: str = "relu") -> Case:
    """A region around a layer, and what it is given. With `add` another tensor is added."""
    rng = np.random.default_rng(len(x) + op.block)
    arrays = [rng.integers(-4, 5, x).astype("float32")]
    node = Node(Input("x", "float32", x))
    cut = op.lists_of(node.type)
    outputs, taps = cut.outputs, op.kernel if isinstance(op, SparseConv2d) else ()
    arrays += map(np.ascontiguousarray, cut.pack(thinned(rng, density, outputs, cut.inputs, *taps)))
    lists = [Node(Input(f"a{i}", str(a.dtype), a.shape)) for i, a in enumerate(arrays[1:])]
    bare = Node(op, (node, *lists))
    channels = bare.type.shape[-1] if bare.type.rank != 5 else bare.type.shape[1] * bare.type.shape[4]
    bias = rng.integers(-4, 5, channels).astype("float32")
    bias[outputs:] = 0
    given = [node, *lists, Node(Input("b", "float32", bias.shape))]
    arrays.append(bias)
    y = Node(op, given)
    if epilogue == "add":
        given.append(Node(Input("other", "float32", y.type.shape)))
        arrays.append(rng.integers(-4, 5, y.type.shape).astype("float32"))
        y = Node(Add(), (y, given[-1]))
    last = {"relu": Relu(), "add": Relu(), "floor": Floor()}[epilogue]
    return Graph(tuple(given), (Node(last, (y,)),)), arrays


def byte_case(op: SparseConv2d | SparseLinear, x: tuple[int, ...], dtype: str, density: float = 0.4, epilogue: str = "") -> Case:
    """The same on 8 bits, any values, many the least or the greatest; with `add` a residual, with `look-up` a table."""
    rng = np.random.default_rng((len(x), op.block, int(density * 100)))
    node, cut = Node(Input("x", dtype, x)), op.lists_of(TensorType(dtype, x))
    mask = rng.random((cut.blocks, -(-cut.inputs // cut.group), cut.taps)) < density
    mask = np.repeat(np.repeat(mask, cut.block, 0), cut.group, 1)[: cut.outputs, : cut.inputs]
    arrays = [extremes(rng, dtype, x), *cut.pack(extremes(rng, "int8", mask.shape) * mask)]
    arrays = [np.ascontiguousarray(array) for array in arrays]
    given = [node, *(Node(Input(f"a{i}", str(a.dtype), a.shape)) for i, a in enumerate(arrays[1:]))]

    def operand(array: Array) -> Node:
        arrays.append(array)
        given.append(Node(Input(f"b{len(given)}", str(array.dtype), array.shape)))
        return given[-1]

    sums = Node(op, given).type.shape
    channels = (1, sums[1], 1, 1, sums[4]) if len(sums) == 5 else sums[-1:]
    bias = rng.integers(-3000, 3000, channels).ravel()
    bias[cut.outputs :] = 0
    y = Node(op, (*given, operand(bias.astype("int32"))))
    if epilogue:
        scale = (rng.uniform(0.5, 1.0, channels) * 4e-3 / max(1.0, mask[0].sum()) ** 0.5).astype("float32")
        factors = [Node(Broadcast(sums), (operand(array),)) for array in (scale, np.full(channels, 99, "float32"))]
        residual = [operand(extremes(rng, "int8", sums))] if epilogue == "add" else []
        y = Node(Requantize(3, "uint8", residual_scale=0.25, residual_zero=-7), (y, *factors, *residual))
    if epilogue == "look-up":
        y = Node(Lookup(), (y, operand(rng.integers(0, 256, 256).astype("uint8"))))
    return Graph(tuple(given), (y,)), arrays


def conv(b: int, block: int, channels: tuple[int, int], kernel: int, span: int = 0, **window: object) -> SparseConv2d:
    inputs, outputs = channels
    image = {"layout": f"NCHW{b}c", "out_layout": f"NCHW{b}c", **window}
    return SparseConv2d(outputs, inputs, (kernel, kernel), block, span or inputs, **image)  # type: ignore[arg-type]


def image(b: int, channels: int, height: int, width: int, batch: int = 1) -> tuple[int, ...]:
    return (batch, -(-channels // b), height, width, b)


def cases(b: int) -> list[tuple[str, Case]]:
    """For vectors of b channels: the family that has to run it, and the case."""
    pad, uneven = ((1, 1), (1, 1)), ((2, 0), (0, 1))
    rows = [
        case(conv(b, 1, (4 * b, 2 * b), 1, 2 * b), image(b, 4 * b, 9, 7), epilogue="add"),
        case(conv(b, 1, (2 * b + 3, b + 5), 3, b, padding=pad), image(b, 2 * b + 3, 5, 7, 2)),
        case(
            conv(b, 1, (b, 2 * b), 3, stride=(2, 2), padding=uneven, dilation=(1, 2)),
            image(b, b, 8, 9),
            epilogue="floor",
        ),
        case(SparseLinear(2 * b + 3, 1, 2 * b), (3, 2 * b + 5, 3 * b + 1)),
        case(SparseLinear(b, 1, 2 * b), (1, 2 * b), 0.0),
    ]
    vectors = [
        case(conv(b, b, (2 * b, 2 * b), 1), image(b, 2 * b, 9, 7), 0.03, epilogue="add"),
        case(conv(b, b, (2 * b + 3, b + 5), 3, padding=pad), image(b, 2 * b + 3, 5, 7, 2), 0.03),
        case(conv(b, b, (3, 2 * b), 3, stride=(2, 1), dilation=(2, 1), layout="NCHW"), (1, 3, 8, 9), 0.1),
        case(SparseLinear(2 * b + 3, b, 37), (3, 11, 37), 0.03, epilogue="floor"),
        case(SparseLinear(3 * b, b, 64), (1, 64), 0.05),
    ]
    generic = [
        case(conv(b, 2, (b, 2 * b), 1), image(b, b, 3, 4)),
        case(SparseLinear(b, 1, b), (20, b - 1)) if b < 8 else case(SparseLinear(b, 4, b), (5, b)),
    ]
    return [
        *(("sparse-rows", each) for each in rows),
        *(("sparse-vectors", each) for each in vectors),
        *(("elementwise", each) for each in generic),
    ]


def byte_cases(b: int) -> list[tuple[str, Case]]:
    """The same on 8 bits: each sign, padding that is zero and that is not, rows and columns all of padding, parts of sums."""
    pad, wide, uneven = ((1, 1), (1, 1)), ((4, 1), (0, 5)), ((2, 0), (0, 1))

    def bytes_(inputs: int, outputs: int, kernel: int, zero: int = 0, **window: object) -> SparseConv2d:
        return conv(b, b, (inputs, outputs), kernel, group=4, pad_value=zero, **window)

    vectors = [
        byte_case(bytes_(2 * b, 2 * b, 1), image(b, 2 * b, 9, 7), "uint8", epilogue="add"),
        byte_case(bytes_(2 * b, b + 5, 1), image(b, 2 * b, 9, 7), "int8", epilogue="look-up"),
        byte_case(bytes_(b, 2 * b, 3, padding=pad), image(b, b, 5, 17, 2), "uint8", epilogue="scaled"),
        byte_case(bytes_(2 * b - 4, b + 5, 3, 130, padding=pad), image(b, 2 * b, 6, 7, 2), "uint8"),
        byte_case(bytes_(2 * b, b, 3, 9, padding=wide, stride=(1, 2)), image(b, 2 * b, 5, 4), "uint8"),
        byte_case(bytes_(b, 2 * b, 3, padding=uneven, stride=(2, 2)), image(b, b, 8, 10), "int8"),
        byte_case(bytes_(b, b, 3, -7, padding=wide, dilation=(2, 1)), image(b, b, 8, 3), "int8", epilogue="scaled"),
        byte_case(bytes_(4, 2 * b, 3, 77, padding=pad, layout="NCHW4c"), (1, 1, 8, 9, 4), "uint8", 0.6),
        byte_case(bytes_(2 * b, b, 3, padding=pad), image(b, 2 * b, 4, 5), "int8", 0.0),
        byte_case(SparseLinear(2 * b + 3, b, 36, 4), (3, 11, 36), "uint8", epilogue="add"),
        byte_case(SparseLinear(2 * b + 1, b, 64, 4), (20, 64), "int8", epilogue="scaled"),
        byte_case(SparseLinear(3 * b, b, 64, 4), (1, 64), "int8"),
        byte_case(SparseLinear(3 * b, b, 64, 4), (1, 64), "uint8", epilogue="look-up"),
    ]
    generic = [
        byte_case(SparseLinear(b + 1, b, 10, 4), (5, 10), "uint8"),
        byte_case(SparseLinear(b, 1, 8, 4), (5, 16), "int8"),
        byte_case(conv(b, 1, (b, b), 3, padding=pad, pad_value=5), image(b, b, 3, 4), "uint8"),
    ]
    return [*(("sparse-vectors", each) for each in vectors), *(("elementwise", each) for each in generic)]


def random_byte_case(b: int, rng: np.random.Generator) -> Case:
    """Any layer on bytes that the kernels run: sizes, borders, strides, signs, zero points, shares of zeros, epilogues."""

    def any_of(*options: int) -> int:
        return options[int(rng.integers(len(options)))]

    dtype, density = ("uint8", "int8")[any_of(0, 1)], rng.uniform(0, 0.8)
    epilogue = ("", "scaled", "add", "look-up")[any_of(0, 1, 2, 3)]
    inputs, outputs = 4 * any_of(1, 3, b // 4, b // 2 + 1), any_of(1, b - 1, b, 2 * b, 2 * b + 3)
    if rng.random() < 0.3:
        rows = any_of(1, 2, 5, 33)
        return byte_case(SparseLinear(outputs, b, inputs, 4), (rows, inputs), dtype, density, epilogue)
    kernel, zero = any_of(1, 2, 3), any_of(0, 0, 5, 100)
    pads = tuple((any_of(0, 1, 2), any_of(0, 1)) for _ in range(2))
    window = {"stride": (any_of(1, 2), any_of(1, 2)), "padding": pads, "dilation": (any_of(1, 2), any_of(1, 1, 2))}
    op = conv(b, b, (inputs, outputs), kernel, group=4, pad_value=zero, **window)
    return byte_case(op, image(b, inputs, any_of(5, 7), any_of(5, 16, 35), any_of(1, 1, 2)), dtype, density, epilogue)


def native(name: str) -> Target:
    missing = missing_flags(TARGETS[name])
    if missing:
        pytest.skip(f"this host lacks {', '.join(missing)}")
    return TARGETS[name]


@pytest.mark.parametrize("name", X86)
def test_kernels_agree_with_the_reference(name: str) -> None:
    target = native(name)
    check(target, cases(target.block))


@pytest.mark.parametrize("name", WITH_BYTES)
def test_kernels_on_bytes_agree_with_the_reference(name: str) -> None:
    target = native(name)
    check(target, byte_cases(target.block))


@pytest.mark.parametrize("name", WITH_BYTES)
def test_random_layers_on_bytes_agree_with_the_reference(name: str, trials: int) -> None:
    target = native(name)
    rng = np.random.default_rng(WITH_BYTES.index(name))
    check(target, [("sparse-vectors", random_byte_case(target.block, rng)) for _ in range(trials // 10)])


def check(target: Target, found: list[tuple[str, Case]]) -> None:
    functions = {}
    for number, (family, (body, _)) in enumerate(found):
        assert choose(body, target)[0].name == family, f"case {number}"
        functions[f"k{number}"] = lower_region(body, target, f"k{number}")
    library = tvm.compile(tvm.IRModule(functions), target=tvm_target(target))
    for number, (_, (body, arrays)) in enumerate(found):
        (expected,) = interpret(body, arrays)
        # Whatever is written outside of the result shows in the guard behind it.
        result = tvm.runtime.tensor(np.full(expected.size + 64, 77, expected.dtype))
        flat = [tvm.runtime.tensor(a.ravel() if a.size else np.zeros(1, a.dtype)) for a in arrays]
        library[f"k{number}"](*flat, result._create_view((expected.size,)))
        got = result.numpy()
        assert (got[expected.size :] == 77).all(), f"case {number} wrote behind the result"
        np.testing.assert_array_equal(got[: expected.size].reshape(expected.shape), expected, f"case {number}: {show(body)}")


@pytest.mark.skipif(bool(emulator_build.missing()), reason=f"no emulated ARM: {', '.join(emulator_build.missing())}")
@pytest.mark.parametrize("name", ["arm", "arm-neon"])
def test_kernels_on_the_emulated_arm(name: str) -> None:
    """All layers of one program, of constants; the blocks of these targets are two vectors wide."""
    block = TARGETS[name].block
    both = [*(cases(block) if name == "arm" else ()), *byte_cases(block)]
    found = [each for family, each in both if family != "elementwise"]
    inputs, outputs, given, expected = [], [], [], []
    for body, arrays in found:
        x = Node(Input("x", str(arrays[0].dtype), arrays[0].shape))
        new = {node: Node(Const(array)) for node, array in zip(body.inputs[1:], arrays[1:], strict=True)}
        new[body.inputs[0]] = x
        for node in body.nodes():
            if node not in new:
                new[node] = Node(node.op, [new[operand] for operand in node.inputs])
        inputs.append(x)
        outputs.append(new[body.outputs[0]])
        given.append(arrays[0])
        expected += interpret(body, arrays)
    graph = Graph(tuple(inputs), tuple(outputs))
    with paring.compile(graph, target=name, device="emulator", pipeline="fuse") as net:
        for got, want in zip(net(*given), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_every_place_counts() -> None:
    """What the kernels read is what the lists say: a weight is packed and unpacked without loss, whatever the cut."""
    rng = np.random.default_rng(0)
    whole = ((6, 5, 9, 4, 5), (7, 9, 1, 1, 4), (16, 32, 9, 16, 32), (33, 20, 2, 8, 7))
    for sizes in (*whole, (6, 5, 9, 4, 5, 4), (16, 32, 9, 16, 32, 4), (33, 26, 2, 8, 12, 4), (3, 9, 1, 1, 4, 2)):
        cut = Lists(*sizes)
        weight = thinned(rng, 0.4 / cut.group, cut.outputs, cut.inputs, cut.taps)
        values, places, starts = cut.pack(weight)
        cut.check(places, starts)
        np.testing.assert_array_equal(cut.unpack(values, places, starts), weight)
