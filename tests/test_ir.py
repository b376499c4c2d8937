"""What a program is: types, graphs, every operator, the text form, and how bad programs die."""

from __future__ import annotations

import importlib
import math
import pickle
import pkgutil
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_lists import list_operand

import paring.ir.ops
from paring.ir import (
    DTYPES,
    OPS,
    Const,
    Graph,
    Input,
    Loc,
    Node,
    Op,
    Region,
    TensorType,
    constants,
    interpret,
    magnitude_bound,
    parse,
    rebuild,
    same,
    show,
    substitute,
)
from paring.ir.errors import InputError, IRTypeError, ParingError, VerifyError
from paring.ir.interpreter import evaluate
from paring.ir.op import Array, Sample
from paring.ir.ops import attention, binary, conv, index, linear, norm, pool, reduce, shape, sparse, unary
from paring.ir.verify import verify
from paring.testing import check_round_trip, graphs, random_graph, random_inputs

pytestmark = pytest.mark.fast

EPS = float(np.finfo(np.float32).eps)
# How many ulps of its bound an operator may lose when it is computed in float32 throughout.
ULPS_IN_FLOAT32 = 4.0
DEPTH = 5000


def sampled(cls: type[Op]) -> list[Sample]:
    return [] if cls in (Input, Region) else cls.samples(np.random.default_rng(0))


SAMPLES = [(op, types) for cls in OPS.values() for op, types in sampled(cls)]
each_sample = pytest.mark.parametrize(("op", "types"), SAMPLES, ids=[f"{i}-{op.name}" for i, (op, _) in enumerate(SAMPLES)])


def operands_for(op: Op, types: tuple[TensorType, ...], rng: np.random.Generator) -> list[Array]:
    """Values within the op's domain."""
    low, high = getattr(op, "sample_range", (-3.0, 3.0))
    arrays = []
    for position, t in enumerate(types):
        kind = DTYPES[t.dtype].kind
        if isinstance(op, index.Gather | index.GatherElements) and position == 1:
            array: Array = rng.integers(0, types[0].shape[op.axis], t.shape)
        elif isinstance(op, sparse.SparseConv2d | sparse.SparseLinear) and position in (2, 3):
            array = list_operand(op.lists_of(types[0]), position, types)
        elif isinstance(op, norm.BatchNorm) and position == 4:
            array = rng.uniform(0.1, 2.0, t.shape)
        elif kind == "bool":
            array = rng.random(t.shape) < 0.5
        elif kind == "float":
            array = rng.uniform(low, high, t.shape)
        else:
            array = rng.integers(math.ceil(low), math.floor(high) + 1, t.shape)
        arrays.append(np.asarray(array, t.dtype))
    return arrays


def graph_of(op: Op, types: tuple[TensorType, ...]) -> Graph:
    inputs = [Node(Input(f"a{i}", t.dtype, t.shape)) for i, t in enumerate(types)]
    return Graph(tuple(inputs), (Node(op, inputs, Loc("m", "f.py:1")),))


def floats(*dims: int) -> TensorType:
    return TensorType("float32", dims)


def x_input(*dims: int, label: str = "x") -> Node:
    return Node(Input(label, "float32", dims))


# --- types and graphs -----------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 10**6), max_size=6))
def test_a_type_reads_back(dtype: str, dims: list[int]) -> None:
    t = TensorType(dtype, tuple(dims))
    assert TensorType.parse(str(t)) == t
    assert t.bytes == math.prod(dims) * np.dtype(dtype).itemsize


@pytest.mark.parametrize("text", ["", "float32", "float32[", "float32[1,]", "float33[1]", "float32[-1]", "float32[1]\n", "f[٣]"])
def test_what_is_not_a_type(text: str) -> None:
    with pytest.raises(IRTypeError):
        TensorType.parse(text)


@pytest.mark.parametrize("dims", [[1], (1.0,), (-1,), (True,), (np.int64(1),)])
def test_what_is_not_a_shape(dims: object) -> None:
    with pytest.raises(IRTypeError, match="shape"):
        TensorType("float32", dims)  # type: ignore[arg-type]


