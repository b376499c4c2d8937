"""Matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.types import TensorType


@dataclass(frozen=True)
class Linear(Op):
    """x (..., I) times the transposed weight (O, I), plus an optional bias (O,). Blocked: weight `OI16o`, (O/16, I, 16).

    `features` is the number of logical outputs where the blocked weight is padded; None: all of the weight's. Bias has
    `features` elements.
    """

    name = "linear"
    arity = (2, 3)
    weight_layout: str = "OI"
    features: int | None = None

    def infer(self, *types: TensorType) -> TensorType:
        x, w = types[:2]
        require(x.is_float and all(t.dtype == x.dtype for t in types), "operands are not of one float type")
        block = lay.linear_block(self.weight_layout)
        require(x.rank >= 1 and w.rank == (3 if block else 2), f"weight does not fit layout {self.weight_layout}", why=f"{w}")
        require(block is None or w.shape[2] == block, f"weight does not fit layout {self.weight_layout}", why=f"{w}")
        require(x.shape[-1] == w.shape[1], "inner sizes differ", why=f"{x} against {w}")
        out = w.shape[0] * (block or 1)
        features = out if self.features is None else self.features
        require(0 <= features <= out, f"features {features} do not fit the weight's {out}")
        if len(types) == 3:
            require(types[2].shape == (features,), "bias does not match the outputs", why=f"{types[2]} against {features}")
        return x.with_shape((*x.shape[:-1], features))

    def ref(self, *arrays: Array) -> Array:
        x, w = wide(arrays[0]), wide(arrays[1])
        w = lay.unblock_linear_weight(w) if w.ndim == 3 else w
        y = x @ w[: self.features].T
        return y + wide(arrays[2]) if len(arrays) == 3 else y

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
        ]


@dataclass(frozen=True)
class Matmul(Op):
    """Batched product of x (..., M, K) and y (..., K, N), same leading dimensions."""

    name = "matmul"
    arity = (2, 2)

    def infer(self, *types: TensorType) -> TensorType:
        x, y = types
        require(x.dtype == y.dtype, "operands differ in dtype", why=f"{x} against {y}")
        require(x.rank >= 2 and x.rank == y.rank and x.shape[:-2] == y.shape[:-2], "batches differ", why=f"{x} against {y}")
        require(x.shape[-1] == y.shape[-2], "inner sizes differ", why=f"{x} against {y}")
        return x.with_shape((*x.shape[:-1], y.shape[-1]))

    def ref(self, *arrays: Array) -> Array:
        return wide(arrays[0]) @ wide(arrays[1])

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        x, y = (np.abs(wide(v)) for v in values)
        return np.maximum(np.abs(result), bounds[0] @ y + x @ bounds[1])

    def macs(self, result: TensorType, *types: TensorType) -> int:
        return result.size * types[0].shape[-1]

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        def f(*shape: int) -> TensorType:
            return TensorType("float32", shape)

        return [(cls(), (f(3, 4), f(4, 5))), (cls(), (f(2, 3, 4, 5), f(2, 3, 5, 2))), (cls(), (f(1, 1, 1), f(1, 1, 4)))]
