"""The reference interpreter as a runtime like any other (`target="reference"`)."""

from __future__ import annotations

from collections.abc import Sequence

from paring.ir.errors import InputError
from paring.ir.graph import Graph
from paring.ir.interpreter import interpret
from paring.ir.op import Array


class ReferenceExecutable:
    """Runs a graph, at whatever stage of the pipeline, by interpreting it."""

    def __init__(self, graph: Graph) -> None:
        self.graph: Graph | None = graph

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        if self.graph is None:
            raise InputError("the network is closed", hint="compile or load it again")
        # Outputs never alias inputs or constants: callers may write to what they are given.
        return [output.copy() for output in interpret(self.graph, arrays)]

    def close(self) -> None:
        self.graph = None
