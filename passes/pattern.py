"""Patterns over graphs, and rules made of a pattern and a rewrite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from paring.ir.errors import PassError
from paring.ir.graph import Loc, Node
from paring.ir.op import Op
from paring.passes.contract import Contract


@dataclass(frozen=True)
class Pattern:
    """Matches a node by op class, operands and a condition; `name` captures it, `once` wants a single use."""

    ops: tuple[type[Op], ...] = ()
    operands: tuple[Pattern, ...] | None = None
    name: str = ""
    where: Callable[[Node], bool] | None = None
    once: bool = False
    commutes: bool = False


def any_(name: str, where: Callable[[Node], bool] | None = None) -> Pattern:
    """Any node, captured as `name`."""
    return Pattern(name=name, where=where)


def op(
    ops: type[Op] | tuple[type[Op], ...],
    *operands: Pattern,
    name: str = "",
    where: Callable[[Node], bool] | None = None,
    once: bool = False,
    commutes: bool = False,
) -> Pattern:
    """A node of one of these classes; without operand patterns any operands do. `commutes` tries two operands both ways."""
    classes = ops if isinstance(ops, tuple) else (ops,)
    return Pattern(classes, operands or None, name, where, once, commutes)


Users = Mapping[Node, Sequence[Node]]


@dataclass
class Match:
    """A place where a pattern fits: its root and the captured nodes; how often nodes are read, and by which."""

    root: Node
    uses: Counter[Node]
    users: Users = field(default_factory=dict)
    captured: dict[str, Node] = field(default_factory=dict)
    reason: str = ""

    def __getitem__(self, name: str) -> Node:
        if name not in self.captured:
            captured = ", ".join(map(repr, self.captured)) or "nothing"
            raise PassError(f"the pattern captures no {name!r}", why=f"it captures {captured}", hint=f"any_({name!r})")
        return self.captured[name]

    def make(self, op: Op, *inputs: Node, loc: Loc | None = None) -> Node:
        """A node with the root's provenance, unless another is given."""
        return Node(op, inputs, loc or self.root.loc)

    def decline(self, reason: str) -> Node | None:
        """For `return m.decline(...)`: no rewrite here, and why (`paring why-not` asks)."""
        self.reason = reason
        return None


def match(pattern: Pattern, node: Node, uses: Counter[Node], users: Users | None = None) -> Match | None:
    """The match rooted at `node`, or None."""
    found = Match(node, uses, users or {})
    return found if _fits(pattern, node, found, root=True) else None


def _fits(pattern: Pattern, node: Node, found: Match, root: bool = False) -> bool:
    if pattern.ops and not isinstance(node.op, pattern.ops):
        return False
    if pattern.once and not root and found.uses[node] != 1:
        return False
    if pattern.where is not None and not pattern.where(node):
        return False
    if pattern.name and found.captured.setdefault(pattern.name, node) is not node:
        return False
    if pattern.operands is None:
        return True
    if len(pattern.operands) != len(node.inputs):
        return False
    orders = [node.inputs, node.inputs[::-1]] if pattern.commutes else [node.inputs]
    for operands in orders:
        saved = dict(found.captured)
        if all(_fits(p, operand, found) for p, operand in zip(pattern.operands, operands, strict=True)):
            return True
        found.captured = saved
    return False


@dataclass(frozen=True)
class Rule:
    """lhs -> rhs: where `pattern` fits, `rewrite` gives the node that takes the root's place, or None where it declines.

    The rewrite's docstring is the formula. A rule never changes the root's type.
    """

    pattern: Pattern
    rewrite: Callable[[Match], Node | None]
    contract: Contract

    @property
    def name(self) -> str:
        return self.rewrite.__name__.strip("_").replace("_", "-")

    @property
    def formula(self) -> str:
        return (self.rewrite.__doc__ or "").strip().splitlines()[0] if self.rewrite.__doc__ else ""
