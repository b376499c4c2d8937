"""Convolutions and linear layers whose weight is constant and mostly zeros: only what is not zero is stored.

The plain weight (O, I, KH, KW), or (O, I) of a linear layer, is cut into lists. Output channels are taken `block` at a time
(the last block may be short), input channels `span` at a time, kernel positions one by one; each combination has a list of the
groups of `group` neighbouring input channels at which one of its `block` x `group` weights is not zero. Three operands hold them:

- `values` (n, block * group): what is stored, one row for each entry, the group's weights of one output side by side; zeros where
  the last block or group is short.
- `places` (n,), int32: the first input channel of each entry, a multiple of `group`, ascending in each list.
- `starts` (lists + 1,), int32: list l has the entries [starts[l], starts[l + 1]). Lists are numbered kernel position first
  (row-major), then span, then block of output channels.

A block of 1 stores single weights (unstructured and N:M masks); a block as wide as a vector stores what structured masks leave.
Groups of several channels are for 8-bit integers, whose instructions sum so many products at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Op, Sample, product_dtype, require
from paring.ir.ops.conv import Conv2d, Padding, Pair
from paring.ir.ops.linear import Linear
from paring.ir.types import BYTES, TensorType


@dataclass(frozen=True)
class Lists:
    """How a weight of `outputs` x `inputs` channels x `taps` kernel positions is cut: see above."""

    outputs: int
    inputs: int
    taps: int
    block: int
    span: int
    group: int = 1

    @property
    def blocks(self) -> int:
        return -(-self.outputs // self.block)

    @property
    def spans(self) -> int:
        return -(-self.inputs // self.span)

    @property
    def groups(self) -> int:
        """Of input channels in a span."""
        return -(-self.span // self.group)

    @property
    def count(self) -> int:
        return self.taps * self.spans * self.blocks

    @property
    def most(self) -> int:
        """Entries of a weight without zeros."""
        return self.taps * self.blocks * -(-self.inputs // self.group)

    def occupied(self, weight: Array) -> Array:
        """Whether an entry is stored: (taps, spans, blocks, groups), of a weight (O, I, ...)."""
        padded = self._padded(weight != 0)
        by_block = padded.reshape(self.blocks, self.block, self.spans, self.groups, self.group, self.taps)
        return np.ascontiguousarray(np.any(by_block, axis=(1, 4)).transpose(3, 1, 0, 2))

    def pack(self, weight: Array) -> tuple[Array, Array, Array]:
        """The values, places and starts of a weight (O, I, ...)."""
        stored = self.occupied(weight)
        tap, span, block, number = np.nonzero(stored)
        number += span * self.groups
        cut = self._padded(weight).reshape(self.blocks, self.block, -1, self.group, self.taps)
        values = cut[block, :, number, :, tap].reshape(-1, self.block * self.group)
        ends = np.cumsum(stored.sum(-1), dtype=np.int32)
        return values, (number * self.group).astype(np.int32), np.append(np.int32(0), ends)

    def unpack(self, values: Array, places: Array, starts: Array) -> Array:
        """The weight (outputs, inputs, taps) that was packed."""
        parts = np.repeat(np.arange(self.count), np.diff(starts))
        tap, block = parts // (self.spans * self.blocks), parts % self.blocks
        weight = np.zeros((self.blocks, self.block, -(-self.inputs // self.group), self.group, self.taps), values.dtype)
        weight[block, :, places // self.group, :, tap] = values.reshape(-1, self.block, self.group)
        return weight.reshape(self.blocks * self.block, -1, self.taps)[: self.outputs, : self.inputs]

    def infer(self, values: TensorType, places: TensorType, starts: TensorType) -> None:
        """Raise IRTypeError where operands of these types are no such lists."""
        require(min(self.outputs, self.inputs, self.taps) > 0, "the weight is empty", why=f"{self}")
        require(min(self.block, self.group) >= 1, f"block {self.block} or group {self.group} is not positive")
        require(1 <= self.span <= self.inputs, f"span {self.span} is not between 1 and the {self.inputs} input channels")
        require(self.spans == 1 or self.span % self.group == 0, f"spans of {self.span} channels are no groups of {self.group}")
        width = self.block * self.group
        require(values.rank == 2 and values.shape[1] == width, f"values are not rows of {width}", why=f"{values}")
        wanted = TensorType("int32", values.shape[:1])
        require(places == wanted, "places are not one for each row of values", why=f"{places}, not {wanted}")
        wanted = TensorType("int32", (self.count + 1,))
        require(starts == wanted, f"starts do not bound {self.count} lists", why=f"{starts}, not {wanted}")

    def check(self, places: Array, starts: Array) -> None:
        """Raise IRTypeError where known places and starts are no such lists."""
        require(bool(starts[0] == 0 and starts[-1] == places.size), f"the lists do not cover the {places.size} places")
        lengths: Array = np.diff(starts.astype(np.int64))
        require(bool((lengths >= 0).all()), "starts descend", why=f"at list {int(lengths.argmin())}")
        parts = np.repeat(np.arange(self.count), lengths)
        low = parts // self.blocks % self.spans * self.span
        outside = (places < low) | (places >= np.minimum(low + self.span, self.inputs))
        where = int(outside.argmax()) if outside.any() else -1
        require(where < 0, "a place lies outside of its list's input channels", why=f"{places[where : where + 1]}")
        require(not (places % self.group).any(), f"a place is not the first of {self.group} channels")
        ascending = (np.diff(places) > 0) | (np.diff(parts) > 0)
        where = -1 if ascending.all() else int(ascending.argmin())
        require(where < 0, "places do not ascend", why=f"at entry {where + 1}")

    def _padded(self, weight: Array) -> Array:
        """(blocks * block, spans * groups * group, taps), of a weight (O, I, ...)."""
        flat = weight.reshape(self.outputs, self.inputs, self.taps)
        more = self.blocks * self.block - self.outputs, self.spans * self.groups * self.group - self.inputs
        return np.pad(flat, ((0, more[0]), (0, more[1]), (0, 0))) if any(more) else flat


class _Sparse(Op):
    """What both have in common: operands x, values, places, starts and perhaps a bias."""

    arity = (4, 5)
    trusted = (2, 3)

    def lists_of(self, x: TensorType) -> Lists:
        """How the weight that multiplies x is cut."""
        raise NotImplementedError(self.name)

    def check_contents(self, types: tuple[TensorType, ...], known: tuple[Array | None, ...]) -> None:
        places, starts = known[2:4]
        if places is not None and starts is not None:
            self.lists_of(types[0]).check(places, starts)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.maximum(np.abs(result), self.ref(*bounds[:2], *values[2:4], *bounds[4:]))

    def _check_lists(self, types: tuple[TensorType, ...], channels: int) -> str:
        """The dtype of the result."""
        x, values, places, starts, *bias = types
        dtype = product_dtype(x, values, *bias)
        self.lists_of(x).infer(values, places, starts)
        fits = all(t.shape == (channels,) for t in bias)
        require(fits, "bias does not match the output channels", why=f"{types[-1]} against {channels}")
        return dtype


@dataclass(frozen=True)
class SparseConv2d(_Sparse):
    """Conv2d of x with the weight (out_channels, in_channels, KH, KW) that values, places and starts stand for, and a bias.

    `block`, `span` and `group` are those of the lists, other attributes and dtypes those of Conv2d. With a blocked `out_layout`
    the result's channels are padded to whole blocks with zeros, and so is the bias.
    """

    name = "sparse_conv2d"
    out_channels: int
    in_channels: int
    kernel: Pair
    block: int
    span: int
    stride: Pair = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    layout: str = "NCHW"
    out_layout: str = "NCHW"
    group: int = 1
    pad_value: int = 0

    @property
    def cut(self) -> Lists:
        return Lists(self.out_channels, self.in_channels, prod(self.kernel), self.block, self.span, self.group)

    def lists_of(self, x: TensorType) -> Lists:
        return self.cut

    def infer(self, *types: TensorType) -> TensorType:
        (x, values), block = types[:2], lay.channel_block(self.out_layout)
        channels = lay.blocks_of(self.out_channels, block) * block if block else self.out_channels
        dtype = self._check_lists(types, channels)
        size = lay.channel_block(self.layout) or 1
        weight = values.with_shape((self.out_channels, lay.blocks_of(self.in_channels, size) * size, *self.kernel))
        window = Conv2d(self.stride, self.padding, self.dilation, layout=self.layout, pad_value=self.pad_value)
        n, _, h, w = window.infer(x, weight).shape
        return TensorType(dtype, (n, channels // block, h, w, block) if block else (n, channels, h, w))

    def ref(self, *arrays: Array) -> Array:
        x, values, places, starts, *bias = arrays
        weight = self.cut.unpack(values, places, starts).reshape(self.out_channels, self.in_channels, *self.kernel)
        x = (lay.unblock_activation(x) if x.ndim == 5 else x)[:, : self.in_channels]
        dense = Conv2d(self.stride, self.padding, self.dilation, pad_value=self.pad_value)
        y = dense.ref(x, weight, *(b[: self.out_channels] for b in bias))
        block = lay.channel_block(self.out_layout)
        return lay.block_activation(y, block) if block else y

    def macs(self, result: TensorType, *types: TensorType) -> int:
        """Of stored values only."""
        return result.shape[0] * prod(result.shape[2:4]) * types[1].size

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        pad = ((1, 1), (1, 1))
        return [
            _sample(cls(6, 5, (3, 3), 4, 5, padding=pad), (1, 5, 6, 7), 40, (6,)),
            _sample(cls(4, 8, (1, 1), 1, 3, stride=(2, 1)), (2, 8, 5, 4), 17),
            _sample(cls(6, 7, (3, 2), 1, 4, padding=pad, layout="NCHW4c", out_layout="NCHW4c"), (1, 2, 6, 5, 4), 90, (8,)),
            _sample(cls(6, 7, (1, 1), 4, 7, layout="NCHW4c", out_layout="NCHW4c"), (1, 2, 3, 5, 4), 9),
            _sample(cls(6, 5, (3, 3), 4, 5, padding=pad, group=4, pad_value=7), (1, 5, 6, 7), 20, (6,), dtype="uint8"),
            _sample(
                cls(6, 12, (1, 1), 4, 8, padding=pad, layout="NCHW4c", out_layout="NCHW4c", group=4, pad_value=-3),
                (1, 3, 3, 5, 4),
                *(4, (8,)),
                dtype="int8",
            ),
        ]


@dataclass(frozen=True)
class SparseLinear(_Sparse):
    """Linear of x (..., I) with the weight (features, I) that values, places and starts stand for, and an optional bias.

    `block`, `span` and `group` are those of the lists, dtypes those of Linear.
    """

    name = "sparse_linear"
    features: int
    block: int
    span: int
    group: int = 1

    def lists_of(self, x: TensorType) -> Lists:
        return self._cut(x.shape[-1] if x.rank else 0)

    def _cut(self, inputs: int) -> Lists:
        return Lists(self.features, inputs, 1, self.block, self.span, self.group)

    def infer(self, *types: TensorType) -> TensorType:
        return TensorType(self._check_lists(types, self.features), (*types[0].shape[:-1], self.features))

    def ref(self, *arrays: Array) -> Array:
        x, values, places, starts, *bias = arrays
        weight = self._cut(x.shape[-1]).unpack(values, places, starts)
        return Linear().ref(x, weight[:, :, 0], *bias)

    def macs(self, result: TensorType, *types: TensorType) -> int:
        """Of stored values only."""
        return prod(result.shape[:-1]) * types[1].size

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            _sample(cls(6, 4, 9), (5, 9), 11, (6,)),
            _sample(cls(7, 1, 4), (2, 3, 9), 23),
            _sample(cls(3, 1, 5), (5,), 0, (3,)),
            _sample(cls(6, 4, 9, 4), (5, 9), 4, (6,), dtype="uint8"),
            _sample(cls(7, 2, 4, 4), (2, 3, 8), 5, dtype="int8"),
        ]


def _sample(op: _Sparse, x: tuple[int, ...], entries: int, *bias: tuple[int, ...], dtype: str = "float32") -> Sample:
    given = TensorType(dtype, x)
    weights, sums = ("int8", "int32") if dtype in BYTES else (dtype, dtype)
    lists = op.lists_of(given)
    values = TensorType(weights, (entries, lists.block * lists.group))
    integers = (TensorType("int32", (size,)) for size in (entries, lists.count + 1))
    return op, (given, values, *integers, *(TensorType(sums, shape) for shape in bias))
