"""aten operators that pool and resize images, and the views of other shapes as images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from paring.frontends.aten_builder import Builder, Missing, Table, Unsupported, pair
from paring.frontends.aten_elementwise import MUL
from paring.ir import Node
from paring.ir.ops import pool as pl
from paring.ir.ops import reduce as rd
from paring.ir.ops.index import Gather
from paring.ir.ops.resize import Resize

Ints = Sequence[int]
NO_INDICES = Missing("the indices of max pooling are not supported")


def images(b: Builder, x: Node, spatial: int) -> Node:
    """x as a batch of images: (C, W), (N, C, W), (C, H, W) or (N, C, H, W) become four-dimensional."""
    if x.type.rank == spatial + 1:
        x = b.unsqueezed(x, [0])
    if x.type.rank != spatial + 2 or spatial > 2:
        raise Unsupported(f"{spatial} spatial dimensions on {x.type}")
    return b.unsqueezed(x, [2]) if spatial == 1 else x


def spread(value: int | Ints, spatial: int, missing: int) -> tuple[int, int]:
    """One setting for both image dimensions; `missing` for the height of a 1-d operator."""
    listed = [value] if isinstance(value, int) else list(value)
    return pair(listed) if spatial == 2 else (missing, int(listed[0]))


# --- pooling --------------------------------------------------------------------------------------------------------


def window(
    spatial: int, kernel: int | Ints, stride: int | Ints | None, padding: int | Ints
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(kernel, stride, padding); without a stride windows lie side by side."""
    empty = stride is None or (not isinstance(stride, int) and not stride)
    strides = kernel if empty else stride
    return spread(kernel, spatial, 1), spread(strides, spatial, 1), spread(padding, spatial, 0)  # type: ignore[arg-type]


def max_pool(
    spatial: int,
    b: Builder,
    x: Node,
    kernel: Ints,
    stride: Ints | None = None,
    padding: int | Ints = 0,
    dilation: int | Ints = 1,
    ceil_mode: bool = False,
) -> Node:
    op = pl.MaxPool2d(*window(spatial, kernel, stride, padding), spread(dilation, spatial, 1), ceil_mode)
    return b.reshape(b.node(op, images(b, x, spatial)), b.type.shape)


def max_pool_with_indices(spatial: int, b: Builder, *args: object) -> tuple[Node, Missing]:
    return max_pool(spatial, b, *args), NO_INDICES  # type: ignore[arg-type]


