"""Winograd's convolution on 8-bit integers: the operator is exact, and the pass takes what pays."""

from __future__ import annotations

import numpy as np
import pytest
from quantized_graphs import quantized_graph

from paring.backends.targets import TARGETS
from paring.ir import Const, Graph, Input, Node, interpret
from paring.ir import layout as lay
from paring.ir.errors import ArgumentError, IRTypeError
from paring.ir.op import Array
from paring.ir.ops import conv, pack, winograd
from paring.ir.types import TensorType
from paring.ir.work import integers_line, saved_bytes
from paring.passes.manager import Result, run_pipeline
from paring.passes.pipelines import parse_pipeline, pipeline
from paring.passes.winograd import Winograd, greatest_sum

pytestmark = pytest.mark.fast

B = 4
OPTIONS = TARGETS["x86-vnni"].pipeline_options()


def by_tiles(x: Array, weight: Array, pads: conv.Padding, fill: int) -> Array:
    """A plain image (N, C, H, W) by a plain weight, by Winograd's way."""
    op = winograd.WinogradConv2d(pads, f"NCHW{B}c", fill)
    blocked = op.ref(lay.block_activation(x, B), winograd.transformed_weight(weight, B))
    return lay.unblock_activation(blocked)[:, : weight.shape[0]]


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_direct_convolution(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = ("uint8", "int8")[seed % 2]
    info = np.iinfo(dtype)
    c, o, batch, h, w = (int(rng.integers(1, most)) for most in (20, 10, 3, 12, 12))
    pads = ((int(rng.integers(0, 4)), int(rng.integers(1, 3))), (int(rng.integers(1, 3)), int(rng.integers(1, 4))))
    x = rng.choice([info.min, info.max, 0, 1, 77], (batch, c, h, w)).astype(dtype)
    weight = rng.choice([-128, 127, -1, 0, 3], (o, c, 3, 3)).astype(np.int8)
    fill = int(rng.choice([0, info.min, info.max, 9]))
    wanted = conv.Conv2d(padding=pads, pad_value=fill).ref(x, weight)
    np.testing.assert_array_equal(by_tiles(x, weight, pads, fill), wanted)


def test_transformed_pixels_and_weights_fit_16_bits() -> None:
    for matrix, greatest in ((winograd.OF_PIXELS, 255), (winograd.OF_WEIGHTS, 128)):
        reach = np.abs(matrix).sum(1).max() ** 2 * greatest
        assert reach < 1 << 15


def full(channels: int, value: int = 127) -> Array:
    return np.full((1, channels, 3, 3), value, np.int8)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_are_right_up_to_their_limit_and_not_beyond(sign: int) -> None:
    """127 * 255 * 9 for each channel: 115 stay below 2^25, 116 do not."""
    for channels, right in ((115, True), (116, False)):
        x, weight = np.full((1, channels, 3, 3), 255, np.uint8), full(channels, sign * 127)
        assert (greatest_sum(weight, "uint8") < winograd.LIMIT) is right
        (found,) = by_tiles(x, weight, ((0, 0), (0, 0)), 0).ravel()
        assert (int(found) == sign * 127 * 255 * 9 * channels) is right


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_the_greatest_sum_is_reached_and_not_passed(dtype: str) -> None:
    weight = np.random.default_rng(0).integers(-128, 128, (3, 4, 3, 3)).astype(np.int8)
    info = np.iinfo(dtype)
    wide = weight.reshape(3, -1).astype(np.int64)
    reached = max(
        abs(int((wide[o] * np.where(wide[o] > 0, high, low)).sum()))
        for o in range(3)
        for high, low in ((info.max, info.min), (info.min, info.max))
    )
    assert greatest_sum(weight, dtype) == reached


def layer(
    inputs: int, outputs: int, size: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1, weight: int = 0
) -> Graph:
    """A blocked convolution on bytes; all its weights are `weight`, or any."""
    x = Node(Input("x", "uint8", (1, inputs // 16, size, size, 16)))
    plain = np.random.default_rng(0).integers(-20, 21, (outputs, inputs // groups, kernel, kernel))
    layout = "OIHW4i16o4i"
    packed = pack.PackConvWeight(layout).ref((plain * 0 + weight if weight else plain).astype(np.int8))
    image, pad = "NCHW16c", dilation * (kernel // 2)
    pads = ((pad, pad), (pad, pad))
    op = conv.Conv2d((stride, 1), pads, (dilation, 1), groups, image, image, layout)
    return Graph((x,), (Node(op, (x, Node(Const(packed)))),))


def after(graph: Graph, **options: float) -> Result:
    return run_pipeline(graph, [Winograd(**{"ratio": OPTIONS["winograd"], "far": OPTIONS["far"], **options})])  # type: ignore[arg-type]


DECISIONS: dict[str, tuple[Graph, str]] = {
    "56x56": (layer(64, 64, 56), ""),
    "28x28": (layer(128, 128, 28), ""),
    "weights from memory": (layer(256, 256, 14), "times as fast as the direct one"),
    "four tiles": (layer(64, 64, 7), "times as fast as the direct one"),
    "few channels": (layer(16, 16, 28), "times as fast as the direct one"),
    "pointwise": (layer(64, 64, 28, kernel=1), "not 3x3 with stride 1"),
    "5x5": (layer(64, 64, 28, kernel=5), "not 3x3 with stride 1"),
    "strided": (layer(64, 64, 28, stride=2), "not 3x3 with stride 1"),
    "dilated": (layer(64, 64, 28, dilation=2), "not 3x3 with stride 1"),
    "grouped": (layer(64, 64, 28, groups=2), "in groups"),
    "sums of 27 bits": (layer(128, 128, 28, weight=127), "its sums reach 37307520"),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_layers_are_taken_where_it_pays(name: str) -> None:
    graph, reason = DECISIONS[name]
    result = after(graph)
    (root,) = result.graph.outputs
    assert isinstance(root.op, winograd.WinogradConv2d) is (reason == "")
    assert reason in "; ".join(why for step, _, why in result.declined if step == "winograd")
    if not reason:
        x = np.random.default_rng(1).integers(0, 256, graph.inputs[0].type.shape).astype(np.uint8)
        np.testing.assert_array_equal(interpret(result.graph, [x])[0], interpret(graph, [x])[0])


def test_weights_near_by_make_more_layers_pay() -> None:
    assert isinstance(after(layer(256, 256, 14), far=0.0).graph.outputs[0].op, winograd.WinogradConv2d)


def test_a_target_without_such_products_keeps_its_layers() -> None:
    result = after(layer(64, 64, 56), ratio=0.0)
    assert isinstance(result.graph.outputs[0].op, conv.Conv2d)
    assert "no kernel for products of 16 bits" in "; ".join(why for _, _, why in result.declined)
    for name in ("arm", "arm-neon", "reference"):
        assert TARGETS[name].winograd == 0


def test_floats_are_left_alone() -> None:
    x = Node(Input("x", "float32", (1, 4, 28, 28, 16)))
    weight = Node(Const(np.ones((4, 4, 3, 3, 16, 16), np.float32)))
    image, pads = "NCHW16c", ((1, 1), (1, 1))
    op = conv.Conv2d(padding=pads, layout=image, out_layout=image, weight_layout="OIHW16i16o")
    assert isinstance(after(Graph((x,), (Node(op, (x, weight)),))).graph.outputs[0].op, conv.Conv2d)


@pytest.mark.parametrize("text", ["winograd{ratio=-1.0}", "winograd{far=-0.5}", "sparsify{ratio=-1.0}", "sparsify{gather=-2.0}"])
def test_options_that_make_no_sense(text: str) -> None:
    with pytest.raises(ArgumentError, match="is negative"):
        parse_pipeline(text)


def test_operands_that_do_not_fit() -> None:
    x, weight = TensorType("uint8", (1, 2, 6, 6, 4)), TensorType("int16", (2, 36, 4, 4, 2))
    op = winograd.WinogradConv2d(((1, 1), (1, 1)), "NCHW4c")
    assert op.infer(x, weight) == TensorType("int32", (1, 2, 6, 6, 4))
    wrong = {
        "fit layout": (TensorType("uint8", (1, 8, 6, 6)), weight),
        "not of 8 bits": (x.with_dtype("float32"), weight),
        "not transformed": (x, TensorType("int16", (2, 9, 4, 4, 2))),
        "does not end": (x, TensorType("int16", (2, 36, 2, 4, 2))),
        "bias does not match": (x, weight, TensorType("int32", (7,))),
        "larger than": (TensorType("uint8", (1, 2, 6, 0, 4)), weight),
    }
    for said, types in wrong.items():
        with pytest.raises(IRTypeError, match=said):
            op.infer(*types)
    odd = TensorType("uint8", (1, 2, 6, 6, 3)), TensorType("int16", (2, 36, 3, 3, 2))
    with pytest.raises(IRTypeError, match="blocks of an odd size"):
        winograd.WinogradConv2d(layout="NCHW3c").infer(*odd)
    with pytest.raises(IRTypeError, match="pad_value"):
        winograd.WinogradConv2d(layout="NCHW4c", pad_value=300).infer(x, weight)


def test_weights_that_grow_are_said_to() -> None:
    """36 numbers of 16 bits instead of 9 of 32."""
    saved = saved_bytes(after(layer(64, 64, 56)).graph)
    assert saved == 64 * 64 * (9 * 4 - 36 * 2)
    assert "weights 144.0 KiB larger than in float32" in integers_line(1.0, saved)
    assert "smaller" in integers_line(1.0, saved_bytes(layer(64, 64, 56)))


def test_many_random_networks_have_convolutions_by_tiles() -> None:
    """Where all that can are taken: the tests of their bits would say little else."""
    options = {**OPTIONS, "winograd": 1e6, "far": 0.0}
    passes = pipeline("blocked", options)
    graphs = [quantized_graph(np.random.default_rng((5, seed)), 3)[0] for seed in range(64, 96)]
    kinds = [[getattr(n.op, "kind", "") for n in run_pipeline(graph, passes).graph.nodes()] for graph in graphs]
    assert sum("winograd_conv2d" in found for found in kinds) >= 3
