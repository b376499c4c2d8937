"""Applies rules to a graph until none fires, with fuel: every rewrite costs one unit, so a wrong one can be bisected."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from traceback import extract_tb

from paring.ir.errors import InternalError, IRTypeError, ParingError, PassError, a_kind
from paring.ir.graph import Graph, Node, rebuild
from paring.ir.interpreter import interpret
from paring.ir.op import Array, Op
from paring.passes.contract import Contract
from paring.passes.machine import SOME_MACHINE, Machine, Time
from paring.passes.pattern import Match, Rule, Users, match

# What rules may take to come to rest, beside one for each node: chains of moves advance one node at a time.
SWEEPS = 32
REWRITES_AT_ONE_NODE = 64

# Runs a graph on given inputs.
Run = Callable[[Graph, Sequence[Array]], list[Array]]
# Trains the weights of a graph: the same program with other constants.
Finetune = Callable[[Graph], Graph]
# For each batch of the calibration data the gradient of a loss, float64, by (reader, position) of each constant that is learned.
Gradients = Callable[[Graph], Iterator[Mapping[tuple[Node, int], Array]]]
# Told what is being done, steps done and steps in all.
Tell = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Rewrite:
    """One change: who made it and to which node."""

    rule: str
    node: str

    def __str__(self) -> str:
        return f"{self.rule} at {self.node}"


@dataclass
class Context:
    """What a pass is given besides the graph: fuel to spend, and where to write down what it did and did not do.

    For lossy passes also `calibration` (batches of inputs), `run` (runs a graph, perhaps faster than the interpreter), the
    user's `metric` of a graph, higher is better, whom to `tell` of progress, and the graphs of `earlier` stages; `finetune`,
    which trains a graph, and `gradients` of a loss, both None where there are none; the `machine` that is compiled for, and
    `time`, which measures a graph there, None where it is not at hand. They write the SQNR of each layer (dB), its `conversion`
    efficiency, and `notes` for the ledger, and what they `promise` where that is only known afterwards.
    """

    fuel: int | None = None
    rewrites: list[Rewrite] = field(default_factory=list)
    declined: list[tuple[Rewrite, str]] = field(default_factory=list)
    calibration: Sequence[Sequence[Array]] = ()
    run: Run = interpret
    metric: Callable[[Graph], float] | None = None
    tell: Tell = silent
    earlier: Sequence[Graph] = ()
    finetune: Finetune | None = None
    gradients: Gradients | None = None
    machine: Machine = SOME_MACHINE
    time: Time | None = None
    sqnr: dict[str, float] = field(default_factory=dict)
    conversion: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    promise: Contract | None = None

    def spend(self, rule: str, node: Node) -> bool:
        """Take one unit for a rewrite at a node; False, and nothing may be changed, when the fuel is used up."""
        if self.fuel is not None:
            if self.fuel <= 0:
                return False
            self.fuel -= 1
        self.rewrites.append(Rewrite(rule, describe(node)))
        return True

    def decline(self, rule: str, node: Node, reason: str) -> None:
        self.declined.append((Rewrite(rule, describe(node)), reason))


def describe(node: Node) -> str:
    """A node in a few words, with its provenance."""
    return f"{node.op.name} {node.type}" + (f" from {node.loc}" if node.loc else "")


def apply_rules(graph: Graph, rules: Sequence[Rule], context: Context) -> Graph:
    """Rewrite operands before users, sweep after sweep, until no rule fires."""
    by_op = _RulesByOp(rules)
    most = SWEEPS + len(graph)
    for _ in range(most):
        fired = len(context.rewrites)
        context.declined.clear()
        graph = _sweep(graph, by_op, context)
        if len(context.rewrites) == fired:
            return graph
    raise InternalError(f"rules still fire after {most} sweeps", why=str(context.rewrites[-1]))


class _RulesByOp(dict[type[Op], list[Rule]]):
    """The rules whose root may be an op of a class or of a class derived from it, in their order."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        super().__init__()
        self.rules = rules

    def __missing__(self, cls: type[Op]) -> list[Rule]:
        self[cls] = [rule for rule in self.rules if issubclass(cls, rule.pattern.ops or Op)]
        return self[cls]


def _sweep(graph: Graph, by_op: _RulesByOp, context: Context) -> Graph:
    users = defaultdict(list, graph.users())
    uses = Counter({node: len(readers) for node, readers in users.items()})
    uses.update(graph.outputs)
    most = REWRITES_AT_ONE_NODE + len(uses)

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        new = node.with_inputs(inputs)
        if new is not node:
            uses[new], users[new] = uses[node], users[node]
        for _ in range(most):
            replacement = _rewrite_once(new, by_op[type(new.op)], uses, users, context)
            if replacement is None:
                return new
            # Rather too many than too few: what had one reader and has two now must not be taken for its only one's.
            uses[replacement] += uses[node]
            users[replacement] = [*users[replacement], *users[node]]
            new = replacement
        raise InternalError(f"rules do not come to rest at {describe(node)}", why=str(context.rewrites[-1]))

    return rebuild(graph, visit)


def _rewrite_once(node: Node, rules: Sequence[Rule], uses: Counter[Node], users: Users, context: Context) -> Node | None:
    for rule in rules:
        found, replacement = _try(rule, node, uses, users)
        if found is None:
            continue
        if replacement is None:
            if found.reason:
                context.decline(rule.name, node, found.reason)
            continue
        if context.spend(rule.name, node):
            return replacement
    return None


def _try(rule: Rule, node: Node, uses: Counter[Node], users: Users) -> tuple[Match | None, Node | None]:
    """The match and what takes the node's place. Whatever a rule raises becomes a ParingError that names rule and node."""
    try:
        found = match(rule.pattern, node, uses, users)
        return found, _replacement(rule, found) if found else None
    except ParingError as error:
        error.at(f"rule {rule.name} at {describe(node)}")
        raise
    except Exception as error:
        place = f"rule {rule.name} at {describe(node)}"
        raise failure("a rule", error, place) from error


def failure(who: str, error: Exception, where: str = "") -> PassError:
    """What stands for an error that is none of ours: what it said, and the deepest line outside libraries."""
    frames = extract_tb(error.__traceback__)
    frame = ([f for f in frames if "site-packages" not in f.filename] or frames)[-1]
    line = f"{'/'.join(PurePath(frame.filename).parts[-2:])}:{frame.lineno}"
    return PassError(f"{who} raised {type(error).__name__} at {line}", where=where, why=str(error))


def _replacement(rule: Rule, found: Match) -> Node | None:
    replacement: object = rule.rewrite(found)
    if replacement is found.root or replacement is None:
        return None
    if not isinstance(replacement, Node):
        raise PassError(f"a rewrite gives {a_kind(replacement)}, not a node")
    if replacement.type != found.root.type:
        raise IRTypeError(f"a rewrite gives {replacement.type} in place of {found.root.type}")
    return replacement
