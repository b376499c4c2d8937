"""Scaled dot-product attention as one operator; the pass `decompose` spells it out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, require, wide
from paring.ir.types import TensorType


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


@dataclass(frozen=True)
class ScaledDotProductAttention(Op):
    """softmax(q k^T * scale + mask) v. q (B, H, L, E), k (B, H, S, E), v (B, H, S, EV), optional mask (B, H, L, S).

    A bool mask keeps where true, a float mask is added; `causal` keeps key <= query. `scale` None is 1 / sqrt(E).
    Grouped queries are expressed by broadcasting k and v first. A row that keeps no key gives zeros, as torch does.
    """

    name = "scaled_dot_product_attention"
    arity = (3, 4)
    scale: float | None = None
    causal: bool = False

    def infer(self, *types: TensorType) -> TensorType:
        q, k, v = types[:3]
        require(q.is_float and q.dtype == k.dtype == v.dtype, "operands are not of one float type", why=f"{q}, {k}, {v}")
        require(q.rank == k.rank == v.rank == 4, "operands have four dimensions", why=f"{q}, {k}, {v}")
        require(
            q.shape[:2] == k.shape[:2] == v.shape[:2], "batches or heads differ", why=f"{q}, {k}, {v}", hint="broadcast first"
        )
        require(q.shape[3] > 0, "the queries are empty", why=f"{q}")
        require(q.shape[3] == k.shape[3] and k.shape[2] == v.shape[2], "inner sizes differ", why=f"{q}, {k}, {v}")
        if len(types) == 4:
            mask, wanted = types[3], (*q.shape[:3], k.shape[2])
            require(
                mask.shape == wanted and mask.dtype in ("bool", q.dtype), "the mask does not fit", why=f"{mask}, wanted {wanted}"
            )
        return q.with_shape((*q.shape[:3], v.shape[3]))

    def scale_for(self, embedding: int) -> float:
        return 1 / math.sqrt(embedding) if self.scale is None else self.scale

    def _weights(self, arrays: tuple[Array, ...]) -> Array:
        q, k = wide(arrays[0]), wide(arrays[1])
        scores = q @ k.swapaxes(2, 3) * self.scale_for(q.shape[3])
        if self.causal:
            scores = np.where(np.tril(np.ones(scores.shape[2:], dtype=bool)), scores, -np.inf)
        if len(arrays) == 4:
            mask = arrays[3]
            scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + wide(mask)
        with np.errstate(all="ignore"):
            top = scores.max(3, keepdims=True, initial=-np.inf)
            e = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
            total = e.sum(3, keepdims=True)
            return np.where(total == 0, 0.0, e / total)

    def ref(self, *arrays: Array) -> Array:
        return self._weights(arrays) @ wide(arrays[2])

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        q, k, v = (np.abs(wide(a)) for a in values[:3])
        share = self._weights(values)
        scale = abs(self.scale_for(q.shape[3]))
        scores = (bounds[0] @ k.swapaxes(2, 3) + q @ bounds[1].swapaxes(2, 3)) * scale
        if len(values) == 4 and values[3].dtype != bool:
            finite = np.where(np.isfinite(bounds[3]), bounds[3], 0.0)
            scores = scores + finite
        # A key of no weight passes no error on, not even an infinite one.
        scores = np.where(share == 0, 0.0, scores)
        spread = share * (1 + scores + (share * scores).sum(3, keepdims=True))
        return spread @ v + share @ bounds[2]

    def macs(self, result: TensorType, *types: TensorType) -> int:
        q, k, v = types[:3]
        return q.size * k.shape[2] + result.size * v.shape[2]

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        q, k, v = _f(1, 2, 5, 4), _f(1, 2, 7, 4), _f(1, 2, 7, 3)
        return [
            (cls(), (q, k, v)),
            (cls(0.5), (q, k, v, _f(1, 2, 5, 7))),
            (cls(causal=True), (q, _f(1, 2, 5, 4), _f(1, 2, 5, 4))),
            (cls(), (q, k, v, TensorType("bool", (1, 2, 5, 7)))),
        ]
