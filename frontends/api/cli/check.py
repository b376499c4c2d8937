"""Is a compiled network right? Against torch in float64, against the reference interpreter, and kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from paring.cli.inputs import Example
from paring.cli.run import leaves
from paring.ir import Const, Graph, Input, Node, interpret, magnitude_bound
from paring.ir.ops.shape import Reshape
from paring.passes.contract import Lossy, same_bits, ulps_apart
from paring.passes.noise import Oracle
from paring.passes.rewriter import Tell

if TYPE_CHECKING:
    Array = np.ndarray[Any, Any]

# What a right kernel may differ from its meaning, in float32 ulps of the magnitude bound: fast exponentials and the like
# take a few, float32 sums of n terms about sqrt(n). Wrong kernels are off by thousands.
KERNEL_ULPS = 64.0


@dataclass(frozen=True)
class Verdict:
    """A figure that may not be above its limit."""

    measure: str
    figure: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.figure <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "measure": self.measure, "figure": self.figure, "limit": self.limit}

    def __str__(self) -> str:
        relation = "at most" if self.ok else "MORE THAN"
        return f"check: {self.measure} is {self.figure:.3g}, {relation} {self.limit:g}"


@dataclass(frozen=True)
class WrongKernel:
    """A kernel whose result is not what its region means, on the very operands that it was given."""

    number: int
    kernel: str
    node: str
    ulps: float
    limit: float
    expected: float
    found: float
    text: str = ""

    def __str__(self) -> str:
        who = f"kernel {self.number} ({self.kernel}), {self.node}"
        return f"{who}: {self.found!r} where {self.expected!r} is right, {self.ulps:.3g} ulps of its magnitude bound"


def check_network(net: Any, example: Example) -> Verdict:
    """A torch module: the error against float64 over the error of torch's own float32. Anything else: the reference.

    After lossy passes another network is left, so what runs is compared with what the program that runs means.
    """
    lossy = any(isinstance(entry.contract, Lossy) for entry in net.ledger.entries)
    if not lossy and not isinstance(example.model, Graph):
        import torch

        if isinstance(example.model, torch.nn.Module):
            return _check_torch(net, example)
    from paring.compiler import import_any

    imported = import_any(example.model, example.args, example.kwargs)
    arrays = imported.flatten_inputs(example.args, example.kwargs)
    found = [array for _, array in leaves(net(*example.args, **example.kwargs))]
    return check_reference(net.graph if lossy else imported.graph, arrays, found)


def _check_torch(net: Any, example: Example) -> Verdict:
    from paring.frontends.oracle import TORCH_FACTOR, arrays_of, reference, worst_ratio

    found = arrays_of(net(*example.args, **example.kwargs))
    ratio = worst_ratio(found, reference(example.model, example.args, example.kwargs))
    return Verdict("the error against float64, over that of torch in float32,", ratio, TORCH_FACTOR)


def check_reference(graph: Graph, arrays: Sequence[Array], found: Sequence[Array]) -> Verdict:
    """A compiled network's outputs against what the graph means."""
    limit = max((kernel_limit(node) for node in graph.nodes()), default=KERNEL_ULPS)
    return Verdict(
        "the error against float64, over that of the float32 reference,", Oracle.of(graph, arrays).distance(found), limit
    )


def kernel_limit(node: Node) -> float:
    """How many ulps of its bound the result of a node, or of a region, may be off."""
    if not node.inputs or not node.type.size:
        return KERNEL_ULPS
    macs = node.macs
    terms = max(macs, *(i.type.size for i in node.inputs)) / node.type.size
    return KERNEL_ULPS + sqrt(terms)


def wrong_kernel(executable: Any, arrays: Sequence[Array], tell: Tell) -> WrongKernel | None:
    """The first kernel that does not compute what its region means; None where all do."""
    values: dict[Node, Array] = dict(zip(executable.built.plan.graph.inputs, arrays, strict=True))
    count = len(executable.built.plan.order)
    for number, (step, result) in enumerate(executable.trace(arrays), 1):
        tell("kernels against the reference", number, count)
        operands = [_value(node, values) for node in step.node.inputs]
        found = _judge(number, step, executable.built.target, operands, result)
        if found is not None:
            return found
        values[step.node] = result
    traced = [_value(node, values) for node in executable.built.plan.graph.outputs]
    for position, (alone, together) in enumerate(zip(traced, executable.run(arrays), strict=True)):
        if not same_bits(alone, together):
            where = f"output {position}: each kernel is right by itself, run together they are not: the memory plan is to blame"
            return WrongKernel(0, "main", where, float("inf"), 0.0, float("nan"), float("nan"))
    return None


def _value(node: Node, values: dict[Node, Array]) -> Array:
    if node in values:
        return values[node]
    if isinstance(node.op, Const):
        return node.op.value
    if isinstance(node.op, Reshape):
        return _value(node.inputs[0], values).reshape(node.type.shape)
    # What has no elements is never computed.
    return np.zeros(node.type.shape, node.type.dtype)


def _judge(number: int, step: Any, target: Any, operands: Sequence[Array], result: Array) -> WrongKernel | None:
    from paring.backends.build import kernel_name
    from paring.ir import show
    from paring.passes.rewriter import describe

    inputs = tuple(Node(Input(f"x{i}", n.type.dtype, n.type.shape)) for i, n in enumerate(step.node.inputs))
    alone = Graph(inputs, (step.node.with_inputs(inputs),))
    (expected,) = interpret(alone, operands)
    _, (bound,) = magnitude_bound(alone, operands)
    apart = ulps_apart(expected, result, bound)
    worst = np.unravel_index(int(np.argmax(apart)), apart.shape)
    limit = kernel_limit(step.node)
    if apart[worst] <= limit:
        return None
    values = (float(apart[worst]), limit, expected[worst].item(), result[worst].item())
    return WrongKernel(number, kernel_name(step, target), describe(step.node), *values, text=show(alone))
