"""Matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Op, Sample, exact_wide, product_dtype, require, wide
from paring.ir.types import BYTES, TensorType


@dataclass(frozen=True)
class Linear(Op):
    """x (..., I) times the transposed weight (O, I), plus an optional bias (O,). Blocked: weight `OI16o`, (O/16, I, 16).

    `features` is the number of logical outputs where the blocked weight is padded; None: all of the weight's. Bias has
    `features` elements. On floats, or on 8-bit integers x with int8 weights and int32 bias: then sums are int32.
    """

    name = "linear"
    arity = (2, 3)
    weight_layout: str = "OI"
    features: int | None = None

    def infer(self, *types: TensorType) -> TensorType:
        x, w = types[:2]
        dtype = product_dtype(*types)
        block, group = lay.linear_block(self.weight_layout), lay.linear_group(self.weight_layout)
        fits = x.rank >= 1 and w.rank >= 2 and w.shape[2:] == lay.linear_tail(self.weight_layout)
        require(fits, f"weight does not fit layout {self.weight_layout}", why=f"{w}")
        require(lay.blocks_of(x.shape[-1], group) == w.shape[1], "inner sizes differ", why=f"{x} against {w}")
        out = w.shape[0] * (block or 1)
        features = out if self.features is None else self.features
        require(0 <= features <= out, f"features {features} do not fit the weight's {out}")
        if len(types) == 3:
            require(types[2].shape == (features,), "bias does not match the outputs", why=f"{types[2]} against {features}")
        return TensorType(dtype, (*x.shape[:-1], features))

    def ref(self, *arrays: Array) -> Array:
        x, w = exact_wide(arrays[0]), exact_wide(arrays[1])
        w = lay.unblock_linear_weight(w) if w.ndim > 2 else w
        y = x @ w[: self.features, : x.shape[-1]].T
        return y + exact_wide(arrays[2]) if len(arrays) == 3 else y

    def macs(self, result: TensorType, *types: TensorType) -> int:
        return result.size * types[0].shape[-1]

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        def f(*shape: int) -> TensorType:
            return TensorType("float32", shape)

        return [
            (cls(), (f(2, 5), f(3, 5), f(3))),
            (cls(), (f(2, 3, 4), f(6, 4))),
            (cls(), (f(7), f(2, 7), f(2))),
            (cls("OI4o", 6), (f(3, 5), f(2, 5, 4), f(6))),
            (cls(), tuple(TensorType(d, s) for d, s in (("uint8", (2, 5)), ("int8", (3, 5)), ("int32", (3,))))),
            (cls("OI4o4i", 6), (TensorType("int8", (3, 5)), TensorType("int8", (2, 2, 4, 4)))),
        ]


@dataclass(frozen=True)
class Matmul(Op):
    """Batched product of x (..., M, K) and y (..., K, N), same leading dimensions.

    On 8-bit integers the sums of (x - x_zero) * (y - y_zero), as int32.
    """

    name = "matmul"
    arity = (2, 2)
    x_zero: int = 0
    y_zero: int = 0

    def infer(self, *types: TensorType) -> TensorType:
        x, y = types
        integer = all(t.dtype in BYTES for t in types)
        require(integer or x.dtype == y.dtype, "operands differ in dtype", why=f"{x} against {y}")
        require(integer or (self.x_zero, self.y_zero) == (0, 0), "only integers have zero points")
        require(x.rank >= 2 and x.rank == y.rank and x.shape[:-2] == y.shape[:-2], "batches differ", why=f"{x} against {y}")
        require(x.shape[-1] == y.shape[-2], "inner sizes differ", why=f"{x} against {y}")
        return TensorType("int32" if integer else x.dtype, (*x.shape[:-1], y.shape[-1]))

    def ref(self, *arrays: Array) -> Array:
        x, y = arrays
        if (self.x_zero, self.y_zero) != (0, 0):
            x, y = exact_wide(x) - self.x_zero, exact_wide(y) - self.y_zero
        return wide(x) @ wide(y) if x.dtype.itemsize > 1 else exact_wide(x) @ exact_wide(y)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        x, y = (np.abs(wide(v)) for v in values)
        return np.maximum(np.abs(result), bounds[0] @ y + x @ bounds[1])

    def macs(self, result: TensorType, *types: TensorType) -> int:
        return result.size * types[0].shape[-1]

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        def f(*shape: int) -> TensorType:
            return TensorType("float32", shape)

        mixed = (TensorType("uint8", (2, 3, 4)), TensorType("int8", (2, 4, 5)))
        return [
            (cls(), (f(3, 4), f(4, 5))),
            (cls(), (f(2, 3, 4, 5), f(2, 3, 5, 2))),
            (cls(), (f(1, 1, 1), f(1, 1, 4))),
            (cls(3, -2), mixed),
            (cls(), mixed),
        ]
