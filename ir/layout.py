"""Layouts of activations and weights, and the way from one to another by way of the plain one.

Activations: `NCHW`, or `NCHW16c` (any block): (N, C/16, H, W, 16), channels padded with zeros to a multiple of the block.
Weights of convolutions: `OIHW`, or `OIHW16i16o`: (O/16, I/16, H, W, 16, 16), both padded with zeros. A block of 1 keeps its
dimension. Weights of linear layers: `OI`, or `OI16o`: (O/16, I, 16).
"""

from __future__ import annotations

import re

import numpy as np

from paring.ir.op import Array, require

_ACTIVATION = re.compile(r"^NCHW(?:([1-9][0-9]{0,3})c)?\Z")
_CONV_WEIGHT = re.compile(r"^OIHW(?:([1-9][0-9]{0,3})i([1-9][0-9]{0,3})o)?\Z")
_LINEAR_WEIGHT = re.compile(r"^OI(?:([1-9][0-9]{0,3})o)?\Z")


def channel_block(layout: str) -> int | None:
    """The block of an activation layout, None for NCHW. Raises IRTypeError for an unknown layout."""
    match = _ACTIVATION.match(layout)
    require(match is not None, f"unknown activation layout {layout!r}", hint="NCHW or NCHW16c")
    assert match is not None
    return int(match[1]) if match[1] else None


def weight_blocks(layout: str) -> tuple[int, int] | None:
    """The (input, output) channel blocks of a convolution's weight layout, None for OIHW."""
    match = _CONV_WEIGHT.match(layout)
    require(match is not None, f"unknown weight layout {layout!r}", hint="OIHW or OIHW16i16o")
    assert match is not None
    return (int(match[1]), int(match[2])) if match[1] else None


def linear_block(layout: str) -> int | None:
    """The output block of a linear layer's weight layout, None for OI."""
    match = _LINEAR_WEIGHT.match(layout)
    require(match is not None, f"unknown weight layout {layout!r}", hint="OI or OI16o")
    assert match is not None
    return int(match[1]) if match[1] else None


def blocks_of(channels: int, block: int) -> int:
    return -(-channels // block)


def _pad_to(array: Array, axis: int, multiple: int) -> Array:
    extra = -array.shape[axis] % multiple
    if not extra:
        return array
    return np.pad(array, [(0, extra if d == axis else 0) for d in range(array.ndim)])


def block_activation(array: Array, block: int) -> Array:
    """NCHW -> NCHW{block}c, channels padded with zeros."""
    array = _pad_to(array, 1, block)
    n, c, h, w = array.shape
    return array.reshape(n, c // block, block, h, w).transpose(0, 1, 3, 4, 2)


def unblock_activation(array: Array) -> Array:
    """NCHW{b}c -> NCHW, padding kept."""
    n, c, h, w, block = array.shape
    return array.transpose(0, 1, 4, 2, 3).reshape(n, c * block, h, w)


def block_conv_weight(array: Array, block_in: int, block_out: int) -> Array:
    """OIHW -> OIHW{i}i{o}o, padded with zeros."""
    array = _pad_to(_pad_to(array, 0, block_out), 1, block_in)
    o, i, h, w = array.shape
    return array.reshape(o // block_out, block_out, i // block_in, block_in, h, w).transpose(0, 2, 4, 5, 3, 1)


def unblock_conv_weight(array: Array) -> Array:
    """OIHW{i}i{o}o -> OIHW, padding kept."""
    o, i, h, w, block_in, block_out = array.shape
    return array.transpose(0, 5, 1, 4, 2, 3).reshape(o * block_out, i * block_in, h, w)


def block_linear_weight(array: Array, block: int) -> Array:
    """OI -> OI{block}o, padded with zeros."""
    array = _pad_to(array, 0, block)
    return array.reshape(array.shape[0] // block, block, array.shape[1]).transpose(0, 2, 1)


def unblock_linear_weight(array: Array) -> Array:
    """OI{b}o -> OI, padding kept."""
    o, i, block = array.shape
    return array.transpose(0, 2, 1).reshape(o * block, i)
