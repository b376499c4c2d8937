"""Layouts of activations and weights, and the way from one to another by way of the plain one.

Activations: `NCHW`, or `NCHW16c` (any block): (N, C/16, H, W, 16), channels padded with zeros to a multiple of the block.
Weights of convolutions: `OIHW`, or `OIHW16i16o`: (O/16, I/16, H, W, 16, 16), both padded with zeros. A block of 1 keeps its
dimension. `OIHW4i16o4i`: (O/16, I/16, H, W, 4, 16, 4), input channel 4 * a + c at [a, :, c], for products that sum four
neighbouring bytes. Weights of linear layers: `OI`, or `OI16o`: (O/16, I, 16), or `OI16o4i`: (O/16, I/4, 16, 4).
"""

from __future__ import annotations

import re

import numpy as np

from paring.ir.op import Array, require

_ACTIVATION = re.compile(r"^NCHW(?:([1-9][0-9]{0,3})c)?\Z")
_CONV_WEIGHT = re.compile(r"^OIHW(?:([1-9][0-9]{0,3})i([1-9][0-9]{0,3})o(?:([1-9][0-9]{0,3})i)?)?\Z")
_LINEAR_WEIGHT = re.compile(r"^OI(?:([1-9][0-9]{0,3})o(?:([1-9][0-9]{0,3})i)?)?\Z")


def channel_block(layout: str) -> int | None:
    """The block of an activation layout, None for NCHW. Raises IRTypeError for an unknown layout."""
    match = _ACTIVATION.match(layout)
    require(match is not None, f"unknown activation layout {layout!r}", hint="NCHW or NCHW16c")
    assert match is not None
    return int(match[1]) if match[1] else None


def _conv_weight(layout: str) -> re.Match[str]:
    match = _CONV_WEIGHT.match(layout)
    require(match is not None, f"unknown weight layout {layout!r}", hint="OIHW, OIHW16i16o or OIHW4i16o4i")
    assert match is not None
    return match


def weight_blocks(layout: str) -> tuple[int, int] | None:
    """The (input, output) channel blocks of a convolution's weight layout, None for OIHW."""
    match = _conv_weight(layout)
    return (int(match[1]) * int(match[3] or 1), int(match[2])) if match[1] else None


def weight_tail(layout: str) -> tuple[int, ...]:
    """The dimensions of a convolution's weight behind (O, I, H, W)."""
    return tuple(int(part) for part in _conv_weight(layout).groups() if part)


def _linear_weight(layout: str) -> re.Match[str]:
    match = _LINEAR_WEIGHT.match(layout)
    require(match is not None, f"unknown weight layout {layout!r}", hint="OI, OI16o or OI16o4i")
    assert match is not None
    return match


def linear_block(layout: str) -> int | None:
    """The output block of a linear layer's weight layout, None for OI."""
    match = _linear_weight(layout)
    return int(match[1]) if match[1] else None


def linear_tail(layout: str) -> tuple[int, ...]:
    """The dimensions of a linear layer's weight behind (O, I)."""
    return tuple(int(part) for part in _linear_weight(layout).groups() if part)


def linear_group(layout: str) -> int:
    """How many neighbouring inputs lie side by side in a linear layer's weight layout."""
    return int(_linear_weight(layout)[2] or 1)


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


def block_conv_weight(array: Array, layout: str) -> Array:
    """OIHW -> a blocked layout, padded with zeros."""
    blocks, tail = weight_blocks(layout), weight_tail(layout)
    assert blocks is not None
    array = _pad_to(_pad_to(array, 0, blocks[1]), 1, blocks[0])
    o, i, h, w = array.shape
    outer, out, inner = (*tail, 1)[:3]
    parts = array.reshape(o // out, out, i // blocks[0], outer, inner, h, w).transpose(0, 2, 5, 6, 3, 1, 4)
    return parts.reshape(o // out, i // blocks[0], h, w, *tail)


def unblock_conv_weight(array: Array) -> Array:
    """A blocked layout -> OIHW, padding kept."""
    o, i, h, w, outer, out, inner = (*array.shape, 1)[:7]
    parts = array.reshape(o, i, h, w, outer, out, inner).transpose(0, 5, 1, 4, 6, 2, 3)
    return parts.reshape(o * out, i * outer * inner, h, w)


def block_linear_weight(array: Array, layout: str) -> Array:
    """OI -> a blocked layout, padded with zeros."""
    block, group = linear_block(layout) or 1, linear_group(layout)
    array = _pad_to(_pad_to(array, 0, block), 1, group)
    o, i = array.shape
    parts = array.reshape(o // block, block, i // group, group).transpose(0, 2, 1, 3)
    return parts.reshape(o // block, i // group, *linear_tail(layout))


def unblock_linear_weight(array: Array) -> Array:
    """A blocked layout -> OI, padding kept."""
    o, i, block, group = (*array.shape, 1)[:4]
    return array.reshape(o, i, block, group).transpose(0, 2, 1, 3).reshape(o * block, i * group)
