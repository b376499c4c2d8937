"""Integers that stand for real numbers: the reference to the bit, and compiled code equal to it on every target of this host."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from paring.ir import Graph, Node, interpret
from paring.ir.errors import IRTypeError
from paring.ir.op import Array, Op
from paring.ir.ops import conv, linear, quantized
from paring.ir.ops.core import Input
from paring.ir.types import TensorType, type_of

fast = pytest.mark.fast
TARGETS = ("x86-avx512", "x86-avx2")


def graph_of(op: Op, arrays: list[Array]) -> Graph:
    inputs = [Node(Input(f"x{i}", a.dtype.name, a.shape)) for i, a in enumerate(arrays)]
    return Graph(tuple(inputs), (Node(op, inputs),))


def nearest32(value: Fraction) -> np.float32:
    """A rational number rounded once to float32, halves to even."""
    near = np.float32(float(value))
    around = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(np.int32)) & 1))


@fast
def test_fma32_rounds_once() -> None:
    rng = np.random.default_rng(0)
    # Products that end near the middle between two float32, where a second rounding shows.
    x = rng.integers(-512, 513, 4000).astype(np.float32)
    y = rng.standard_normal(4000).astype(np.float32)
    z = (rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 30, 4000)).astype(np.float32)
    ties = np.float32(1 + 2**-23)
    x, y, z = (np.append(a, b).astype(np.float32) for a, b in ((x, [ties, 3]), (y, [ties, 2**-25]), (z, [2**-24, 1])))
    wanted = [nearest32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))) for a, b, c in zip(x, y, z, strict=True)]
    np.testing.assert_array_equal(quantized.fma32(x, y, z), wanted)
    assert np.isinf(quantized.fma32(np.float32([np.inf]), np.float32([2]), np.float32([1]))).all()


@fast
def test_halves_go_to_even_and_ends_are_kept() -> None:
    x = np.float32([-1.5, -0.5, 0.5, 1.5, 2.5, 1e30, -1e30, np.inf, -np.inf, np.nan, 254.5, 255.5])
    got = quantized.Quantize(0, "uint8").ref(x)
    np.testing.assert_array_equal(got, [0, 0, 0, 2, 2, 255, 0, 255, 0, 0, 254, 255])
    shifted = quantized.Quantize(-3, "int8", -100, 100).ref(x)
    np.testing.assert_array_equal(shifted, [-5, -3, -3, -1, -1, 100, -100, 100, -100, -100, 100, 100])


@fast
@pytest.mark.parametrize("zero", [0, 3, 255])
def test_quantize_undoes_dequantize(zero: int) -> None:
    q = np.arange(256, dtype=np.uint8)
    for scale in np.float32([1e-30, 0.1, 1 / 3, 7.3, 1e20]):
        real = quantized.Dequantize(float(scale), zero).ref(q)
        np.testing.assert_array_equal(quantized.Quantize(zero, scale=float(scale)).ref(real), q)


@fast
@pytest.mark.parametrize(
    ("op", "operands", "message"),
    [
        (quantized.Quantize(scale=0.0), ("float32",), "positive float32"),
        (quantized.Quantize(scale=0.1), ("float32",), "positive float32"),
        (quantized.Quantize(scale=float("nan")), ("float32",), "positive float32"),
        (quantized.Quantize(scale=float(np.float32(1e-45))), ("float32",), "too small"),
        (quantized.Quantize(-1, "uint8"), ("float32",), "zero point"),
        (quantized.Quantize(0, "uint8", 5, 4), ("float32",), "range"),
        (quantized.Quantize(0, "int16"), ("float32",), "does not give"),
        (quantized.Quantize(), ("float64",), "not float32"),
        (quantized.Dequantize(1.0, 200), ("int8",), "zero point"),
        (quantized.Dequantize(1.0, 1), ("int32",), "zero point"),
        (quantized.Requantize(), ("float32", "float32", "float32"), "does not apply"),
        (quantized.Requantize(residual_zero=-1), ("int32", "float32", "float32", "uint8"), "residual_zero"),
        (quantized.QuantizedMul(), ("int8", "int32"), "8 bits"),
        (quantized.Lookup(), ("int8", "int8"), "256"),
        (linear.Linear(), ("int8", "uint8"), "one float type"),
        (linear.Matmul(1, 0), ("float32", "float32"), "zero points"),
        (conv.Conv2d(pad_value=1), ("float32", "float32"), "zeros only"),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else "",
)
def test_ill_typed(op: Op, operands: tuple[str, ...], message: str) -> None:
    shape = (1, 1, 1, 1) if isinstance(op, conv.Conv2d) else (1, 1)
    with pytest.raises(IRTypeError, match=message):
        op.infer(*(TensorType(dtype, shape) for dtype in operands))


def steps(rng: np.random.Generator, dtype: str, size: int) -> Array:
    info = np.iinfo(dtype)
    return rng.integers(info.min, int(info.max) + 1, size).astype(dtype)


def cases() -> list[tuple[Op, list[Array]]]:
    """Ops on many values: halves, ends, NaN, and sums near the places where float32 rounds."""
    rng = np.random.default_rng(1)
    size = 4099
    sums = np.concatenate([steps(rng, "int32", size // 2), rng.integers(-30000, 30000, size - size // 2)]).astype(np.int32)
    halves = np.float32(rng.integers(-600, 600, size) / 2)
    special = np.where(
        rng.random(size) < 0.05, np.float32(rng.choice([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e9, -3e9], size)), halves
    )
    small = np.float32(rng.uniform(0.5, 2, size) * 2.0 ** rng.integers(-24, 1, size))
    bias = np.float32(rng.standard_normal(size) * 40)
    u, i = steps(rng, "uint8", size), steps(rng, "int8", size)
    found: list[tuple[Op, list[Array]]] = [
        (quantized.Quantize(9, "uint8"), [special]),
        (quantized.Quantize(-1, "int8", -120, 99, float(np.float32(0.37))), [special]),
        (quantized.Dequantize(float(np.float32(0.1)), 77), [u]),
        (quantized.Dequantize(float(np.float32(1 / 3))), [sums]),
        (quantized.Descale(), [sums, small, bias]),
        (quantized.Requantize(128, "uint8"), [sums, small, bias]),
        (quantized.Requantize(3, "int8", 3, 127), [sums, small, np.zeros_like(bias)]),
        (quantized.Requantize(5, "uint8", None, None, float(np.float32(0.7)), 31), [sums, small * np.float32(0.01), bias, u]),
        (quantized.Requantize(0, "int8", -128, 90, float(np.float32(1.9)), -5), [i, small, bias, i]),
        (quantized.QuantizedMul(7, "uint8", x_zero=128, y_zero=-4, scale=float(np.float32(0.013))), [u, i]),
        (quantized.Lookup(), [u, steps(rng, "int8", 256)]),
        (quantized.Lookup(), [i, np.float32(rng.standard_normal(256))]),
    ]
    return found


@fast
def test_rounding_cases_are_there() -> None:
    """The values above meet ties and both ends."""
    for op, arrays in cases():
        if isinstance(op, quantized.Quantize | quantized.Requantize):
            low, high = op.range
            got = op.ref(*arrays)
            assert {low, high} <= set(got.tolist()), op
            assert len(np.unique(got)) > 20, op


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_ops_have_the_same_bits(target: str) -> None:
    from paring.backends.build import build
    from paring.backends.devices import open_executable
    from paring.backends.targets import missing_flags, resolve

    machine = resolve(target)
    if missing_flags(machine):
        pytest.skip(f"this host lacks {', '.join(missing_flags(machine))}")
    for op, arrays in cases():
        graph = graph_of(op, arrays)
        (wanted,) = interpret(graph, arrays)
        with open_executable(build(graph, machine), machine, None) as run:
            (got,) = run.run(arrays)
        assert type_of(got) == type_of(wanted)
        np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8), err_msg=str(op))
