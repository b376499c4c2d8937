"""One step of a reduction: a few neighbouring channels of a pixel (or of a row) times a block of outputs.

A schedule keeps sums of `lanes` outputs in registers and adds to them `dot.add(sums, pixel, weights)`: one channel at a time for
floats, four for 8-bit integers, whose weights have four input channels side by side for each output (`OIHW4i16o4i`).
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from paring.backends import wrapping
from paring.backends.kernel import Kernel, Lanes, Scalar, Value, constant, splat
from paring.backends.targets import Target
from paring.backends.vecmath import full, lanes_in, part, reinterpret
from paring.ir.graph import Node
from paring.ir.types import BYTES


@dataclass(frozen=True)
class Dot:
    """Floats: sums + pixel * weights. `depth`: channels of one step. `dtype`: that of the sums."""

    depth: int = 1
    dtype: str = "float32"

    @property
    def uniform(self) -> bool:
        """Whether every pixel must go through every step, those of the padding too."""
        return False

    def pixel(self, kernel: Kernel, buffer: object, offset: Scalar, count: int) -> Value:
        """What one step takes of a pixel: `count` channels from an offset, at most `depth`."""
        return kernel.load(buffer, offset)

    def fill(self, value: int, count: int) -> Value:
        """The same of a pixel whose channels all have one value."""
        return constant(value, self.dtype)

    def weights(self, kernel: Kernel, buffer: object, offset: Scalar, lanes: int) -> Value:
        """What one step takes of the weights of `lanes` outputs."""
        return kernel.bind(kernel.load(buffer, Lanes(offset, lanes * self.depth)))

    def add(self, sums: Value, pixel: Value, weights: Value) -> Value:
        return sums + splat(pixel, lanes_in(sums)) * weights


FLOAT = Dot()
# Four bytes with their highest bits flipped: from one sign to the other.
FLIP = -0x7F7F7F80


@dataclass(frozen=True)
class _Bytes(Dot):
    """Four 8-bit channels at a time, in int32 lanes. A pixel is an int32 of its four bytes."""

    depth: int = 4
    dtype: str = "int32"
    signed: bool = False

    def pixel(self, kernel: Kernel, buffer: object, offset: Scalar, count: int) -> Value:
        if count == self.depth:
            return self.code(reinterpret(kernel.load(buffer, Lanes(offset, 4)), "int32", lanes=1))
        bytes_ = [kernel.load(buffer, offset + i).astype("int32") & 255 for i in range(count)]
        return self.code(sum((byte << 8 * i for i, byte in enumerate(bytes_[1:], 1)), bytes_[0]))

    def fill(self, value: int, count: int) -> Value:
        bytes_ = bytes([value & 255] * count).ljust(self.depth, b"\0")
        return self.code(constant(int.from_bytes(bytes_, "little", signed=True), "int32"))

    def code(self, pixel: Value) -> Value:
        """How the instruction wants the four bytes."""
        return pixel


@dataclass(frozen=True)
class _OneSign(_Bytes):
    """Base of instructions that take pixels of one sign only.

    Those of the other go in with their highest bit flipped, 128 more or less. So that this can be taken off again, it must have
    been added alike to all sums.
    """

    takes_signed = False

    @property
    def uniform(self) -> bool:
        return self.signed != self.takes_signed

    def code(self, pixel: Value) -> Value:
        return pixel ^ constant(FLIP, "int32") if self.uniform else pixel


@dataclass(frozen=True)
class Vnni(_OneSign):
    """x86's vpdpbusd: unsigned times signed bytes, summed in int32 without saturation on the way."""

    def add(self, sums: Value, pixel: Value, weights: Value) -> Value:
        lanes = lanes_in(sums)
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return _intrinsic(name, sums, reinterpret(splat(pixel, lanes), "int8", lanes=4 * lanes), weights)


