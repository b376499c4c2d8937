"""Criteria that look at data: what they say of channels, against a slow account, and what they are good for."""

from __future__ import annotations

import numpy as np
import pytest
from planting_prune import PRUNE_PLANTERS
from test_prune import check_pruned, ladder, planted, relu
from test_quantize import Batches, batches_for, layer, noise, weight

from paring.ir import Const, Graph, Input, Loc, Node, interpret
from paring.ir.errors import ArgumentError
from paring.ir.ops import linear, reduce, unary
from paring.passes.compress.channels.channel_evidence import _greedy, _summed, reconstruction_errors, zero_shares
from paring.passes.compress.channels.channel_rules import channels_of
from paring.passes.compress.channels.cut import masked
from paring.passes.compress.channels.prune_channels import PruneChannels
from paring.passes.compress.criteria import CHANNEL_CRITERIA, CRITERIA, WEIGHT_CRITERIA, Evidence
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline
from paring.passes.rewriter import Context

pytestmark = pytest.mark.fast

WITH_DATA = ("apoz", "reconstruction")


def test_every_criterion_judges_something() -> None:
    assert {*CHANNEL_CRITERIA, *WEIGHT_CRITERIA} == set(CRITERIA)


@pytest.mark.parametrize("criterion", WITH_DATA)
def test_pruned_by_data_is_the_masked_network(criterion: str) -> None:
    """On planted graphs of all kinds: whatever the data say, what goes is what `masked` sets to zero."""
    gone = 0
    for seed, plant in enumerate(PRUNE_PLANTERS.values()):
        exact = seed % 2 == 0
        graph = planted(plant, seed, exact, size=1)
        prune = PruneChannels(0.5, criterion, ("layer", "global")[seed % 2], 0)
        gone += check_pruned(graph, prune, exact, seed, batches_for(graph, 2, exact))
    assert gone > 50


def pruned_noise(graph: Graph, criterion: str, data: Batches, fresh: Batches, seed: int = 0) -> float:
    text = f"prune-channels{{criterion={criterion!r}, round_to=0, ratio=0.3, seed={seed}}}"
    return noise(graph, run_pipeline(graph, parse_pipeline(text), calibration=data).graph, fresh)


def test_data_tell_more_than_weights_and_chance() -> None:
    """In noise of the outputs on other data, over several networks."""
    total = dict.fromkeys(("apoz", "reconstruction", "l2", "random"), 0.0)
    for seed in range(4):
        graph = ladder(16, 1 + seed % 2)
        batches = batches_for(graph, 8 + seed, exact=False)
        for criterion in total:
            total[criterion] += pruned_noise(graph, criterion, batches[: 4 + seed], batches[4 + seed :], seed)
    assert max(total["reconstruction"], total["apoz"]) < min(total["l2"], total["random"]), total


# --- apoz -----------------------------------------------------------------------------------------------------------


def test_zeros_are_counted_behind_the_activation() -> None:
    """Through a residual sum and a pooling; where no function follows, in the result itself."""
    rng = np.random.default_rng(0)
    x = Node(Input("x", "float32", (2, 3, 5, 5)))
    first = layer(rng, x, 4, "first")
    y = relu(first)
    second = layer(rng, y, 4, "second")
    z = Node(unary.Clamp(0.0, 1.0), [Node(reduce.Mean((2, 3)), [second])])
    last = Node(linear.Linear(), [z, weight(rng, 3, 4)], Loc("last"))
    graph = Graph((x,), (last,))
    data = batches_for(graph, 3, exact=False)
    found = zero_shares(graph, [first, second, last], Context(calibration=data))
    at = Graph((x,), (y, z))
    values = [interpret(at, batch) for batch in data]
    assert np.allclose(found[first], np.mean([(v[0] == 0).mean((0, 2, 3)) for v in values], 0))
    assert np.allclose(found[second], np.mean([(v[1] == 0).mean(0) for v in values], 0))
    assert not found[last].any()


# --- reconstruction -------------------------------------------------------------------------------------------------


def test_the_greedy_choice_is_that_of_trying_all() -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        parts = rng.standard_normal((40, 7)) + rng.standard_normal((40, 1))
        left, gone, wanted = set(range(7)), [], np.zeros(7)
        total = 0.0
        for _ in range(7):
            best = min(left, key=lambda c: (parts[:, [*gone, c]].sum(1) ** 2).sum())
            gone.append(best)
            left.discard(best)
            total = max(total, float((parts[:, gone].sum(1) ** 2).sum()))
            wanted[best] = total
        assert np.allclose(_greedy(parts.T @ parts), wanted)


def test_columns_of_one_group_add_up() -> None:
    columns = np.arange(12.0).reshape(2, 6)
    assert _summed(columns, np.array([7, 3, 7, 3, 9, 7])).tolist() == [[4, 7, 4], [16, 25, 10]]


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_the_first_to_go_is_the_one_that_the_next_layer_misses_least(shift: float) -> None:
    """The error of each channel alone, by running the masked network; a masked channel that is not zero counts as it is."""
    rng = np.random.default_rng(3)
    x = Node(Input("x", "float32", (64, 5)))
    hidden = Node(linear.Linear(), [x, weight(rng, 6, 5), Node(Const((shift + rng.standard_normal(6)).astype("float32")))])
    function = unary.Relu() if shift == 0 else unary.Sigmoid()
    graph = Graph((x,), (Node(linear.Linear(), [Node(function, [hidden]), weight(rng, 64, 6)]),))
    data = batches_for(graph, 6, exact=False)
    channels = channels_of(graph)
    errors = reconstruction_errors(channels, Context(calibration=data), np.random.default_rng(0))
    alone = {}
    for group in channels.groups:
        (channel,) = group.channels[hidden]
        without = masked(graph, {hidden: [channel]})
        alone[group.number] = noise(graph, without, data)
    assert min(errors, key=errors.__getitem__) == min(alone, key=alone.__getitem__)


def test_evidence_is_gathered_once() -> None:
    calls: list[int] = []

    def gather(evidence: Evidence) -> int:
        calls.append(len(evidence.layers))
        return 42

    graph = ladder()
    evidence = Evidence(graph, [], Context(), np.random.default_rng(0))
    assert [evidence.once(gather), evidence.once(gather)] == [42, 42]
    assert calls == [0]


@pytest.mark.parametrize("criterion", [*WITH_DATA, "wanda"])
def test_without_data_there_is_no_evidence(criterion: str) -> None:
    name = "prune-channels" if criterion in CHANNEL_CRITERIA else "prune-unstructured"
    with pytest.raises(ArgumentError, match="needs calibration data") as caught:
        run_pipeline(ladder(), parse_pipeline(f"{name}{{criterion={criterion!r}}}"))
    assert name in str(caught.value)
