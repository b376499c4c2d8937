"""The pass quantize: its form as golden files, its numbers, its data, its sensitivity scan, and everything bad given to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from paring.ir import Const, Graph, Input, Loc, Node, interpret, parse, rebuild, show
from paring.ir.errors import ArgumentError, InputError, ModelError, ParingError
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, norm, quantized, reduce, shape, unary
from paring.ir.verify import verify
from paring.passes.compress.layers import Names, is_quantized_weight
from paring.passes.compress.quantization.scan import Ratio
from paring.passes.compress.quantization.units import Flow, Unit, find_units, is_pair
from paring.passes.compress.quantization.weights import scales_for, to_integers
from paring.passes.contract import Lossy, check
from paring.passes.ledger import Ledger
from paring.passes.manager import Result, run_pipeline
from paring.passes.pipelines import LOSSY, parse_pipeline
from paring.testing import check_round_trip, random_graph, random_inputs

pytestmark = pytest.mark.fast

FOLDER = Path(__file__).parent / "golden" / "lossy"
FILES = sorted(FOLDER.glob("*.ir"))
CUT = "# ----\n"
# Noise over signal: 26 dB, what 8 bits make of a few layers.
LITTLE = 0.05
Batches = list[list[Array]]


def batches_for(graph: Graph, count: int = 4, exact: bool = True) -> Batches:
    return [random_inputs(graph, np.random.default_rng(seed), exact) for seed in range(count)]


def run(graph: Graph, pipeline: str, calibration: Batches | None = None, **options: object) -> Result:
    calibration = batches_for(graph) if calibration is None else calibration
    return run_pipeline(graph, parse_pipeline(pipeline), calibration=calibration, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", FILES, ids=[p.stem for p in FILES])
def test_golden(path: Path, update_golden: bool) -> None:
    """Small integers as data, so that ranges and sums are exact everywhere."""
    before, cut, expected = path.read_text().partition(CUT)
    assert cut
    head, given = before[: before.index("graph(")], before[before.index("graph(") :]
    graph = parse(given)
    result = run(graph, head.splitlines()[0].removeprefix("# pipeline: "))
    if update_golden:
        expected = show(result.graph)
        path.write_text(f"{head}{show(graph)}{CUT}{expected}")
    else:
        assert show(graph) == given
    assert len(head.splitlines()) >= 2, "say what the file shows"
    assert show(result.graph) == expected
    check_round_trip(result.graph)


def test_every_lossy_pass_has_a_golden_file() -> None:
    # What a hook of the user does is no text.
    assert {path.name.partition(".")[0] for path in FILES} == set(LOSSY) - {"finetune"}


# --- networks -------------------------------------------------------------------------------------------------------


def weight(rng: np.random.Generator, *dims: int) -> Node:
    return Node(Const((rng.standard_normal(dims) / max(1, np.prod(dims[1:])) ** 0.5).astype("float32")))


def layer(rng: np.random.Generator, x: Node, out: int, name: str, *, kernel: int = 3, groups: int = 1) -> Node:
    pad = kernel // 2
    op = conv.Conv2d(padding=((pad, pad), (pad, pad)), groups=groups)
    return Node(op, [x, weight(rng, out, x.type.shape[1] // groups, kernel, kernel), weight(rng, out)], Loc(name))


def chain(seed: int = 0, depth: int = 4, channels: int = 8) -> Graph:
    """Convolutions with relu and residual sums, a mean, a classifier."""
    rng = np.random.default_rng(seed)
    image = x = Node(Input("x", "float32", (1, channels, 6, 6)))
    for number in range(depth):
        y = Node(unary.Relu(), [layer(rng, x, channels, f"body.{number}")])
        x = Node(unary.Relu(), [Node(binary.Add(), [layer(rng, y, channels, f"body.{number}.second"), x])]) if number % 2 else y
    flat = Node(reduce.Mean((2, 3)), [x])
    logits = Node(linear.Linear(), [flat, weight(rng, 5, channels), weight(rng, 5)], Loc("classifier"))
    return Graph((image,), (logits,))


def noise(before: Graph, after: Graph, batches: Batches) -> float:
    ratio = Ratio()
    for batch in batches:
        for right, found in zip(interpret(before, batch), interpret(after, batch), strict=True):
            ratio.add(right, found)
    return ratio.relative


# --- the form -------------------------------------------------------------------------------------------------------


def assert_form(graph: Graph) -> None:
    """Products that read quantized weights read quantized activations, and no pair stands right before another."""
    for node in graph.nodes():
        if is_pair(node):
            assert not is_pair(node.inputs[0].inputs[0])
        if isinstance(node.op, conv.Conv2d | linear.Linear) and is_quantized_weight(node.inputs[1]):
            (integers, *_) = node.inputs[1].inputs
            assert integers.type.dtype == "int8"
            assert np.abs(integers.op.value.astype(int)).max(initial=0) <= 127
            x = node.inputs[0]
            while not is_pair(x):
                assert isinstance(x.op, shape.Movement) or x.op.name == "max_pool2d", f"{x.op.name} between pair and product"
                x = x.inputs[0]


def test_random_graphs_keep_the_form_and_their_types() -> None:
    found = 0
    for seed in range(30):
        rng = np.random.default_rng((31, seed))
        graph = random_graph(rng, 12, exact=False)
        result = run(graph, "quantize{scan='none'}", batches_for(graph, 2, exact=False))
        verify(result.graph)
        check_round_trip(result.graph)
        assert [n.type for n in result.graph.outputs] == [n.type for n in graph.outputs]
        assert_form(result.graph)
        found += sum(is_pair(n) for n in result.graph.nodes())
    assert found > 120, "nothing was tested"


def test_a_second_run_and_simplification_leave_the_form_alone() -> None:
    graph = run(chain(), "quantize").graph
    again = run_pipeline(graph, parse_pipeline("canonicalize, const-fold, cse, dce, fold-bn, decompose, sink-reshapes"))
    assert sum(map(is_pair, again.graph.nodes())) == sum(map(is_pair, graph.nodes())) > 0
    assert sum(map(is_quantized_weight, again.graph.nodes())) == sum(map(is_quantized_weight, graph.nodes())) > 0


def test_fuel_buys_values_and_weights_one_by_one() -> None:
    graph = chain(depth=1)
    total = sum(run(graph, "quantize").ledger.entries[0].rewrites.values())
    for fuel in range(total + 1):
        result = run(graph, "quantize", fuel=fuel)
        inserted = sum(is_pair(n) or is_quantized_weight(n) for n in result.graph.nodes())
        assert inserted == fuel


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrator", ["minmax", "ema", "percentile", "kl", "mse"])
@pytest.mark.parametrize("activations", ["uint8", "int8"])
def test_eight_bits_lose_little(calibrator: str, activations: str) -> None:
    graph = chain()
    calibration, fresh = batches_for(graph, 16, exact=False), batches_for(graph, 24, exact=False)[16:]
    result = run(graph, f"quantize{{calibrator='{calibrator}', activations='{activations}'}}", calibration)
    assert noise(graph, result.graph, fresh) < LITTLE


def test_more_bits_and_more_scales_lose_less() -> None:
    graph = chain()
    calibration = batches_for(graph, 8, exact=False)
    settings = ("bits=8", "bits=6", "bits=4", "bits=3", "bits=2")
    errors = [noise(graph, run(graph, f"quantize{{{s}}}", calibration).graph, calibration) for s in settings]
    assert errors == sorted(errors)
    tensor = noise(graph, run(graph, "quantize{bits=4, weights='tensor'}", calibration).graph, calibration)
    assert tensor > errors[2]


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_are_symmetric_integers_of_so_many_bits(bits: int) -> None:
    rng = np.random.default_rng(bits)
    most = 2 ** (bits - 1) - 1
    value = rng.standard_normal((6, 5)).astype("float32")
    value[2], value[3, 0] = 0.0, 40.0
    for method in ("minmax", "mse"):
        for per_channel in (True, False):
            scales = scales_for(value, most, per_channel, method)
            q = to_integers(value, scales, most)
            assert scales.dtype == np.float32
            assert scales.shape == (6 if per_channel else 1,)
            assert np.abs(q.astype(int)).max() == most
            assert (q[2] == 0).all()
    least = scales_for(value, most, True, "mse")
    losses = [
        ((to_integers(value, s, most) * s[:, None] - value) ** 2).sum() for s in (least, scales_for(value, most, True, "minmax"))
    ]
    assert losses[0] <= losses[1]


def test_zero_and_tiny_and_constant_networks_give_right_results() -> None:
    rng = np.random.default_rng(0)
    for factor in (0.0, 1e-42, 1e-30, 1e30):
        x = Node(Input("x", "float32", (1, 2, 4, 4)))
        w = Node(Const((rng.standard_normal((3, 2, 3, 3)) * factor).astype("float32")))
        graph = Graph((x,), (Node(unary.Relu(), [Node(unary.Relu(), [Node(conv.Conv2d(), [x, w])])]),))
        for batch in (np.zeros((1, 2, 4, 4), "float32"), np.full((1, 2, 4, 4), 3.0, "float32")):
            result = run(graph, "quantize", [[batch]])
            (right,), (found,) = interpret(graph, [batch]), interpret(result.graph, [batch])
            # One step of the range, and below float32's normal numbers there are no steps at all.
            assert np.abs(found - right).max() <= np.abs(right).max() / 50 + 1e-37
            assert all(np.isfinite(ratio) for ratio in result.ledger.entries[0].sqnr.values())


def test_values_that_calibration_saw_as_zero_only_are_named() -> None:
    graph = reweighted(chain(depth=2), "body.0", lambda array: -np.abs(array))
    calibration = [[np.abs(array) for array in batch] for batch in batches_for(graph)]
    (entry,) = run(graph, "quantize", calibration).ledger.entries
    assert any("0 throughout calibration" in note and "relu" in note for note in entry.notes)
    assert not any("0 throughout" in note for note in run(chain(), "quantize").ledger.entries[0].notes)


def test_values_that_are_not_finite_inside_leave_their_units_in_float() -> None:
    x = Node(Input("x", "float32", (2, 4)))
    rng = np.random.default_rng(0)
    y = Node(linear.Linear(), [x, weight(rng, 4, 4)])
    wild = Node(unary.Log(), [Node(unary.Relu(), [y])])
    graph = Graph((x,), (Node(linear.Linear(), [wild, weight(rng, 3, 4)]),))
    result = run(graph, "quantize")
    assert any("NaN, infinite" in why for _, _, why in result.declined)
    layers = [n for n in result.graph.nodes() if isinstance(n.op, linear.Linear)]
    assert [is_quantized_weight(n.inputs[1]) for n in layers] == [True, False]


@pytest.mark.parametrize("value", [-np.inf, float(np.finfo(np.float32).min), -1e9, -1e4])
@pytest.mark.parametrize("constant", [True, False])
def test_masks_do_not_use_up_the_range(value: float, constant: bool) -> None:
    rng = np.random.default_rng(0)
    q, k = (Node(Input(name, "float32", (1, 4, 8))) for name in "qk")
    keep = np.tril(np.ones((1, 4, 4), bool))
    mask = Node(Const(np.where(keep, 0, value).astype("float32")) if constant else Input("m", "bool", (1, 4, 4)))
    scores = Node(linear.Matmul(), [q, Node(shape.Transpose((0, 2, 1)), [k])])
    if constant:
        masked = Node(binary.Add(), [scores, mask])
    else:
        far = Node(shape.Broadcast((1, 4, 4)), [Node(Const(np.float32(value)))])
        masked = Node(binary.Where(), [mask, scores, far])
    graph = Graph((q, k, *(() if constant else (mask,))), (Node(linear.Matmul(), [Node(norm.Softmax(2), [masked]), k]),))
    calibration = [[*(rng.standard_normal((1, 4, 8)).astype("float32") for _ in "qk"), *([] if constant else [keep])]]
    result = run(graph, "quantize", calibration)
    assert noise(graph, result.graph, calibration) < LITTLE
    assert sum(map(is_pair, result.graph.nodes())) == 3


def test_the_promise_is_the_noise_that_was_measured() -> None:
    graph = chain()
    calibration = batches_for(graph, 4, exact=False)
    result = run(graph, "quantize", calibration)
    (entry,) = result.ledger.entries
    assert isinstance(entry.contract, Lossy)
    assert entry.contract.metric == "noise"
    assert str(result.ledger.contract) == str(entry.contract)
    check(entry.contract, graph, result.graph, calibration[0], metric=lambda g: -noise(graph, g, calibration))


# --- the sensitivity scan -------------------------------------------------------------------------------------------


def reweighted(graph: Graph, name: str, change: Callable[[Array], Array]) -> Graph:
    """The graph with the weight and bias of one layer changed."""

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.loc is not None and node.loc.module == name:
            return node.with_inputs((inputs[0], *(Node(Const(change(i.op.value.copy()))) for i in inputs[1:])))
        return node.with_inputs(inputs)

    return rebuild(graph, visit)


def poisoned(number: int) -> Graph:
    """The same function, but one channel between two layers is a thousand times smaller, and its weights as much larger."""

    def shrink(array: Array) -> Array:
        array[0] /= 1000
        return array

    def grow(array: Array) -> Array:
        if array.ndim == 4:
            array[:, 0] *= 1000
        return array

    return reweighted(reweighted(chain(depth=6), f"body.{number}", shrink), f"body.{number}.second", grow)


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("scan", ["layer", "network"])
def test_the_scan_names_the_poisoned_layer(number: int, scan: str) -> None:
    graph, name = poisoned(number), f"body.{number}.second"
    calibration = batches_for(graph, 4, exact=False)
    result = run(graph, f"quantize{{scan='{scan}'}}", calibration)
    ratios = result.ledger.entries[0].sqnr
    layers = {n: r for n, r in ratios.items() if n.startswith(("body", "classifier"))}
    assert min(layers, key=layers.__getitem__) == name, layers
    assert name in str(result.ledger)


@pytest.mark.parametrize("scan", ["layer", "network", "metric"])
def test_a_budget_leaves_the_poisoned_layer_in_float(scan: str) -> None:
    graph = poisoned(3)
    calibration = batches_for(graph, 4, exact=False)

    def metric(g: Graph) -> float:
        return -100 * noise(graph, g, calibration)

    lost = -metric(run(graph, "quantize", calibration).graph)
    budget = -1.1 * metric(run(graph, "quantize{skip='body.3.second'}", calibration).graph)
    assert budget < lost / 2
    result = run(graph, f"quantize{{budget={budget}, scan='{scan}'}}", calibration, metric=metric)
    (entry,) = result.ledger.entries
    assert -metric(result.graph) <= budget
    assert entry.metric == metric(result.graph)
    assert entry.contract == Lossy("metric", budget)
    left = next(note for note in entry.notes if note.startswith("left in float"))
    assert "body.3.second " in left
    assert left.count(" dB") < len(entry.sqnr) / 2
    assert any("lowest: body.3.second " in note for note in entry.notes) == (scan == "metric")
    nothing = run(graph, "quantize{bits=2, budget=0.0}", calibration, metric=metric)
    assert metric(nothing.graph) == 0


def test_the_ledger_reads_back_with_its_ratios_and_notes() -> None:
    import json

    ledger = run(chain(), "quantize").ledger
    again = Ledger.from_json(json.loads(json.dumps(ledger.as_json())))
    assert again == ledger
    assert again.entries[0].sqnr
    assert any("of multiply-adds between roundings to 8 bits" in note for note in again.entries[0].notes)


def test_the_ledger_says_where_nothing_runs_on_integers() -> None:
    """Sums of 70,000 products may leave 32 bits: the layer is rounded, and stays in float."""
    x = Node(Input("x", "float32", (1, 70_000)))
    graph = Graph((x,), (Node(linear.Linear(), (x, Node(Const(np.ones((3, 70_000), np.float32))))),))
    ledger = run(graph, "quantize, fold-qdq").ledger
    assert ledger.entries[-1].after.integer_share == 0
    assert "no multiply-adds on 8 bits" in str(ledger)
    assert "no multiply-adds on 8 bits" not in str(run(chain(), "quantize").ledger)


# --- units ----------------------------------------------------------------------------------------------------------


def units_of(graph: Graph, skip: str = "") -> list[Unit]:
    return find_units(Flow(graph), Names(skip))


def test_units_have_unique_names_and_share_no_node() -> None:
    for seed in range(40):
        units = units_of(random_graph(np.random.default_rng(seed), 12))
        nodes = [node for unit in units for node in unit.nodes]
        assert len(nodes) == len(set(nodes))
        assert len({unit.name for unit in units}) == len(units)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("", 8),
        ("classifier", 7),
        ("body", 1),
        ("body.0", 7),
        ("body.1", 6),
        ("body.*.second", 6),
        ("body.1, classifier", 5),
        ("*", 0),
    ],
)
def test_layers_are_skipped_by_path_and_by_pattern(skip: str, left: int) -> None:
    result = run(chain(depth=5), f"quantize{{skip='{skip}'}}")
    assert sum(map(is_quantized_weight, result.graph.nodes())) == left


def test_only_a_concat_that_a_unit_reads_ties_its_operands() -> None:
    rng = np.random.default_rng(0)
    x = Node(Input("x", "float32", (1, 4, 3, 3)))
    small, large = layer(rng, x, 4, "small"), layer(rng, x, 4, "large")
    large = large.with_inputs([x, Node(Const(large.inputs[1].op.value * 100)), *large.inputs[2:]])
    outputs = [layer(rng, y, 2, f"after.{i}") for i, y in enumerate((small, large))]
    joined = Node(shape.Concat(1), [small, large])
    for reader in (Node(unary.Exp(), [joined]), layer(rng, joined, 2, "both")):
        after = run(Graph((x,), (*outputs, reader)), "quantize").graph
        scales = {n.op.scale for n in after.nodes() if is_pair(n) and n.inputs[0].inputs[0] is not after.inputs[0]}
        assert len(scales) == (2 if isinstance(reader.op, unary.Exp) else 1)


# --- bad input ------------------------------------------------------------------------------------------------------


def with_value(value: float) -> Callable[[Graph], Batches]:
    def make(graph: Graph) -> Batches:
        batches = batches_for(graph, 3)
        batches[1][0] = batches[1][0].copy()
        batches[1][0][0, 0, 0, 0] = value
        return batches

    return make


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda g: [], ArgumentError, "needs calibration data"),
        (lambda g: [[]], InputError, "calibration batch 0"),
        (lambda g: [*batches_for(g), [np.zeros((1, 8, 6, 5), "float32")]], InputError, "calibration batch 4"),
        (lambda g: [[np.zeros((1, 8, 6, 6), "float64")]], InputError, "expected float32"),
        (with_value(np.nan), InputError, r"NaN or infinite\n.*calibration batch 1, input x"),
        (with_value(-np.inf), InputError, "calibration batch 1"),
    ],
)
def test_bad_calibration_data_are_refused(make: Callable[[Graph], Batches], error: type[ParingError], message: str) -> None:
    graph = chain()
    with pytest.raises(error, match=message):
        run(graph, "quantize", make(graph))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("calibrator='maxmin'", "unknown calibrator 'maxmin'"),
        ("activations='int16'", "activations is 'int16'"),
        ("weights='row'", "weights is 'row'"),
        ("weight_range='kl'", "weight_range is 'kl'"),
        ("scan='all'", "scan is 'all'"),
        ("bits=1", "weights of 1 bits"),
        ("bits=9", "weights of 9 bits"),
        ("percentile=200.0", "percentile is 200"),
        ("budget=-1", "budget is -1"),
        ("budget=0.5", "a budget needs a metric"),
        ("budget=0.5, scan='none'", "a budget needs a scan"),
        ("scan='metric'", "needs a metric"),
        ("skip='clasifier'", "did you mean 'classifier'"),
        ("skip='body, nowhere.*'", r"'nowhere\.\*', which is no module"),
    ],
)
def test_bad_options_are_refused(options: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(chain(), f"quantize{{{options}}}")


def test_weights_that_are_not_finite_are_refused() -> None:
    for value in (np.nan, np.inf):
        broken = reweighted(chain(), "body.1", lambda array, value=value: np.where(array == array.max(), value, array))  # type: ignore[misc]
        with pytest.raises(ModelError, match=r"weight is NaN[\s\S]*body\.1"):
            run(broken, "quantize")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda g: float("nan"), "the metric is nan"),
        (lambda g: 1 / 0, "the metric raised ZeroDivisionError"),
        (lambda g: "high", "the metric gives a str"),
        (lambda g: None, "the metric gives None"),
    ],
)
def test_a_bad_metric_is_refused(metric: Callable[[Graph], float], message: str) -> None:
    for options in ("", "{budget=0.5}"):
        with pytest.raises(ArgumentError, match=message):
            run(chain(), f"quantize{options}", metric=metric)


def test_nothing_to_quantize_is_no_error() -> None:
    x = Node(Input("x", "int64", (2,)))
    graph = Graph((x,), (Node(unary.Relu(), [x]),))
    assert run(graph, "quantize").graph is graph


def test_quantized_ops_are_used() -> None:
    names = {n.op.name for n in run(chain(), "quantize").graph.nodes()}
    assert {quantized.Quantize.name, quantized.Dequantize.name, quantized.DequantizeChannels.name} <= names