@dataclass(frozen=True)
class Sdot(_OneSign):
    """ARM's sdot: signed bytes, four int32 sums at a time."""

    takes_signed = True

    def add(self, sums: Value, pixel: Value, weights: Value) -> Value:
        lanes = lanes_in(sums)
        if lanes > 4:
            halves = [(part(sums, h, lanes // 2), part(weights, h, 2 * lanes)) for h in range(2)]
            return tirx.Shuffle([self.add(s, pixel, w) for s, w in halves], [tirx.const(i, "int32") for i in range(lanes)])
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return _intrinsic(name, sums, reinterpret(splat(pixel, lanes), "int8", lanes=4 * lanes), weights)


@dataclass(frozen=True)
class Widen(_Bytes):
    """No instruction of its own: each byte is multiplied as an int32."""

    def add(self, sums: Value, pixel: Value, weights: Value) -> Value:
        lanes = lanes_in(sums)
        for place in range(self.depth):
            byte = (pixel >> 8 * place) & 255
            # Sign extension of 8 bits.
            byte = (byte ^ 128) - 128 if self.signed else byte
            weight = tirx.Shuffle([weights], [tirx.const(place + 4 * i, "int32") for i in range(lanes)]).astype(f"int32x{lanes}")
            sums = sums + splat(byte, lanes) * weight
        return sums


@dataclass(frozen=True)
class Madd(_Bytes):
    """x86's vpmaddwd: bytes widened to 16 bits, even and odd channels apart. Nothing can saturate (2 * 255 * 128 < 2^31)."""

    NAMES = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}

    def add(self, sums: Value, pixel: Value, weights: Value) -> Value:
        lanes = lanes_in(sums)
        x = reinterpret(splat(pixel, lanes), "int16", lanes=2 * lanes)
        w = reinterpret(weights, "int16", lanes=2 * lanes)
        pixels = (_even(x), _odd(x)) if self.signed else (x & full(x, 255), (x >> full(x, 8)) & full(x, 255))
        for a, b in zip(pixels, (_even(w), _odd(w)), strict=True):
            sums = sums + _intrinsic(self.NAMES[lanes], a, b, like=sums)
        return sums


@dataclass(frozen=True)
class Pairs(Dot):
    """Two 16-bit channels at a time, in int32 lanes, modulo 2^32. A pixel is an int32 of its two channels."""

    depth: int = 2
    dtype: str = "int32"

    def pixel(self, kernel: Kernel, buffer: object, offset: Scalar, count: int) -> Value:
        return reinterpret(kernel.load(buffer, Lanes(offset, 2)), "int32", lanes=1)

    def add(self, sums: Value, pixel: Value, weights: Value) -> Value:
        """x86's vpmaddwd, whose pair of products cannot overflow unless all four factors are -2^15."""
        lanes = lanes_in(sums)
        pixels = reinterpret(splat(pixel, lanes), "int16", lanes=2 * lanes)
        return wrapping.add(sums, _intrinsic(Madd.NAMES[lanes], pixels, weights, like=sums))


@dataclass(frozen=True)
class VnniPairs(Pairs):
    """x86's vpdpwssd, which adds them as well."""

    def add(self, sums: Value, pixel: Value, weights: Value) -> Value:
        lanes = lanes_in(sums)
        pixels = reinterpret(splat(pixel, lanes), "int16", lanes=2 * lanes)
        return _intrinsic(f"llvm.x86.avx512.vpdpwssd.{32 * lanes}", sums, pixels, weights)


def _even(pairs: Value) -> Value:
    """The lower signed byte of each 16 bits."""
    return (pairs << full(pairs, 8)) >> full(pairs, 8)


def _odd(pairs: Value) -> Value:
    return pairs >> full(pairs, 8)


def _intrinsic(name: str, *operands: Value, like: Value | None = None) -> Value:
    return T.call_llvm_pure_intrin(str((operands[0] if like is None else like).ty.dtype), name, *operands)


PAIRS: dict[str, Pairs] = {"vnni": VnniPairs(), "madd": Pairs()}
INTEGER: dict[str, type[_Bytes]] = {"vnni": Vnni, "madd": Madd, "sdot": Sdot, "widen": Widen}


def dot_for(dtype: str, target: Target) -> Dot | None:
    """How products of that type of x are summed on a target; None where it has no way of its own."""
    if dtype == "float32":
        return FLOAT
    if dtype not in BYTES or target.dot not in INTEGER:
        return None
    return INTEGER[target.dot](signed=dtype == "int8")


def dot_of(anchor: Node, target: Target) -> Dot:
    """How the products of a node are summed that a family has accepted."""
    dot = dot_for(anchor.inputs[0].type.dtype, target)
    assert dot is not None
    return dot
