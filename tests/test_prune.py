"""The pass prune-channels: what is removed computes what the masked network does, to the bit where sums are exact."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from planting_prune import KEPT_PLANTERS, PRUNE_PLANTERS
from test_quantize import layer, weight
from wrong_prune import WRONG_PRUNES, Mistake

from paring.ir import Const, Graph, Input, Loc, Node, show
from paring.ir.errors import ArgumentError, IRTypeError, ParingError
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, norm, reduce, unary
from paring.ir.verify import verify
from paring.passes.compress.channels.channel_rules import channels_of
from paring.passes.compress.channels.cut import masked
from paring.passes.compress.channels.prune_channels import PruneChannels
from paring.passes.compress.criteria import CHANNEL_CRITERIA, CRITERIA
from paring.passes.contract import Exact, check
from paring.passes.ledger import Ledger, measure
from paring.passes.manager import Result, run_pass, run_pipeline
from paring.passes.pipelines import parse_pipeline
from paring.passes.rewriter import Context
from paring.testing import Plant, check_round_trip, planted_graph, random_graph, random_inputs, shrink

pytestmark = pytest.mark.fast

RATIOS = tuple(tenth / 10 for tenth in range(1, 10))
SEEDS = 27
LEAST = 12
SAME = Exact(finite=True)
WITHOUT_DATA = tuple(name for name in CHANNEL_CRITERIA if not CRITERIA[name].data)


def planted(plant: Plant, seed: int, exact: bool = True, size: int = 3) -> Graph:
    """A planted graph; other numbers where sums would not have been exact."""
    for attempt in range(20):
        rng = np.random.default_rng((seed, attempt, zlib.crc32(plant.__qualname__.encode())))
        try:
            return planted_graph(rng, plant, size, exact)
        except IRTypeError:
            continue
    raise AssertionError(f"{plant.__qualname__} builds nothing")


def check_pruned(
    graph: Graph, prune: PruneChannels, exact: bool, seed: int = 0, calibration: Sequence[Sequence[Array]] = ()
) -> int:
    """Raise ParingError unless the graph without channels is the masked one; gives how many channels went."""
    removed = prune.plan(graph, Context(calibration=calibration))
    after = run_pass(prune, graph, Context(calibration=calibration))
    check_round_trip(after)
    before = masked(graph, removed)
    for offset in range(2):
        arrays = random_inputs(graph, np.random.default_rng((seed, offset)), exact)
        check(SAME, before, after, arrays, exact=exact, who=str(prune))
    count = sum(map(len, removed.values()))
    if count:
        assert measure(after).macs < measure(graph).macs
    return count


def fault(graph: Graph, prune: PruneChannels, exact: bool) -> ParingError | None:
    try:
        check_pruned(graph, prune, exact)
    except ParingError as error:
        return error
    return None


# --- the same as masked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PRUNE_PLANTERS, *KEPT_PLANTERS])
def test_a_pruned_graph_is_the_masked_one(name: str, trials: int) -> None:
    """At every ratio, with and without rounding, on exact graphs bit by bit, on others within the rounding of one sum."""
    plant = {**PRUNE_PLANTERS, **KEPT_PLANTERS}[name]
    gone = 0
    for seed in range(SEEDS * max(1, trials // 100)):
        exact = seed % 3 != 2
        graph = planted(plant, seed, exact)
        ratio = RATIOS[seed % len(RATIOS)]
        scope, criterion = ("layer", "global")[seed % 2], WITHOUT_DATA[seed % len(WITHOUT_DATA)]
        prune = PruneChannels(ratio, criterion, scope, (0, 1, 2, 4)[seed % 4], seed)
        gone += check_pruned(graph, prune, exact, seed)
    assert gone >= LEAST or name in KEPT_PLANTERS, f"{name}: {gone} channels went in all"


@pytest.mark.parametrize("ratio", RATIOS)
def test_random_graphs_are_the_masked_ones(ratio: float, graphs: int) -> None:
    gone = 0
    for seed in range(max(8, graphs // 16)):
        exact = seed % 2 == 0
        graph = random_graph(np.random.default_rng((41, seed)), 14, exact)
        gone += check_pruned(graph, PruneChannels(ratio, "l1", round_to=0), exact, seed)
    assert gone or ratio < 0.2


@pytest.mark.parametrize("name", WRONG_PRUNES)
def test_a_wrong_prune_is_found_out(name: str) -> None:
    mistake: Mistake = WRONG_PRUNES[name]
    prune = PruneChannels(0.5, "random", round_to=0)
    for seed in range(8):
        for plant in PRUNE_PLANTERS.values():
            exact = seed % 2 == 0 and plant.__name__ != "normalised"
            graph = planted(plant, seed, exact, size=0)
            with mistake():
                found = fault(graph, prune, exact)
            if found is not None:
                return
    pytest.fail("every planted graph passed")


def test_a_failure_shrinks() -> None:
    with WRONG_PRUNES["forgets_the_rest"]():
        prune = PruneChannels(0.5, "random", round_to=0)
        graph = next(
            g for g in (planted(PRUNE_PLANTERS["revived"], seed) for seed in range(20)) if fault(g, prune, True) is not None
        )
        small = shrink(graph, lambda g: fault(g, prune, True) is not None)
    assert sum(bool(node.inputs) for node in small.nodes()) <= 5


# --- what goes together ---------------------------------------------------------------------------------------------


def rng_for(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def relu(x: Node) -> Node:
    return Node(unary.Relu(), [x])


def ladder(channels: int = 16, depth: int = 2) -> Graph:
    """Residual blocks, a mean, a classifier."""
    rng = rng_for(3)
    image = Node(Input("x", "float32", (1, 3, 6, 6)))
    x = relu(layer(rng, image, channels, "stem"))
    for number in range(depth):
        y = layer(rng, relu(layer(rng, x, channels, f"{number}.first")), channels, f"{number}.second")
        x = relu(Node(binary.Add(), [y, x]))
    flat = Node(reduce.Mean((2, 3)), [x])
    return Graph((image,), (Node(linear.Linear(), [flat, weight(rng, 5, channels), weight(rng, 5)], Loc("classifier")),))


def widths(graph: Graph) -> dict[str, int]:
    layers = [node for node in graph.nodes() if isinstance(node.op, conv.Conv2d | linear.Linear) and node.loc]
    return {node.loc.module: node.inputs[1].type.shape[0] for node in layers if node.loc}


def prune(graph: Graph, options: str = "", **more: object) -> Result:
    return run_pipeline(graph, parse_pipeline(f"prune-channels{{{options}}}"), **more)  # type: ignore[arg-type]


def test_residual_sums_tie_their_producers() -> None:
    graph = ladder()
    sizes = sorted(len(group.channels) for group in channels_of(graph).groups)
    assert sizes == [1] * 32 + [3] * 16
    after = prune(graph, "ratio=0.5, round_to=4").graph
    assert widths(after) == {"stem": 8, "0.first": 8, "0.second": 8, "1.first": 8, "1.second": 8, "classifier": 5}


@pytest.mark.parametrize("name", ["grouped_query_attention", "rotary_grouped_query_attention"])
def test_a_kv_head_goes_with_all_its_queries(name: str) -> None:
    graph = planted(PRUNE_PLANTERS[name], 1, size=0)
    for group in channels_of(graph).groups:
        assert sorted(map(len, group.channels.values())) == [2, 2, 4], "one head of keys and values, two of queries"
        for places in group.channels.values():
            assert (np.diff(places) == 1).all()


def test_groups_of_a_convolution_go_whole() -> None:
    rng = rng_for(0)
    x = Node(Input("x", "float32", (1, 3, 4, 4)))
    y = layer(rng, relu(layer(rng, x, 8, "a")), 12, "b", groups=4)
    graph = Graph((x,), (layer(rng, y, 3, "c"),))
    after = prune(graph, "ratio=0.5, round_to=0").graph
    (grouped,) = (n for n in after.nodes() if isinstance(n.op, conv.Conv2d) and n.op.groups > 1)
    assert (grouped.op.groups, grouped.inputs[1].type.shape) == (2, (6, 2, 3, 3))


def test_the_least_go_first() -> None:
    x = Node(Input("x", "float32", (1, 1)))
    first = Node(linear.Linear(), [x, Node(Const(np.array([[3], [-1], [2], [-4]], "float32")))], Loc("a"))
    graph = Graph((x,), (Node(linear.Linear(), [first, Node(Const(np.array([[1, 2, 3, 4]], "float32")))]),))
    for criterion in ("l1", "l2"):
        assert [list(c) for c in PruneChannels(0.5, criterion, round_to=0).plan(graph).values()] == [[1, 2]]
    chance = {tuple(*PruneChannels(0.5, "random", round_to=0, seed=seed).plan(graph).values()) for seed in range(20)}
    assert len(chance) > 3
    again = PruneChannels(0.5, "random", round_to=0, seed=7)
    assert [list(c) for c in again.plan(graph).values()] == [list(c) for c in again.plan(graph).values()]


def test_global_scope_takes_from_the_layer_that_matters_least() -> None:
    rng = rng_for(1)
    x = Node(Input("x", "float32", (1, 4)))
    even = Node(Const(np.ones((8, 4), "float32")))
    spread = Node(Const(np.repeat(np.array([[1e-3], [4.0]], "float32"), 4, 0) * np.ones((8, 4), "float32")))
    a = Node(linear.Linear(), [x, even], Loc("even"))
    b = Node(linear.Linear(), [relu(a), Node(Const(np.tile(spread.op.value, (1, 2))))], Loc("spread"))
    graph = Graph((x,), (Node(linear.Linear(), [relu(b), weight(rng, 2, 8)], Loc("end")),))
    assert widths(prune(graph, "ratio=0.25, scope='global', round_to=0").graph) == {"even": 8, "spread": 4, "end": 2}
    assert widths(prune(graph, "ratio=0.25, round_to=0").graph) == {"even": 6, "spread": 6, "end": 2}


@pytest.mark.parametrize(("step", "stay"), [(0, 5), (1, 5), (2, 6), (4, 8), (8, 8), (16, 16), (32, 20)])
def test_counts_stay_multiples(step: int, stay: int) -> None:
    rng = rng_for(0)
    x = Node(Input("x", "float32", (1, 3, 4, 4)))
    graph = Graph((x,), (layer(rng, relu(layer(rng, x, 20, "a")), 3, "b"),))
    assert widths(prune(graph, f"ratio=0.75, round_to={step}").graph) == {"a": stay, "b": 3}


def test_ratio_zero_changes_nothing() -> None:
    graph = ladder()
    assert prune(graph, "ratio=0.0").graph is graph


# --- what stays, and why --------------------------------------------------------------------------------------------


def reasons(graph: Graph) -> str:
    return "; ".join(f"{rewrite.node}: {why}" for _, rewrite, why in prune(graph, "round_to=0").declined)


def of_two(middle: list[object], dims: tuple[int, ...] = (1, 6)) -> Graph:
    """A linear layer, some operators, another layer."""
    rng = rng_for(0)
    x = Node(Input("x", "float32", dims))
    y = Node(linear.Linear(), [x, weight(rng, 8, dims[-1]), weight(rng, 8)], Loc("first"))
    for op in middle:
        y = Node(op, [y, *(weight(rng, 8) for _ in range(op.arity[0] - 1))])  # type: ignore[attr-defined,arg-type]
    return Graph((x,), (Node(linear.Linear(), [y, weight(rng, 3, 8)], Loc("last")),))


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        ([norm.LayerNorm()], "layer_norm mixes them"),
        ([norm.RmsNorm()], "rms_norm mixes them"),
        ([norm.Softmax(1)], "softmax mixes them"),
        ([unary.Exp(), unary.Log(), norm.Softmax(1)], "softmax mixes them"),
        ([norm.GroupNorm(1)], "group_norm mixes them"),
        ([unary.Log()], "once masked they would not be finite after log"),
        ([unary.Rsqrt(), unary.Relu()], "once masked they would not be finite after rsqrt"),
    ],
)
def test_what_cannot_go_is_named_with_the_reason(middle: list[object], why: str) -> None:
    said = reasons(of_two(middle))
    assert f"from first: 8 of 8 channels stay: {why}" in said
    assert "from last: 3 of 3 channels stay: it is an output of the network" in said


def test_reasons_for_channels_that_meet_something() -> None:
    found = {name: reasons(planted(KEPT_PLANTERS[name], 4, size=0)) for name in KEPT_PLANTERS}
    assert "max mixes them" in found["mixed"]
    assert "it meets input 'x0'" in found["with_input"]
    assert "conv_transpose2d needs all of them" in found["transposed_conv"]


def test_a_masked_channel_that_meets_padding_stays() -> None:
    rng = rng_for(0)
    x = Node(Input("x", "float32", (1, 3, 4, 4)))
    y = Node(unary.Sigmoid(), [layer(rng, x, 8, "a")])
    graph = Graph((x,), (layer(rng, y, 3, "b"),))
    assert "8 of 8 channels stay: once masked they would not be zero as the padding of conv2d is" in reasons(graph)
    graph = Graph((x,), (layer(rng, y, 3, "b", kernel=1),))
    result = prune(graph, "round_to=0")
    assert widths(result.graph)["a"] == 4


def test_a_layer_keeps_one_channel_and_the_ledger_says_so() -> None:
    rng = rng_for(1)
    x = Node(Input("x", "float32", (1, 4)))
    small = Node(linear.Linear(), [x, Node(Const(np.array([[1, 1, 1, 1], [0, 0, 0, 0]], "float32")))], Loc("small"))
    wide = Node(linear.Linear(), [relu(small), weight(rng, 64, 2)], Loc("wide"))
    graph = Graph((x,), (Node(linear.Linear(), [relu(wide), weight(rng, 2, 64)], Loc("end")),))
    for ratio in RATIOS:
        assert min(widths(prune(graph, f"ratio={ratio}, round_to=0, scope='global'").graph).values()) >= 1
    (entry,) = prune(graph, "ratio=0.999, round_to=0, scope='global'").ledger.entries
    assert [note for note in entry.notes if note.startswith("one channel stays of")]
    assert "0.999" in entry.name


def test_a_slice_of_a_value_is_not_emptied() -> None:
    for seed in range(20):
        for ratio in (0.7, 0.9):
            graph = planted(PRUNE_PLANTERS["split"], seed, size=0)
            after = run_pass(PruneChannels(ratio, "random", "global", 0, seed), graph, Context())
            assert all(node.type.size for node in after.nodes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ratio=1.0", "ratio is 1.0"),
        ("ratio=-0.1", "ratio is -0.1"),
        ("ratio=nan", "ratio is nan"),
        ("ratio='half'", "ratio should be of type float"),
        ("criterion='l3'", "criterion is 'l3'"),
        ("scope='network'", "scope is 'network'"),
        ("round_to=-1", "round_to is -1, it is at least 0"),
        ("seed=-1", "seed is -1"),
        ("ration=0.5", "did you mean 'ratio'?"),
    ],
)
def test_bad_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(ParingError, match=message):
        parse_pipeline(f"prune-channels{{{options}}}")
    assert math.isinf(PruneChannels.contract.budget)


def test_it_stands_before_quantization() -> None:
    from paring.passes.pipelines import with_users

    with pytest.raises(ArgumentError, match="pass prune-channels stands after quantize"):
        with_users((), parse_pipeline("quantize, prune-channels"))
    assert with_users((), parse_pipeline("prune-channels, quantize"))


def test_masks_are_checked() -> None:
    graph = ladder()
    (stem,) = (n for n in graph.nodes() if n.loc and n.loc.module == "stem")
    with pytest.raises(ArgumentError, match="has no channel 16"):
        masked(graph, {stem: [16]})
    with pytest.raises(ArgumentError, match="add is no layer"):
        masked(graph, {graph.outputs[0].inputs[0].inputs[0].inputs[0]: [0]})
    with pytest.raises(ArgumentError, match="is no layer of this graph"):
        masked(ladder(), {stem: [0]})
    (zeroed,) = (n for n in masked(graph, {stem: [2, 5]}).nodes() if n.loc and n.loc.module == "stem")
    for node in zeroed.inputs[1:]:
        assert [int(i) for i in np.flatnonzero(~node.op.value.reshape(16, -1).any(1))] == [2, 5]


# --- the pass in a pipeline -----------------------------------------------------------------------------------------


def test_fuel_buys_groups_one_by_one() -> None:
    graph = ladder(4, 1)
    fired = sum(prune(graph, "round_to=0").ledger.entries[0].rewrites.values())
    for fuel in range(fired + 1):
        result = prune(graph, "round_to=0", fuel=fuel)
        verify(result.graph)
        assert sum(result.ledger.entries[0].rewrites.values()) == fuel
        assert (result.graph is graph) == (fuel == 0)


def test_the_ledger_says_how_many_went_and_reads_back() -> None:
    result = prune(ladder(), "ratio=0.5")
    (entry,) = result.ledger.entries
    assert "40 of 85 channels removed, in 5 of 6 layers; 80 could go" in entry.notes
    assert entry.after.macs < entry.before.macs / 2
    assert entry.after.parameter_bytes < entry.before.parameter_bytes / 2
    assert Ledger.from_json(result.ledger.as_json(times=False)).as_json(times=False) == result.ledger.as_json(times=False)


def test_the_same_graph_gives_the_same_text() -> None:
    first, second = (show(prune(ladder(), "criterion='random', seed=3").graph) for _ in range(2))
    assert first == second


def test_a_second_run_prunes_what_is_left() -> None:
    once = prune(ladder(), "ratio=0.5, round_to=0").graph
    assert widths(prune(once, "ratio=0.5, round_to=0").graph)["stem"] == 4


def test_layers_that_share_weights_are_pruned_apart() -> None:
    rng = rng_for(5)
    x = Node(Input("x", "float32", (1, 8)))
    shared = weight(rng, 8, 8)
    first = Node(linear.Linear(), [x, shared], Loc("first"))
    second = Node(linear.Linear(), [relu(first), shared], Loc("second"))
    graph = Graph((x,), (Node(linear.Linear(), [relu(second), weight(rng, 3, 8)], Loc("end")),))
    assert check_pruned(graph, PruneChannels(0.5, round_to=0), exact=False) == 8
    assert widths(prune(graph, "round_to=0").graph) == {"first": 4, "second": 4, "end": 3}


def test_nothing_to_prune_is_no_error() -> None:
    x = Node(Input("x", "float32", (2, 3)))
    empty = Node(Input("y", "float32", (0, 3)))
    assert prune(Graph((x,), (relu(x),))).graph.outputs
    graph = Graph((empty,), (layer_of(layer_of(empty, 4), 2),))
    result = prune(graph, "round_to=0")
    assert result.graph is graph
    assert "0 of 6 channels removed" in str(result.ledger) or "0 could go" in str(result.ledger)


def layer_of(x: Node, width: int) -> Node:
    return Node(linear.Linear(), [x, weight(rng_for(0), width, x.type.shape[-1])])
