"""Operators that move elements without computing: every result element is one operand element, or padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paring.ir import layout as lay
from paring.ir.op import Array, Op, Sample, normalize_axis, require
from paring.ir.types import TensorType

Ints = tuple[int, ...]


def _f(*shape: int) -> TensorType:
    return TensorType("float32", shape)


class Movement(Op):
    """Base of operators that only move: the error of a result element is that of the element it came from."""

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return self.ref(*bounds)


@dataclass(frozen=True)
class Broadcast(Movement):
    """numpy.broadcast_to: dimensions are aligned at the right, those of size 1 are repeated."""

    name = "broadcast"
    shape: Ints

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(x.rank <= len(self.shape), "the result has fewer dimensions", why=f"{x} to {self.shape}")
        tail = self.shape[len(self.shape) - x.rank :]
        require(all(a in (1, b) for a, b in zip(x.shape, tail, strict=True)), "sizes differ", why=f"{x} to {self.shape}")
        return x.with_shape(self.shape)

    def ref(self, *arrays: Array) -> Array:
        return np.broadcast_to(arrays[0], self.shape)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls((2, 3, 4)), (_f(3, 1),)), (cls((2, 2)), (_f(),)), (cls((3, 4)), (_f(3, 4),)), (cls((0, 3)), (_f(1, 3),))]


@dataclass(frozen=True)
class Reshape(Movement):
    """The same elements in row-major order under another shape."""

    name = "reshape"
    shape: Ints

    def infer(self, *types: TensorType) -> TensorType:
        result = types[0].with_shape(self.shape)
        require(result.size == types[0].size, "sizes differ", why=f"{types[0]} to {self.shape}")
        return result

    def ref(self, *arrays: Array) -> Array:
        return arrays[0].reshape(self.shape)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls((3, 8)), (_f(2, 3, 4),)), (cls(()), (_f(1, 1),)), (cls((1, 6, 1)), (_f(6),)), (cls((0, 7)), (_f(2, 0),))]


@dataclass(frozen=True)
class Transpose(Movement):
    """Dimension d of the result is dimension perm[d] of the operand."""

    name = "transpose"
    perm: Ints

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(sorted(self.perm) == list(range(x.rank)), f"{self.perm} is not a permutation of {x.rank} dimensions")
        return x.with_shape(tuple(x.shape[d] for d in self.perm))

    def ref(self, *arrays: Array) -> Array:
        return arrays[0].transpose(self.perm)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls((0, 2, 1)), (_f(2, 3, 4),)),
            (cls((1, 0)), (_f(5, 2),)),
            (cls(()), (_f(),)),
            (cls((3, 0, 2, 1)), (_f(2, 3, 4, 5),)),
        ]


@dataclass(frozen=True)
class Concat(Movement):
    name = "concat"
    arity = (1, None)
    axis: int

    def infer(self, *types: TensorType) -> TensorType:
        first = types[0]
        axis = normalize_axis(self.axis, first.rank)
        require(self.axis == axis, "the axis is not negative in the IR")
        for other in types[1:]:
            same = other.dtype == first.dtype and other.rank == first.rank
            same = same and all(a == b for d, (a, b) in enumerate(zip(first.shape, other.shape, strict=True)) if d != axis)
            require(same, f"operands differ outside axis {axis}", why=f"{first} against {other}")
        total = sum(t.shape[axis] for t in types)
        return first.with_shape((*first.shape[:axis], total, *first.shape[axis + 1 :]))

    def ref(self, *arrays: Array) -> Array:
        return np.concatenate(arrays, self.axis)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(1), (_f(2, 3, 2), _f(2, 1, 2), _f(2, 4, 2))), (cls(0), (_f(3), _f(1))), (cls(2), (_f(1, 2, 3),))]


@dataclass(frozen=True)
class Slice(Movement):
    """x[start:stop:step, ...] with one (start, stop, step) for each dimension, all within bounds, steps positive."""

    name = "slice"
    starts: Ints
    stops: Ints
    steps: Ints

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(len(self.starts) == len(self.stops) == len(self.steps) == x.rank, "one range for each dimension", why=f"{x}")
        for d, (start, stop, step) in enumerate(zip(self.starts, self.stops, self.steps, strict=True)):
            inside = 0 <= start <= stop <= x.shape[d] and step >= 1
            require(inside, f"range {start}:{stop}:{step} is outside dimension {d}", why=f"{x}")
        return x.with_shape(tuple(len(range(*r)) for r in zip(self.starts, self.stops, self.steps, strict=True)))

    def ref(self, *arrays: Array) -> Array:
        ranges = zip(self.starts, self.stops, self.steps, strict=True)
        return arrays[0][tuple(slice(*r) for r in ranges)]

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls((0, 1), (2, 4), (1, 2)), (_f(2, 5),)),
            (cls((1, 0, 0), (2, 3, 4), (1, 1, 1)), (_f(3, 3, 4),)),
            (cls((2,), (2,), (1,)), (_f(4),)),
        ]


@dataclass(frozen=True)
class Flip(Movement):
    """Reversed along the given axes."""

    name = "flip"
    axes: Ints

    def infer(self, *types: TensorType) -> TensorType:
        require(all(0 <= a < types[0].rank for a in self.axes), f"axes {self.axes} are out of range", why=f"{types[0]}")
        return types[0]

    def ref(self, *arrays: Array) -> Array:
        return np.flip(arrays[0], self.axes)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls((0,)), (_f(3, 2),)), (cls((0, 2)), (_f(2, 3, 4),))]


@dataclass(frozen=True)
class Roll(Movement):
    """numpy.roll: element i goes to (i + shift) mod size, along each axis."""

    name = "roll"
    shifts: Ints
    axes: Ints

    def infer(self, *types: TensorType) -> TensorType:
        require(len(self.shifts) == len(self.axes), "one shift for each axis")
        require(all(0 <= a < types[0].rank for a in self.axes), f"axes {self.axes} are out of range", why=f"{types[0]}")
        return types[0]

    def ref(self, *arrays: Array) -> Array:
        return np.roll(arrays[0], self.shifts, self.axes)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls((1,), (0,)), (_f(4, 2),)), (cls((-2, 3), (1, 2)), (_f(2, 3, 4),))]


@dataclass(frozen=True)
class Pad(Movement):
    """Before and after each dimension; mode constant (with `value`), reflect or replicate."""

    name = "pad"
    padding: tuple[tuple[int, int], ...]
    mode: str = "constant"
    value: float = 0.0

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(len(self.padding) == x.rank, "one pair for each dimension", why=f"{self.padding} on {x}")
        require(self.mode in ("constant", "reflect", "replicate"), f"unknown mode {self.mode!r}")
        require(all(min(p) >= 0 for p in self.padding), "padding is not negative", hint="slice instead")
        for size, pair in zip(x.shape, self.padding, strict=True):
            require(
                self.mode != "reflect" or max(pair) < max(size, 1), "reflection is wider than the input", why=f"{pair} on {size}"
            )
            require(self.mode == "constant" or size > 0 or max(pair) == 0, "nothing to repeat", why=f"{x}")
        return x.with_shape(tuple(s + sum(p) for s, p in zip(x.shape, self.padding, strict=True)))

    def ref(self, *arrays: Array) -> Array:
        if self.mode == "constant":
            return np.pad(arrays[0], self.padding, constant_values=np.asarray(self.value).astype(arrays[0].dtype))
        return np.pad(arrays[0], self.padding, "reflect" if self.mode == "reflect" else "edge")

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        return np.abs(self.ref(*bounds))

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        pads = ((0, 0), (1, 2), (2, 0))
        return [
            (cls(pads), (_f(2, 3, 4),)),
            (cls(pads, "reflect"), (_f(2, 3, 4),)),
            (cls(pads, "replicate"), (_f(2, 3, 4),)),
            (cls(((1, 1),), value=-1.5), (_f(2),)),
        ]


@dataclass(frozen=True)
class PixelShuffle(Movement):
    """(N, C*r*r, H, W) -> (N, C, H*r, W*r)."""

    name = "pixel_shuffle"
    factor: int

    def infer(self, *types: TensorType) -> TensorType:
        x = types[0]
        require(x.rank == 4 and self.factor >= 1, "x has four dimensions and the factor is positive", why=f"{x}")
        n, c, h, w = x.shape
        require(c % self.factor**2 == 0, f"{c} channels do not divide by {self.factor} squared")
        return x.with_shape((n, c // self.factor**2, h * self.factor, w * self.factor))

    def ref(self, *arrays: Array) -> Array:
        n, c, h, w = arrays[0].shape
        r = self.factor
        x = arrays[0].reshape(n, c // (r * r), r, r, h, w)
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(n, c // (r * r), h * r, w * r)

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [(cls(2), (_f(2, 8, 3, 2),)), (cls(3), (_f(1, 9, 1, 2),))]


@dataclass(frozen=True)
class LayoutTransform(Movement):
    """From one activation layout to another. `channels` is the logical number: padding is added (zeros) or cut off."""

    name = "layout_transform"
    src: str
    dst: str
    channels: int

    def infer(self, *types: TensorType) -> TensorType:
        x, src, dst = types[0], lay.channel_block(self.src), lay.channel_block(self.dst)
        require(x.rank == (5 if src else 4), f"x does not fit layout {self.src}", why=f"it is {x}")
        require(src is None or x.shape[4] == src, f"x does not fit layout {self.src}", why=f"it is {x}")
        held = x.shape[1] * src if src else x.shape[1]
        fits = lay.blocks_of(self.channels, src) * src == held if src else held == self.channels
        require(fits, f"{self.channels} channels do not fill x", why=f"it is {x}")
        n, _, h, w = x.shape[:4]
        return x.with_shape((n, lay.blocks_of(self.channels, dst), h, w, dst) if dst else (n, self.channels, h, w))

    def ref(self, *arrays: Array) -> Array:
        x = lay.unblock_activation(arrays[0])[:, : self.channels] if arrays[0].ndim == 5 else arrays[0]
        block = lay.channel_block(self.dst)
        return lay.block_activation(x, block) if block else x

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        return [
            (cls("NCHW", "NCHW4c", 6), (_f(2, 6, 3, 2),)),
            (cls("NCHW4c", "NCHW", 6), (_f(1, 2, 3, 2, 4),)),
            (cls("NCHW4c", "NCHW8c", 6), (_f(1, 2, 2, 2, 4),)),
        ]
