"""Calibration data as arrays, and a quick way to run the graphs that calibration asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paring.backends import targets
from paring.backends.targets import Target
from paring.frontends.structure import Signature
from paring.ir.errors import ArgumentError, InputError, ParingError, TargetError, a_kind
from paring.ir.graph import Graph
from paring.ir.interpreter import interpret
from paring.passes.ledger import measure
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import pipeline
from paring.passes.rewriter import Tell

Arrays = list[np.ndarray]

# Below this many multiply-adds the interpreter is done before torch is there, or a compiler.
QUICK_FROM_MACS = 20_000_000


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


def host_target(target: Target) -> Target:
    """The target itself where this host runs it, else the host's own."""
    runs = target.device == "host" and target.name != targets.REFERENCE.name
    return target if runs else targets.resolve("native")


def open_on_host(graph: Graph, target: Target, tell: Tell) -> Any:
    """A graph compiled for this host. Raises TargetError or ImportError where it cannot be."""
    from paring.backends.build import build
    from paring.backends.devices import open_executable

    passes = pipeline(target.pipeline, target.pipeline_options())
    built = build(run_pipeline(graph, passes).graph, target, lambda done, total, name: tell("kernels", done, total))
    return open_executable(built, target, None)


class HostRun:
    """Runs graphs, the last one is kept: of large ones those of floats by torch, which need not be compiled first, others
    compiled for this host; the rest, and what can be neither, is interpreted. What torch fails to run is compiled too.
    """

    def __init__(self, target: Target, tell: Tell) -> None:
        self.target = host_target(target)
        self.tell = tell
        self.graph: Graph | None = None
        self.executable: Any = None

    def __call__(self, graph: Graph, arrays: Sequence[np.ndarray]) -> Arrays:
        if graph is not self.graph:
            self.close()
            self.graph, self.executable = graph, self._open(graph)
        if isinstance(self.executable, EagerExecutable):
            try:
                return self.executable.run(arrays)
            except Exception:  # of any type: what torch raises is of its own choice
                self.executable = self._compiled(graph)
        return list(interpret(graph, arrays) if self.executable is None else self.executable.run(arrays))

    def _open(self, graph: Graph) -> Any:
        if self.target.device != "host" or measure(graph).macs < QUICK_FROM_MACS:
            return None
        try:
            return EagerExecutable(graph)
        except ParingError:
            return self._compiled(graph)

    def _compiled(self, graph: Graph) -> Any:
        """None where this host cannot compile it."""
        try:
            return open_on_host(graph, self.target, self.tell)
        except (TargetError, ImportError):
            return None

    def close(self) -> None:
        if self.executable is not None:
            self.executable.close()
        self.graph = self.executable = None


class EagerExecutable:
    """A graph run by torch, operator by operator. Raises ParingError for one that torch cannot compute as it is."""

    def __init__(self, graph: Graph) -> None:
        from paring.frontends.torch_module import to_torch

        self.module: Any = to_torch(graph)

    def run(self, arrays: Sequence[np.ndarray]) -> Arrays:
        import torch

        with torch.no_grad():
            found = self.module(*(torch.from_numpy(np.array(array)) for array in arrays))
        return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]

    def close(self) -> None:
        self.module = None