def test_users_and_uses_are_counted_once_for_each_operand() -> None:
    x = x_input(2)
    y = Node(binary.Add(), (x, x))
    graph = Graph((x,), (y, y, x))
    assert graph.users()[x] == [y, y]
    assert graph.use_counts() == {x: 3, y: 2}
    assert graph.nodes() == [x, y]


def test_rebuilding_and_substituting_keep_what_is_unchanged() -> None:
    x = x_input(2)
    kept, old = Node(unary.Relu(), (x,)), Node(unary.Neg(), (x,))
    graph = Graph((x,), (kept, Node(unary.Abs(), (old,))))
    assert rebuild(graph, lambda node, inputs: node).outputs == graph.outputs
    new = Node(unary.Sign(), (x,))
    changed = substitute(graph, {old: new})
    assert changed.outputs[0] is kept
    assert changed.outputs[1].inputs == (new,)


def test_constants_are_compared_by_content_and_never_written() -> None:
    array = np.arange(3.0)
    const = Const(array)
    assert const == Const(np.arange(3.0)) != Const(np.arange(3))
    assert Const(np.array([0.0])) != Const(np.array([-0.0]))
    with pytest.raises(ValueError, match="read-only"):
        const.value[0] = 1


def test_regions_of_different_bodies_differ() -> None:
    x = x_input(2)
    regions = [Region("chain", Graph((x,), (Node(op, (x,)),))) for op in (unary.Relu(), unary.Relu(), unary.Neg())]
    assert len(set(regions)) == 3


def test_errors_survive_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(IRTypeError("what", where="where", why="why", hint="hint")))
    assert isinstance(error, IRTypeError)
    assert str(error) == "what\n  where: where\n  why: why\n  hint: hint"


# --- bad programs die where they are born ---------------------------------------------------------------------------

FAULTS: list[tuple[Op, tuple[TensorType, ...], str]] = [
    (conv.Conv2d(groups=2), (floats(1, 3, 4, 4), floats(4, 1, 3, 3)), "input channels do not match the weight"),
    (conv.Conv2d(), (floats(1, 3, 2, 2), floats(4, 3, 3, 3)), "the kernel is larger than the padded input"),
    (conv.Conv2d(), (floats(1, 3, 4, 4), floats(4, 3, 3, 3), floats(3)), "bias does not match"),
    (conv.Conv2d(out_layout="NCHW0c"), (floats(1, 3, 4, 4), floats(4, 3, 3, 3)), "unknown activation layout"),
    (linear.Linear(), (floats(2, 3), floats(4, 5)), "inner sizes differ"),
    (linear.Matmul(), (floats(2, 3, 4), floats(3, 4, 5)), "batches differ"),
    (binary.Add(), (floats(2, 3), floats(3)), "operands differ in type"),
    (binary.Add(), (floats(2),), "takes 2 operands, got 1"),
    (binary.LogicalAnd(), (floats(2), floats(2)), "does not apply to float32"),
    (unary.Sigmoid(), (TensorType("int64", (2,)),), "does not apply to int64"),
    (unary.Clamp(low=math.nan), (floats(2),), "high minus infinity"),
    (unary.Cast("float31"), (floats(2),), "unknown dtype"),
    (shape.Reshape((7,)), (floats(2, 3),), "sizes differ"),
    (shape.Reshape([6]), (floats(2, 3),), "attribute shape is [6]"),  # type: ignore[arg-type]
    (shape.Transpose((0, 0)), (floats(2, 3),), "is not a permutation"),
    (shape.Concat(1), (floats(2, 3), floats(3, 3)), "operands differ outside axis 1"),
    (shape.Slice((0,), (4,), (1,)), (floats(3),), "is outside dimension 0"),
    (shape.Pad(((0, 3),), "reflect"), (floats(3),), "reflection is wider than the input"),
    (norm.BatchNorm(), (floats(2, 3), *(floats(2),) * 4), "parameters do not match the channels"),
    (norm.Softmax(2), (floats(2, 3),), "axis 2 is out of range"),
    (norm.Softmax(1.0), (floats(2, 3),), "attribute axis is 1.0"),  # type: ignore[arg-type]
    (pool.MaxPool2d((2, 2), (1, 1), (2, 2)), (floats(1, 1, 4, 4),), "padding is at most half the kernel"),
    (reduce.Max((0,)), (floats(0, 3),), "nothing to choose from"),
    (index.Gather(0), (floats(3), floats(2)), "indices are int32 or int64"),
    (attention.ScaledDotProductAttention(), (floats(1, 2, 3, 4),) * 2 + (floats(1, 1, 3, 4),), "batches or heads differ"),
    (binary.Where(), (floats(2), floats(2), floats(2)), "the condition is not bool"),
]


