"""Tests for passes, the user's own included: random and planted graphs, the check of a contract, and shrinking.

Exact graphs compute with small integers and powers of two, so every float32 sum is exact and results must agree bit by bit.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paring.generators import STEPS, Builder
from paring.ir import Graph, Input, Node, parse, rebuild, show
from paring.ir import constants as arrays_of
from paring.ir.errors import ContractError, IRTypeError, ParingError
from paring.ir.op import Array
from paring.ir.ops import index
from paring.ir.ops.core import Const
from paring.ir.verify import verify
from paring.passes import contract as contracts
from paring.passes.base import Pass
from paring.passes.manager import run_pass
from paring.passes.pattern import Rule
from paring.passes.rewriter import Context

__all__ = [
    "LANES",
    "Builder",
    "Plant",
    "Report",
    "check_once",
    "check_pass",
    "check_round_trip",
    "graphs",
    "planted_graph",
    "random_graph",
    "random_inputs",
    "shrink",
    "work",
]

Plant = Callable[[Builder], Node]
LANES = ("exact", "float", "special")
LOOKUPS = (index.Gather, index.GatherElements)
SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0], "float32")
FIRES = 50


def random_graph(rng: np.random.Generator, size: int = 12, exact: bool = True) -> Graph:
    """A well-typed network of about `size` steps (a step is one node or a small block, such as a residual one)."""
    b = Builder(rng, exact)
    _grow(b, size)
    return b.finish()


def planted_graph(rng: np.random.Generator, plant: Plant, size: int = 4, exact: bool = True) -> Graph:
    """A random network with `plant(builder)` inside: what it builds is read by later nodes or is an output."""
    b = Builder(rng, exact)
    _grow(b, int(rng.integers(0, size + 1)))
    node = plant(b)
    b.pool.append(node)
    _grow(b, int(rng.integers(0, size + 1)))
    return b.finish(node)


def _grow(b: Builder, steps: int) -> None:
    """A step that an operator refuses (an image too small for a kernel) is left out."""
    weights = np.array([weight for _, weight, exact in STEPS if exact or not b.exact], float)
    choices = [step for step, _, exact in STEPS if exact or not b.exact]
    for _ in range(steps):
        step = choices[int(b.rng.choice(len(choices), p=weights / weights.sum()))]
        with contextlib.suppress(IRTypeError):
            node = step(b)
            if node.type.size <= b.limit:
                b.pool.append(node)


def graphs(*, max_size: int = 12, exact: bool = True) -> Any:
    """A hypothesis strategy of random graphs; it shrinks towards few steps."""
    from hypothesis import strategies as st

    def build(size: int, seed: int) -> Graph:
        return random_graph(np.random.default_rng(seed), size, exact)

    return st.builds(build, st.integers(0, max_size), st.integers(0, 2**32 - 1))


def random_inputs(graph: Graph, rng: np.random.Generator, exact: bool = True, special: float = 0.0) -> list[Array]:
    """Arrays for a graph's inputs: integers in [-4, 4] where `exact`, normal floats else; indices stay within bounds.

    `special` is the share of float elements that become NaN, an infinity or a zero of either sign. An input's values hang
    on its label, not on its place, so that a graph with fewer inputs can be tried on the same values.
    """
    users = graph.users()
    arrays = []
    base = int(rng.integers(2**32))
    for node in graph.inputs:
        label = node.op.label if isinstance(node.op, Input) else ""
        rng = np.random.default_rng((base, zlib.crc32(label.encode("utf-8", "surrogatepass"))))
        kind, shape = np.dtype(node.type.dtype).kind, node.type.shape
        if kind == "f":
            array = rng.integers(-4, 5, shape).astype(float) if exact else rng.standard_normal(shape)
            if special:
                array = np.where(rng.random(shape) < special, rng.choice(SPECIAL, shape), array)
        elif kind == "b":
            array = rng.random(shape) < 0.5
        else:
            sizes = [u.inputs[0].type.shape[u.op.axis] for u in users[node] if isinstance(u.op, LOOKUPS)]
            array = rng.integers(0, max(1, min(sizes, default=5)), shape)
        arrays.append(np.asarray(array, dtype=node.type.dtype))
    return arrays


@dataclass(frozen=True)
class Only(Pass):
    """A pass of one rule."""

    name = "only"
    rule: Rule

    def rules(self) -> Sequence[Rule]:
        return (self.rule,)

    def __str__(self) -> str:
        return f"rule {self.rule.name}"


@dataclass
class Report:
    """What `check_pass` saw: graphs tried, graphs changed, and how often each rewrite fired."""

    trials: int = 0
    changed: int = 0
    fired: int = 0
    rewrites: dict[str, int] = field(default_factory=dict)


def check_pass(
    subject: Pass | Rule,
    *,
    plant: Plant | Sequence[Plant] = (),
    trials: int = 100,
    seed: int = 0,
    size: int = 8,
    fires: int = FIRES,
    lanes: Sequence[str] = LANES,
    shrinking: bool = True,
) -> Report:
    """Hold a pass, or a rule, to its contract on random graphs and on graphs planted with instances of its left-hand side.

    Each trial checks the result's invariants and types, its text form, that rules have come to rest, and the contract: on
    `exact` graphs the same bits, on `float` graphs the ulps promised, on `special` inputs (NaN, infinities, signed zeros)
    again the same, unless the contract is for finite values only. Raises ContractError with a small graph that shows the
    fault, or when the pass fired fewer than `fires` times, because then nothing was tested.
    """
    transformation = Only(subject) if isinstance(subject, Rule) else subject
    plants = (plant,) if callable(plant) else tuple(plant)
    report = Report()
    for trial in range(2 * trials):
        if trial >= trials and report.fired >= fires:
            break
        rng = np.random.default_rng((seed, trial))
        lane = lanes[trial % len(lanes)]
        planted = bool(plants) and trial % 8 != 7
        chosen = plants[trial % len(plants)] if planted else None
        exact = lane != "float"
        graph = planted_graph(rng, chosen, size // 2, exact) if chosen else random_graph(rng, size, exact)
        context = Context()
        try:
            check_once(transformation, graph, lane, seed=trial, context=context)
        except ParingError as error:
            raise (_shrunk(transformation, graph, lane, trial, error) if shrinking else error) from None
        report.trials += 1
        report.changed += bool(context.rewrites)
        report.fired += len(context.rewrites)
        for rewrite in context.rewrites:
            report.rewrites[rewrite.rule] = report.rewrites.get(rewrite.rule, 0) + 1
    if report.fired < fires:
        why = f"it fired {report.fired} times in {report.trials} graphs, {fires} are wanted"
        raise ContractError(f"the test of {transformation} is vacuous", why=why, hint="plant=... builds its left-hand side")
    return report


def check_once(
    transformation: Pass, graph: Graph, lane: str = "exact", *, seed: int = 0, context: Context | None = None
) -> Graph:
    """One graph through a pass and all checks; returns the result. Raises ParingError."""
    context = context or Context()
    who = str(transformation)
    verify(graph)
    after = run_pass(transformation, graph, context)
    if lane == LANES[0]:
        check_round_trip(after, who)
    if transformation.rules():
        again = Context()
        transformation.run(after, again)
        if again.rewrites:
            raise ContractError(f"{who} has not come to rest", why=f"a second run still fires {again.rewrites[0]}")
    promise = transformation.promise(context)
    special = 0.05 if lane == "special" and not contracts.for_finite(promise) else 0.0
    for offset in range(2):
        rng = np.random.default_rng((seed, offset))
        arrays = random_inputs(graph, rng, lane != "float", special)
        contracts.check(
            promise,
            graph,
            after,
            arrays,
            exact=lane != "float",
            who=who,
        )
    return after


def check_round_trip(graph: Graph, who: str = "the graph") -> None:
    """Raise ContractError unless the graph's text parses back to the same text, provenance included."""
    text = show(graph)
    if show(parse(text, arrays_of(graph))) != text:
        raise ContractError(f"{who} gives a graph whose text does not read back", why=text)