def avg_pool(
    spatial: int,
    b: Builder,
    x: Node,
    kernel: Ints,
    stride: Ints | None = None,
    padding: int | Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Node:
    source = images(b, x, spatial)
    op = pl.AvgPool2d(*window(spatial, kernel, stride, padding), ceil_mode=ceil_mode, count_include_pad=count_include_pad)
    y = b.node(op, source)
    if divisor is not None:
        y = b.apply(MUL, y, b.constant((op.divisors(*source.type.shape[2:]) / divisor).astype(y.type.dtype)))
    return b.reshape(y, b.type.shape)


def volume_pool(op: type[pl.MaxPool2d] | type[pl.AvgPool2d], b: Builder, x: Node, *settings: Any) -> Node:
    """Pooling of volumes: windows are boxes, so the images first, then their sequence along the depth."""
    kernel, stride, padding, dilation, ceil_mode, include = _volume_settings(op, *settings)
    x = b.unsqueezed(x, [0]) if x.type.rank == 4 else x
    n, c, d, h, w = x.type.shape
    extra = {"count_include_pad": include} if op is pl.AvgPool2d else {}
    flat = b.reshape(x, (n * c, d, h, w))
    image = op(kernel[1:], stride[1:], padding[1:], dilation[1:], ceil_mode, **extra)
    flat = b.node(image, flat)
    _, _, oh, ow = flat.type.shape
    depth = op((kernel[0], 1), (stride[0], 1), (padding[0], 0), (dilation[0], 1), ceil_mode, **extra)
    return b.reshape(b.node(depth, b.reshape(flat, (n, c, d, oh * ow))), b.type.shape)


def _volume_settings(
    op: type[pl.Pool2d],
    kernel: Ints,
    stride: Ints | None = None,
    padding: int | Ints = 0,
    dilation: int | Ints | bool = 1,
    ceil_mode: bool = False,
    include: Any = None,
    divisor: int | None = None,
) -> tuple[Any, ...]:
    """(kernel, stride, padding, dilation, ceil_mode, count_include_pad), triples first; avg_pool3d has no dilation."""
    if op is pl.AvgPool2d:
        dilation, ceil_mode, include, divisor = 1, bool(dilation), ceil_mode, include
    if divisor is not None:
        raise Unsupported("avg_pool3d with divisor_override")

    def triple(value: int | Ints) -> tuple[int, ...]:
        listed = [value] if isinstance(value, int) else list(value)
        return tuple(listed * 3)[:3] if len(listed) == 1 else tuple(listed)

    return triple(kernel), triple(stride or kernel), triple(padding), triple(dilation), ceil_mode, include


def adaptive_avg_pool(spatial: int, b: Builder, x: Node, size: Ints) -> Node:
    images_ = images(b, x, spatial)
    return b.reshape(b.node(pl.AdaptiveAvgPool2d(spread(size, spatial, 1)), images_), b.type.shape)


def adaptive_max_pool(spatial: int, b: Builder, x: Node, size: Ints) -> tuple[Node, Missing]:
    """Ordinary max pooling where all windows have one size, else window by window along each dimension."""
    source, out = images(b, x, spatial), spread(size, spatial, 1)
    if not any(s % o for s, o in zip(source.type.shape[2:], out, strict=True)):
        kernel = pair([s // o for s, o in zip(source.type.shape[2:], out, strict=True)])
        return b.reshape(b.node(pl.MaxPool2d(kernel, kernel), source), b.type.shape), NO_INDICES
    for axis, count in zip((2, 3), out, strict=True):
        total = source.type.shape[axis]
        windows = [b.slice(source, axis, i * total // count, -(-(i + 1) * total // count)) for i in range(count)]
        source = b.concat([b.node(rd.Max((axis,), True), w) for w in windows], axis)
    return b.reshape(source, b.type.shape), NO_INDICES


# --- resizing -------------------------------------------------------------------------------------------------------


def resize(mode: str, spatial: int, b: Builder, x: Node, align_corners: bool, factors: Sequence[float | None] | None) -> Node:
    """To torch's output size. Coordinates follow the user's scale factors where there are some."""
    x = images(b, x, spatial)
    listed = [None] * spatial if not factors else list(factors)
    ratios = [1.0 / f if f and f > 0 else 0.0 for f in ([1.0, *listed] if spatial == 1 else listed)]
    size = spread(b.type.shape[-spatial:], spatial, 1)
    op = Resize(size, mode, bool(align_corners), (float(ratios[0]), float(ratios[1])))
    return b.reshape(b.node(op, x), b.type.shape)


def nearest(spatial: int, b: Builder, x: Node, size: Ints | None, *factors: float | Sequence[float] | None) -> Node:
    return resize("nearest", spatial, b, x, False, _listed(factors))


def linear_resize(
    spatial: int, b: Builder, x: Node, size: Ints | None, align_corners: bool, *factors: float | Sequence[float] | None
) -> Node:
    return resize("bilinear", spatial, b, x, align_corners, _listed(factors))


def _listed(factors: Sequence[object]) -> Sequence[float | None] | None:
    """The overloads `.vec` and `.default` give a list or separate numbers."""
    first = factors[0] if factors else None
    if isinstance(first, list | tuple) or (first is None and len(factors) == 1):
        return first
    return factors  # type: ignore[return-value]


def nearest_exact(spatial: int, b: Builder, x: Node, size: Ints | None, *factors: float | Sequence[float] | None) -> Node:
    """Elements at the positions floor((i + 0.5) * ratio), as torch rounds them."""
    listed = list(_listed(factors) or [None] * spatial)
    for d in range(spatial):
        axis = x.type.rank - spatial + d
        source, out, factor = x.type.shape[axis], b.type.shape[axis], listed[d]
        ratio = np.float32(1.0 / factor if factor else source / out)
        positions = np.floor((np.arange(out, dtype=np.float32) + np.float32(0.5)) * ratio)
        x = b.node(Gather(axis), x, b.constant(np.minimum(positions.astype(np.int64), source - 1)))
    return x


TABLE: Table = {
    **{f"aten.max_pool{d}d.default": partial(max_pool, d) for d in (1, 2)},
    **{f"aten.max_pool{d}d_with_indices.default": partial(max_pool_with_indices, d) for d in (1, 2)},
    **{f"aten.avg_pool{d}d.default": partial(avg_pool, d) for d in (1, 2)},
    "aten.max_pool3d.default": partial(volume_pool, pl.MaxPool2d),
    "aten.avg_pool3d.default": partial(volume_pool, pl.AvgPool2d),
    **{f"aten.adaptive_avg_pool{d}d.default": partial(adaptive_avg_pool, d) for d in (1, 2)},
    "aten._adaptive_avg_pool2d.default": partial(adaptive_avg_pool, 2),
    **{f"aten.adaptive_max_pool{d}d.default": partial(adaptive_max_pool, d) for d in (1, 2)},
    **{f"aten.upsample_nearest{d}d.{o}": partial(nearest, d) for d in (1, 2) for o in ("vec", "default")},
    **{f"aten._upsample_nearest_exact{d}d.{o}": partial(nearest_exact, d) for d in (1, 2) for o in ("vec", "default")},
    **{f"aten.upsample_linear1d.{o}": partial(linear_resize, 1) for o in ("vec", "default")},
    **{f"aten.upsample_bilinear2d.{o}": partial(linear_resize, 2) for o in ("vec", "default")},
}