@pytest.mark.parametrize(("op", "types", "reason"), FAULTS, ids=[f"{op.name}-{r[:20]}" for op, _, r in FAULTS])
def test_an_ill_typed_node_is_refused_with_op_types_reason_and_origin(op: Op, types: tuple[TensorType, ...], reason: str) -> None:
    inputs = [Node(Input("a", t.dtype, t.shape)) for t in types]
    with pytest.raises(IRTypeError) as caught:
        Node(op, inputs, Loc("net.layer1", "net.py:7"))
    text = str(caught.value)
    assert reason in text
    assert f"{op.name}({', '.join(map(str, types))})" in text
    assert "net.layer1 (net.py:7)" in text


def test_a_broken_graph_is_refused() -> None:
    x, y = x_input(2), x_input(2, label="y")
    for graph, what in (
        (Graph((x,), ()), "at least one output"),
        (Graph((x, x), (x,)), "listed twice"),
        (Graph((Node(unary.Relu(), (x,)),), (x,)), "relu is listed as an input"),
        (Graph((x,), (y,)), "'y' is read but not listed"),
        (Graph((y,), (Node(Region("chain", Graph((x, x), (x,))), (y, y)),)), "listed twice"),
    ):
        with pytest.raises(VerifyError, match=what):
            verify(graph)
    forged = Node(unary.Relu(), (x,))
    forged.type = floats(3)
    with pytest.raises(VerifyError, match=re.escape("relu claims float32[3], infers float32[2]")) as caught:
        verify(Graph((x,), (forged,)))
    assert caught.value.where == "relu(float32[2]) in graph"


def test_wrong_arrays_are_refused() -> None:
    graph = graph_of(unary.Relu(), (floats(2),))
    with pytest.raises(InputError, match="expected 1 inputs, got 0"):
        interpret(graph, [])
    with pytest.raises(InputError, match=re.escape("input 0 (a0) is float64[2], expected float32[2]")):
        interpret(graph, [np.zeros(2)])


# --- every operator -------------------------------------------------------------------------------------------------


def test_every_operator_has_samples() -> None:
    lacking = [name for name, cls in OPS.items() if cls not in (Input, Region) and not sampled(cls)]
    assert not lacking


