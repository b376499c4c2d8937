"""sparsify: layers whose constant weights are mostly zeros store and multiply only what is not zero, where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from paring.ir import layout as lay
from paring.ir.errors import ArgumentError
from paring.ir.graph import Graph, Node
from paring.ir.op import Array, Op
from paring.ir.ops import conv, linear, sparse
from paring.ir.ops.sparse import Lists
from paring.passes.base import Pass
from paring.passes.contract import Exact
from paring.passes.pattern import Match, Rule, op
from paring.passes.rewriter import Context
from paring.passes.util import const_value, constant, is_const, layer_name
from paring.passes.winograd import Winograd

FORMATS = ("auto", "vectors", "rows", "none")
# A sparse layer has to be faster than the dense one by this factor, which is about what the model errs by.
MARGIN = 1.12
# Weights of which more are not zero cannot be: they are not looked at more closely.
MOST_STORED = 1 / MARGIN
# Of a register tile of the kernels: columns that share a stored vector.
COLUMNS = 14
# Measured on Zen 4: loads beside those of the pixels, and what lists of a few dozen entries cost in branches.
ENTRY = 1.15


@dataclass(frozen=True)
class _Layer:
    """A dense layer as the model of costs sees it: `pixels` of each image, and its weight (O, I, ...) without padding.

    `group`: input channels that one instruction multiplies, 1 for floats. `single`: whether single weights have kernels, which is
    so for floats where x is read in blocks of channels as wide as those of the result. `gain`: how many times as fast the dense
    layer will be by the passes behind this one.
    """

    images: int
    pixels: int
    weight: Array
    group: int
    single: bool
    gain: float = 1.0

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.weight.shape[0], self.weight.shape[1], prod(self.weight.shape[2:])


@dataclass(frozen=True)
class _Choice:
    """A way to store a layer's weight, and what the layer takes then, in multiply-adds of whole vectors."""

    name: str
    cut: Lists
    cost: float


