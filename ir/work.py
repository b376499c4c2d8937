"""On what a program computes: its multiply-adds on 8-bit integers, and the weights that are such integers."""

from __future__ import annotations

from collections.abc import Iterator

from paring.ir.graph import Graph, Node
from paring.ir.ops.core import Const, Region
from paring.ir.ops.winograd import POSITIONS, TAPS, WinogradConv2d
from paring.ir.types import BYTES, DTYPES

FLOAT_BYTES = DTYPES["float32"].bits // 8


def products(node: Node) -> Iterator[tuple[Node, int, dict[Node, Node]]]:
    """What multiplies and adds in a node, with how often; for a region also what its body's inputs stand for."""
    outside = dict(zip(node.op.body.inputs, node.inputs, strict=True)) if isinstance(node.op, Region) else {}
    for member in node.op.body.nodes() if isinstance(node.op, Region) else (node,):
        macs = member.macs
        if macs:
            yield member, macs, outside


def integer_macs(node: Node) -> int:
    """Multiply-adds of 8-bit integers in a node; those of a region are its body's."""
    return sum(macs for product, macs, _ in products(node) if product.inputs[0].type.dtype in BYTES)


def saved_bytes(graph: Graph) -> int:
    """How many bytes less the weights of its products of bytes take than they would in float32, each counted once, as packed."""
    saved: dict[str, int] = {}
    for node in graph.nodes():
        for product, _, outside in products(node):
            weight = outside.get(product.inputs[1], product.inputs[1])
            if not isinstance(weight.op, Const) or product.inputs[0].type.dtype not in BYTES:
                continue
            tiles = isinstance(product.op, WinogradConv2d)
            plain = weight.type.size * TAPS**2 // POSITIONS if tiles else weight.type.size
            saved[weight.op.digest] = plain * FLOAT_BYTES - weight.type.bytes
    return sum(saved.values())


def integers_line(share: float, saved: int) -> str:
    """A line for people about 8 bits: their share of multiply-adds, and bytes saved; empty where they have no share."""
    size = f"{abs(saved) / 2**10:.1f} KiB" if abs(saved) < 2**20 else f"{abs(saved) / 2**20:.1f} MiB"
    how = "smaller" if saved >= 0 else "larger"
    return f"{share:.1%} of multiply-adds on 8 bits, weights {size} {how} than in float32" if share else ""