@each_sample
def test_infer_agrees_with_ref(op: Op, types: tuple[TensorType, ...]) -> None:
    node = graph_of(op, types).outputs[0]
    arrays = operands_for(op, types, np.random.default_rng(1))
    result = np.asarray(op.ref(*arrays))
    assert result.shape == node.type.shape
    assert evaluate(node, arrays).dtype == np.dtype(node.type.dtype)
    assert node.op.macs(node.type, *types) >= 0


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@each_sample
def test_what_infer_accepts_ref_computes(op: Op, types: tuple[TensorType, ...]) -> None:
    """Sizes of all operands changed at random, most of them alike, to none and one in particular."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        sizes = {d: int(rng.choice([d, d, 0, 1, 2, 3])) for t in types for d in t.shape}
        changed = [t.with_shape(tuple(sizes[d] if rng.random() < 0.8 else d for d in t.shape)) for t in types]
        try:
            graph = graph_of(op, tuple(changed))
        except IRTypeError:
            continue
        if any(isinstance(op, index.Gather | index.GatherElements) and not t.size for t in changed):
            continue
        (value,), (bound,) = magnitude_bound(graph, operands_for(op, tuple(changed), rng))
        assert value.shape == bound.shape == graph.outputs[0].type.shape


@each_sample
def test_the_magnitude_bounds_value_and_moved_operands(op: Op, types: tuple[TensorType, ...]) -> None:
    graph = graph_of(op, types)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        arrays = operands_for(op, types, rng)
        (value,), (bound,) = magnitude_bound(graph, arrays)
        assert (bound >= np.abs(value)).all()
        if not graph.outputs[0].type.is_float or any(a.dtype.kind != "f" for a in arrays) or _jumps(op):
            continue
        moved = [a * (1 + EPS * rng.uniform(-1, 1, a.shape)) for a in arrays]
        (other,) = interpret(graph, moved, exact_real=True)
        # Each operand moved by one ulp adds one bound at most; at first order, so a little more at second.
        assert (np.abs(other - value) <= 1.01 * len(types) * EPS * bound + EPS**2).all()


def _jumps(op: Op) -> bool:
    return isinstance(op, unary._Step | binary.FloorDiv | binary.Remainder)


@each_sample
def test_the_magnitude_bounds_the_error_of_float32(
    op: Op, types: tuple[TensorType, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(op, types)
    if not graph.outputs[0].type.is_float or _jumps(op):
        return
    arrays = operands_for(op, types, np.random.default_rng(2))
    (value,), (bound,) = magnitude_bound(graph, arrays)
    for module in pkgutil.iter_modules(paring.ir.ops.__path__, "paring.ir.ops."):
        loaded = importlib.import_module(module.name)
        if hasattr(loaded, "wide"):
            monkeypatch.setattr(loaded, "wide", lambda array: array)
    found = np.asarray(op.ref(*arrays)).astype(np.float64)
    assert (np.abs(found - value) <= ULPS_IN_FLOAT32 * EPS * bound + np.finfo(np.float32).tiny).all()


@settings(max_examples=60)
@given(graphs(max_size=12, exact=False), st.integers(0, 2**32 - 1))
def test_the_magnitude_bounds_whole_graphs_in_float32(graph: Graph, seed: int) -> None:
    """Each node rounded to float32 against none rounded: one ulp of the bound for each node on the longest path."""
    arrays = random_inputs(graph, np.random.default_rng(seed), exact=False)
    values, bounds = magnitude_bound(graph, arrays)
    depth: dict[Node, int] = {}
    for node in graph.nodes():
        depth[node] = 1 + max((depth[i] for i in node.inputs), default=0)
    for node, found, value, bound in zip(graph.outputs, interpret(graph, arrays), values, bounds, strict=True):
        if node.type.is_float:
            assert (np.abs(found - value) <= depth[node] * EPS * bound + np.finfo(np.float32).tiny).all()


@settings(max_examples=60)
@given(graphs(max_size=12), st.integers(0, 2**32 - 1))
def test_exact_graphs_are_exact(graph: Graph, seed: int) -> None:
    arrays = random_inputs(graph, np.random.default_rng(seed))
    for found, real in zip(interpret(graph, arrays), interpret(graph, arrays, exact_real=True), strict=True):
        assert np.array_equal(found, real)


def test_random_graphs_use_most_operators() -> None:
    seen = {n.op.name for s in range(300) for n in random_graph(np.random.default_rng(s), 12, exact=bool(s % 2)).nodes()}
    wanted = {"conv2d", "conv_transpose2d", "linear", "matmul", "batch_norm", "layer_norm", "softmax", "max_pool2d", "avg_pool2d"}
    wanted |= {"adaptive_avg_pool2d", "concat", "slice", "pad", "broadcast", "reshape", "transpose", "gather", "where", "sum"}
    wanted |= {"scaled_dot_product_attention", "resize", "pixel_shuffle", "cumsum", "silu", "gelu", "sub", "div", "minimum"}
    assert not wanted - seen


# --- the text form --------------------------------------------------------------------------------------------------


@each_sample
def test_every_operator_reads_back(op: Op, types: tuple[TensorType, ...]) -> None:
    graph = graph_of(op, types)
    check_round_trip(graph)
    assert parse(show(graph), constants(graph)).outputs[0].op == op


@settings(max_examples=100)
@given(graphs(max_size=12))
def test_random_graphs_read_back(graph: Graph) -> None:
    check_round_trip(graph)
    assert same(parse(show(graph, locs=False), constants(graph)), graph)


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, 1e-45, 0.1, 3.4028234663852886e38, 2**0.5, 5])
def test_odd_attributes_read_back(value: float) -> None:
    graph = graph_of(shape.Pad(((1, 1),), value=value), (floats(2),))
    again = parse(show(graph)).outputs[0].op
    assert isinstance(again, shape.Pad)
    assert repr(again.value) == repr(float(value))


def test_a_nan_attribute_reads_back() -> None:
    check_round_trip(graph_of(shape.Pad(((1, 1),), value=math.nan), (floats(2),)))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_odd_constants_read_back_bit_for_bit(dtype: str) -> None:
    kind = np.dtype(dtype).kind
    values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-7, 0.1] if kind == "f" else [0, 1]
    if kind in "iu":
        values += [np.iinfo(dtype).min, np.iinfo(dtype).max]
    for array in (np.array(values, dtype), np.array(values * 3, dtype), np.array(values[-1], dtype), np.zeros((0, 2), dtype)):
        graph = Graph((), (Node(Const(array)),))
        back = parse(show(graph), constants(graph)).outputs[0].op
        assert isinstance(back, Const)
        assert back.value.dtype == array.dtype
        assert back.value.tobytes() == array.tobytes()


@settings(max_examples=40)
@given(st.text(), st.text(), st.text())
def test_any_label_and_place_read_back(label: str, module: str, source: str) -> None:
    x = Node(Input(label, "float32", (2,)))
    graph = Graph((x,), (Node(unary.Relu(), (x,), Loc(module, source)),))
    text = show(graph)
    assert text.isascii()
    assert len(text.splitlines()) == 5
    back = parse(text)
    assert back.outputs[0].loc == Loc(module, source)
    assert back.inputs[0].op == x.op


def test_regions_within_regions_read_back() -> None:
    x = x_input(2)
    graph = Graph((x,), (Node(unary.Relu(), (x,)),))
    for _ in range(5):
        outer = x_input(2)
        graph = Graph((outer,), (Node(Region("chain", graph), (outer,), Loc("m")),))
    check_round_trip(graph)
    verify(graph)
    assert interpret(graph, [np.array([-1, 2], "float32")])[0].tolist() == [0, 2]


GOOD = """graph(%0) {
  %0: float32[2,3] = input() {label="x"}
  %1: float32[2,3] = relu(%0)
  %2: float32[3] = const() {value=(1.0, 2.0, 3.0)}
  %3: float32[2,3] = broadcast(%2) {shape=(2, 3)}
  %4: float32[2,3] = add(%1, %3) @"net":"net.py:3"
  %5: float32[2] = max(%4) {axes=(1,)}
  %6: float32[2] = region(%5) {kind="chain"} graph(%0) {
    %0: float32[2] = input() {label="a"}
    %1: float32[2] = clamp(%0) {low=-inf, high=6.0}
    return %1
  }
  return %6
}
"""


@pytest.mark.parametrize(
    ("old", "new", "fragments"),
    [
        ("relu(%0)", "rleu(%0)", ["line 3, column 22", "unknown op 'rleu'"]),
        ("relu(%0)", "relu(%9)", ["line 3", "%9 is used before it is defined"]),
        ("relu(%0)", "relu(%0, %0)", ["line 3", "relu(float32[2,3], float32[2,3])", "takes 1 operands, got 2"]),
        ("%1: float32[2,3] = relu", "%1: float32[2,4] = relu", ["line 3", "relu gives float32[2,3], the text says float32[2,4]"]),
        ("(1.0, 2.0, 3.0)", "(1.0, 2.0)", ["line 4", "the value does not fill float32[3]"]),
        ("shape=(2, 3)", "shape=(2, 4)", ["line 5", "broadcast(float32[3])", "sizes differ", "float32[3] to (2, 4)"]),
        ("shape=(2, 3)", 'shape="23"', ["line 5", "broadcast(float32[3])", "attribute shape is '23'"]),
        ("shape=(2, 3)", "shapes=(2, 3)", ["line 5", "broadcast has no attribute 'shapes'"]),
        (" {axes=(1,)}", "", ["line 7", "max lacks 'axes'"]),
        ("add(%1, %3)", "add(%1, %2)", ["line 6", "add(float32[2,3], float32[3])", "operands differ in type", "net.py:3"]),
        ("%4: float32", "%3: float32", ["line 6", "%3 is defined twice"]),
        ("return %6", "return %7", ["%7 is not defined"]),
        ("float32[2,3] = input", "float33[2,3] = input", ["line 2", "unknown dtype 'float33'"]),
        ("relu(%0)", "relu(%0) graph(%0) { return %0 }", ["line 3"]),
        ("float32[3] = const() {value=(1.0", "int32[3] = const() {value=(1.5", ["line 4", "does not fit int32[3]"]),
    ],
)
def test_bad_text_names_place_op_types_and_reason(old: str, new: str, fragments: list[str]) -> None:
    check_round_trip(parse(GOOD))
    assert GOOD.count(old) == 1
    with pytest.raises(ParingError) as caught:
        parse(GOOD.replace(old, new))
    for fragment in fragments:
        assert fragment in str(caught.value)


def _texts() -> list[str]:
    drawn = [random_graph(np.random.default_rng(seed), 6) for seed in range(20)]
    return [GOOD, *(show(graph) for graph in drawn), *(show(graph_of(op, types)) for op, types in SAMPLES[::3])]


TEXTS = _texts()
SCRAPS = [*'(){}[],=%-0"\\\n\0٣@', "%0", "9" * 40, "9" * 5000, "1e999", "inf", "-nan", "-1", "0.5", "1" + "0" * 18]
SCRAPS += ["True", "None", "graph() {", "return", '"\\u0000d800"', "NCHW0c", "float16"]


@settings(max_examples=800)
@given(st.data())
def test_damaged_text_gives_a_typed_error_or_a_graph(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(st.sampled_from(["", *SCRAPS])) + text[stop:]
    try:
        graph = parse(text)
    except ParingError:
        return
    assert show(parse(show(graph), constants(graph))) == show(graph)


@settings(max_examples=300)
@given(st.text(max_size=60))
def test_any_text_gives_a_typed_error(text: str) -> None:
    with pytest.raises(ParingError):
        parse(text)


@pytest.mark.parametrize("text", ["(" * 10**5, "graph(%0) {" * 10**4, "graph() { %0: float32[1] = const() {value=" + "(" * 10**5])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(ParingError):
        parse(text)


# --- depth ----------------------------------------------------------------------------------------------------------


def test_a_chain_of_thousands_of_nodes_works_everywhere() -> None:
    x = node = x_input(2)
    for _ in range(DEPTH):
        node = Node(unary.Neg(), (node,))
    graph = Graph((x,), (node,))
    assert len(graph) == DEPTH + 1
    verify(graph)
    check_round_trip(graph)
    array = np.array([1, -2], "float32")
    assert np.array_equal(interpret(graph, [array])[0], array)
    assert np.array_equal(magnitude_bound(graph, [array])[1][0], np.abs(array))
    assert len(substitute(graph, {x: x_input(2)})) > DEPTH
