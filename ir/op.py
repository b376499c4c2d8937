"""What an operator is: attributes, type rule, meaning, magnitude, sampler, all in one class."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from paring.ir.errors import IRTypeError
from paring.ir.types import BYTES, TensorType

Array = npt.NDArray[Any]
Sample = tuple["Op", tuple[TensorType, ...]]

# Up to here floats are no coarser than ints.
MOST_INT = 2**53


@dataclass(frozen=True)
class Op:
    """Base of all operators: a frozen dataclass whose fields are its attributes.

    Subclasses state `name` (their text form), `arity` (least and greatest number of operands; None: no limit),
    `infer`, `ref`, `samples`, and `magnitude` where the default does not hold. `trusted`: operands whose contents kernels
    rely on, so that programs from outside have them as constants, which `check_contents` looks at.
    """

    name: ClassVar[str]
    arity: ClassVar[tuple[int, int | None]] = (1, 1)
    trusted: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        # Equal ops print the same text: 1 and 1.0 are equal in Python.
        cls: Any = type(self)
        for name, hint in attribute_types(cls):
            value = getattr(self, name)
            exact = as_declared(value, hint)
            if exact is not value:
                object.__setattr__(self, name, exact)

    def check_arity(self, count: int) -> None:
        low, high = self.arity
        if count < low or (high is not None and count > high):
            wanted = str(low) if low == high else f"{low} to {high if high is not None else 'any number'}"
            raise IRTypeError(f"takes {wanted} operands, got {count}")

    def check_attributes(self) -> None:
        """Raise IRTypeError where an attribute is not of its declared type: it could not be printed, hashed or lowered."""
        cls: Any = type(self)
        for name, hint in attribute_types(cls):
            value = getattr(self, name)
            if not is_a(value, hint):
                raise IRTypeError(f"attribute {name} is {value!r}", why=f"it should be {getattr(hint, '__name__', hint)}")

    def infer(self, *types: TensorType) -> TensorType:
        """The type of the result. Raises IRTypeError with the reason when the op does not apply."""
        raise NotImplementedError(self.name)

    def check_contents(self, types: tuple[TensorType, ...], known: tuple[Array | None, ...]) -> None:
        """Raise IRTypeError where operands whose values are known (constants) are not what the op is defined on."""

    def ref(self, *arrays: Array) -> Array:
        """The meaning, slow and obvious: computes in float64; the interpreter rounds the result to its type."""
        raise NotImplementedError(self.name)

    def magnitude(self, result: Array, values: tuple[Array, ...], bounds: tuple[Array, ...]) -> Array:
        """How large an error of one relative ulp in each operand and in this op can show in the result.

        `bounds[i]` (float64, same shape as `values[i]`) bounds the error of operand i in units of its ulp, and is at least
        |values[i]|. The default, `ref` on the bounds, holds for ops that are linear with their own coefficients non-negative.
        """
        return np.maximum(np.abs(result), self.ref(*bounds))

    def macs(self, result: TensorType, *types: TensorType) -> int:
        """Multiply-accumulates, by the usual counting (convolutions, linear, matmul, attention); 0 elsewhere."""
        return 0

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        """A few legal attribute settings with operand types, small enough for tests."""
        raise NotImplementedError(cls.name)


@functools.cache
def attribute_types(cls: type) -> tuple[tuple[str, Any], ...]:
    """The fields of a dataclass with their declared types."""
    hints = typing.get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(cls))


def is_a(value: object, hint: Any) -> bool:
    """Whether a value is of a type built from int, float, bool, str, None, tuples and classes."""
    if hint in (int, float):
        return type(value) is hint
    origin = typing.get_origin(hint)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(_kinds(value, hint)) and all(map(is_a, value, _kinds(value, hint)))
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, member) for member in typing.get_args(hint))
    return isinstance(value, origin or hint)


def as_declared(value: Any, hint: Any) -> Any:
    """The value, with an int as a float where a float is declared, unless floats are coarser than it."""
    if type(value) is int and not is_a(value, hint) and is_a(0.0, hint):
        return float(value) if abs(value) <= MOST_INT else value
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple:
        exact = tuple(map(as_declared, value, _kinds(value, hint)))
        return value if len(exact) != len(value) or all(map(operator.is_, exact, value)) else exact
    return value


def _kinds(value: tuple[Any, ...], hint: Any) -> tuple[Any, ...]:
    """The declared type of each element of a tuple."""
    members = typing.get_args(hint)
    return members[:1] * len(value) if members[1:] == (...,) else members


def require(condition: bool, what: str, *, why: str = "", hint: str = "") -> None:
    """Raise IRTypeError unless `condition` holds."""
    if not condition:
        raise IRTypeError(what, why=why, hint=hint)


def wide(array: Array) -> Array:
    """Floats as float64, everything else as it is."""
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def exact_wide(array: Array) -> Array:
    """Everything as float64, in which sums of products of 8-bit integers are exact (and faster than integer ones)."""
    return array.astype(np.float64)


def product_dtype(x: TensorType, w: TensorType, *bias: TensorType) -> str:
    """The dtype in which x times w is summed: their own for floats, int32 for 8-bit x and int8 w. Raises IRTypeError."""
    if x.dtype in BYTES:
        result, fits = "int32", w.dtype == "int8" and all(b.dtype == "int32" for b in bias)
    else:
        result, fits = x.dtype, x.is_float and all(t.dtype == x.dtype for t in (w, *bias))
    why = ", ".join(t.dtype for t in (x, w, *bias))
    require(fits, "operands are not of one float type, nor 8-bit x, int8 weight, int32 bias", why=why)
    return result


def normalize_axis(axis: int, rank: int) -> int:
    require(-rank <= axis < rank, f"axis {axis} is out of range for rank {rank}")
    return axis % rank
