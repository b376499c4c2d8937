"""Units: what runs on integers as one kernel, and the values between units, which 8 bits carry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Op
from paring.ir.ops import binary, conv, linear, norm, pool, quantized, reduce, shape, unary
from paring.ir.ops.attention import ScaledDotProductAttention
from paring.passes.compress.layers import Names
from paring.passes.compress.quantization.attention import fits, on_integers, quantize
from paring.passes.compress.quantization.observers import Affine
from paring.passes.util import const_value, is_const, is_plain, module_of

LAYERS: tuple[type[Op], ...] = (conv.Conv2d, linear.Linear)
PRODUCTS: tuple[type[Op], ...] = (*LAYERS, linear.Matmul)
ARITHMETIC: tuple[type[Op], ...] = (binary.Add, binary.Mul)
ENDS: tuple[type[Op], ...] = (unary.Relu, unary.Clamp)
# Functions whose values 8 bits can tell apart. Exponentials and logarithms spread over too many orders of magnitude.
CURVES: tuple[type[Op], ...] = (
    *(unary.Sigmoid, unary.HardSigmoid, unary.Tanh, unary.Silu, unary.HardSwish, unary.Gelu, unary.Erf),
    *(unary.LeakyRelu, unary.Elu, unary.Abs, unary.Neg),
)
NORMS: tuple[type[Op], ...] = (norm.Softmax, norm.LayerNorm, norm.RmsNorm, norm.GroupNorm)
MEANS: tuple[type[Op], ...] = (reduce.Mean, pool.AvgPool2d, pool.AdaptiveAvgPool2d)
ANCHORS = (*PRODUCTS, ScaledDotProductAttention, *ARITHMETIC, *ENDS, *CURVES, *NORMS, *MEANS)
MOVES: tuple[type[Op], ...] = (
    *(shape.Reshape, shape.Transpose, shape.Slice, shape.Concat, shape.Broadcast, shape.Flip, shape.Roll, shape.PixelShuffle),
    pool.MaxPool2d,
)
# A constant beyond this in a sum is a mask: it says which elements do not count, and would use up the whole range.
MASK = 1e3


@dataclass(frozen=True, eq=False)
class Unit:
    """An anchor and what follows it with no other reader; `name` is where it comes from in the model, and unique."""

    name: str
    nodes: tuple[Node, ...]

    @property
    def anchor(self) -> Node:
        return self.nodes[0]

    @property
    def end(self) -> Node:
        return self.nodes[-1]

    @property
    def macs(self) -> int:
        return self.anchor.macs

    def operands(self) -> list[Node]:
        """The activations it reads: not the constants of a layer."""
        inside = set(self.nodes)
        found = []
        for node in self.nodes:
            count = 1 if isinstance(node.op, (*LAYERS, *NORMS)) else 3
            read = node.inputs[:count]
            found += [i for i in read if i not in inside]
        return found


def moves(node: Node) -> bool:
    """Whether a node's elements are its operands' elements, or zeros."""
    if isinstance(node.op, shape.Pad):
        return node.op.mode != "constant" or node.op.value == 0
    return isinstance(node.op, MOVES)


def sources(graph: Graph) -> dict[Node, tuple[Node, ...]]:
    """For each node the nodes that its elements come from, past everything that only moves them."""
    found: dict[Node, tuple[Node, ...]] = {}
    for node in graph.nodes():
        if moves(node):
            found[node] = tuple(dict.fromkeys(s for i in node.inputs for s in found[i]))
        else:
            found[node] = (node,)
    return found


class Flow:
    """Where the values of a graph come from, past everything that only moves them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.origins = sources(graph)
        self.order = {node: number for number, node in enumerate(graph.nodes())}

    def operands(self, unit: Unit) -> list[Node]:
        """The activations that a unit reads as 8 bits. A constant that is added or multiplied stays as it is."""
        both = isinstance(unit.anchor.op, (linear.Matmul, ScaledDotProductAttention))
        return [i for i in unit.operands() if both or not _constant(i, self.origins)]

    def values_of(self, unit: Unit) -> list[Node]:
        """What 8 bits carry when this unit runs on integers: the values that its operands come from."""
        return [s for i in self.operands(unit) for s in self.origins[i] if s.type.dtype == "float32"]

    def _passed(self, operands: Iterable[Node]) -> list[Node]:
        """What lies between operands and the values that they come from, in order."""
        stack, found = [i for i in operands if moves(i)], set[Node]()
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(i for i in node.inputs if moves(i))
        return sorted(found, key=self.order.__getitem__)

    def groups(self, units: Iterable[Unit]) -> list[tuple[Node, ...]]:
        """All values that 8 bits carry, those of one concat together: they share parameters.

        What no unit reads stays float: a graph output, and what is computed for a layer that stays float.
        """
        chosen = list(units)
        groups = {value: [value] for unit in chosen for value in self.values_of(unit)}
        for node in self._passed(operand for unit in chosen for operand in self.operands(unit)):
            members = self.origins[node] if isinstance(node.op, shape.Concat) else ()
            joined = list(dict.fromkeys(n for m in members for n in groups.get(m, ())))
            groups.update((n, joined) for n in joined)
        distinct = {id(group): tuple(sorted(group, key=self.order.__getitem__)) for group in groups.values()}
        return sorted(distinct.values(), key=lambda group: self.order[group[0]])


