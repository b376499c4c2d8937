"""Scaled dot-product attention as one operator, which the pass `decompose` spells out, and its like on 8-bit integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paring.ir.op import Array, Op, Sample, exact_wide, require, wide
from paring.ir.types import BYTES, TensorType


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


def _require_fit(q: TensorType, k: TensorType, v: TensorType) -> None:
    require(q.rank == k.rank == v.rank == 4, "operands have four dimensions", why=f"{q}, {k}, {v}")
    same = q.shape[:2] == k.shape[:2] == v.shape[:2]
    require(same, "batches or heads differ", why=f"{q}, {k}, {v}", hint="broadcast first")
    require(q.shape[3] > 0, "the queries are empty", why=f"{q}")
    require(q.shape[3] == k.shape[3] and k.shape[2] == v.shape[2], "inner sizes differ", why=f"{q}, {k}, {v}")


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
        _require_fit(q, k, v)
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


# Sums of integers stay within this, so that neither they nor their differences leave 32 bits.
MOST_SUM = 1 << 29


def sums_fit(inner: int, keys: int) -> bool:
    """Whether sums of products of bytes, over the inner size or over the keys, stay within MOST_SUM."""
    return max(inner, keys) << 16 <= MOST_SUM


@dataclass(frozen=True)
class IntegerAttention(Op):
    """Attention on 8-bit q (B, H, L, E), k (B, H, S, E), v (B, H, S, EV), each of its own dtype, as float32 (B, H, L, EV).

    Operands: q, k, v, the table, optionally a bool mask (B, H, L, S), which keeps where true; `causal` keeps key <= query.

    The scores s are the sums of (q - q_zero) * k; a zero point of k adds the same to a whole row, and falls out. The weight of a
    key is w = table[min(round(float32(max(s) - s) * steps), 255)], `table` being uint8 (256,): exact sums, one rounding, and
    each row's own scale. Keys that are not kept have the weight 0 and do not count for max(s).
    The result is float32(sum(w * (v - v_zero))) * (scale / float32(max(sum(w), 1))).
    """

    name = "integer_attention"
    arity = (4, 5)
    q_zero: int = 0
    v_zero: int = 0
    steps: float = 1.0
    scale: float = 1.0
    causal: bool = False

    def infer(self, *types: TensorType) -> TensorType:
        q, k, v, table = types[:4]
        require(all(t.dtype in BYTES for t in (q, k, v)), "operands are not of 8 bits", why=f"{q}, {k}, {v}")
        _require_fit(q, k, v)
        require(k.shape[2] > 0, "there are no keys", why=f"{k}")
        require(table.dtype == "uint8" and table.shape == (256,), "a table has 256 entries of uint8", why=f"{table}")
        require(sums_fit(q.shape[3], k.shape[2]), "a sum may leave 32 bits", why=f"{q}, {k}")
        for mask in types[4:]:
            kept = mask.dtype == "bool" and mask.shape == (*q.shape[:3], k.shape[2])
            require(kept, "the mask does not fit", why=f"{mask}, wanted bool {(*q.shape[:3], k.shape[2])}")
        for value in (self.steps, self.scale):
            require(float(np.float32(value)) == value and 0 < value < np.inf, f"{value!r} is not a positive float32")
        return v.with_dtype("float32").with_shape((*q.shape[:3], v.shape[3]))

    def _weights(self, arrays: tuple[Array, ...]) -> Array:
        q, k, _, table, *mask = arrays
        scores = ((exact_wide(q) - self.q_zero) @ exact_wide(k).swapaxes(2, 3)).astype(np.int64)
        kept = np.tri(*scores.shape[2:], dtype=np.bool_) if self.causal else np.array(True)
        kept = np.broadcast_to(np.logical_and(kept, *mask) if mask else kept, scores.shape)
        top = np.where(kept, scores, -MOST_SUM).max(3, keepdims=True)
        below = np.maximum(top - scores, 0).astype(np.float32) * np.float32(self.steps)
        weights = table[np.rint(np.minimum(below, np.float32(255))).astype(np.int64)]
        return np.where(kept, exact_wide(weights), 0.0)

    def ref(self, *arrays: Array) -> Array:
        weights = self._weights(arrays)
        mixed = weights @ (exact_wide(arrays[2]) - self.v_zero)
        total = np.maximum(weights.sum(3, keepdims=True), 1).astype(np.float32)
        return mixed.astype(np.float32) * (np.float32(self.scale) / total)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(result.astype(np.float64))

    def macs(self, result: TensorType, *types: TensorType) -> int:
        q, k, v = types[:3]
        return q.size * k.shape[2] + result.size * v.shape[2]

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        def bytes_(dtype: str, *shape: int) -> TensorType:
            return TensorType(dtype, shape)

        table = bytes_("uint8", 256)
        small = bytes_("int8", 1, 1, 3, 6), bytes_("uint8", 1, 1, 9, 6), bytes_("int8", 1, 1, 9, 5)
        return [
            (cls(7, 120, 2.0**-8, 0.5), (bytes_("uint8", 1, 2, 5, 4), *(bytes_("uint8", 1, 2, 7, n) for n in (4, 3)), table)),
            (cls(-3, 5, 0.015625), (*small, table)),
            (cls(2, 0, 0.03125), (*small, table, bytes_("bool", 1, 1, 3, 9))),
            (cls(causal=True), (*small, table)),
        ]
