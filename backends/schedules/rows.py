"""Not written yet: declines everything, so that the last family takes it."""

from __future__ import annotations

from paring.backends.kernel import Kernel
from paring.backends.targets import Target
from paring.ir.graph import Graph, Node


def find(body: Graph, target: Target) -> Node | None:
    return None


def knobs(anchor: Node, target: Target) -> None:
    return None


def emit(kernel: Kernel, anchor: Node, settings: None) -> None:
    raise AssertionError("find takes nothing")
