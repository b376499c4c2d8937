"""An index out of range stands for the first or the last position: in the reference, in passes, and compiled."""

from __future__ import annotations

import numpy as np
import pytest

import paring
from paring.ir import Const, Graph, Input, Node, interpret, magnitude_bound
from paring.ir.errors import IRTypeError
from paring.ir.ops.index import Gather, GatherElements

X = np.arange(12, dtype="float32").reshape(4, 3)
LIMITS = {"int32": np.iinfo("int32"), "int64": np.iinfo("int64")}


def lookup(op: Gather | GatherElements, dtype: str, shape: tuple[int, ...]) -> Graph:
    x, indices = Node(Input("x", "float32", X.shape)), Node(Input("indices", dtype, shape))
    return Graph((x, indices), (Node(op, (x, indices)),))


def odd(dtype: str) -> np.ndarray:
    return np.array([[-1, 4, 2], [LIMITS[dtype].min, LIMITS[dtype].max, 0]], dtype)


EXPECTED = np.array([[0, 3, 2], [0, 3, 0]])


@pytest.mark.fast
@pytest.mark.parametrize("dtype", LIMITS)
def test_the_reference_clamps(dtype: str) -> None:
    arrays = [X, odd(dtype)]
    rows, elements = (lookup(op, dtype, (2, 3)) for op in (Gather(0), GatherElements(0)))
    for graph, expected in ((rows, X[EXPECTED]), (elements, np.take_along_axis(X, EXPECTED, 0))):
        assert np.array_equal(interpret(graph, arrays)[0], expected)
        assert np.array_equal(magnitude_bound(graph, arrays)[1][0], expected)


@pytest.mark.fast
@pytest.mark.parametrize("op", [Gather(0), GatherElements(0)])
def test_from_nothing_nothing_can_be_taken(op: Gather | GatherElements) -> None:
    empty = Node(Const(np.zeros((0, 3), "float32")))
    with pytest.raises(IRTypeError, match="nothing to choose from"):
        Node(op, (empty, Node(Const(np.zeros((2, 3), "int64")))))
    assert Node(op, (empty, Node(Const(np.zeros((0, 3), "int64"))))).type.size == 0


@pytest.mark.parametrize("op", [Gather(0), GatherElements(0)])
@pytest.mark.parametrize("dtype", LIMITS)
def test_compiled_code_clamps_as_the_reference_does(op: Gather | GatherElements, dtype: str) -> None:
    graph, arrays = lookup(op, dtype, (2, 3)), [X, odd(dtype)]
    with paring.compile(graph, target="native") as net:
        assert np.array_equal(net(*arrays), interpret(graph, arrays)[0])
