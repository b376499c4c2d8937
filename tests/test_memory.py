"""The static plan: nothing alive is overwritten, whatever the graph."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paring.backends.memory import ALIGNMENT, Plan, aligned, as_kernel, overwritable, plan
from paring.ir.graph import Graph, Node
from paring.ir.interpreter import interpret
from paring.ir.liveness import peak_activation_bytes, root
from paring.ir.ops.binary import Add, Less, Mul, Where
from paring.ir.ops.core import Const, Input, Region
from paring.ir.ops.reduce import Sum
from paring.ir.ops.shape import Broadcast, Reshape, Transpose
from paring.ir.ops.unary import Cast, Neg, Relu
from paring.ir.text import show

pytestmark = pytest.mark.fast


def variable(*shape: int, dtype: str = "float32", label: str = "x") -> Node:
    return Node(Input(label, dtype, shape))


def chain(*ops: object, start: Node) -> Node:
    for op in ops:
        start = Node(op, (start,))  # type: ignore[arg-type]
    return start


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Elementwise ops, views, transpositions, casts and reductions over small tensors, with any set of outputs."""
    shapes = [(4, 6), (6, 4), (24,), (2, 12), (1, 6), (3, 5)]
    inputs = [variable(*draw(st.sampled_from(shapes)), label=f"x{i}") for i in range(draw(st.integers(1, 3)))]
    weight = Node(Const(np.arange(24, dtype="float32").reshape(4, 6)))
    nodes = [*inputs, weight]
    for _ in range(draw(st.integers(1, 14))):
        node = draw(st.sampled_from(nodes))
        kind = draw(st.sampled_from(["neg", "relu", "add", "reshape", "transpose", "cast", "broadcast"]))
        if kind == "add":
            alike = [n for n in nodes if n.type == node.type]
            nodes.append(Node(Add(), (node, draw(st.sampled_from(alike)))))
        elif kind == "reshape":
            nodes.append(Node(Reshape((node.type.size,)), (node,)))
        elif kind == "transpose":
            nodes.append(Node(Transpose(tuple(reversed(range(node.type.rank)))), (node,)))
        elif kind == "cast":
            nodes.append(Node(Cast("int32" if node.type.dtype == "float32" else "float32"), (node,)))
        elif kind == "broadcast":
            nodes.append(Node(Broadcast((2, *node.type.shape)), (node,)) if node.type.rank < 3 else node)
        else:
            nodes.append(Node(Neg() if kind == "neg" else Relu(), (node,)))
    outputs = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))
    return Graph(tuple(inputs), tuple(outputs))


def check_disjoint(planned: Plan) -> None:
    for a, b in combinations(planned.allocations, 2):
        together = a.first <= b.last and b.first <= a.last
        apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
        assert apart or not together
    for a in planned.allocations:
        assert a.offset % ALIGNMENT == 0
        assert a.offset >= 0
        assert a.offset + a.bytes <= planned.peak_bytes
        assert all(max(n.type.bytes, 1) <= a.bytes for n in a.nodes)
    assert planned.peak_bytes <= sum(aligned(a.bytes) for a in planned.allocations)


