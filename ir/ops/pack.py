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
    """OIHW -> OIHW{i}i{o}o, output and input channels padded with zeros to whole blocks."""

    name = "pack_conv_weight"
    layout: str

    def infer(self, *types: TensorType) -> TensorType:
        w, blocks = types[0], lay.weight_blocks(self.layout)
        require(w.rank == 4, "the weight has four dimensions", why=f"{w}")
        require(blocks is not None, f"{self.layout} is not a blocked layout")
        assert blocks is not None
        o, i, kh, kw = w.shape
        return w.with_shape((lay.blocks_of(o, blocks[1]), lay.blocks_of(i, blocks[0]), kh, kw, *blocks))

    def ref(self, *arrays: Array) -> Array:
        blocks = lay.weight_blocks(self.layout)
        assert blocks is not None
        return lay.block_conv_weight(arrays[0], *blocks)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        weight = TensorType("float32", (6, 3, 2, 3))
        return [(cls("OIHW4i4o"), (weight,)), (cls("OIHW1i4o"), (weight,))]


@dataclass(frozen=True)
class PackLinearWeight(Movement):
    """OI -> OI{o}o, outputs padded with zeros to whole blocks."""

    name = "pack_linear_weight"
    layout: str

    def infer(self, *types: TensorType) -> TensorType:
        w, block = types[0], lay.linear_block(self.layout)
        require(w.rank == 2, "the weight has two dimensions", why=f"{w}")
        require(block is not None, f"{self.layout} is not a blocked layout")
        assert block is not None
        return w.with_shape((lay.blocks_of(w.shape[0], block), w.shape[1], block))

    def ref(self, *arrays: Array) -> Array:
        block = lay.linear_block(self.layout)
        assert block is not None
        return lay.block_linear_weight(arrays[0], block)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls("OI4o"), (TensorType("float32", (6, 3)),))]
