"""Programs of thousands of nodes: what passes take, in seconds of processor time, grows linearly."""

from __future__ import annotations

import time
from collections.abc import Callable

from test_pipeline import blocked
from test_prune import ladder, prune, widths
from test_quantize import batches_for, run
from test_quantize import chain as layers

from paring.ir import Graph, Input, Node
from paring.ir.ops import shape, unary
from paring.passes.manager import run_pipeline

SECONDS_FOR_5000_NODES = 10.0
SECONDS_FOR_1000_QUANTIZED = 20.0
SECONDS_FOR_1400_LAYERS = 20.0


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def chain(length: int) -> Graph:
    """Elementwise nodes that no rule removes: one long identity of two alternating halves."""
    x = node = Node(Input("x", "float32", (8,)))
    for _ in range(length // 2):
        node = Node(unary.Neg(), (Node(unary.Abs(), (node,)),))
    return Graph((x,), (node,))


def test_five_thousand_nodes_pass_quickly_and_time_grows_linearly() -> None:
    small, large = (seconds(lambda n=n: run_pipeline(chain(n), blocked(16))) for n in (5000, 10000))
    assert small < SECONDS_FOR_5000_NODES
    assert large < 4 * small


def test_five_thousand_nodes_that_all_go_away() -> None:
    x = node = Node(Input("x", "float32", (8,)))
    for _ in range(5000):
        node = Node(shape.Reshape((8,)), (node,))
    result = run_pipeline(Graph((x,), (node,)), blocked(16))
    assert result.graph.outputs == (x,)


def test_a_thousand_nodes_are_quantized_quickly() -> None:
    graph = layers(depth=250)
    assert seconds(lambda: run(graph, "equalize, quantize{scan='none'}", batches_for(graph, 1))) < SECONDS_FOR_1000_QUANTIZED


def test_channels_of_many_layers_are_found_quickly() -> None:
    graph = ladder(16, 700)
    found: list[Graph] = []
    assert seconds(lambda: found.append(prune(graph, "ratio=0.5").graph)) < SECONDS_FOR_1400_LAYERS
    assert widths(found[0])["699.first"] == 8
