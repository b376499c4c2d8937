"""Ratios for a budget, and layers that must pay: the right layer is narrowed, and one that became slower is put back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from planting_prune import PRUNE_PLANTERS
from test_prune import ladder, layer_of, planted, prune, relu, rng_for, widths
from test_quantize import layer, weight

from paring.ir import Const, Graph, Input, Loc, Node, interpret, show
from paring.ir.errors import ArgumentError, ModelError, ParingError
from paring.ir.ops import linear
from paring.passes.compress.channels import paying
from paring.passes.compress.channels.channel_rules import channels_of
from paring.passes.compress.channels.costs import Costs
from paring.passes.compress.channels.families import Families
from paring.passes.compress.channels.paying import conversion, slower
from paring.passes.compress.channels.prune_channels import PruneChannels, ranked
from paring.passes.compress.channels.prune_search import PruneSearch
from paring.passes.compress.channels.sensitivity import Curve
from paring.passes.ledger import NETWORK, Ledger, measure
from paring.passes.machine import Machine, Timing, modelled, staircase
from paring.passes.manager import Result, run_pipeline
from paring.passes.pipelines import parse_pipeline
from paring.passes.rewriter import Context
from paring.passes.util import const_value, constant, module_of, with_operands
from paring.testing import random_inputs

pytestmark = pytest.mark.fast

# Between two ways of adding the same float64 figures.
ROUNDING = 1e-9


def search(graph: Graph, options: str, **more: object) -> Result:
    data = [random_inputs(graph, rng_for(seed), exact=False) for seed in range(2)]
    return run_pipeline(graph, parse_pipeline(f"prune-search{{{options}}}"), calibration=data, **more)  # type: ignore[arg-type]


def chain(fragile: float = 100.0) -> Graph:
    """Two hidden layers of one shape: of `spare` a quarter of the channels matters, of `fragile` all of them."""
    rng = rng_for(5)
    x = Node(Input("x", "float32", (32, 16)))
    spare = rng.standard_normal((16, 16)).astype("float32")
    spare[4:] /= fragile
    first = Node(linear.Linear(), [x, Node(Const(spare))], Loc("spare"))
    second = Node(linear.Linear(), [relu(first), weight(rng, 16, 16)], Loc("fragile"))
    return Graph((x,), (Node(linear.Linear(), [relu(second), weight(rng, 4, 16)], Loc("end")),))


# --- the search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["greedy", "evolutionary"])
@pytest.mark.parametrize("kind", ["channels", "macs", "size", "latency"])
def test_a_budget_is_kept_and_the_prunable_layer_is_the_one_that_is_pruned(kind: str, method: str) -> None:
    result = search(chain(), f"{kind}=0.7, method='{method}', round_to=1")
    (entry,) = result.ledger.entries
    assert widths(result.graph)["fragile"] >= (16 if method == "greedy" else 15)
    assert 4 <= widths(result.graph)["spare"] < 16
    assert entry.after.macs < entry.before.macs
    shares = {"macs": entry.after.macs / entry.before.macs, "size": entry.after.parameter_bytes / entry.before.parameter_bytes}
    assert shares.get(kind, 0.7) <= 0.7
    (said,) = (note for note in entry.notes if note.startswith(f"{kind}: "))
    assert said.endswith("(counted)" if kind != "latency" else "(modelled: the target is not at hand)")


def test_the_other_way_round_the_other_layer_is_pruned() -> None:
    graph = chain(fragile=1.0)
    second = next(node for node in graph.nodes() if module_of(node) == "fragile")
    value = second.inputs[1].op.value.copy()
    value[4:] /= 100
    swapped = with_operands(graph, {second: [constant(value)]})
    assert widths(search(swapped, "macs=0.7, round_to=1").graph)["spare"] == 16


def test_a_metric_decides_where_there_is_one() -> None:
    """It says that only `spare` counts, against what the outputs say."""

    def metric(graph: Graph) -> float:
        return float(widths(graph)["spare"])

    result = search(chain(), "macs=0.7, round_to=1", metric=metric)
    assert (widths(result.graph)["spare"], widths(result.graph)["fragile"] < 16) == (16, True)
    run_pipeline(chain(), parse_pipeline("prune-search{macs=0.7, round_to=1}"), metric=metric)


def test_the_scan_is_a_table_in_the_ledger_even_if_nothing_goes() -> None:
    result = search(chain(), "macs=1.0, round_to=1")
    (entry,) = result.ledger.entries
    assert not entry.changed
    assert [note.split(":")[0] for note in entry.notes[1:3]] == ["  spare (16 channels)", "  fragile (16 channels)"]
    assert entry.notes[1].count("%") == 4
    least, most = (float(entry.notes[line].split("75%: ")[1].split(",")[0]) for line in (1, 2))
    assert least < most / 100
    assert Ledger.from_json(result.ledger.as_json()).as_json() == result.ledger.as_json()


@pytest.mark.parametrize("method", ["greedy", "evolutionary"])
def test_the_same_seed_gives_the_same_network(method: str) -> None:
    first, second = (show(search(ladder(), f"macs=0.5, method='{method}', round_to=2, seed=3").graph) for _ in range(2))
    assert first == second


def test_progress_is_told() -> None:
    told: list[str] = []
    search(chain(), "macs=0.7, method='evolutionary', round_to=1", tell=lambda stage, done, total: told.append(stage))
    assert {"scan", "budget", "evolution"} <= set(told)


@pytest.mark.parametrize("name", PRUNE_PLANTERS)
def test_costs_of_counts_are_those_of_graphs(name: str) -> None:
    """Whatever hangs together: multiply-adds of layers counted from how many groups stay."""
    for seed in range(3):
        graph = planted(PRUNE_PLANTERS[name], seed, size=0)
        families = ranked(PruneChannels(round_to=0, seed=seed), graph, Context())
        costs = Costs(families, "macs", Machine())
        rng = rng_for(seed)
        for _ in range(3):
            keep = [int(rng.integers(1, len(family) + 1)) for family in families.families]
            gone = {group.number for group in families.chosen(keep)}
            if len(gone) < sum(len(f) - k for f, k in zip(families.families, keep, strict=True)):
                continue
            after = [node.macs for node in families.graph(keep).nodes() if node.op.name in ("conv2d", "linear")]
            assert abs(costs.total(keep) - sum(after)) <= ROUNDING * sum(after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("macs=0.5, size=0.5", "takes one budget, not macs and size"),
        ("macs=0.0", "macs is 0.0"),
        ("latency=1.5", "latency is 1.5"),
        ("macs=nan", "macs is nan"),
        ("macs=0.5, method='annealing'", "method is 'annealing'"),
        ("macs=0.5, criterion='l3'", "criterion is 'l3'"),
        ("macs=0.5, round_to=-1", "round_to is -1"),
    ],
)
def test_bad_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(ParingError, match=message):
        parse_pipeline(f"prune-search{{{options}}}")


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(ArgumentError, match="prune-search needs calibration data"):
        run_pipeline(chain(), parse_pipeline("prune-search{macs=0.5}"))
    with pytest.raises(ArgumentError, match=r"macs=0\.01 cannot be reached"):
        search(chain(), "macs=0.01")
    for criterion in ("taylor", "snip"):
        with pytest.raises(ArgumentError, match="needs calibration data"):
            prune(chain(), f"criterion='{criterion}'")
        with pytest.raises(ArgumentError, match="needs gradients, and nobody computes them"):
            search(chain(), f"macs=0.5, criterion='{criterion}'")


def test_a_ruined_network_makes_nothing_cheap() -> None:
    curve = Curve(np.array([0.0, 0.25, 0.5, 0.75]), np.array([0.0, 1.0, 1.1, 1.1]))
    assert curve.at(0.75) == 3.0
    assert (curve.was_tried(0.75), curve.was_tried(0.8)) == (True, False)


# --- the machine's block ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "left"), [(1, 20), (8, 24), (16, 32), (64, 40)])
def test_channel_counts_stay_multiples_of_what_the_machine_computes_at_once(block: int, left: int) -> None:
    x = Node(Input("x", "float32", (1, 3)))
    wide = Node(linear.Linear(), [x, weight(rng_for(0), 40, 3)], Loc("wide"))
    graph = Graph((x,), (layer_of(relu(wide), 3),))
    assert widths(prune(graph, "ratio=0.5", machine=Machine(block)).graph)["wide"] == left
    assert widths(prune(graph, "ratio=0.5, round_to=5", machine=Machine(block)).graph)["wide"] == 20


def test_the_modelled_time_is_a_staircase() -> None:
    def seconds(width: int) -> float:
        x = Node(Input("x", "float32", (1, 64, 14, 14)))
        return modelled(Graph((x,), (layer(rng_for(0), x, width, "a"),)), Machine(16, 1e9, 1e15)).layers["a"]

    assert [staircase(c, 16) for c in (1, 16, 17)] == [16, 16, 32]
    times = {width: seconds(width) for width in (17, 24, 32, 33)}
    for width in (17, 24):
        assert abs(times[width] / times[32] - 1) <= ROUNDING
    assert times[33] > 1.4 * times[32]
    slow = modelled(ladder(), Machine(8, 1e9, 1e3))
    assert abs(sum(slow.layers.values()) - slow.seconds) <= ROUNDING
    assert not slow.measured


# --- what must pay ------------------------------------------------------------------------------------------------------

Model = Callable[[Node], float]


def timed(seconds: Model) -> Callable[[Graph], Timing]:
    """A machine on which each layer takes what a function says."""

    def time(graph: Graph) -> Timing:
        found = {module_of(n): seconds(n) for n in graph.nodes() if n.op.name in ("conv2d", "linear")}
        return Timing(sum(found.values()), found)

    return time


def by_macs(node: Node) -> float:
    return 1e-9 * node.macs


def hates(name: str, *sizes: int, by: float = 10) -> Model:
    """A machine on which one layer takes many times as long at some widths."""
    return lambda n: by_macs(n) * (by if module_of(n) == name and n.inputs[1].type.shape[0] in sizes else 1)


def test_a_layer_that_became_slower_is_put_back_and_the_ledger_says_so() -> None:
    result = prune(ladder(), "ratio=0.5, round_to=4", time=timed(hates("0.first", 8, 12)))
    assert widths(result.graph) == {"stem": 8, "0.first": 16, "0.second": 8, "1.first": 8, "1.second": 8, "classifier": 5}
    (entry,) = result.ledger.entries
    (undone,) = (note for note in entry.notes if note.startswith("undone"))
    assert undone == "undone: 8 channels of 0.first (0.first takes 207.4 us pruned, 82.9 us before): put back"


def test_a_layer_is_rounded_up_to_the_next_cheaper_size() -> None:
    machine = Machine(4)
    result = prune(ladder(), "ratio=0.5, round_to=2", time=timed(hates("1.first", 8, 10)), machine=machine)
    assert widths(result.graph)["1.first"] == 12
    assert "rounded up to 12 of 16 channels" in str(result.ledger)


def test_a_layer_that_is_slower_stays_pruned_where_what_hangs_on_it_is_faster_by_more() -> None:
    result = prune(ladder(), "ratio=0.5, round_to=4", time=timed(hates("0.first", 8, by=5)))
    assert widths(result.graph)["0.first"] == 8
    (said,) = (note for note in result.ledger.entries[0].notes if note.startswith("slower"))
    assert said.endswith("1 layers, of which 0.first takes 103.7 us pruned, 82.9 us before")


def test_a_layer_whose_inputs_are_at_fault_gets_them_back() -> None:
    """The classifier's own width does not change: it is slow with 8 of the 16 channels that it reads."""

    def seconds(node: Node) -> float:
        return by_macs(node) * (10000 if module_of(node) == "classifier" and node.inputs[1].type.shape[1] == 8 else 1)

    after = prune(ladder(), "ratio=0.5, round_to=4", time=timed(seconds), machine=Machine(16)).graph
    assert widths(after) == {"stem": 16, "0.first": 8, "0.second": 16, "1.first": 8, "1.second": 16, "classifier": 5}


