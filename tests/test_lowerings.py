"""Every op, compiled, against its `ref`: all samples, odd sizes, exact integers, special values."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm
from sparse_lists import list_operand

from paring.backends.families import lower_region
from paring.backends.kernel import tvm_target
from paring.backends.lowering import LOWERINGS
from paring.backends.targets import TARGETS, Target, missing_flags
from paring.ir import OPS, Graph, Input, Node, interpret, magnitude_bound
from paring.ir.op import Array, Op
from paring.ir.ops import attention, binary, conv, index, linear, norm, pool, reduce, resize, scan, shape, sparse, unary
from paring.ir.types import DTYPES, TensorType

HOST = [t for t in TARGETS.values() if t.arch == "x86_64" and not missing_flags(t)]
COMPUTING = [cls for name, cls in OPS.items() if name not in ("input", "const", "region")]
EPS = float(np.finfo(np.float32).eps)

# |error| <= K * eps * bound, where the bound of a sum is the sum of its magnitudes. A few roundings stay under 2 in all.
K: dict[type[Op], float] = {binary.Pow: 4.0}
K_DEFAULT = 2.0

# Ops whose results on small integers are small integers again: not a bit may differ.
EXACT = (
    *(
        conv.Conv2d,
        conv.ConvTranspose2d,
        linear.Linear,
        linear.Matmul,
        sparse.SparseConv2d,
        sparse.SparseLinear,
        scan.CumSum,
        reduce.Sum,
        reduce.Max,
        reduce.Min,
    ),
    *(reduce.ArgMax, pool.MaxPool2d, unary.Relu, unary.Clamp, unary.Abs, unary.Neg, unary.Floor, unary.Ceil, unary.Round),
    *(unary.Sign, unary.LogicalNot, unary.Cast, binary.Add, binary.Sub, binary.Mul, binary.FloorDiv, binary.Remainder),
    *(binary.Maximum, binary.Minimum, binary.Equal, binary.NotEqual, binary.Less, binary.LessEqual, binary.Greater),
    *(binary.GreaterEqual, binary.LogicalAnd, binary.LogicalOr, binary.Where, index.Gather, index.GatherElements),
    *(index.Tril, index.Triu, shape.Movement),
)

Case = tuple[Graph, list[Array]]


class Kernels:
    """All graphs compiled as kernels of one module, which is much faster than one by one."""

    def __init__(self, graphs: Sequence[Graph], target: Target) -> None:
        self.graphs = graphs
        functions = {f"k{i}": lower_region(graph, target, f"k{i}") for i, graph in enumerate(graphs)}
        self.module = tvm.compile(tvm.IRModule(functions), target=tvm_target(target))

    def run(self, number: int, arrays: Sequence[Array]) -> Array:
        output = self.graphs[number].outputs[0].type
        flat = [np.ascontiguousarray(a).reshape(-1) if a.size else np.zeros(1, a.dtype) for a in arrays]
        tensors = [tvm.runtime.tensor(a) for a in (*flat, np.zeros(max(output.size, 1), output.dtype))]
        self.module[f"k{number}"](*tensors)
        return tensors[-1].numpy()[: output.size].reshape(output.shape)


def run_all(cases: Sequence[Case], target: Target) -> list[Array]:
    kernels = Kernels([graph for graph, _ in cases], target)
    return [kernels.run(i, arrays) for i, (_, arrays) in enumerate(cases)]


def graph_of(op: Op, types: Sequence[TensorType]) -> Graph:
    inputs = [Node(Input(f"x{i}", t.dtype, t.shape)) for i, t in enumerate(types)]
    return Graph(tuple(inputs), (Node(op, inputs),))


def random_array(rng: np.random.Generator, op: Op, position: int, types: Sequence[TensorType], small: bool) -> Array:
    """An operand that the op is defined on; `small`: integers, so that sums are exact."""
    t = types[position]
    kind = DTYPES[t.dtype].kind
    if isinstance(op, index.Gather | index.GatherElements) and position == 1:
        return rng.integers(0, max(types[0].shape[op.axis], 1), t.shape).astype(t.dtype)
    if isinstance(op, sparse.SparseConv2d | sparse.SparseLinear) and position in (2, 3):
        return list_operand(op.lists_of(types[0]), position, tuple(types))
    if kind == "bool":
        return rng.random(t.shape) < 0.5
    low, high = getattr(op, "sample_range", (-3.0, 3.0))
    if isinstance(op, norm.BatchNorm) and position == 4:
        low, high = 0.5, 2.0
    if small or kind != "float":
        low, high = np.ceil(low), np.floor(high)
        values = rng.integers(int(max(low, 0) if kind == "uint" else low), int(high) + 1, t.shape)
        return values.astype(t.dtype)
    return (rng.random(t.shape) * (high - low) + low).astype(t.dtype)


def arrays_for(op: Op, types: Sequence[TensorType], small: bool) -> list[Array]:
    rng = np.random.default_rng(zlib.crc32(f"{op}{types}".encode()))
    return [random_array(rng, op, i, types, small) for i in range(len(types))]


def f(*sizes: int) -> TensorType:
    return TensorType("float32", sizes)


def larger(cls: type[Op]) -> list[tuple[Op, tuple[TensorType, ...]]]:
    """Sizes that are no multiples of the lanes, and such that are, for ops whose samples are all small."""
    if issubclass(cls, unary.Unary):
        dtype = "bool" if cls is unary.LogicalNot else "float32"
        return [(cls(), (TensorType(dtype, s),)) for s in ((3, 37), (2, 5, 64), (1031,), (7, 1), (1, 1, 5))]
    if issubclass(cls, binary.Binary):
        dtype = "bool" if cls in (binary.LogicalAnd, binary.LogicalOr) else "float32"
        return [(cls(), (TensorType(dtype, s),) * 2) for s in ((3, 37), (1031,), (5, 1))]
    if issubclass(cls, reduce.Reduction):
        settings = [
            ((1,), (37, 301)),
            ((0,), (301, 37)),
            ((2, 3), (2, 5, 7, 7)),
            ((2, 3), (1, 3, 7, 7, 16)),
            ((0, 2), (19, 5, 33)),
        ]
        return [(cls(axes, keep), (f(*s),)) for axes, s in settings for keep in (False, True)] + [(cls((0,)), (f(5000),))]
    return LARGER.get(cls, [])


def _images() -> list[TensorType]:
    return [f(1, 3, 17, 19), f(2, 2, 9, 9, 8)]


LARGER: dict[type[Op], list[tuple[Op, tuple[TensorType, ...]]]] = {
    reduce.ArgMax: [(reduce.ArgMax(1), (f(5, 301),)), (reduce.ArgMax(0), (f(31, 40),)), (reduce.ArgMax(1), (f(2, 9, 3, 5),))],
    norm.LayerNorm: [(norm.LayerNorm(), (f(7, 5, 197), f(197), f(197))), (norm.LayerNorm(), (f(3, 8, 33), f(8, 33), f(8, 33)))],
    norm.RmsNorm: [(norm.RmsNorm(), (f(7, 5, 197), f(197)))],
    norm.GroupNorm: [(norm.GroupNorm(4), (f(2, 24, 9, 7), f(24), f(24))), (norm.GroupNorm(1), (f(2, 6, 35), f(6), f(6)))],
    norm.BatchNorm: [(norm.BatchNorm(), (f(2, 20, 9, 7), *(f(20),) * 4))],
    norm.Softmax: [(norm.Softmax(a), (f(3, 35, 50),)) for a in (0, 1, 2)] + [(norm.Softmax(1), (f(2, 21, 5, 9),))],
    norm.LogSoftmax: [(norm.LogSoftmax(a), (f(3, 35, 50),)) for a in (0, 1, 2)],
    scan.CumSum: [(scan.CumSum(a), (f(3, 35, 50),)) for a in (0, 1, 2)],
    shape.Transpose: [
        (shape.Transpose((0, 2, 1)), (f(2, 45, 70),)),
        (shape.Transpose((0, 2, 1, 3)), (f(2, 7, 3, 32),)),
        (shape.Transpose((2, 1, 0)), (f(33, 1, 18),)),
    ],
    shape.Broadcast: [
        (shape.Broadcast((3, 40, 5, 7)), (f(40, 1, 1),)),
        (shape.Broadcast((40, 50)), (f(40, 1),)),
        (shape.Broadcast((3, 1)), (f(1, 1),)),
    ],
    shape.Concat: [
        (shape.Concat(1), (f(2, 20, 7, 5), f(2, 12, 7, 5), f(2, 1, 7, 5))),
        (shape.Concat(2), (f(3, 5, 40), f(3, 5, 33))),
        (shape.Concat(0), (f(7), f(0), f(50))),
    ],
    shape.Reshape: [(shape.Reshape((7, 2, 30)), (f(7, 60),)), (shape.Reshape((21, 20)), (f(7, 60),))],
    shape.Slice: [(shape.Slice((0, 3, 2), (2, 33, 60), (1, 2, 3)), (f(2, 40, 64),))],
    shape.Flip: [(shape.Flip((1,)), (f(5, 70),)), (shape.Flip((0,)), (f(5, 70),))],
    shape.Roll: [(shape.Roll((5, -9), (0, 1)), (f(7, 70),)), (shape.Roll((3, 2), (1, 2)), (f(1, 8, 8, 48),))],
    shape.Pad: [
        (shape.Pad(((0, 0), (0, 0), (2, 1), (3, 2)), mode), (f(1, 2, 20, 37),)) for mode in ("constant", "reflect", "replicate")
    ],
    shape.PixelShuffle: [(shape.PixelShuffle(2), (f(1, 12, 9, 20),)), (shape.PixelShuffle(1), (f(1, 2, 9, 20),))],
    shape.LayoutTransform: [
        (shape.LayoutTransform("NCHW", "NCHW16c", 48), (f(2, 48, 7, 9),)),
        (shape.LayoutTransform("NCHW16c", "NCHW", 48), (f(2, 3, 7, 9, 16),)),
        (shape.LayoutTransform("NCHW", "NCHW16c", 3), (f(1, 3, 20, 33),)),
        (shape.LayoutTransform("NCHW16c", "NCHW", 20), (f(1, 2, 5, 33, 16),)),
        (shape.LayoutTransform("NCHW16c", "NCHW8c", 40), (f(1, 3, 5, 6, 16),)),
        (shape.LayoutTransform("NCHW8c", "NCHW16c", 40), (f(1, 5, 5, 6, 8),)),
    ],
    index.Gather: [
        (index.Gather(0), (f(50, 37), TensorType("int64", (4, 9)))),
        (index.Gather(1), (f(5, 40), TensorType("int32", (33,)))),
        (index.Gather(0), (f(50), TensorType("int64", (4, 9)))),
    ],
    index.GatherElements: [(index.GatherElements(1), (f(9, 40), TensorType("int64", (9, 37))))],
    index.Tril: [(index.Tril(2), (f(3, 20, 37),))],
    index.Triu: [(index.Triu(2), (f(3, 20, 37),)), (index.Triu(-3), (f(50, 37),))],
    conv.Conv2d: [
        (conv.Conv2d(padding=((1, 1), (1, 1)), groups=20), (f(1, 20, 9, 9), f(20, 1, 3, 3), f(20))),
        (
            conv.Conv2d(groups=2, layout="NCHW8c", out_layout="NCHW16c", weight_layout="OIHW8i16o"),
            (f(1, 4, 5, 5, 8), f(2, 2, 3, 3, 8, 16)),
        ),
        (conv.Conv2d(layout="NCHW", out_layout="NCHW16c"), (f(1, 3, 9, 9), f(32, 3, 3, 3), f(32))),
    ],
    linear.Linear: [
        (linear.Linear(), (f(5, 130), f(37, 130), f(37))),
        (linear.Linear("OI16o", 37), (f(2, 3, 200), f(3, 200, 16), f(37))),
    ],
    linear.Matmul: [(linear.Matmul(), (f(2, 9, 70), f(2, 70, 37)))],
    attention.ScaledDotProductAttention: [
        (attention.ScaledDotProductAttention(), (f(1, 3, 35, 20), f(1, 3, 50, 20), f(1, 3, 50, 24))),
        (attention.ScaledDotProductAttention(causal=True), (f(2, 2, 33, 64), f(2, 2, 33, 64), f(2, 2, 33, 64))),
        (attention.ScaledDotProductAttention(), (f(1, 2, 9, 8), f(1, 2, 37, 8), f(1, 2, 37, 5), f(1, 2, 9, 37))),
        (
            attention.ScaledDotProductAttention(),
            (f(1, 2, 19, 8), f(1, 2, 37, 8), f(1, 2, 37, 5), TensorType("bool", (1, 2, 19, 37))),
        ),
    ],
    pool.MaxPool2d: [
        (pool.MaxPool2d((3, 3), (2, 2), (1, 1), layout="NCHW16c"), (f(1, 2, 12, 13, 16),)),
        (pool.MaxPool2d((3, 3), (1, 1), (1, 1)), (f(1, 3, 17, 19),)),
    ],
    pool.AvgPool2d: [
        (pool.AvgPool2d((3, 3), (2, 2), (1, 1), count_include_pad=c, ceil_mode=m, layout=name), (t,))
        for c in (False, True)
        for m in (False, True)
        for name, t in zip(("NCHW", "NCHW8c"), _images(), strict=True)
    ],
    pool.AdaptiveAvgPool2d: [
        (pool.AdaptiveAvgPool2d(size, name), (t,))
        for size in ((1, 1), (4, 5))
        for name, t in zip(("NCHW", "NCHW8c"), _images(), strict=True)
    ],
    resize.Resize: [
        (resize.Resize((40, 33), mode, align), (f(1, 2, 17, 19),))
        for mode, align in (("nearest", False), ("bilinear", False), ("bilinear", True))
    ],
}


@cache
def settings() -> tuple[tuple[Op, tuple[TensorType, ...]], ...]:
    """Each op with each of its samples and larger sizes."""
    rng = np.random.default_rng(0)
    return tuple(setting for cls in COMPUTING for setting in (*cls.samples(rng), *larger(cls)))


@cache
def kernels_for(target: Target) -> Kernels:
    return Kernels([graph_of(op, types) for op, types in settings()], target)


def describe(graph: Graph) -> str:
    node = graph.outputs[0]
    return f"{node.op} on {', '.join(str(i.type) for i in graph.inputs)}"


def test_every_operator_has_a_lowering() -> None:
    assert {cls.__name__ for cls in COMPUTING} == {cls.__name__ for cls in LOWERINGS}


@pytest.mark.parametrize("target", HOST, ids=lambda t: t.name)
def test_small_integers_are_exact(target: Target) -> None:
    kernels = kernels_for(target)
    for number, (op, types) in enumerate(settings()):
        if isinstance(op, EXACT):
            arrays = arrays_for(op, types, small=True)
            want = interpret(kernels.graphs[number], arrays)[0]
            np.testing.assert_array_equal(kernels.run(number, arrays), want, err_msg=describe(kernels.graphs[number]))


@pytest.mark.parametrize("target", HOST, ids=lambda t: t.name)
def test_random_values_are_close(target: Target) -> None:
    kernels = kernels_for(target)
    for number, (op, types) in enumerate(settings()):
        arrays = arrays_for(op, types, small=False)
        assert_close(kernels.graphs[number], arrays, kernels.run(number, arrays), K.get(type(op), K_DEFAULT))


def assert_close(graph: Graph, arrays: list[Array], got: Array, k: float) -> None:
    (value,), (bound,) = magnitude_bound(graph, arrays)
    if not graph.outputs[0].type.is_float:
        np.testing.assert_array_equal(got, value, err_msg=describe(graph))
        return
    excess = np.abs(got - value) - k * EPS * bound
    assert not (excess > 0).any(), f"{describe(graph)}: {np.max(np.abs(got - value) / (EPS * bound)):.2f} ulps"


_SIZES = (0.0, 1e-45, 1e-40, 1e-30, 0.5, 1.0, 1.5, 2.5, 3.7, 88.0, 100.0, 104.0, 3e38)
SPECIAL = np.array([np.nan, np.inf, -np.inf, *_SIZES, *(-s for s in _SIZES)], np.float32)

THROUGH_EXP = (unary.Exp, unary.Elu, unary.Sigmoid, unary.Silu, unary.Gelu)


def special_cases() -> list[Case]:
    found: list[Case] = []
    for cls in COMPUTING:
        if issubclass(cls, unary.Unary) and "float" in cls.kinds:
            for op, _ in cls.samples(np.random.default_rng(0)):
                found.append((graph_of(op, [f(SPECIAL.size)]), [SPECIAL]))
        if issubclass(cls, binary.Binary) and "float" in cls.kinds:
            x, y = (a.ravel() for a in np.meshgrid(SPECIAL, SPECIAL))
            found.append((graph_of(cls(), [f(x.size)] * 2), [x, y]))
            shared = Node(Input("x", "float32", (SPECIAL.size,)))
            found.append((Graph((shared,), (Node(cls(), (shared, shared)),)), [SPECIAL]))
        if issubclass(cls, reduce.Max | reduce.Min):
            found.append(
                (
                    graph_of(cls((1,)), [f(SPECIAL.size, SPECIAL.size)]),
                    [np.array([np.roll(SPECIAL, i) for i in range(SPECIAL.size)])],
                )
            )
    return found


@pytest.mark.parametrize("target", HOST, ids=lambda t: t.name)
def test_special_values(target: Target) -> None:
    chosen = special_cases()
    for (graph, arrays), got in zip(chosen, run_all(chosen, target), strict=True):
        want = interpret(graph, arrays)[0]
        if graph.outputs[0].type.is_float:
            with np.errstate(all="ignore"):
                same = (got == want) | (np.isnan(got) & np.isnan(want))
                # Products with what has few bits left, being denormal, have no more.
                slack = float(np.finfo(np.float32).tiny) if isinstance(graph.outputs[0].op, THROUGH_EXP) else 0.0
                # 1 + erf cancels, so that gelu's error is at the size of its operand.
                size = np.abs(arrays[0]) if isinstance(graph.outputs[0].op, unary.Gelu) else np.abs(want)
                near = np.abs(got.astype(np.float64) - want) <= 4 * EPS * size + slack
            assert (same | near).all(), f"{describe(graph)}: {got[~(same | near)]} for {want[~(same | near)]}"
        else:
            np.testing.assert_array_equal(got, want, err_msg=describe(graph))


def _cast_cases() -> list[Case]:
    rng = np.random.default_rng(1)
    found = []
    for source in DTYPES:
        for dtype in DTYPES:
            values = rng.integers(0 if source in ("uint8", "bool") or dtype == "uint8" else -100, 100, (3, 41))
            array = values % 2 == 0 if source == "bool" else values.astype(source)
            if DTYPES[source].kind == "float":
                array = (array + 0.25).astype(source)
            found.append((graph_of(unary.Cast(dtype), [TensorType(source, (3, 41))]), [array]))
    return found


def _dtype_cases() -> list[Case]:
    """Elementwise ops on every dtype they take."""
    rng = np.random.default_rng(2)
    found = []
    for cls in COMPUTING:
        if not issubclass(cls, binary.Binary | unary.Unary):
            continue
        for dtype, info in DTYPES.items():
            if info.kind not in cls.kinds or dtype == "float32":
                continue
            low = 0 if info.kind == "uint" else -7
            count = 1 if issubclass(cls, unary.Unary) else 2
            arrays = [rng.integers(low, 8, (3, 41)).astype(dtype) for _ in range(count)]
            found.append((graph_of(cls(), [TensorType(dtype, (3, 41))] * count), arrays))
    return found


@pytest.mark.parametrize("make", [_cast_cases, _dtype_cases], ids=["casts", "dtypes"])
def test_all_dtypes(make: Callable[[], list[Case]]) -> None:
    target = HOST[-1]
    chosen = make()
    for (graph, arrays), got in zip(chosen, run_all(chosen, target), strict=True):
        want: Any = interpret(graph, arrays)[0]
        if graph.outputs[0].type.is_float:
            # Half precision is rounded twice: from float64 to float32, then to float16.
            np.testing.assert_array_max_ulp(got, want, 1 if got.dtype == np.float16 else 4)
        else:
            np.testing.assert_array_equal(got, want, err_msg=describe(graph))
