"""A graph as a torch.nn.Module that can be trained, and what was learned back as a graph."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from paring.frontends.torch_ops import TORCH, compute, is_plain
from paring.ir.errors import ArgumentError, InputError, UnsupportedOpsError, a_kind
from paring.ir.graph import Graph, Node, rebuild
from paring.ir.op import Array, Op
from paring.ir.ops import binary, conv, index, linear, norm, pack, pool, shape, sparse, winograd
from paring.ir.ops.core import Const, Input, Region

# By operator class which operands are learned, by their position, and what they are called.
_WEIGHT_AND_BIAS = {1: "weight", 2: "bias"}
LEARNED: dict[type[Op], dict[int, str]] = {
    conv.Conv2d: _WEIGHT_AND_BIAS,
    conv.ConvTranspose2d: _WEIGHT_AND_BIAS,
    linear.Linear: _WEIGHT_AND_BIAS,
    linear.Matmul: {0: "weight", 1: "weight"},
    norm.BatchNorm: _WEIGHT_AND_BIAS,
    norm.LayerNorm: _WEIGHT_AND_BIAS,
    norm.RmsNorm: {1: "weight"},
    norm.GroupNorm: _WEIGHT_AND_BIAS,
    index.Gather: {0: "weight"},
    binary.Add: {0: "shift", 1: "shift"},
    binary.Sub: {0: "shift", 1: "shift"},
    binary.Mul: {0: "scale", 1: "scale"},
    binary.Div: {0: "scale", 1: "scale"},
}
# Of these a matrix may be masked, or tied on purpose; vectors and norms are not.
MATRICES = (conv.Conv2d, conv.ConvTranspose2d, linear.Linear, linear.Matmul, index.Gather)
ARITHMETIC = (binary.Add, binary.Sub, binary.Mul, binary.Div)
LOWERED = (
    *(Region, shape.LayoutTransform, pack.PackConvWeight, pack.PackLinearWeight),
    *(sparse.SparseConv2d, sparse.SparseLinear, winograd.WinogradConv2d),
)
# A constant beyond this that is added is a mask: minus infinity written as a number.
MOST_SHIFT = 1000.0


@dataclass(frozen=True, eq=False)
class Slot:
    """An operand that is learned: the parameter's name, the constant it starts from, what moves it to where it is read, and
    whether it is the weight matrix there, of a single row too."""

    name: str
    source: Node
    moves: tuple[Node, ...]
    is_matrix: bool


class Program:
    """A graph, and which operands of its nodes are parameters. Never changed, so that copies of a module share it."""

    def __init__(self, graph: Graph) -> None:
        check_trainable(graph)
        self.graph = graph
        self.slots = _slots(graph)
        needed = self._needed()
        self.nodes = [node for node in graph.nodes() if node in needed and node.inputs]
        constants = [node for node in graph.nodes() if node in needed and isinstance(node.op, Const)]
        self.constants = {node: f"constant{number}" for number, node in enumerate(constants)}

    def _needed(self) -> set[Node]:
        """What is computed or read, but for what leads from a constant to an operand that is learned."""
        found: set[Node] = set()
        stack = list(self.graph.outputs)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack.extend(i for position, i in enumerate(node.inputs) if (node, position) not in self.slots)
        return found

    def __deepcopy__(self, memo: object) -> Program:
        return self

    def parameters(self) -> dict[str, Node]:
        """The constant that each parameter starts from."""
        return {slot.name: slot.source for slot in self.slots.values()}

    def matrices(self) -> set[str]:
        """The parameters that are weight matrices, which a mask may have set to zero."""
        return {slot.name for slot in self.slots.values() if slot.is_matrix}

    def with_values(self, values: Mapping[str, Array]) -> Graph:
        """The graph with parameters replaced; nodes none of whose parameters changed stay themselves."""
        old = self.parameters()
        new = {name: _constant(source, values[name]) for name, source in old.items()}
        if new == old:
            return self.graph

        def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
            operands = list(inputs)
            for position in range(len(inputs)):
                slot = self.slots.get((node, position))
                if slot is not None and new[slot.name] is not slot.source:
                    operands[position] = _moved(new[slot.name], slot.moves)
            return node.with_inputs(operands)

        return rebuild(self.graph, visit)


class TrainableGraph(nn.Module):
    """A graph as a module. Call it with a tensor for each input of the graph, in order or by its label.

    Weights and biases of layers, gains and shifts of norms, tables of embeddings, and what is added or multiplied channel by
    channel are parameters, named by where they come from (`layer1.0.conv1.weight`); all else is constant. Inputs may have
    more or fewer rows along dimension 0 than the graph's: they are computed as so many calls of the graph, the last one filled
    up with zeros, and the results joined along dimension 0. Gives a tensor, or a tuple of several.

    With `keep_zeros` each weight matrix has a mask, by the parameter's name in `masks`: what is zero now stays zero, in the
    forward pass too, in a matrix of zeros only as well. `del module.masks[name]` frees the zeros of one.
    """

    def __init__(self, graph: Graph, keep_zeros: bool = False) -> None:
        super().__init__()
        self.program = Program(graph)
        self.labels = tuple(node.op.label for node in graph.inputs if isinstance(node.op, Input))
        for node, name in self.program.constants.items():
            self.register_buffer(name, _tensor(node), persistent=False)
        self.masks: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        masked = self.program.matrices() if keep_zeros else set()
        for name, source in self.program.parameters().items():
            value = _tensor(source)
            self.paths[name] = _put(self, name, nn.Parameter(value))
            kept = value != 0
            if name in masked and not kept.all():
                self.masks[name] = f"mask{len(self.masks)}"
                self.register_buffer(self.masks[name], kept, persistent=False)

    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Raises InputError where tensors are too many, too few, or of other shapes."""
        given = self._in_order(tensors, named)
        calls = self._calls(given)
        results = self._run(*given) if calls is None else self._in_parts(given, calls)
        return results[0] if len(results) == 1 else results

    def _in_parts(self, given: Sequence[Tensor], calls: Fraction) -> tuple[Tensor, ...]:
        """Several calls side by side; the last one is filled up with zeros, and its results are cut."""
        parts, dims = [], []
        for node, x in zip(self.program.graph.inputs, given, strict=True):
            own = node.type.shape
            split = x.shape != own
            if split:
                lacking = math.ceil(calls) * own[0] - x.shape[0]
                x = torch.cat([x, x.new_zeros(lacking, *own[1:])]) if lacking else x
                x = x.reshape(math.ceil(calls), *own)
            parts.append(x)
            dims.append(0 if split else None)
        found = []
        for node, y in zip(self.program.graph.outputs, torch.vmap(self._run, tuple(dims))(*parts), strict=True):
            rows = calls * node.type.shape[0] if node.type.rank else calls
            y = y.flatten(0, 1) if node.type.rank else y
            found.append(y[: int(rows)] if rows.denominator == 1 else y)
        return tuple(found)

    def values(self) -> dict[str, Tensor]:
        """Each parameter by its name in the graph, zeros that are kept being zero. Raises ArgumentError for one that is gone."""
        found = dict(self.named_parameters(remove_duplicate=False))
        missing = [path for path in self.paths.values() if path not in found]
        added = sorted(found.keys() - set(self.paths.values()))
        if missing or added:
            what = f"has lost its parameter {missing[0]!r}" if missing else f"has a new parameter {added[0]!r}"
            hint = "train the parameters that are there; what wraps them (parametrizations, pruning of torch) belongs off again"
            raise ArgumentError(f"the module {what}: another architecture", hint=hint)
        return {name: self._masked(name, found[path]) for name, path in self.paths.items()}

    def _masked(self, name: str, value: Tensor) -> Tensor:
        if name not in self.masks:
            return value
        mask = self.get_buffer(self.masks[name])
        if mask.shape != value.shape:
            hint = "train the values of parameters; their number and shapes are those of the graph"
            why = f"it is {tuple(value.shape)}, was {tuple(mask.shape)}"
            raise ArgumentError(f"the parameter {self.paths[name]!r} is of another shape", why=why, hint=hint)
        return torch.where(mask, value, 0.0)

    def _run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        parameters, slots = self.values(), self.program.slots
        known = dict(zip(self.program.graph.inputs, tensors, strict=True))
        known.update((node, self.get_buffer(name)) for node, name in self.program.constants.items())
        for node in self.program.nodes:
            operands = [
                _at(slots[node, position], parameters) if (node, position) in slots else known[operand]
                for position, operand in enumerate(node.inputs)
            ]
            known[node] = compute(node.op, operands, node.type.dtype)
        return tuple(known[node] for node in self.program.graph.outputs)

    def _in_order(self, tensors: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
        """One tensor for each input of the graph."""
        rest = self.labels[len(tensors) :]
        if len(tensors) > len(self.labels) or set(rest) != set(named):
            given = [*map(str, range(len(tensors))), *named]
            raise InputError(f"the module takes {len(self.labels)} tensors, got {', '.join(given) or 'none'}", hint=self._hint())
        return [*tensors, *(named[label] for label in rest)]

    def _calls(self, given: Sequence[Tensor]) -> Fraction | None:
        """How many calls the tensors hold along dimension 0, perhaps not a whole number; None where they make one call."""
        found: set[Fraction] = set()
        for node, label, tensor in zip(self.program.graph.inputs, self.labels, given, strict=True):
            own, shape = node.type.shape, tuple(tensor.shape)
            if shape == own:
                continue
            if len(shape) != len(own) or shape[1:] != own[1:] or not own[0] or not shape[0]:
                raise InputError(f"input {label!r} has the shape {list(shape)}, expected {node.type}", hint=self._hint())
            found.add(Fraction(shape[0], own[0]))
        if len(found) > 1:
            raise InputError("inputs have rows for different numbers of calls", hint=self._hint())
        return found.pop() if found else None

    def _hint(self) -> str:
        pairs = zip(self.labels, self.program.graph.inputs, strict=True)
        return f"({', '.join(f'{label}: {node.type}' for label, node in pairs)}), or other numbers of rows"


def to_torch(graph: Graph, *, keep_zeros: bool = False) -> TrainableGraph:
    """The module that computes what a graph does, and can be trained.

    The graph is one that lossy passes see: simplified, in plain layouts, of floats. `keep_zeros`: weights of layers that are
    zero stay zero, whatever is learned, those of a matrix of zeros only as well; without it they learn.

    Raises ArgumentError for a graph that is lowered to a target, UnsupportedOpsError for operators that have no gradients.
    """
    return TrainableGraph(graph, keep_zeros)


def from_torch(module: object) -> Graph:
    """The graph of a module that `to_torch` made, with the values that its parameters have now.

    Raises ArgumentError for any other module, for parameters that are gone or of another type, and for values that are NaN or
    infinite.
    """
    if not isinstance(module, TrainableGraph):
        hint = "give the module that paring.to_torch made, trained in place"
        raise ArgumentError(f"{a_kind(module)} is no module made from a graph", hint=hint)
    found: dict[str, Array] = {}
    for name, tensor in module.values().items():
        source = module.program.parameters()[name]
        value = tensor.detach().cpu().numpy()
        if value.shape != source.type.shape or value.dtype.name != source.type.dtype:
            why = f"it is {value.dtype.name}{list(value.shape)}, was {source.type}"
            hint = "train the values of parameters; their number and shapes are those of the graph"
            raise ArgumentError(f"the parameter {name!r} is of another type", why=why, hint=hint)
        if not np.isfinite(value).all():
            hint = "a lower learning rate, or clipped gradients"
            raise ArgumentError(f"the parameter {name!r} is NaN or infinite", hint=hint)
        found[name] = value.copy()
    return module.program.with_values(found)


def gradients(module: TrainableGraph, loss: Tensor) -> dict[tuple[Node, int], Array]:
    """The gradient of a loss, float64, by each operand that is learned: its reader and its position there.

    Zero where the loss does not hang on it; where several layers read one matrix each has the gradient of all.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = list(module.paths)
    found = torch.autograd.grad(loss, [parameters[module.paths[name]] for name in names], allow_unused=True)
    arrays = {name: g.cpu().numpy().astype(np.float64) for name, g in zip(names, found, strict=True) if g is not None}
    slots = module.program.slots.items()
    return {place: arrays.get(slot.name, np.zeros(slot.source.type.shape)) for place, slot in slots}


def check_trainable(graph: Graph) -> None:
    """Raise ArgumentError for a graph in the layouts of a target, UnsupportedOpsError naming every operator without a row."""
    nodes = graph.nodes()
    lowered = [node for node in nodes if isinstance(node.op, LOWERED) or not is_plain(node.op)]
    if lowered:
        hint = 'the stage before the pass layout, as lossy passes see it: paring.to_torch(net), or pipeline="prepare"'
        raise ArgumentError("the graph is lowered to a target", why=f"it has {lowered[0].op.name} {lowered[0].type}", hint=hint)
    known = (*TORCH, Input, Const)
    lacking = Counter(node.op.name for node in nodes if type(node.op) not in known or _on_integers(node))
    if lacking:
        listed = ", ".join(f"{name} ({count})" for name, count in lacking.items())
        hint = "what computes on 8-bit integers has no gradients: train before quantize"
        raise UnsupportedOpsError(f"no torch operator for {listed}", hint=hint)


def _on_integers(node: Node) -> bool:
    """Products and pools of 8 bits."""
    return isinstance(node.op, conv.Conv2d | linear.Linear | linear.Matmul | pool.Pool2d) and not node.inputs[0].type.is_float


def _slots(graph: Graph) -> dict[tuple[Node, int], Slot]:
    """The operands that are learned, with names of which each stands for one parameter."""
    slots: dict[tuple[Node, int], Slot] = {}
    names: set[str] = set()
    shared: dict[Node, str] = {}
    for node in graph.nodes():
        for position, role in LEARNED.get(type(node.op), {}).items():
            if position >= len(node.inputs) or not _is_learned(node, position):
                continue
            source, moves = _origin(node.inputs[position])
            # Equal vectors of several layers are one constant; a matrix that several read is tied on purpose.
            is_matrix = isinstance(node.op, MATRICES) and node.inputs[position].type.rank >= 2
            name = (shared.get(source) if is_matrix else None) or _unused(_name(node, source, role), names)
            if is_matrix:
                shared[source] = name
            slots[node, position] = Slot(name, source, moves, is_matrix)
    return slots


def _is_learned(node: Node, position: int) -> bool:
    source, _ = _origin(node.inputs[position])
    if not isinstance(source.op, Const) or not source.type.is_float:
        return False
    if isinstance(node.op, index.Gather):
        return node.op.axis == 0 and source.type.rank == 2
    if isinstance(node.op, linear.Matmul):
        return not isinstance(_origin(node.inputs[1 - position])[0].op, Const)
    if isinstance(node.op, ARITHMETIC):
        by_channel = 1 < source.type.size == max(source.type.shape)
        return by_channel and bool((np.abs(source.op.value) < MOST_SHIFT).all())
    return True


def _origin(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """What a node is broadcast and reshaped from, and the nodes that do so, the first one first."""
    moves: list[Node] = []
    while isinstance(node.op, shape.Broadcast | shape.Reshape):
        moves.append(node)
        (node,) = node.inputs
    return node, tuple(reversed(moves))


def _name(node: Node, source: Node, role: str) -> str:
    """The torch parameter's own, or its layer's with what it does there."""
    if source.loc and source.loc.module and not source.loc.source:
        return source.loc.module
    return f"{(node.loc.module if node.loc else '') or node.op.name}.{role}"


def _unused(name: str, names: set[str]) -> str:
    numbered = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
    found = next(each for each in numbered if each not in names)
    names.add(found)
    return found


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """Register a parameter under a dotted name, and say under which: attributes of modules are not hidden."""
    *parents, last = [part or "_" for part in name.split(".")]
    path = []
    for part in parents:
        while part not in module._modules and hasattr(module, part):
            part += "_"
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
        path.append(part)
    while hasattr(module, last):
        last += "_"
    module.register_parameter(last, parameter)
    return ".".join((*path, last))


def _tensor(node: Node) -> Tensor:
    assert isinstance(node.op, Const)
    return torch.from_numpy(node.op.value.copy())


def _at(slot: Slot, parameters: Mapping[str, Tensor]) -> Tensor:
    """A parameter as its reader sees it."""
    value = parameters[slot.name]
    for move in slot.moves:
        value = compute(move.op, [value], move.type.dtype)
    return value


def _constant(source: Node, value: Array) -> Node:
    """A constant in place of another; itself where no value changed: torch's own masks leave -0.0, ours 0.0."""
    assert isinstance(source.op, Const)
    return source if np.array_equal(source.op.value, value) else Node(Const(value), (), source.loc)


def _moved(node: Node, moves: Sequence[Node]) -> Node:
    for move in moves:
        node = move.with_inputs([node])
    return node