def test_a_network_that_became_slower_as_a_whole_stays_dense() -> None:
    graph = ladder()

    def time(candidate: Graph) -> Timing:
        return Timing(1.0 if candidate is graph else 1.2)

    result = prune(graph, "ratio=0.5", time=time)
    assert result.graph is graph
    assert "undone: the whole network is slower, 1200.000 ms pruned, 1000.000 ms before" in result.ledger.entries[0].notes


def test_a_network_is_looked_at_twice_before_it_counts_as_slower() -> None:
    graph = ladder()
    for now, stays in (((1.03, 1.0), True), ((1.03, 1.02), False)):
        seen: dict[bool, list[float]] = {True: [1.0, 1.0], False: list(now)}

        def time(candidate: Graph, left: dict[bool, list[float]] = seen) -> Timing:
            return Timing(left[candidate is graph].pop(0))

        assert (prune(graph, "ratio=0.5", time=time).graph is not graph) == stays


def test_a_search_says_what_is_left_after_what_was_undone() -> None:
    """Every narrower layer is slower: all of it is undone, and the budget is not kept."""
    graph = ladder()
    sizes = {module_of(n): n.inputs[1].type.size for n in graph.nodes() if n.op.name in ("conv2d", "linear")}
    time = timed(lambda node: by_macs(node) * (100 if node.inputs[1].type.size < sizes[module_of(node)] else 1))
    result = search(graph, "macs=0.5, round_to=4", time=time)
    assert result.graph is graph
    notes = result.ledger.entries[0].notes
    assert "macs: 100.0% of the dense network's are left (counted)" in notes
    assert any(note.startswith("over the budget of 50.0%") for note in notes)