@dataclass(frozen=True)
class Sparsify(Pass):
    """Convolutions and linear layers with zeros in their constant weights become sparse ones, where these are faster.

    `block` is the width of a stored vector, of 8-bit integers by `group` input channels (1: they stay dense); `span` the number
    of input channels in a list of single weights (what stays in the first cache), `pixels` the tile of those that share a stored
    weight. `start` and `gather` are costs of the target, in multiply-adds of a vector: to start a list, and to gather a vector of
    pixels; `entry` that of an entry of 8-bit integers, in steps of the dense layer. `ratio` and `far` are those of `winograd`,
    which makes layers that stay dense faster (0: it does not run). `format`: the fastest by these (auto), or
    vectors or rows wherever there are zeros, or none.
    """

    name = "sparsify"
    contract = Exact(finite=True)
    block: int = 16
    span: int = 128
    group: int = 1
    pixels: int = 64
    start: float = 14.0
    gather: float = 10.0
    entry: float = 1.0
    ratio: float = 0.0
    far: float = 0.0
    format: str = "auto"

    def check(self) -> None:
        super().check()
        if self.format not in FORMATS:
            raise ArgumentError(f"pass sparsify: format {self.format!r}", hint=f"one of {', '.join(FORMATS)}")
        costs = {name: getattr(self, name) for name in ("start", "gather", "entry", "ratio", "far")}
        if least := next((name for name, cost in costs.items() if cost < 0), ""):
            raise ArgumentError(f"pass sparsify: {least} {costs[least]} is negative", hint="costs are at least 0")
        if self.span % self.block:
            what = f"pass sparsify: spans of {self.span} channels are no whole blocks of {self.block}"
            raise ArgumentError(what, hint="like sparsify{block=16, span=128}")

    def rules(self) -> Sequence[Rule]:
        def sparsify_conv2d(m: Match) -> Node | None:
            """conv2d(x, constant w, b) -> sparse_conv2d(x, values, places, starts, b)"""
            return self._conv2d(m)

        def sparsify_linear(m: Match) -> Node | None:
            """linear(x, constant w, b) -> sparse_linear(x, values, places, starts, b)"""
            return self._linear(m)

        def constant_weight(node: Node) -> bool:
            return is_const(node.inputs[1])

        if self.format == "none":
            return ()
        return (
            Rule(op(conv.Conv2d, where=constant_weight), sparsify_conv2d, self.contract),
            Rule(op(linear.Linear, where=constant_weight), sparsify_linear, self.contract),
        )

    def run(self, graph: Graph, context: Context) -> Graph:
        after = super().run(graph, context)
        kept = set(graph.nodes())
        context.notes.extend(_note(node) for node in after.nodes() if isinstance(node.op, SPARSE) and node not in kept)
        return after

    def _conv2d(self, m: Match) -> Node | None:
        layer, packed = m.root.op, m.root.inputs[1]
        assert isinstance(layer, conv.Conv2d)
        group = self._group(m)
        if group is None:
            return None
        blocks, b = lay.weight_blocks(layer.weight_layout), lay.channel_block(layer.out_layout)
        if blocks is None or b != self.block or blocks != (lay.channel_block(layer.layout) or 1, b) or blocks[0] % group:
            return m.decline(f"it does not run in blocks of {self.block} channels")
        if layer.groups > 1:
            return m.decline("its channels are in groups")
        o, i = layer.out_channels or packed.type.shape[0] * b, layer.in_channels or packed.type.shape[1] * blocks[0]
        if (reason := self._too_dense(packed, o * i * prod(packed.type.shape[2:4]))) is not None:
            return m.decline(reason)
        weight = lay.unblock_conv_weight(const_value(packed))[:o, :i]
        n, _, h, w, _ = m.root.type.shape
        gain = Winograd(self.block, self.group, self.ratio, self.far).gain(m.root)
        choice = self._choose(m, _Layer(n, h * w, weight, group, group == 1 and blocks[0] == b, gain))
        if choice is None:
            return None
        kernel, cut = (weight.shape[2], weight.shape[3]), choice.cut
        window = (layer.stride, layer.padding, layer.dilation, layer.layout, layer.out_layout)
        thinned = sparse.SparseConv2d(o, i, kernel, cut.block, cut.span, *window, cut.group, layer.pad_value)
        return self._sparse(m, thinned, cut, weight)

    def _linear(self, m: Match) -> Node | None:
        layer, (x, packed, *_) = m.root.op, m.root.inputs
        assert isinstance(layer, linear.Linear)
        group = self._group(m)
        if group is None:
            return None
        if lay.linear_block(layer.weight_layout) != self.block:
            return m.decline(f"its weight is not packed in blocks of {self.block} outputs")
        o, i = m.root.type.shape[-1], x.type.shape[-1]
        if i % group:
            return m.decline(f"its {i} inputs are no whole groups of {group}")
        if (reason := self._too_dense(packed, o * i)) is not None:
            return m.decline(reason)
        weight = lay.unblock_linear_weight(const_value(packed))[:o, :i]
        choice = self._choose(m, _Layer(1, prod(x.type.shape[:-1]), weight, group, group == 1 and i >= self.block))
        if choice is None:
            return None
        cut = choice.cut
        return self._sparse(m, sparse.SparseLinear(o, cut.block, cut.span, cut.group), cut, weight)

    def _group(self, m: Match) -> int | None:
        """How many input channels one instruction multiplies; where the layer has no sparse kernels, the match knows why."""
        dtype = m.root.inputs[1].type.dtype
        if dtype == "int8" and self.group > 1:
            return self.group
        if dtype != "float32":
            bytes_ = dtype == "int8"
            m.decline("the target has no products of bytes" if bytes_ else f"{dtype} has no sparse kernels")
            return None
        return 1

    def _sparse(self, m: Match, layer: Op, cut: Lists, weight: Array) -> Node:
        loc = m.root.inputs[1].loc
        lists = [constant(np.ascontiguousarray(array), loc) for array in cut.pack(weight)]
        return m.make(layer, m.root.inputs[0], *lists, *m.root.inputs[2:])

    def _too_dense(self, packed: Node, size: int) -> str | None:
        """Why a weight needs no closer look; it is counted as it is packed, which is quick."""
        share = np.count_nonzero(const_value(packed)) / size if size else 1.0
        if size == 0 or share == 1 or (self.format == "auto" and share > MOST_STORED):
            return f"{share:.0%} of its weights are not zero"
        return None

    def _choose(self, m: Match, layer: _Layer) -> _Choice | None:
        """The format for a layer; where there is none, the match knows why."""
        o, i, taps = layer.shape
        # A dense layer loads a vector of weights beside the multiply-adds of a tile of columns, as one with stored vectors does.
        columns = max(1, min(COLUMNS, layer.pixels))
        steps = ceil(o / self.block) * ceil(i / layer.group) * taps
        dense = layer.images * layer.pixels * steps * (1 + 1 / columns) / layer.gain
        found = [self._vectors(layer)] + ([self._rows(layer)] if layer.single else [])
        if self.format != "auto":
            forced = [choice for choice in found if choice.name == self.format]
            if not forced:
                m.decline("single weights are for floats that are read in whole blocks of channels")
            return forced[0] if forced else None
        best = min(found, key=lambda choice: choice.cost)
        if best.cost * MARGIN <= dense:
            return best
        shown = " and ".join(f"{choice.cost / max(dense, 1):.2f} times in {choice.name}" for choice in found)
        bytes_ = f": 8-bit integers are stored in entries of {self.block}x{layer.group} weights" if layer.group > 1 else ""
        m.decline(f"it would take {shown} what it takes dense{bytes_}")
        return None

    def _vectors(self, layer: _Layer) -> _Choice:
        """Vectors of `block` output channels x a group: each entry is one load beside the multiply-adds of a tile of columns."""
        o, i, taps = layer.shape
        cut = Lists(o, i, taps, self.block, i, layer.group)
        entries = int(np.count_nonzero(cut.occupied(layer.weight)))
        pixels = layer.images * layer.pixels
        columns = max(1, min(COLUMNS, layer.pixels))
        own = entries * (1 + 1 / columns) * (self.entry if layer.group > 1 else 1)
        return _Choice("vectors", cut, pixels * (own + cut.count * self.start / columns))

    def _rows(self, layer: _Layer) -> _Choice:
        """Single weights: each entry is one load beside a few vectors of pixels, which are gathered first."""
        o, i, taps = layer.shape
        cut = Lists(o, i, taps, 1, self._balanced(i))
        entries = int(np.count_nonzero(layer.weight))
        vectors = ceil(layer.pixels / self.block)
        width = vectors / max(1, ceil(vectors * self.block / self.pixels))
        own = entries * (1 + 1 / max(width, 1)) * ENTRY + self.gather * (i * taps + o) + cut.count * self.start / max(width, 1)
        return _Choice("rows", cut, layer.images * vectors * own)

    def _balanced(self, inputs: int) -> int:
        """The span nearest to an even share of the input channels, in whole blocks, the last one no less than a block."""
        for spans in range(ceil(inputs / self.span), 1, -1):
            span = ceil(inputs / spans / self.block) * self.block
            rest = inputs - (spans - 1) * span
            if rest >= self.block or (rest > 0 and inputs % self.block == 0):
                return span
        return inputs


SPARSE = (sparse.SparseConv2d, sparse.SparseLinear)


def _note(node: Node) -> str:
    """A line for the ledger: which layer is stored how."""
    assert isinstance(node.op, SPARSE)
    cut = node.op.lists_of(node.inputs[0].type)
    stored = node.inputs[1].type.shape[0] / cut.most
    vectors = f"vectors of {cut.block}" if cut.group == 1 else f"8-bit blocks of {cut.block}x{cut.group}"
    how = "single weights" if cut.block == 1 else vectors
    return f"{layer_name(node)}: {how}, {stored:.1%} of them stored"
