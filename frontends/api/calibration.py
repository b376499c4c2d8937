"""Calibration data as arrays, and a quick way to run the graphs that calibration asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paring.backends import targets
from paring.backends.targets import Target
from paring.frontends.structure import Signature
from paring.ir.errors import ArgumentError, InputError, TargetError, a_kind
from paring.ir.graph import Graph
from paring.ir.interpreter import interpret
from paring.passes.ledger import measure
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import pipeline
from paring.passes.rewriter import Tell

Arrays = list[np.ndarray]

# Below this many multiply-adds the interpreter is done before a compiler is.
COMPILED_FROM_MACS = 20_000_000


def collect(calibration: Iterable[Any] | None) -> tuple[Any, ...]:
    """The user's batches, each once. Raises ArgumentError for what is no iterable, or an empty one."""
    if calibration is None:
        return ()
    try:
        batches = tuple(calibration)
    except TypeError as error:
        hint = "a list of input tuples, of single tensors, or of dicts of keyword inputs"
        raise ArgumentError(f"calibration is {a_kind(calibration)}", why=str(error), hint=hint) from None
    if not batches:
        raise ArgumentError("the calibration data are empty", hint="some dozens of typical inputs")
    return batches


def flatten(batches: Sequence[Any], signature: Signature) -> list[Arrays]:
    """Each batch as the arrays of the graph's inputs. Raises InputError naming the batch and the input that does not fit."""
    found = []
    for number, batch in enumerate(batches):
        kwargs = dict(batch) if isinstance(batch, Mapping) else {}
        args = () if kwargs else tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        try:
            found.append(signature.flatten_inputs(args, kwargs))
        except InputError as error:
            hint = f"{error.hint}; a batch is what the network is called with: no labels, the shapes it is compiled for"
            raise InputError(error.what, where=f"calibration batch {number}", why=error.why, hint=hint.lstrip("; ")) from None
    return found


class HostRun:
    """Runs graphs: a large one is compiled for this host, the last one is kept; what cannot be compiled is interpreted."""

    def __init__(self, target: Target, tell: Tell) -> None:
        runs = target.device == "host" and target.name != targets.REFERENCE.name
        self.target = target if runs else targets.resolve("native")
        self.tell = tell
        self.graph: Graph | None = None
        self.executable: Any = None

    def __call__(self, graph: Graph, arrays: Sequence[np.ndarray]) -> Arrays:
        if graph is not self.graph:
            self.close()
            self.graph, self.executable = graph, self._open(graph)
        return list(interpret(graph, arrays) if self.executable is None else self.executable.run(arrays))

    def _open(self, graph: Graph) -> Any:
        if self.target.device != "host" or measure(graph).macs < COMPILED_FROM_MACS:
            return None
        passes = pipeline(self.target.pipeline, self.target.pipeline_options())
        try:
            from paring.backends.build import build
            from paring.backends.devices import open_executable

            lowered = run_pipeline(graph, passes).graph
            built = build(lowered, self.target, lambda done, total, name: self.tell("kernels", done, total))
            return open_executable(built, self.target, None)
        except (TargetError, ImportError):
            return None

    def close(self) -> None:
        if self.executable is not None:
            self.executable.close()
        self.graph = self.executable = None
