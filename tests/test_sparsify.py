"""`sparsify`: which layers become sparse, what it says of the others, and lists that are damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import paring
from paring.backends.targets import TARGETS
from paring.ir import Const, Graph, Input, Node, Region, constants, interpret, parse, same, show
from paring.ir.errors import ArgumentError, IRTypeError, VerifyError
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, reduce, sparse, unary
from paring.ir.verify import check_trusted, verify
from paring.passes.ledger import measure
from paring.passes.manager import Result, run_pipeline
from paring.passes.pipelines import parse_pipeline, pipeline
from paring.passes.sparsify import SPARSE, Sparsify
from paring.passes.winograd import Winograd

TARGET = TARGETS["x86-avx512"].pipeline_options()


def compiled(graph: Graph, format: str = "auto") -> Result:
    """What the passes of an AVX-512 target make of a program."""
    own = pipeline("blocked", TARGET)
    return run_pipeline(graph, [replace(p, format=format) if isinstance(p, Sparsify) else p for p in own])


def constant(array: Array) -> Node:
    return Node(Const(array.astype("float32")))


def masked(mask: Array) -> Node:
    return constant(np.random.default_rng(1).integers(1, 5, mask.shape) * mask)


def a_conv(mask: Array, size: int = 14) -> Graph:
    x = Node(Input("x", "float32", (1, mask.shape[1], size, size)))
    pads = ((mask.shape[2] // 2,) * 2,) * 2
    return Graph((x,), (Node(unary.Relu(), (Node(conv.Conv2d(padding=pads), (x, masked(mask))),)),))


def a_linear(mask: Array, rows: int = 64) -> Graph:
    x = Node(Input("x", "float32", (rows, mask.shape[1])))
    return Graph((x,), (Node(linear.Linear(), (x, masked(mask))),))


def on_bytes(mask: Array, size: int = 14) -> Graph:
    """A convolution of 8-bit integers, or a linear layer on `size` rows."""
    x = Node(Input("x", "uint8", (1, mask.shape[1], size, size) if mask.ndim == 4 else (size, mask.shape[1])))
    weight = Node(Const((np.random.default_rng(1).integers(1, 128, mask.shape) * mask).astype("int8")))
    pads = ((mask.shape[-1] // 2,) * 2,) * 2
    op = conv.Conv2d(padding=pads, pad_value=9) if mask.ndim == 4 else linear.Linear()
    return Graph((x,), (Node(op, (x, weight)),))


def scattered(density: float, *shape: int) -> Array:
    return np.random.default_rng(0).random(shape) < density


def in_blocks(density: float, *shape: int) -> Array:
    return np.repeat(scattered(density, shape[0] // 16, *shape[1:]), 16, 0)


def by_fours(density: float, *shape: int) -> Array:
    """Blocks of 16 outputs x 4 inputs."""
    return np.repeat(in_blocks(density, shape[0], shape[1] // 4, *shape[2:]), 4, 1)


def format_of(result: Result) -> str:
    members = [n for node in result.graph.nodes() for n in (node.op.body.nodes() if isinstance(node.op, Region) else [node])]
    layers = [node.op for node in members if isinstance(node.op, sparse.SparseConv2d | sparse.SparseLinear)]
    return "dense" if not layers else "rows" if layers[0].block == 1 else "vectors"


def reasons(result: Result) -> str:
    return "; ".join(why for name, _, why in result.declined if name == "sparsify")


DECISIONS = {
    "unstructured 1x1": (a_conv(scattered(0.2, 256, 256, 1, 1)), "rows"),
    "blocks 1x1": (a_conv(in_blocks(0.5, 256, 256, 1, 1)), "vectors"),
    "unstructured 3x3": (a_conv(scattered(0.2, 64, 64, 3, 3)), "rows"),
    "blocks 3x3": (a_conv(in_blocks(0.5, 64, 64, 3, 3)), "vectors"),
    "unread inputs": (a_conv(np.broadcast_to(np.arange(64)[:, None, None] % 2 == 0, (64, 64, 3, 3))), "vectors"),
    "nothing": (a_conv(np.zeros((64, 64, 1, 1))), "vectors"),
    "unstructured linear": (a_linear(scattered(0.2, 256, 256)), "rows"),
    "blocks linear": (a_linear(in_blocks(0.3, 256, 256)), "vectors"),
    "one row": (a_linear(scattered(0.5, 256, 256), 1), "dense"),
    "one row of blocks": (a_linear(in_blocks(0.5, 256, 256), 1), "vectors"),
    "too dense": (a_conv(scattered(0.9, 64, 64, 1, 1)), "dense"),
    "few channels": (a_conv(scattered(0.5, 16, 3, 3, 3)), "dense"),
    "all of it": (a_conv(np.ones((64, 64, 1, 1))), "dense"),
    "bytes in blocks of four inputs 1x1": (on_bytes(by_fours(0.5, 256, 256, 1, 1)), "vectors"),
    "bytes in blocks of four inputs 3x3": (on_bytes(by_fours(0.5, 64, 64, 3, 3)), "vectors"),
    "bytes in blocks of four inputs linear": (on_bytes(by_fours(0.5, 256, 256), 64), "vectors"),
    "bytes, one row": (on_bytes(by_fours(0.3, 256, 256), 1), "vectors"),
    "bytes without anything": (on_bytes(np.zeros((64, 64, 3, 3))), "vectors"),
    "bytes in blocks of one input": (on_bytes(in_blocks(0.5, 64, 64, 3, 3)), "dense"),
    "bytes, unstructured": (on_bytes(scattered(0.1, 256, 256, 1, 1)), "dense"),
    "bytes, few zeros": (on_bytes(by_fours(0.95, 64, 64, 1, 1)), "dense"),
}


@pytest.mark.fast
@pytest.mark.parametrize("name", DECISIONS)
def test_the_format_is_what_costs_least(name: str) -> None:
    graph, wanted = DECISIONS[name]
    result = compiled(graph)
    assert format_of(result) == wanted, reasons(result)
    entry = next(e for e in result.ledger.entries if e.name.startswith("sparsify"))
    assert len(entry.notes) == (wanted != "dense")
    assert bool(reasons(result)) == (wanted == "dense")
    if wanted != "dense":
        assert entry.after.macs < entry.before.macs
        assert "stored" in entry.notes[0]


@pytest.mark.fast
def test_a_format_can_be_asked_for_and_forbidden() -> None:
    graph = a_conv(scattered(0.9, 64, 64, 1, 1))
    assert [format_of(compiled(graph, name)) for name in ("rows", "vectors", "none")] == ["rows", "vectors", "dense"]


@pytest.mark.fast
def test_why_not() -> None:
    assert "100% of its weights are not zero" in reasons(compiled(a_linear(np.ones((32, 32)))))
    assert "what it takes dense" in reasons(compiled(a_linear(scattered(0.5, 256, 256), 1)))
    x = Node(Input("x", "float32", (1, 32, 8, 8)))
    grouped = Node(conv.Conv2d(groups=2), (x, masked(scattered(0.1, 32, 16, 3, 3))))
    assert "its channels are in groups" in reasons(compiled(Graph((x,), (grouped,))))
    doubles = Node(Input("x", "float64", (64, 32)))
    layer = Node(linear.Linear(), (doubles, Node(Const(np.zeros((32, 32), "float64")))))
    assert "float64 has no sparse kernels" in reasons(compiled(Graph((doubles,), (layer,))))


@pytest.mark.fast
@pytest.mark.parametrize(("density", "wanted"), [(0.5, "dense"), (0.1, "vectors")])
def test_a_layer_that_is_faster_by_tiles_is_judged_by_them(density: float, wanted: str) -> None:
    """`winograd` stands behind: what it makes of a dense layer is what a sparse one has to beat."""
    x = Node(Input("x", "uint8", (1, 64, 56, 56)))
    weight = Node(Const(by_fours(density, 64, 64, 3, 3).astype("int8")))
    graph = Graph((x,), (Node(conv.Conv2d(padding=((1, 1), (1, 1))), (x, weight)),))
    result = compiled(graph)
    assert format_of(result) == wanted
    assert ("winograd_conv2d" in show(result.graph)) == (wanted == "dense")
    direct = [replace(p, ratio=0.0) if isinstance(p, Sparsify | Winograd) else p for p in pipeline("blocked", TARGET)]
    assert format_of(run_pipeline(graph, direct)) == "vectors"


@pytest.mark.fast
def test_why_not_on_8_bits() -> None:
    single = reasons(compiled(on_bytes(scattered(0.1, 256, 256, 1, 1))))
    assert "what it takes dense" in single
    assert "entries of 16x4 weights" in single
    assert "single weights are for floats" in reasons(compiled(on_bytes(by_fours(0.5, 64, 64, 1, 1)), "rows"))
    assert "its 30 inputs are no whole groups of 4" in reasons(compiled(on_bytes(np.zeros((32, 30)))))
    x = Node(Input("x", "int8", (4, 32)))
    layer = Node(linear.Linear(), (x, Node(Const(np.zeros((32, 32), "int8")))))
    assert "the target has no products of bytes" in reasons(run_pipeline(Graph((x,), (layer,)), parse_pipeline("sparsify")))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "named"),
    [
        *(("sparsify{format='csr'}", "csr"), ("sparsify{block=0}", "block"), ("sparsify{span=24}", "span")),
        ("sparsify{group=0}", "group"),
    ],
)
def test_options_out_of_range(text: str, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        parse_pipeline(text)


@pytest.mark.fast
def test_dense_programs_come_out_as_they_were() -> None:
    graph = a_conv(np.ones((64, 64, 3, 3)))
    without = [str(step) for step in pipeline("blocked", TARGET) if step.name != "sparsify"]
    assert show(compiled(graph).graph) == show(run_pipeline(graph, parse_pipeline(without)).graph)


@pytest.mark.fast
def test_sparse_programs_read_back_and_count_what_is_stored() -> None:
    mask = scattered(0.2, 64, 64, 1, 1)
    result = compiled(a_conv(mask))
    assert same(parse(show(result.graph), constants(result.graph)), result.graph)
    assert measure(result.graph).macs == int(mask.sum()) * 14 * 14


def a_sparse_linear(values: Array, places: Array, starts: Array) -> Graph:
    """Six outputs of eight inputs, single weights, in two spans."""
    x = Node(Input("x", "float32", (3, 8)))
    lists = [Node(Const(array)) for array in (values, places, starts)]
    return Graph((x,), (Node(unary.Relu(), (Node(sparse.SparseLinear(6, 1, 4), (x, *lists)),)),))


GOOD = sparse.Lists(6, 8, 1, 1, 4).pack((np.arange(48).reshape(6, 8) % 3 == 0).astype("float32"))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("what", "position", "index", "value"),
    [
        ("a place lies outside of its list's input channels", 1, 0, 8),
        ("a place lies outside of its list's input channels", 1, 0, -1),
        ("a place lies outside of its list's input channels", 1, -1, 0),
        ("places do not ascend", 1, 1, 0),
        ("starts descend", 2, 1, 9),
        ("the lists do not cover the 16 places", 2, -1, 12),
        ("the lists do not cover the 16 places", 2, 0, 1),
    ],
)
def test_damaged_lists_are_found_in_the_constants(what: str, position: int, index: int, value: int) -> None:
    verify(a_sparse_linear(*GOOD))
    damaged = [array.copy() for array in GOOD]
    damaged[position][index] = value
    graph = a_sparse_linear(*damaged)
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    assert what in str(caught.value)
    assert "sparse_linear(float32[3,8], float32[16,1], int32[16], int32[13])" in str(caught.value)
    # Inside of a region the lists are operands.
    fused = run_pipeline(a_sparse_linear(*GOOD), parse_pipeline("fuse")).graph.outputs[0]
    inputs = [*fused.inputs[:1], *(Node(Const(array)) for array in damaged)]
    with pytest.raises(VerifyError, match="region sparse_linear"):
        verify(Graph((fused.inputs[0],), (Node(fused.op, inputs),)))


@pytest.mark.fast
def test_places_of_bytes_are_the_first_of_their_group() -> None:
    """Kernels read whole groups: what lies behind the last one may not be there."""
    x = Node(Input("x", "uint8", (3, 8)))
    lists = [Node(Const(array)) for array in sparse.Lists(4, 8, 1, 4, 8, 4).pack(np.ones((4, 8), "int8"))]
    layer = sparse.SparseLinear(4, 4, 8, 4)
    verify(Graph((x,), (Node(layer, (x, *lists)),)))
    lists[1] = Node(Const(np.array([0, 5], "int32")))
    with pytest.raises(VerifyError, match="a place is not the first of 4 channels"):
        verify(Graph((x,), (Node(layer, (x, *lists)),)))
    with pytest.raises(IRTypeError, match="spans of 6 channels are no groups of 4"):
        Node(sparse.SparseLinear(4, 4, 6, 4), (x, *lists))


@pytest.mark.fast
def test_starts_that_wrap_around_are_found() -> None:
    values, places, _ = GOOD
    starts = np.concatenate([[0, 2**31 - 1, -2], np.full(10, len(places))]).astype(np.int32)
    with pytest.raises(VerifyError, match="starts descend"):
        verify(a_sparse_linear(values, places, starts))


@pytest.mark.fast
def test_lists_from_outside_are_constants() -> None:
    """Kernels rely on them: nobody could check what a caller gives."""
    graph = a_sparse_linear(*GOOD)
    check_trusted(graph)
    check_trusted(run_pipeline(graph, parse_pipeline("fuse")).graph)
    layer = graph.outputs[0].inputs[0]
    inputs = [Node(Input(f"x{i}", n.type.dtype, n.type.shape)) for i, n in enumerate(layer.inputs)]
    loose = Graph(tuple(inputs), (Node(layer.op, inputs),))
    fused = run_pipeline(loose, parse_pipeline("fuse")).graph
    for given in (loose, fused):
        with pytest.raises(VerifyError, match="operand 2 of sparse_linear is not constant"):
            check_trusted(given)
        with pytest.raises(VerifyError, match="is not constant"):
            paring.compile(given, target="reference")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ((GOOD[0].ravel(), *GOOD[1:]), "values are not rows of 1"),
        ((GOOD[0][1:], *GOOD[1:]), "places are not one for each row of values"),
        ((GOOD[0], GOOD[1].astype("int64"), GOOD[2]), "places are not one for each row of values"),
        ((*GOOD[:2], GOOD[2][1:]), "starts do not bound 12 lists"),
        ((GOOD[0].astype("float64"), *GOOD[1:]), "operands are not of one float type"),
    ],
)
def test_operands_that_are_no_lists(arrays: tuple[Array, Array, Array], what: str) -> None:
    with pytest.raises(IRTypeError, match=what):
        a_sparse_linear(*arrays)


def network() -> Graph:
    """An image through a convolution of each format, and rows of a matrix."""
    x = Node(Input("x", "float32", (1, 16, 12, 12)))
    pads = ((1, 1), (1, 1))
    y = Node(unary.Clamp(-2.0, 2.0), (Node(conv.Conv2d(padding=pads), (x, masked(scattered(0.1, 64, 16, 3, 3)))),))
    y = Node(unary.Clamp(-2.0, 2.0), (Node(conv.Conv2d(), (y, masked(in_blocks(0.2, 48, 64, 1, 1)))),))
    rows = Node(Input("rows", "float32", (40, 64)))
    z = Node(linear.Linear(), (rows, masked(scattered(0.1, 80, 64)), constant(np.arange(80))))
    return Graph((x, rows), (y, z))


def test_a_network_with_zeros_is_compiled_saved_and_loaded(tmp_path: Path) -> None:
    """The same bits as the program it came from: all its sums are exact."""
    graph = network()
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-2, 3, node.type.shape).astype("float32") for node in graph.inputs]
    with paring.compile(graph, target="native") as net:
        kinds = [line for line in str(net.ledger).splitlines() if "stored" in line]
        assert len(kinds) == 3, kinds
        for got, want in zip(net(*arrays), interpret(graph, arrays), strict=True):
            np.testing.assert_array_equal(got, want)
        net.save(tmp_path / "net.paring")
        with paring.load(tmp_path / "net.paring") as again:
            for got, want in zip(again(*arrays), net(*arrays), strict=True):
                np.testing.assert_array_equal(got, want)


def residual_network() -> Graph:
    """A convolution of an image, two with a residual around them, one that is not linear in what follows, a linear layer."""
    rng = np.random.default_rng(3)

    def weight(*dims: int) -> Node:
        return Node(Const((rng.standard_normal(dims) / np.prod(dims[1:]) ** 0.5).astype("float32")))

    def layer(x: Node, out: int, kernel: int, stride: int = 1) -> Node:
        pads, inputs = ((kernel // 2,) * 2,) * 2, x.type.shape[1]
        return Node(conv.Conv2d((stride, stride), pads), (x, weight(out, inputs, kernel, kernel), weight(out)))

    x = Node(Input("x", "float32", (1, 3, 12, 12)))
    first = Node(unary.Relu(), (layer(x, 64, 3),))
    inner = layer(Node(unary.Relu(), (layer(first, 64, 3),)), 64, 3)
    y = Node(unary.Relu(), (Node(binary.Add(), (inner, first)),))
    y = Node(unary.HardSwish(), (layer(y, 96, 1, 2),))
    y = Node(reduce.Mean((2, 3)), (y,))
    return Graph((x,), (Node(linear.Linear(), (y, weight(64, 96), weight(64))),))


@pytest.mark.parametrize(
    ("masks", "stored"),
    [
        ("prune-block{shape='16x4', ratio=0.75}", 4),
        ("prune-kernel{share=16, inputs=4}, prune-pattern{inputs=4}", 2),
        ("prune-unstructured{ratio=0.75}", 0),
    ],
)
def test_pruned_and_quantized_it_runs_sparse_on_integers(masks: str, stored: int) -> None:
    """From end to end: zeros survive, each layer's kernel writes bytes, and the compiled network has the interpreter's bits."""
    graph = residual_network()
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((1, 3, 12, 12)).astype("float32") for _ in range(3)]
    with paring.compile(graph, target="native", passes=f"{masks}, equalize, quantize", calibration=batches) as net:
        if net.target.group == 1:
            pytest.skip(f"{net.target.name} has no products of bytes")
        lines = [line for line in str(net.ledger).splitlines() if "8-bit blocks" in line]
        assert len(lines) == stored, lines
        regions = [node for node in net.graph.nodes() if isinstance(node.op, Region)]
        sparse_ones = [r for r in regions if any(isinstance(n.op, SPARSE) for n in r.op.body.nodes())]
        assert len(sparse_ones) == stored
        assert all(r.inputs[0].type.dtype == "uint8" for r in sparse_ones)
        assert all(r.type.dtype == "uint8" or r is net.graph.outputs[0] for r in sparse_ones), "sums are written"
        for batch in batches:
            np.testing.assert_array_equal(net(batch), interpret(net.graph, [batch])[0])
