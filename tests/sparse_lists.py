"""Operands of sparse layers: lists that an operator is defined on, and weights with zeros in many patterns."""

from __future__ import annotations

import numpy as np

from paring.ir.op import Array
from paring.ir.ops.sparse import Lists
from paring.ir.types import TensorType


def spread(cut: Lists, entries: int) -> tuple[Array, Array]:
    """Places and starts of that many entries, shared out over the lists as evenly as their lengths allow."""
    first = np.arange(cut.count) // cut.blocks % cut.spans * cut.span
    room = -(-np.minimum(cut.span, cut.inputs - first) // cut.group)
    assert entries <= room.sum()
    lengths = np.zeros(cut.count, np.int64)
    while lengths.sum() < entries:
        open_ = np.flatnonzero(lengths < room)
        lengths[open_[: entries - lengths.sum()]] += 1
    places = np.concatenate([low + cut.group * np.arange(length) for low, length in zip(first, lengths, strict=True)])
    return places.astype("int32"), np.append(0, lengths.cumsum()).astype("int32")


def list_operand(cut: Lists, position: int, types: tuple[TensorType, ...]) -> Array:
    """Operand 2 (places) or 3 (starts) of a sparse layer."""
    return spread(cut, types[2].size)[position - 2]
