"""What passes may know of the machine that a network is made for: a few figures, and measured or modelled times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from paring.ir.graph import Graph, Node
from paring.ir.ops import attention, conv, linear
from paring.ir.ops.core import Const
from paring.passes.util import module_of

PRODUCTS = (conv.Conv2d, conv.ConvTranspose2d, linear.Linear, linear.Matmul, attention.ScaledDotProductAttention)


@dataclass(frozen=True)
class Machine:
    """`block`: channels that a kernel computes at once, so that time grows in such steps. `flops`: float32 operations a second,
    and `bandwidth`: bytes a second, both of the whole machine and nominal: only their ratio counts where times are compared.
    """

    block: int = 8
    flops: float = 100e9
    bandwidth: float = 20e9


SOME_MACHINE = Machine()
"""Where nobody says what a network is made for."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a network, and of its layers by the path of their module. `measured`, or else modelled."""

    seconds: float
    layers: Mapping[str, float] = field(default_factory=dict)
    measured: bool = True


Time = Callable[[Graph], Timing]


def modelled(graph: Graph, machine: Machine) -> Timing:
    """Each product at the machine's peak or as fast as its bytes move, whichever is slower; the rest as fast as bytes move.

    Channels count in whole blocks: a layer of 9 channels takes as long as one of 16.
    """
    total, layers = 0.0, dict[str, float]()
    for node in graph.nodes():
        if isinstance(node.op, Const) or not node.inputs:
            continue
        moved = node.type.bytes + sum(operand.type.bytes for operand in node.inputs)
        # Elementwise work is fused with the product before it: it is what products wait for that counts.
        seconds = moved / machine.bandwidth if isinstance(node.op, PRODUCTS) else 0.0
        seconds = max(seconds, 2 * padded_macs(node, machine.block) / machine.flops)
        total += seconds
        if seconds and module_of(node):
            layers[module_of(node)] = layers.get(module_of(node), 0.0) + seconds
    return Timing(total, layers, measured=False)


def padded_macs(node: Node, block: int) -> float:
    """Multiply-adds with the channels of the result, and those read, rounded up to whole blocks."""
    if not isinstance(node.op, conv.Conv2d | linear.Linear):
        return node.macs
    outputs, inputs = node.inputs[1].type.shape[:2]
    grouped = isinstance(node.op, conv.Conv2d) and node.op.groups > 1
    share = staircase(outputs, block) / outputs * (1.0 if grouped else staircase(inputs, block) / max(inputs, 1))
    return node.macs * share


def staircase(channels: int, block: int) -> int:
    """Channels rounded up to whole blocks."""
    return -(-channels // max(block, 1)) * max(block, 1)