def test_without_measuring_nothing_is_timed() -> None:
    def time(graph: Graph) -> Timing:
        raise AssertionError("it was timed")

    result = search(ladder(), "latency=0.8, measure=False", time=time)
    assert "modelled" in str(result.ledger)


def test_scores_that_are_no_numbers_are_refused() -> None:
    graph = ladder()
    first = next(n for n in graph.nodes() if n.op.name == "conv2d")
    value = const_value(first.inputs[1]).copy()
    value.flat[3] = np.nan
    with pytest.raises(ModelError, match="NaN or infinite scores"):
        prune(with_operands(graph, {first: (Node(Const(value)), *first.inputs[2:])}), "ratio=0.5")


def test_small_differences_are_chance() -> None:
    before = Timing(1.0, {"a": 0.5, "b": 1e-4, "gone": 0.1})
    now = Timing(1.0, {"a": 0.54, "b": 1e-3, "new": 0.1})
    assert not slower(before, now)
    assert slower(before, Timing(1.0, {"a": 0.56, "b": 1e-2})) == {"a": (0.5, 0.56), "b": (1e-4, 1e-2)}


def test_conversion_efficiency_is_speed_over_multiply_adds() -> None:
    graph = ladder()
    times = timed(lambda n: 1e-9 * (n.macs + 20000))
    result = prune(graph, "ratio=0.5, round_to=4", time=times)
    (entry,) = result.ledger.entries
    before, now = times(graph), times(result.graph)
    wanted = before.seconds / now.seconds / (measure(graph).macs / measure(result.graph).macs)
    assert abs(entry.conversion[NETWORK] - wanted) <= ROUNDING
    assert set(entry.conversion) == {NETWORK, *widths(graph)}
    assert abs(conversion(graph, result.graph, timed(by_macs)(graph), timed(by_macs)(result.graph))["stem"] - 1) <= ROUNDING
    assert f"conversion efficiency: network {wanted:.0%}" in str(result.ledger)
    assert Ledger.from_json(result.ledger.as_json()).entries[0].conversion == entry.conversion


