"""aten operators that move elements, and those that make constants from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from paring.frontends.aten_builder import Builder, Operand, Table, Unsupported, axis_of, pair
from paring.ir import Node
from paring.ir.ops import shape as sh
from paring.ir.ops.index import Gather, Tril, Triu

Ints = Sequence[int]


def same(b: Builder, x: Node, *_: object) -> Node:
    """Copies, aliases and hints about memory: values are unchanged."""
    return x


def nothing(b: Builder, *_: object) -> None:
    """Assertions that torch.export has already checked for these shapes."""


def reshaped(b: Builder, x: Node, *_: object) -> Node:
    """Anything that only regroups dimensions: torch says to which shape."""
    return b.reshape(x, b.type.shape)


def cast(b: Builder, x: Node, *_: object) -> Node:
    return b.cast(x, b.type.dtype)


def copy(b: Builder, x: Node, source: Node, *_: object) -> Node:
    return b.broadcast(b.cast(source, x.type.dtype), x.type.shape)


def permute(b: Builder, x: Node, axes: Ints) -> Node:
    return b.transpose(x, [axis_of(a, x.type.rank) for a in axes])


def transpose(b: Builder, x: Node, first: int, second: int) -> Node:
    return b.swap(x, first, second)


def t(b: Builder, x: Node) -> Node:
    return b.swap(x, 0, 1) if x.type.rank == 2 else x


def movedim(b: Builder, x: Node, source: Ints | int, target: Ints | int) -> Node:
    pairs = ([source], [target]) if isinstance(source, int) else (source, target)
    moved = {axis_of(to, x.type.rank): axis_of(a, x.type.rank) for a, to in zip(*pairs, strict=True)}
    rest = iter(a for a in range(x.type.rank) if a not in moved.values())
    return b.transpose(x, [moved[d] if d in moved else next(rest) for d in range(x.type.rank)])


def expand(b: Builder, x: Node, *_: object) -> Node:
    return b.broadcast(x, b.type.shape)


def select(b: Builder, x: Node, axis: int, index: int) -> Node:
    axis = axis_of(axis, x.type.rank)
    start = index % x.type.shape[axis]
    return b.reshape(b.slice(x, axis, start, start + 1), b.type.shape)


def slice_(b: Builder, x: Node, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Node:
    axis = axis_of(axis, x.type.rank)
    return b.slice(x, axis, start or 0, x.type.shape[axis] if stop is None else stop, step)


def split_with_sizes(b: Builder, x: Node, sizes: Ints, axis: int = 0) -> tuple[Node, ...]:
    ends = list(accumulate(sizes, initial=0))
    return tuple(b.slice(x, axis, start, stop) for start, stop in pairwise(ends))


def split(b: Builder, x: Node, size: int, axis: int = 0) -> tuple[Node, ...]:
    total = x.type.shape[axis]
    if not size:
        return (x,)
    return tuple(b.slice(x, axis, start, min(start + size, total)) for start in range(0, max(total, 1), size))


def chunk(b: Builder, x: Node, count: int, axis: int = 0) -> tuple[Node, ...]:
    return split(b, x, -(-x.type.shape[axis] // count), axis)


def unbind(b: Builder, x: Node, axis: int = 0) -> tuple[Node, ...]:
    axis = axis_of(axis, x.type.rank)
    rest = x.type.shape[:axis] + x.type.shape[axis + 1 :]
    return tuple(b.reshape(b.slice(x, axis, i, i + 1), rest) for i in range(x.type.shape[axis]))


def concat(b: Builder, parts: Sequence[Node], axis: int = 0) -> Node:
    # torch lets empty 1-d tensors join anything.
    parts = [p for p in parts if p.type.shape != (0,)] or list(parts[:1])
    return b.concat([b.cast(p, b.type.dtype) for p in parts], axis_of(axis, parts[0].type.rank))


def stack(b: Builder, parts: Sequence[Node], axis: int = 0) -> Node:
    axis = axis % (parts[0].type.rank + 1)
    return b.concat([b.unsqueezed(b.cast(p, b.type.dtype), [axis]) for p in parts], axis)


def flip(b: Builder, x: Node, axes: Ints) -> Node:
    return b.node(sh.Flip(tuple(axis_of(a, x.type.rank) for a in axes)), x) if x.type.rank else x


def roll(b: Builder, x: Node, shifts: Ints, axes: Ints = ()) -> Node:
    shifts = [shifts] if isinstance(shifts, int) else shifts
    if not axes:
        flat = b.reshape(x, (x.type.size,))
        return b.reshape(b.node(sh.Roll(tuple(shifts), (0,)), flat), x.type.shape)
    return b.node(sh.Roll(tuple(shifts), tuple(axis_of(a, x.type.rank) for a in axes)), x)


def repeat(b: Builder, x: Node, times: Ints) -> Node:
    """Each dimension doubled up with a broadcast one in front of it."""
    shape = (*(1,) * (len(times) - x.type.rank), *x.type.shape)
    apart = [s for size in shape for s in (1, size)]
    spread = [s for count, size in zip(times, shape, strict=True) for s in (count, size)]
    return b.reshape(b.broadcast(b.reshape(x, apart), spread), b.type.shape)


def repeat_interleave(b: Builder, x: Node, count: int, axis: int | None = None, *_: object) -> Node:
    if not isinstance(count, int):
        raise Unsupported("the number of repetitions is a tensor")
    if axis is None:
        x, axis = b.reshape(x, (x.type.size,)), 0
    axis = axis_of(axis, x.type.rank)
    apart = b.unsqueezed(x, [axis + 1])
    shape = (*apart.type.shape[: axis + 1], count, *apart.type.shape[axis + 2 :])
    return b.flattened(b.broadcast(apart, shape), axis, axis + 2)


def pad(b: Builder, x: Node, padding: Ints, mode: str = "constant", value: float | None = None) -> Node:
    """torch lists pairs from the last dimension on; negative ones cut off."""
    pairs = [(0, 0)] * x.type.rank
    for i in range(len(padding) // 2):
        pairs[-1 - i] = (padding[2 * i], padding[2 * i + 1])
    for axis, (before, after) in enumerate(pairs):
        x = b.slice(x, axis, max(0, -before), max(0, x.type.shape[axis] + min(0, after)))
    grown = tuple((max(0, before), max(0, after)) for before, after in pairs)
    if mode == "circular":
        return circular(b, x, grown)
    if all(p == (0, 0) for p in grown):
        return x
    if x.type.dtype == "bool":
        return b.cast(b.node(sh.Pad(grown, mode, float(value or 0)), b.cast(x, "int32")), "bool")
    return b.node(sh.Pad(grown, mode, float(value or 0)), x)


def circular(b: Builder, x: Node, grown: Sequence[tuple[int, int]]) -> Node:
    for axis, (before, after) in enumerate(grown):
        size = x.type.shape[axis]
        ends = [b.slice(x, axis, size - before, size)] * bool(before), [b.slice(x, axis, 0, after)] * bool(after)
        x = b.concat([*ends[0], x, *ends[1]], axis)
    return x


def pad_by(mode: str, b: Builder, x: Node, padding: Ints, value: float = 0.0) -> Node:
    return pad(b, x, padding, mode, value)


def slice_scatter(
    b: Builder, x: Node, source: Node, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Node:
    """x with a slice replaced: its parts around the slice, or for a step a choice by position."""
    axis = axis_of(axis, x.type.rank)
    size = x.type.shape[axis]
    start, stop, step = slice(start, stop, step).indices(size)
    source = b.cast(source, x.type.dtype)
    taken = list(range(start, stop, step))
    if not taken:
        return x
    if step == 1:
        around = (b.slice(x, axis, 0, start), source, b.slice(x, axis, stop, size))
        return b.concat([p for p in around if p.type.shape[axis]], axis)
    order = np.arange(size)
    order[taken] = size + np.arange(len(taken))
    return b.node(Gather(axis), b.concat([x, source], axis), b.constant(order))


def select_scatter(b: Builder, x: Node, source: Node, axis: int, index: int) -> Node:
    axis = axis_of(axis, x.type.rank)
    index %= x.type.shape[axis]
    return slice_scatter(b, x, b.unsqueezed(source, [axis]), axis, index, index + 1)


def take(b: Builder, x: Node, axis: int, indices: np.ndarray) -> Node:
    """Elements at constant positions along one axis."""
    return b.node(Gather(axis), x, b.constant(indices.astype(np.int64)))


def unfold(b: Builder, x: Node, axis: int, size: int, step: int) -> Node:
    """Windows along one axis; their elements become the last dimension."""
    if not x.type.rank:
        return b.reshape(x, b.type.shape)
    axis = axis_of(axis, x.type.rank)
    starts = np.arange(0, x.type.shape[axis] - size + 1, step)
    windows = take(b, x, axis, starts[:, None] + np.arange(size))
    perm = [d for d in range(windows.type.rank) if d != axis + 1]
    return b.transpose(windows, [*perm, axis + 1])


def diagonal(b: Builder, x: Node, offset: int = 0, first: int = 0, second: int = 1) -> Node:
    """The two axes flattened to the end, then elements at constant positions."""
    first, second = axis_of(first, x.type.rank), axis_of(second, x.type.rank)
    rows, columns = x.type.shape[first], x.type.shape[second]
    rest = [d for d in range(x.type.rank) if d not in (first, second)]
    flat = b.flattened(b.transpose(x, [*rest, first, second]), len(rest), len(rest) + 2)
    count = b.type.shape[-1]
    steps = np.arange(count)
    positions = (steps + max(0, -offset)) * columns + steps + max(0, offset)
    if not rows * columns:
        return b.reshape(flat, b.type.shape)
    return take(b, flat, len(rest), positions)


def im2col(b: Builder, x: Node, kernel: Ints, dilation: Ints, padding: Ints, stride: Ints) -> Node:
    """Windows of an image as columns (N, C * KH * KW, L)."""
    unbatched = x.type.rank == 3
    x = b.unsqueezed(x, [0]) if unbatched else x
    top, left = pair(padding)
    x = pad(b, x, (left, left, top, top))
    for axis, k, d, s in zip((2, 4), pair(kernel), pair(dilation), pair(stride), strict=True):
        starts = np.arange(0, x.type.shape[axis] - d * (k - 1), s)
        x = take(b, x, axis, np.arange(k)[:, None] * d + starts)
    return b.reshape(b.transpose(x, (0, 1, 2, 4, 3, 5)), b.type.shape)


def pixel_shuffle(b: Builder, x: Node, factor: int) -> Node:
    batch = (int(np.prod(x.type.shape[:-3])), *x.type.shape[-3:])
    return b.reshape(b.node(sh.PixelShuffle(factor), b.reshape(x, batch)), b.type.shape)


def pixel_unshuffle(b: Builder, x: Node, factor: int) -> Node:
    *_, c, h, w = x.type.shape
    apart = b.reshape(x, (x.type.size // max(c * h * w, 1), c, h // factor, factor, w // factor, factor))
    return b.reshape(b.transpose(apart, (0, 1, 3, 5, 2, 4)), b.type.shape)


def channel_shuffle(b: Builder, x: Node, groups: int) -> Node:
    n, c, *rest = x.type.shape
    return b.reshape(b.swap(b.reshape(x, (n, groups, c // groups, *rest)), 1, 2), b.type.shape)


def triangle(op: type[Tril], b: Builder, x: Node, diagonal: int = 0) -> Node:
    return b.node(op(diagonal), x)


def filled(value: float, b: Builder, *_: object) -> Node:
    """A tensor of one value; torch says of which shape and dtype."""
    return b.full(b.type.shape, value, b.type.dtype)


def full_like(b: Builder, x: Node, value: Operand, *_: object) -> Node:
    return b.broadcast(b.operand(value, b.type.dtype), b.type.shape)


def full(b: Builder, size: Ints, value: Operand, *_: object) -> Node:
    return b.broadcast(b.operand(value, b.type.dtype), b.type.shape)


def new_full(b: Builder, x: Node, size: Ints, value: Operand, *_: object) -> Node:
    return b.broadcast(b.operand(value, b.type.dtype), b.type.shape)


def size_of(b: Builder, x: Node, axis: int) -> int:
    return x.type.shape[axis]


SAME = (
    *("clone", "alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy", "contiguous", "lift", "dropout", "alias_copy"),
    *("feature_dropout", "alpha_dropout", "feature_alpha_dropout", "positive", "resolve_conj", "resolve_neg", "detach_copy"),
)
RESHAPED = (
    *("view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default", "flatten.using_ints"),
    *("squeeze.default", "squeeze.dim", "squeeze.dims", "unflatten.int", "view_as.default", "reshape_as.default"),
    *("view_copy.default", "unsqueeze_copy.default", "_reshape_alias.default"),
)
NOTHING = ("_assert_tensor_metadata.default", "_assert_async.msg", "_assert_scalar.default", "sym_constrain_range.default")

TABLE: Table = {
    **{f"aten.{name}.default": same for name in SAME},
    **{f"aten.{name}": reshaped for name in RESHAPED},
    **{f"aten.{name}": nothing for name in NOTHING},
    **{f"aten.to.{overload}": cast for overload in ("dtype", "device", "dtype_layout", "other")},
    "aten._to_copy.default": cast,
    "aten.type_as.default": cast,
    "aten.copy.default": copy,
    "aten.permute.default": permute,
    "aten.transpose.int": transpose,
    "aten.t.default": t,
    "aten.movedim.intlist": movedim,
    "aten.movedim.int": movedim,
    "aten.expand.default": expand,
    "aten.expand_as.default": expand,
    "aten.broadcast_to.default": expand,
    "aten.select.int": select,
    "aten.slice.Tensor": slice_,
    "aten.split.Tensor": split,
    "aten.split.sizes": split_with_sizes,
    "aten.split_with_sizes.default": split_with_sizes,
    "aten.chunk.default": chunk,
    "aten.unbind.int": unbind,
    "aten.cat.default": concat,
    "aten.stack.default": stack,
    "aten.flip.default": flip,
    "aten.roll.default": roll,
    "aten.repeat.default": repeat,
    "aten.repeat_interleave.self_int": repeat_interleave,
    "aten.pad.default": pad,
    "aten.constant_pad_nd.default": partial(pad_by, "constant"),
    **{f"aten.reflection_pad{d}d.default": partial(pad_by, "reflect") for d in (1, 2, 3)},
    **{f"aten.replication_pad{d}d.default": partial(pad_by, "replicate") for d in (1, 2, 3)},
    "aten.slice_scatter.default": slice_scatter,
    "aten.select_scatter.default": select_scatter,
    "aten.unfold.default": unfold,
    "aten.diagonal.default": diagonal,
    "aten.im2col.default": im2col,
    "aten.pixel_shuffle.default": pixel_shuffle,
    "aten.pixel_unshuffle.default": pixel_unshuffle,
    "aten.channel_shuffle.default": channel_shuffle,
    "aten.native_channel_shuffle.default": channel_shuffle,
    "aten.tril.default": partial(triangle, Tril),
    "aten.triu.default": partial(triangle, Triu),
    **{f"aten.{name}.default": partial(filled, 0) for name in ("zeros_like", "new_zeros", "empty_like", "new_empty")},
    **{f"aten.{name}.default": partial(filled, 0) for name in ("new_empty_strided", "zeros", "empty_permuted", "empty_strided")},
    "aten.empty.memory_format": partial(filled, 0),
    **{f"aten.{name}.default": partial(filled, 1) for name in ("ones_like", "new_ones", "ones")},
    "aten.full_like.default": full_like,
    "aten.full.default": full,
    "aten.new_full.default": new_full,
    "aten.fill.Scalar": full_like,
    "aten.fill.Tensor": full_like,
    "aten.sym_size.int": size_of,
}
