"""Nodes and graphs: an immutable data-flow graph, shared by identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paring.ir.errors import IRTypeError
from paring.ir.types import TensorType

if TYPE_CHECKING:
    from paring.ir.op import Op


@dataclass(frozen=True)
class Loc:
    """Where a node comes from: the path of the torch module and the user's source line."""

    module: str = ""
    source: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.module, self.source and f"({self.source})") if part)


class Node:
    """One value: `op` applied to `inputs`. Building it infers its type, so an ill-typed node cannot exist.

    Equality is identity. Raises IRTypeError when the op refuses the types of its inputs.
    """

    __slots__ = ("inputs", "loc", "op", "type")

    op: Op
    inputs: tuple[Node, ...]
    type: TensorType
    loc: Loc | None

    def __init__(self, op: Op, inputs: Iterable[Node] = (), loc: Loc | None = None) -> None:
        self.op = op
        self.inputs = tuple(inputs)
        self.loc = loc
        types = [node.type for node in self.inputs]
        try:
            op.check_attributes()
            op.check_arity(len(types))
            self.type = op.infer(*types)
        except IRTypeError as error:
            shown = ", ".join(map(str, types))
            where = f"{op.name}({shown})" + (f" from {loc}" if loc else "")
            raise IRTypeError(f"{op.name}: {error.what}", where=where, why=error.why, hint=error.hint) from None

    def with_inputs(self, inputs: Iterable[Node]) -> Node:
        """The same operator on other operands; itself where they are its own."""
        inputs = tuple(inputs)
        return self if inputs == self.inputs else Node(self.op, inputs, self.loc)

    @property
    def macs(self) -> int:
        """Multiply-adds, of constant operands too."""
        return self.op.macs(self.type, *(operand.type for operand in self.inputs))

    def __repr__(self) -> str:
        return f"<{self.op.name} {self.type}>"


@dataclass(frozen=True, eq=False)
class Graph:
    """A function from `inputs` (nodes of op Input, in call order, used or not) to `outputs` (repetitions allowed)."""

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]

    def nodes(self) -> list[Node]:
        """All nodes in topological order, inputs of the graph first; deterministic, without recursion."""
        return topological(self.outputs, first=self.inputs)

    def users(self) -> dict[Node, list[Node]]:
        """For each node the nodes that read it, once per operand; outputs of the graph do not count."""
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes()}
        for node in list(users):
            for operand in node.inputs:
                users[operand].append(node)
        return users

    def use_counts(self) -> Counter[Node]:
        """How often each node is read, as an operand or as an output."""
        counts: Counter[Node] = Counter(self.outputs)
        for node in self.nodes():
            counts.update(node.inputs)
        return counts

    def __len__(self) -> int:
        return len(self.nodes())


def topological(roots: Sequence[Node], first: Sequence[Node] = ()) -> list[Node]:
    """Operands before users, starting with `first`; iterative, because models are thousands of nodes deep."""
    order: list[Node] = []
    done: set[Node] = set()
    for root in (*first, *roots):
        stack: list[tuple[Node, Iterator[Node]]] = []
        if root not in done:
            done.add(root)
            stack.append((root, iter(root.inputs)))
        while stack:
            node, operands = stack[-1]
            for operand in operands:
                if operand not in done:
                    done.add(operand)
                    stack.append((operand, iter(operand.inputs)))
                    break
            else:
                stack.pop()
                order.append(node)
    return order


def rebuild(graph: Graph, visit: Callable[[Node, tuple[Node, ...]], Node]) -> Graph:
    """A new graph: `visit(node, new_inputs)` is called in topological order; unchanged nodes keep their identity."""
    new: dict[Node, Node] = {}
    for node in graph.nodes():
        new[node] = visit(node, tuple(new[operand] for operand in node.inputs))
    return Graph(tuple(new[node] for node in graph.inputs), tuple(new[node] for node in graph.outputs))


def substitute(graph: Graph, replacements: Mapping[Node, Node]) -> Graph:
    """The graph with nodes replaced; replacements may read old nodes, which are taken as they are."""

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node in replacements:
            return replacements[node]
        return node.with_inputs(inputs)

    return rebuild(graph, visit)
