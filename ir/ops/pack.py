"""Weights in the order in which kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Sample, require
from paring.ir.ops.shape import Movement
from paring.ir.types import TensorType


@dataclass(frozen=True)
class PackConvWeight(Movement):
    """OIHW -> OIHW{i}i{o}o or OIHW{i}i{o}o{g}i, output and input channels padded with zeros to whole blocks."""

    name = "pack_conv_weight"
    layout: str

    def infer(self, *types: TensorType) -> TensorType:
        w, blocks = types[0], lay.weight_blocks(self.layout)
        require(w.rank == 4, "the weight has four dimensions", why=f"{w}")
        require(blocks is not None, f"{self.layout} is not a blocked layout")
        assert blocks is not None
        o, i, kh, kw = w.shape
        tail = lay.weight_tail(self.layout)
        return w.with_shape((lay.blocks_of(o, blocks[1]), lay.blocks_of(i, blocks[0]), kh, kw, *tail))

    def ref(self, *arrays: Array) -> Array:
        return lay.block_conv_weight(arrays[0], self.layout)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        weight, bytes_ = (TensorType(dtype, (6, 3, 2, 3)) for dtype in ("float32", "int8"))
        return [(cls("OIHW4i4o"), (weight,)), (cls("OIHW1i4o"), (weight,)), (cls("OIHW2i4o4i"), (bytes_,))]


@dataclass(frozen=True)
class PackLinearWeight(Movement):
    """OI -> OI{o}o or OI{o}o{g}i, outputs (and inputs) padded with zeros to whole blocks."""

    name = "pack_linear_weight"
    layout: str

    def infer(self, *types: TensorType) -> TensorType:
        w, block = types[0], lay.linear_block(self.layout)
        require(w.rank == 2, "the weight has two dimensions", why=f"{w}")
        require(block is not None, f"{self.layout} is not a blocked layout")
        assert block is not None
        group = lay.linear_group(self.layout)
        return w.with_shape((lay.blocks_of(w.shape[0], block), lay.blocks_of(w.shape[1], group), *lay.linear_tail(self.layout)))

    def ref(self, *arrays: Array) -> Array:
        return lay.block_linear_weight(arrays[0], self.layout)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls("OI4o"), (TensorType("float32", (6, 3)),)), (cls("OI4o4i"), (TensorType("int8", (6, 7)),))]