def test_measuring_is_an_option() -> None:
    def never(graph: Graph) -> Timing:
        raise AssertionError("it was measured")

    assert not prune(ladder(), "measure=False", time=never).ledger.entries[0].conversion
    assert not prune(ladder()).ledger.entries[0].conversion
    (entry,) = prune(ladder(), "measure=True").ledger.entries
    assert entry.conversion
    assert any(note.endswith("(modelled, of the float network: the target is not at hand)") for note in entry.notes)


def test_a_search_pays_too() -> None:
    result = search(chain(), "macs=0.7, round_to=1", time=timed(hates("spare", *range(1, 16))))
    assert widths(result.graph)["spare"] == 16


WRONG_UNDOS = {
    "never widens": ("_widen", lambda *arguments, **more: None),
    "finds nothing slow": ("slower", lambda before, now: {}),
    "blames nobody": ("_responsible", lambda families, keep, name: []),
}


@pytest.mark.parametrize("name", WRONG_UNDOS)
def test_a_wrong_undo_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute, wrong = WRONG_UNDOS[name]
    monkeypatch.setattr(paying, attribute, wrong)
    with pytest.raises(AssertionError):
        test_a_layer_that_became_slower_is_put_back_and_the_ledger_says_so()


def test_families_know_their_levels() -> None:
    channels = channels_of(ladder())
    families = Families.of(channels, {group.number: group.number for group in channels.groups}, 4)
    assert [family.levels for family in families.families] == [(16, 12, 8, 4)] * 3
    assert [family.rounded(9) for family in families.families] == [12] * 3
    graph = families.graph(families.dense)
    arrays = random_inputs(graph, rng_for(0))
    assert interpret(graph, arrays)[0].shape == (1, 5)
    assert PruneSearch(macs=0.5).kind == "macs"
