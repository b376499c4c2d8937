"""How long graphs take on this host: what passes that must pay for themselves ask."""

from __future__ import annotations

import time

import numpy as np

from paring.backends import targets
from paring.backends.targets import Target
from paring.calibration import open_on_host
from paring.ir.graph import Graph
from paring.ir.op import Array
from paring.passes.machine import Machine, Timing
from paring.passes.rewriter import Tell

# Calls are repeated for so long, and kernels so often: what else the machine does shows in some calls, not in the fastest.
STRETCH_S = 0.2
LEAST_CALLS = 5
MOST_CALLS = 500
REPEATS = 10
PROFILES = 3


def machine_of(target: Target) -> Machine:
    """What passes may know of a target."""
    return Machine(target.block, target.flops, target.bandwidth)


class HostTime:
    """Compiles a graph for this host and times it: the fastest of some calls, and each layer's kernels by its module.

    Compiled by the target's own pipeline: a time is that of the float network, before passes that follow (`quantize`) and
    without a `pipeline=` of the user. Graphs that were timed before are not compiled again. What is measured differs from
    run to run.
    """

    def __init__(self, target: Target, tell: Tell) -> None:
        self.target, self.tell = target, tell
        self._known: dict[Graph, Timing] = {}

    @staticmethod
    def where_it_runs(target: Target, tell: Tell) -> HostTime | None:
        """None for a target whose code this host does not run, and for the interpreter, whose time means nothing."""
        measurable = target.device == "host" and target.name != targets.REFERENCE.name
        return HostTime(target, tell) if measurable else None

    def __call__(self, graph: Graph) -> Timing:
        if graph not in self._known:
            executable = open_on_host(graph, self.target, self.tell)
            try:
                self._known[graph] = _timed(executable, _inputs(graph))
            finally:
                executable.close()
        return self._known[graph]


def _inputs(graph: Graph) -> list[Array]:
    """Normal floats; zeros of all else, which are legal indices too."""
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(n.type.shape) if n.type.is_float else np.zeros(n.type.shape) for n in graph.inputs)
    return [np.asarray(array, n.type.dtype) for array, n in zip(arrays, graph.inputs, strict=True)]


def _timed(executable: object, arrays: list[Array]) -> Timing:
    run, profile = executable.run, executable.profile  # type: ignore[attr-defined]
    run(arrays)
    calls: list[float] = []
    stop = time.perf_counter() + STRETCH_S
    while len(calls) < LEAST_CALLS or (len(calls) < MOST_CALLS and time.perf_counter() < stop):
        start = time.perf_counter()
        run(arrays)
        calls.append(time.perf_counter() - start)
    layers: dict[str, float] = {}
    for same in zip(*(profile(arrays, REPEATS) for _ in range(PROFILES)), strict=True):
        kernel = min(same, key=lambda each: each.ns)
        if kernel.loc and kernel.loc.module and kernel.macs:
            layers[kernel.loc.module] = layers.get(kernel.loc.module, 0.0) + kernel.ns / 1e9
    return Timing(min(calls), layers)