def run_plan(planned: Plan, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Run the kernels of a plan on one real arena."""
    arena = np.full(planned.peak_bytes, 0xAA, np.uint8)
    outside = {"input": arrays, "weight": [w.value for w in planned.weights]}
    outside["output"] = [np.empty(n.type.shape, n.type.dtype) for n in planned.results]

    def view(node: Node) -> np.ndarray:
        slot = planned.slots[node]
        if slot.space == "arena":
            found = np.frombuffer(arena.data, node.type.dtype, node.type.size, slot.position)
        else:
            found = outside[slot.space][slot.position]
        return found.reshape(node.type.shape)

    for step in planned.order:
        (result,) = interpret(step.body, [view(operand) for operand in step.operands])
        view(step.node)[...] = result
    return [view(node).copy() for node in planned.graph.outputs]


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_a_plan_computes_what_the_graph_means(graph: Graph, seed: int) -> None:
    planned = plan(graph)
    check_disjoint(planned)
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(-4, 5, n.type.shape).astype(n.type.dtype) for n in graph.inputs]
    for got, wanted in zip(run_plan(planned, arrays), interpret(graph, arrays), strict=True):
        np.testing.assert_array_equal(got, wanted)


@settings(max_examples=30, deadline=None)
@given(graphs())
def test_a_plan_is_deterministic(graph: Graph) -> None:
    first, second = plan(graph), plan(graph)
    assert [(a.offset, a.bytes, a.first, a.last) for a in first.allocations] == [
        (a.offset, a.bytes, a.first, a.last) for a in second.allocations
    ]
    assert first.outputs == second.outputs


def written_in_place(body: Graph, position: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(result element by element over the memory of an operand, in a random order; result of the body)."""
    arrays = [rng.integers(-4, 5, n.type.shape).astype(n.type.dtype) for n in body.inputs]
    (wanted,) = interpret(body, arrays)
    memory = arrays[position].copy()
    for index in rng.permutation(wanted.size):
        operands = [memory if i == position else a for i, a in enumerate(arrays)]
        (now,) = interpret(body, operands)
        memory.reshape(-1).view(wanted.dtype)[index] = now.reshape(-1)[index]
    return memory.reshape(-1).view(wanted.dtype).reshape(wanted.shape), wanted


@settings(max_examples=100, deadline=None)
@given(graphs(), st.integers(0, 1000))
def test_what_may_be_overwritten_survives_any_order_of_writes(graph: Graph, seed: int) -> None:
    body = Graph(graph.inputs, graph.outputs[:1])
    for position in overwritable(body):
        got, wanted = written_in_place(body, position, np.random.default_rng(seed))
        np.testing.assert_array_equal(got, wanted)


def test_what_may_be_overwritten() -> None:
    x, y, row = variable(4, 6), variable(4, 6, label="y"), variable(1, 6, label="row")
    wide = Node(Broadcast((4, 6)), (row,))
    condition = Node(Less(), (x, y))

    def legal(output: Node, *inputs: Node) -> set[int]:
        return set(overwritable(Graph(inputs, (output,))))

    assert legal(Node(Add(), (x, y)), x, y) == {0, 1}
    assert legal(Node(Add(), (x, wide)), x, row) == {0}
    assert legal(Node(Where(), (condition, x, y)), x, y) == {0, 1}
    assert legal(Node(Cast("int32"), (x,)), x) == {0}
    assert legal(Node(Cast("int64"), (x,)), x) == set()
    assert legal(condition, x, y) == set()
    assert legal(Node(Transpose((1, 0)), (x,)), x) == set()
    # An identical Broadcast moves nothing, but nothing is proved about it either.
    assert legal(Node(Add(), (x, Node(Broadcast((4, 6)), (x,)))), x) == set()
    square = variable(4, 4)
    turned = Node(Transpose((1, 0)), (square,))
    assert legal(Node(Add(), (square, turned)), square) == set()
    assert legal(Node(Broadcast((4, 4)), (Node(Neg(), (square,)),)), square) == set()


def test_a_chain_stays_in_place() -> None:
    x = variable(8, 8)
    planned = plan(Graph((x,), (chain(Neg(), Relu(), Neg(), Relu(), start=x),)))
    assert [step.in_place for step in planned.order] == [False, True, True, False]
    assert planned.peak_bytes == 256
    assert [planned.slots[step.node].space for step in planned.order] == ["arena", "arena", "arena", "output"]


def test_nothing_alive_is_overwritten_in_place() -> None:
    x = variable(8, 8)
    h = chain(Neg(), start=x)
    later = Node(Add(), (chain(Relu(), Neg(), start=h), h))
    planned = plan(Graph((x,), (chain(Relu(), start=later),)))
    (relu,) = [step for step in planned.order if isinstance(step.node.op, Relu) and step.operands == (h,)]
    assert not relu.in_place


def test_a_view_keeps_its_memory_alive() -> None:
    x = variable(4, 6)
    h = chain(Neg(), start=x)
    flat = chain(Reshape((24,)), start=h)
    used = Node(Mul(), (chain(Relu(), start=flat), flat))
    planned = plan(Graph((x,), (chain(Neg(), start=used),)))
    assert planned.slots[flat] == planned.slots[h]
    check_disjoint(planned)
    assert not next(step for step in planned.order if isinstance(step.node.op, Relu)).in_place


def test_outputs_that_need_no_kernel() -> None:
    x, c = variable(4, 6), Node(Const(np.ones((2, 2), "float32")))
    h = chain(Neg(), start=x)
    view = chain(Reshape((24,)), start=h)
    planned = plan(Graph((x,), (x, c, h, view, chain(Reshape((6, 4)), start=x), h)))
    assert [(s.space, s.position) for s in planned.outputs] == [
        ("input", 0),
        ("weight", 0),
        ("output", 0),
        ("output", 0),
        ("input", 0),
        ("output", 0),
    ]
    assert planned.peak_bytes == 0
    assert len(planned.order) == 1


def test_equal_weights_are_held_once() -> None:
    x = variable(3)
    one, same = (Node(Const(np.array([1, 2, 3], "float32"))) for _ in range(2))
    planned = plan(Graph((x,), (Node(Add(), (Node(Add(), (x, one)), same)),)))
    assert len(planned.weights) == 1


def test_empty_results_are_not_computed() -> None:
    x = variable(0, 3)
    total = chain(Neg(), Sum((0,), False), start=x)
    planned = plan(Graph((x,), (total, chain(Relu(), start=x))))
    assert [step.node for step in planned.order] == [total]
    assert planned.slots[total.inputs[0]].space == "arena"


def test_a_kernel_of_a_single_op() -> None:
    x, two = variable(4), Node(Const(np.array(2.0, "float32")))
    scaled = Node(Mul(), (x, Node(Broadcast((4,)), (two,))))
    body, operands = as_kernel(scaled)
    assert operands == scaled.inputs
    square, operands = as_kernel(Node(Mul(), (x, x)))
    assert operands == (x,)
    assert len(square.inputs) == 1
    broadcast, operands = as_kernel(scaled.inputs[1])
    assert operands == ()
    assert interpret(broadcast, [])[0].tolist() == [2.0] * 4
    assert show(body) == show(as_kernel(Node(Mul(), (variable(4, label="other"), variable(4, label="b"))))[0])


def test_large_constants_of_a_body_become_operands() -> None:
    a = variable(3, label="a")
    body = Graph((a,), (Node(Add(), (a, Node(Const(np.array([1, 2, 3], "float32"))))),))
    x = variable(3)
    node = Node(Region("elementwise", body), (x,))
    made, operands = as_kernel(node)
    assert operands[0] is x
    assert len(made.inputs) == 2
    given = [np.zeros(3, "float32"), operands[1].op.value]  # type: ignore[attr-defined]
    assert interpret(made, given)[0].tolist() == [1, 2, 3]
    assert len(plan(Graph((x,), (node,))).weights) == 1


def test_peak_of_activations() -> None:
    x = variable(16)
    h = chain(Neg(), start=x)
    y = Node(Add(), (h, x))
    assert peak_activation_bytes(Graph((x,), (y,))) == 3 * 64
    assert peak_activation_bytes(Graph((x,), (x,))) == 64
    assert peak_activation_bytes(Graph((x, variable(16, label="unread")), (x,))) == 2 * 64
    assert peak_activation_bytes(Graph((), (Node(Const(np.zeros(3, "float32"))),))) == 0
    assert root(chain(Reshape((4, 4)), Reshape((2, 8)), start=x)) is x


def test_the_tightest_gap_is_taken() -> None:
    """Two short-lived results of different sizes leave gaps; a third goes where it fits best."""
    x = variable(1024)
    keep = [chain(Transpose((0,)), start=x) for _ in range(4)]
    total = keep[0]
    for other in keep[1:]:
        total = Node(Add(), (total, other))
    planned = plan(Graph((x,), (chain(Transpose((0,)), start=total),)))
    check_disjoint(planned)
    assert planned.peak_bytes <= 4 * 4096


def test_thousands_of_kernels_are_planned_quickly() -> None:
    x = variable(32)
    nodes = [x]
    for i in range(5000):
        nodes.append(Node(Transpose((0,)), (nodes[-1],)) if i % 3 else Node(Add(), (nodes[-1], nodes[max(0, i - 7)])))
    start = time.perf_counter()
    planned = plan(Graph((x,), (nodes[-1],)))
    assert time.perf_counter() - start < 10
    assert planned.peak_bytes < 32 * 4 * 20
