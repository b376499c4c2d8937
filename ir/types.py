"""Physical types: what a tensor is in memory. Quantization parameters and layouts are attributes of ops, not of types."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from paring.ir.errors import IRTypeError


@dataclass(frozen=True)
class DType:
    """An element type. `kind` is one of float, int, uint, bool."""

    name: str
    kind: str
    bits: int

    @property
    def numpy(self) -> np.dtype[np.generic]:
        return np.dtype(self.name)

    @property
    def bytes(self) -> int:
        return max(1, self.bits // 8)


# The 8-bit integers: what quantized networks compute with.
BYTES = ("int8", "uint8")
# bfloat16 joins with one row here once the reference may use a numpy extension type.
DTYPES = {
    d.name: d
    for d in (
        DType("float32", "float", 32),
        DType("float64", "float", 64),
        DType("float16", "float", 16),
        DType("int64", "int", 64),
        DType("int32", "int", 32),
        DType("int16", "int", 16),
        DType("int8", "int", 8),
        DType("uint8", "uint", 8),
        DType("bool", "bool", 1),
    )
}

_TYPE = re.compile(r"^(\w+)\[((?:[0-9]{1,18}(?:,[0-9]{1,18})*)?)\]\Z")


@dataclass(frozen=True)
class TensorType:
    """A dense, row-major tensor: dtype name and static shape (a 0-d tensor has the shape `()`)."""

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise IRTypeError(f"unknown dtype {self.dtype!r}", hint=f"one of {', '.join(DTYPES)}")
        if not isinstance(self.shape, tuple) or any(type(d) is not int or d < 0 for d in self.shape):
            raise IRTypeError(f"a shape is a tuple of non-negative ints, not {self.shape!r}")

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * DTYPES[self.dtype].bytes

    @property
    def is_float(self) -> bool:
        return DTYPES[self.dtype].kind == "float"

    def with_shape(self, shape: tuple[int, ...]) -> TensorType:
        return TensorType(self.dtype, shape)

    def with_dtype(self, dtype: str) -> TensorType:
        return TensorType(dtype, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @staticmethod
    def parse(text: str) -> TensorType:
        """The inverse of `str`. Raises IRTypeError."""
        match = _TYPE.match(text)
        if not match:
            raise IRTypeError(f"not a type: {text!r}", hint="like float32[1,3,224,224]")
        return TensorType(match[1], tuple(int(d) for d in match[2].split(",") if d))


def type_of(array: npt.NDArray[Any]) -> TensorType:
    """The type of a numpy array."""
    return TensorType(array.dtype.name, tuple(int(d) for d in array.shape))