def find_units(flow: Flow, skip: Names) -> list[Unit]:
    """All units, in topological order of their ends; no node is in two of them."""
    users, outputs, order, origins = flow.graph.users(), set(flow.graph.outputs), list(flow.order), flow.origins
    # Every node is asked, so that a name which means none of them is known.
    eligible = {n for n in order if not skip.has(n) and _eligible(n, origins)}
    chains: dict[Node, list[Node]] = {}
    taken: set[Node] = set()

    def follow(chain: list[Node], ops: tuple[type[Op], ...]) -> None:
        readers = users[chain[-1]]
        if len(readers) == 1 and chain[-1] not in outputs and isinstance(readers[0].op, ops):
            (reader,) = readers
            if reader in eligible and reader not in taken and not _adds_constant(reader, origins):
                chain.append(reader)
                taken.add(reader)

    # Of two products that one sum reads, the later one takes it: the other's value is there by then.
    products = [n for n in reversed(order) if isinstance(n.op, PRODUCTS) and n in eligible]
    for node in (*products, *order):
        if node not in eligible or node in taken:
            continue
        chain = chains[node] = [node]
        taken.add(node)
        if isinstance(node.op, PRODUCTS):
            follow(chain, (binary.Add,))
        if isinstance(node.op, (*PRODUCTS, *ARITHMETIC)):
            follow(chain, ENDS)
    return _named(sorted(chains.values(), key=lambda chain: flow.order[chain[-1]]))


def _named(chains: Sequence[Sequence[Node]]) -> list[Unit]:
    """Layers go by their module, all else by module and operator; what is still the same twice is numbered."""
    seen: Counter[str] = Counter()
    units = []
    for chain in chains:
        anchor = chain[0]
        module = module_of(anchor)
        name = module if module and isinstance(anchor.op, LAYERS) else f"{module} ({anchor.op.name})".strip()
        seen[name] += 1
        units.append(Unit(name if seen[name] == 1 else f"{name} #{seen[name]}", tuple(chain)))
    return units


def _eligible(node: Node, origins: Mapping[Node, tuple[Node, ...]]) -> bool:
    """Whether a node may be part of a unit at all."""
    if not isinstance(node.op, ANCHORS) or isinstance(node.op, norm.LogSoftmax):
        return False
    if node.type.dtype != "float32" or node.type.size == 0 or any(i.type.size == 0 for i in node.inputs):
        return False
    if isinstance(node.op, LAYERS):
        return is_plain(node) and all(map(is_const, node.inputs[1:]))
    if isinstance(node.op, ScaledDotProductAttention) and not fits(node):
        return False
    constants = [i for i in node.inputs if _constant(i, origins)]
    masked = any(_is_mask(i, origins) for s in (node, *(s for i in node.inputs for s in origins[i])) for i in s.inputs)
    return len(constants) < len(node.inputs) and not masked


def _constant(node: Node, origins: Mapping[Node, tuple[Node, ...]]) -> bool:
    return all(is_const(s) for s in origins[node])


def _is_mask(node: Node, origins: Mapping[Node, tuple[Node, ...]]) -> bool:
    if not _constant(node, origins) or not node.type.is_float:
        return False
    return any(bool((~(np.abs(const_value(s)) <= MASK)).any()) for s in origins[node])


def _adds_constant(node: Node, origins: Mapping[Node, tuple[Node, ...]]) -> bool:
    return isinstance(node.op, binary.Add) and any(_constant(i, origins) for i in node.inputs)


@dataclass(frozen=True)
class Inserted:
    """A graph with quantized values in it; `read[n]` is what the readers of the old node n read now."""

    graph: Graph
    read: dict[Node, Node]


def insert(
    graph: Graph, pairs: Mapping[Node, Affine], weights: Mapping[Node, Node], attentions: Mapping[Node, Sequence[Affine]]
) -> Inserted:
    """Quantize and dequantize after each value of `pairs`, and `weights[layer]` as the weight of each layer named.

    Each of `attentions` is computed on integers, those of its operands with the parameters given. Graph outputs stay as they
    are: they read the value before its pair.
    """
    new: dict[Node, Node] = {}
    read: dict[Node, Node] = {}
    for node in graph.nodes():
        inputs = tuple(read[i] for i in node.inputs)
        if node in weights:
            inputs = (inputs[0], weights[node], *inputs[2:])
        if node in attentions:
            new[node] = on_integers(node, inputs, attentions[node])
        else:
            new[node] = node.with_inputs(inputs)
        read[node] = _pair(new[node], pairs[node]) if node in pairs else new[node]
    return Inserted(Graph(tuple(new[n] for n in graph.inputs), tuple(new[n] for n in graph.outputs)), read)


def _pair(node: Node, params: Affine) -> Node:
    return Node(quantized.Dequantize(params.scale, params.zero_point), (quantize(node, params),), node.loc)


def is_pair(node: Node) -> bool:
    """Whether a node is dequantize(quantize(x))."""
    return isinstance(node.op, quantized.Dequantize) and isinstance(node.inputs[0].op, quantized.Quantize)