def _shrunk(transformation: Pass, graph: Graph, lane: str, seed: int, error: ParingError) -> ContractError:
    def fails(candidate: Graph) -> bool:
        return _failure(transformation, candidate, lane, seed) is not None

    small = shrink(graph, fails) if fails(graph) else graph
    found = _failure(transformation, small, lane, seed) or error
    why = f"{found.why}\n{show(small)}".strip()
    return ContractError(found.what, where=f"trial {seed}, {lane} values", why=why, hint=found.hint)


def _failure(transformation: Pass, graph: Graph, lane: str, seed: int) -> ParingError | None:
    try:
        check_once(transformation, graph, lane, seed=seed)
    except ParingError as error:
        return error
    return None


def work(graph: Graph) -> int:
    """How many nodes compute something: inputs and constants do not count."""
    return sum(not isinstance(node.op, Input | Const) for node in graph.nodes())


def shrink(graph: Graph, fails: Callable[[Graph], bool], attempts: int = 2000) -> Graph:
    """A smaller graph for which `fails` still holds: outputs dropped, nodes replaced by operands or by new inputs."""
    smaller = True
    while smaller:
        smaller = False
        for candidate in _candidates(graph):
            attempts -= 1
            if attempts < 0:
                return graph
            with contextlib.suppress(ParingError):
                if fails(candidate):
                    graph, smaller = candidate, True
                    break
    return graph


def _candidates(graph: Graph) -> Iterator[Graph]:
    """Graphs that are one step smaller, the boldest first."""
    for node in graph.outputs:
        if len(graph.outputs) > 1:
            yield _trim(Graph(graph.inputs, (node,)))
    for output in graph.outputs:
        for operand in output.inputs:
            yield _trim(Graph(graph.inputs, tuple(operand if n is output else n for n in graph.outputs)))
    trimmed = _trim(graph)
    if len(trimmed.inputs) < len(graph.inputs):
        yield trimmed
    for node in graph.nodes():
        if not isinstance(node.op, Input | Const):
            fresh = Node(Input(f"s{len(graph.nodes())}", node.type.dtype, node.type.shape))
            for other in (*(i for i in node.inputs if i.type == node.type), fresh):
                yield _replaced(graph, node, other)


def _replaced(graph: Graph, old: Node, new: Node) -> Graph:
    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node is old:
            return new
        return node.with_inputs(inputs)

    changed = rebuild(graph, visit)
    return _trim(Graph((*changed.inputs, new), changed.outputs) if isinstance(new.op, Input) else changed)


def _trim(graph: Graph) -> Graph:
    """Without the inputs that nothing reads, each input once."""
    read = set(Graph((), graph.outputs).nodes())
    return Graph(tuple(dict.fromkeys(n for n in graph.inputs if n in read)), graph.outputs)
