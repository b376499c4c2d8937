"""What every graph is made of: inputs, constants and regions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from paring.ir.graph import Graph
from paring.ir.op import Array, Op, Sample, require
from paring.ir.types import TensorType, type_of


@dataclass(frozen=True)
class Input(Op):
    """An argument of the graph."""

    name = "input"
    arity = (0, 0)
    label: str
    dtype: str
    shape: tuple[int, ...]

    def infer(self, *types: TensorType) -> TensorType:
        return TensorType(self.dtype, self.shape)


@dataclass(frozen=True, eq=False)
class Const(Op):
    """A constant array, compared by content; it is never written to."""

    name = "const"
    arity = (0, 0)
    value: Array = field(repr=False)

    def __post_init__(self) -> None:
        value = np.array(self.value, order="C", copy=None)
        if value.flags.writeable:
            value = value.view()
            value.flags.writeable = False
        object.__setattr__(self, "value", value)

    @cached_property
    def digest(self) -> str:
        """sha256 over dtype, shape and bytes."""
        head = str(type_of(self.value)).encode()
        return hashlib.sha256(head + b"\0" + self.value.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Const) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def infer(self, *types: TensorType) -> TensorType:
        return type_of(self.value)

    def ref(self, *arrays: Array) -> Array:
        return self.value

    @classmethod
    def samples(cls, rng: np.random.Generator) -> list[Sample]:
        values: tuple[Array, ...] = (rng.standard_normal((2, 3)).astype("float32"), np.array(3), np.array([True, False]))
        return [(cls(value), ()) for value in values]


@dataclass(frozen=True, eq=False)
class Region(Op):
    """A graph that a backend runs as one kernel; its body's inputs are the operands, in order.

    `kind` names the anchor's schedule family, for people to read; the body alone says what is computed. Like nodes,
    regions are compared by identity.
    """

    name = "region"
    arity = (0, None)
    kind: str
    body: Graph

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def infer(self, *types: TensorType) -> TensorType:
        wanted = tuple(node.type for node in self.body.inputs)
        require(types == wanted, "operands do not match the body's inputs", why=f"body takes {', '.join(map(str, wanted))}")
        require(len(self.body.outputs) == 1, "a region's body has exactly one output")
        return self.body.outputs[0].type

    def macs(self, result: TensorType, *types: TensorType) -> int:
        return sum(n.macs for n in self.body.nodes())
