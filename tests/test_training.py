"""Graphs as torch modules: the same results, gradients that are right, weights back; what a hook may do, and may not."""

from __future__ import annotations

import copy
import zlib

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from test_prune import ladder
from test_quantize import layer, weight
from torch import nn

import paring
from paring.compiler import graph_signature
from paring.frontends.torch_module import TrainableGraph, from_torch, gradients, to_torch
from paring.frontends.torch_ops import TORCH, is_plain
from paring.ir import OPS, Const, Graph, Input, Loc, Node, interpret, magnitude_bound, show
from paring.ir.errors import ArgumentError, InputError, ParingError, UnsupportedOpsError
from paring.ir.op import Array, Op
from paring.ir.ops import binary, index, linear, norm, quantized, shape, unary
from paring.ir.types import BYTES, DTYPES, TensorType
from paring.passes.contract import ulps_apart
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline
from paring.testing import random_graph, random_inputs
from paring.training import loss_gradients

# Roundings of torch at each node, in ulps of the magnitude bound: its functions are good to a few of them.
ULPS = 4.0
# Relative error of central differences in float64 against gradients in float32.
SLOPE_ERROR = 1e-3
# What torch does not compute for us: of targets and their layouts, and of 8-bit integers.
WITHOUT_A_ROW = {
    *("input", "const", "region", "layout_transform", "pack_conv_weight", "pack_linear_weight", "integer_attention"),
    *("sparse_conv2d", "sparse_linear", "winograd_conv2d"),
    *("quantize", "dequantize", "dequantize_channels", "descale", "requantize", "quantized_mul", "lookup"),
}


def run(module: nn.Module, arrays: list[Array]) -> list[Array]:
    with torch.no_grad():
        found = module(*(torch.from_numpy(np.array(array)) for array in arrays))
    return [y.numpy() for y in (found if isinstance(found, tuple) else (found,))]


def check_same(graph: Graph, arrays: list[Array], exact: bool) -> None:
    """Raise AssertionError unless torch gives what the interpreter does: the same values where sums are exact."""
    found, wanted = run(to_torch(graph), arrays), interpret(graph, arrays)
    _, bounds = magnitude_bound(graph, arrays)
    for y, right, bound in zip(found, wanted, bounds, strict=True):
        assert (y.dtype, y.shape) == (right.dtype, right.shape)
        if exact:
            assert np.array_equal(y, right)
        elif y.size:
            assert ulps_apart(right, y, bound).max() <= ULPS


# --- the same results ------------------------------------------------------------------------------------------------


def test_every_operator_has_a_row_or_a_reason() -> None:
    assert {name for name, cls in OPS.items() if cls not in TORCH} == WITHOUT_A_ROW


def operand(rng: np.random.Generator, op: Op, position: int, types: tuple[TensorType, ...]) -> Array:
    t = types[position]
    low, high = getattr(op, "sample_range", (-3.0, 3.0))
    if isinstance(op, norm.BatchNorm) and position == 4:
        low = 0.5
    if isinstance(op, index.Gather | index.GatherElements) and position == 1:
        # Out of range too: they are clamped.
        low, high = -1.0, types[0].shape[op.axis] + 2.0
    if DTYPES[t.dtype].kind == "bool":
        return rng.random(t.shape) < 0.5
    return np.asarray(rng.random(t.shape) * (high - low) + low).astype(t.dtype)


@pytest.mark.parametrize("name", [name for name, cls in OPS.items() if cls in TORCH])
def test_operators_compute_what_the_interpreter_does(name: str) -> None:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    tried = 0
    for op, types in OPS[name].samples(rng):
        inputs = tuple(Node(Input(f"x{i}", t.dtype, t.shape)) for i, t in enumerate(types))
        graph = Graph(inputs, (Node(op, inputs),))
        if any(t.dtype in BYTES for t in types) or not is_plain(op):
            with pytest.raises(ParingError, match=r"lowered to a target|no torch operator"):
                to_torch(graph)
            continue
        arrays = [operand(rng, op, i, types) for i in range(len(types))]
        if isinstance(op, binary.FloorDiv | binary.Remainder):
            arrays[1] = np.maximum(arrays[1], 1)
        tried += 1
        check_same(graph, arrays, exact=False)
    assert tried


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
@pytest.mark.parametrize("op", [binary.FloorDiv(), binary.Remainder()])
def test_whole_numbers_are_divided_by_zero_and_overflow_as_the_ir_says(op: Op, dtype: str) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    numbers = np.array([low, low + 1, -7, -1, 0, 1, 7, high], dtype)
    x, y = (a.ravel() for a in np.meshgrid(numbers, numbers))
    inputs = tuple(Node(Input(name, dtype, x.shape)) for name in "xy")
    check_same(Graph(inputs, (Node(op, inputs),)), [x, y], exact=True)


@pytest.mark.parametrize("exact", [True, False])
def test_random_graphs_compute_the_same(exact: bool, trials: int) -> None:
    for seed in range(trials):
        graph = random_graph(np.random.default_rng((71, seed)), 14, exact)
        check_same(graph, random_inputs(graph, np.random.default_rng((72, seed)), exact), exact)


def test_other_numbers_of_rows_are_other_calls() -> None:
    graph = ladder()
    module = to_torch(graph)
    images = torch.randn(7, 3, 6, 6)
    with torch.no_grad():
        apart = torch.cat([module(image[None]) for image in images])
        assert (module(images) - apart).abs().max() <= ULPS * torch.finfo(torch.float32).eps * apart.abs().max()
        three = to_torch(Graph(graph.inputs, (Node(binary.Add(), graph.outputs * 2),)))
        assert (three(x=images) - 2 * apart).abs().max() <= 4 * ULPS * torch.finfo(torch.float32).eps * apart.abs().max()


def test_a_last_call_that_is_not_full_is_cut() -> None:
    x = Node(Input("x", "float32", (4, 3)))
    rng = np.random.default_rng(0)
    module = to_torch(Graph((x,), (Node(linear.Linear(), [x, weight(rng, 2, 3)]),)))
    rows = torch.randn(10, 3)
    with torch.no_grad():
        assert torch.equal(module(rows)[:4], module(rows[:4]))
        assert module(rows).shape == (10, 2)
        assert torch.equal(module(rows[:1]), module(rows)[:1])


def test_rows_without_elements_are_calls_too() -> None:
    x = Node(Input("x", "float32", (2, 0, 3)))
    module = to_torch(Graph((x,), (Node(linear.Linear(), [x, weight(np.random.default_rng(0), 5, 3)]),)))
    with torch.no_grad():
        assert module(torch.zeros(6, 0, 3)).shape == (6, 0, 5)
        assert module(torch.zeros(3, 0, 3)).shape == (3, 0, 5)


@pytest.mark.parametrize(
    ("shapes", "message"), [([(1, 3, 6)], "has the shape"), ([(1, 3, 6, 5)], "has the shape"), ([], "takes 1 tensors, got none")]
)
def test_tensors_that_do_not_fit_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        to_torch(ladder())(*(torch.zeros(shape) for shape in shapes))


# --- gradients, and the way back --------------------------------------------------------------------------------------


def test_gradients_are_those_of_central_differences() -> None:
    graph = ladder(4, 1)
    (x,) = random_inputs(graph, np.random.default_rng(0), exact=False)
    module = to_torch(graph)
    found = gradients(module, (module(torch.from_numpy(x)) ** 2).sum())
    rng, step = np.random.default_rng(1), 1e-4
    for (reader, position), gradient in found.items():
        source = reader.inputs[position]
        direction = rng.standard_normal(source.type.shape)

        def loss(sign: int, source: Node = source, direction: Array = direction) -> float:
            moved = Node(Const(source.op.value.astype(np.float64) + sign * step * direction))
            values = {source: moved}
            new: dict[Node, Node] = {}
            for node in graph.nodes():
                wide = Node(Const(node.op.value.astype(np.float64))) if isinstance(node.op, Const) else None
                wide = Node(Input("x", "float64", node.type.shape)) if isinstance(node.op, Input) else wide
                new[node] = values.get(node) or wide or Node(node.op, [new[i] for i in node.inputs])
            double = Graph(tuple(new[i] for i in graph.inputs), tuple(new[o] for o in graph.outputs))
            return float((interpret(double, [x.astype(np.float64)])[0] ** 2).sum())

        slope = (loss(1) - loss(-1)) / (2 * step)
        assert abs(slope - (gradient * direction).sum()) <= SLOPE_ERROR * (abs(slope) + np.abs(gradient * direction).sum())
    assert len(found) == sum(len(node.inputs) - 1 for node in graph.nodes() if node.op.name in ("conv2d", "linear"))


def test_a_graph_comes_back_as_it_was_and_as_it_was_trained() -> None:
    graph = ladder()
    module = to_torch(graph)
    assert from_torch(module) is graph
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    again = from_torch(module)
    assert show(again) != show(graph)
    arrays = random_inputs(graph, np.random.default_rng(0))
    check_same(again, arrays, exact=False)
    for a, b in zip(run(to_torch(again), arrays), run(module, arrays), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(graph.nodes(), again.nodes(), strict=True):
        assert (a.op.name, a.type, a.loc) == (b.op.name, b.type, b.loc)


def test_parameters_have_the_names_of_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
    module = paring.to_torch(model, (torch.zeros(1, 3, 6, 6),))
    assert [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias", "4.weight", "4.bias"]
    net = paring.compile(model, (torch.zeros(1, 3, 6, 6),), target="reference", passes="prune-channels{ratio=0.5}")
    assert [tuple(p.shape) for p in paring.to_torch(net).parameters()] == [(2, 3, 3, 3), (2,), (5, 32), (5,)]


def test_equal_vectors_are_apart_and_one_matrix_stays_one() -> None:
    x = Node(Input("x", "float32", (2, 4)))
    shared, bias = Node(Const(np.eye(4, dtype="float32"))), Node(Const(np.zeros(4, "float32")))
    first = Node(linear.Linear(), [x, shared, bias], Loc("first"))
    graph = Graph((x,), (Node(linear.Linear(), [first, shared, bias], Loc("second")),))
    assert [name for name, _ in to_torch(graph).named_parameters()] == ["first.weight", "first.bias", "second.bias"]


def test_a_matrix_of_one_row_is_tied_and_no_shift_of_equal_values_with_it() -> None:
    x = Node(Input("x", "float32", (2, 4)))
    row, bias = Node(Const(np.zeros((1, 4), "float32"))), Node(Const(np.zeros(1, "float32")))
    moved = Node(binary.Add(), [x, Node(shape.Broadcast((2, 4)), [row])], Loc("s"))
    heads = tuple(Node(linear.Linear(), [of, row, bias], Loc(name)) for of, name in ((x, "a"), (moved, "b")))
    assert {name for name, _ in to_torch(Graph((x,), heads)).named_parameters()} == {"a.weight", "a.bias", "s.shift", "b.bias"}


def test_what_is_no_weight_is_not_learned() -> None:
    x = Node(Input("x", "float32", (2, 4)))
    mask = Node(Const(np.array([0, 0, 0, -1e9], "float32")))
    half = Node(Const(np.array([0.5], "float32")))
    y = Node(binary.Add(), [x, Node(OPS["broadcast"]((2, 4)), [mask])])  # type: ignore[call-arg]
    y = Node(binary.Mul(), [y, Node(OPS["broadcast"]((2, 4)), [half])])  # type: ignore[call-arg]
    module = to_torch(Graph((x,), (y,)))
    assert not list(module.parameters())
    assert copy.deepcopy(module).program is module.program


def test_what_torch_cannot_train_is_named_at_once() -> None:
    x = Node(Input("x", "float32", (2, 4)))
    q = Node(quantized.Quantize(scale=0.5), [x])
    with pytest.raises(UnsupportedOpsError, match=r"quantize \(1\), dequantize \(1\)"):
        to_torch(Graph((x,), (Node(quantized.Dequantize(0.5), [q]),)))
    graph = run_pipeline(ladder(), parse_pipeline("layout{block=8, group=1}")).graph
    with pytest.raises(ArgumentError, match="lowered to a target"):
        to_torch(graph)


def _half(module: TrainableGraph) -> None:
    module.half()


def _reshaped(module: TrainableGraph) -> None:
    module.classifier.weight = nn.Parameter(torch.zeros(5, 7))


def _lost(module: TrainableGraph) -> None:
    del module.classifier.weight


def _added(module: TrainableGraph) -> None:
    module.adapter = nn.Linear(2, 2)


def _ruined(module: TrainableGraph) -> None:
    with torch.no_grad():
        module.classifier.weight[0, 0] = float("nan")


WRONG_HOOKS = {
    "another type": _half,
    "is of another type": _reshaped,
    "lost its parameter": _lost,
    "a new parameter": _added,
    "is NaN or infinite": _ruined,
    r"raised ZeroDivisionError at tests/test_training\.py:": lambda module: 1 / 0,
    "gives an int": lambda module: 3,
    "gives a Sequential": lambda module: nn.Sequential(),
    "gives a TrainableGraph, not the module it was given": copy.deepcopy,
}


@pytest.mark.parametrize("message", WRONG_HOOKS)
def test_a_hook_that_does_something_else_is_refused(message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        paring.compile(ladder(), target="reference", passes="prune-channels, finetune", finetune=WRONG_HOOKS[message])


def test_a_masked_parameter_of_another_shape_is_refused() -> None:
    def resized(module: nn.Module) -> None:
        module.classifier.weight.data = module.classifier.weight.data[:3]

    with pytest.raises(ArgumentError, match="is of another shape"):
        paring.compile(ladder(), target="reference", passes="prune-unstructured, finetune", finetune=resized)


def test_modules_that_are_none_of_ours_are_refused() -> None:
    with pytest.raises(ArgumentError, match="a Linear is no module made from a graph"):
        paring.from_torch(nn.Linear(2, 2))


# --- the hook in a pipeline --------------------------------------------------------------------------------------------


def test_the_hook_trains_between_the_steps() -> None:
    seen = []

    def hook(module: nn.Module) -> nn.Module:
        seen.append(tuple(module.stem.weight.shape))
        with torch.no_grad():
            module.classifier.bias.fill_(len(seen))
        return module

    steps = "prune-channels{ratio=0.5, round_to=1}, finetune, prune-channels{ratio=0.5, round_to=1}, finetune"
    net = paring.compile(ladder(), target="reference", passes=steps, finetune=hook)
    assert seen == [(8, 3, 3, 3), (4, 3, 3, 3)]
    (last,) = (node for node in net.graph.nodes() if node.op.name == "linear")
    assert (last.inputs[2].op.value == 2).all()
    assert "5 weights trained, in 1 constants" in str(net.ledger)


def test_a_hook_and_its_pass_belong_together() -> None:
    with pytest.raises(ArgumentError, match="the pass finetune needs a hook"):
        paring.compile(ladder(), target="reference", passes="finetune")
    with pytest.raises(ArgumentError, match="the pass finetune is not among the passes"):
        paring.compile(ladder(), target="reference", passes="prune-channels", finetune=lambda module: None)
    with pytest.raises(ArgumentError, match="finetune is an int"):
        paring.compile(ladder(), target="reference", passes="finetune", finetune=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="stands after quantize"):
        paring.compile(ladder(), target="reference", passes="quantize, finetune", finetune=lambda module: None)


def test_hooks_and_gradients_work_where_the_caller_infers() -> None:
    seen = []

    def hook(module: nn.Module) -> None:
        module(torch.ones(1, 3, 6, 6)).sum().backward()
        seen.append(all(p.grad is not None for p in module.parameters()))

    data = [np.ones((1, 3, 6, 6), "float32")] * 2
    passes = "prune-channels{criterion='taylor'}, finetune"
    with torch.inference_mode():
        net = paring.compile(ladder(), target="reference", passes=passes, calibration=data, finetune=hook)
        assert torch.is_inference_mode_enabled()
    assert seen == [True]
    plain = paring.compile(ladder(), target="reference", passes=passes, calibration=data, finetune=hook)
    assert show(net.graph) == show(plain.graph)


def test_a_batchs_gradients_leave_torch_as_it_was() -> None:
    data = [[np.ones((1, 3, 6, 6), "float32")]] * 2
    with torch.no_grad():
        for _ in loss_gradients(None, data, graph_signature(ladder()))(ladder()):
            assert not torch.is_grad_enabled()


# --- gradients for criteria ---------------------------------------------------------------------------------------------


def test_the_users_loss_is_given_the_models_outputs_and_the_batch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.last(torch.relu(self.hidden(x)))}

    torch.manual_seed(0)
    batches = [torch.randn(3, 4) for _ in range(2)]
    seen = []

    def loss(outputs: dict[str, torch.Tensor], batch: int) -> torch.Tensor:
        seen.append((sorted(outputs), batch))
        return outputs["logits"][:, 0].sum()

    options = {"target": "reference", "calibration": batches}
    passes = "prune-channels{criterion='taylor', round_to=1}"
    paring.compile(Two().eval(), (batches[0],), passes=passes, loss=loss, **options)
    assert seen == [(["logits"], 0), (["logits"], 1)]
    for wrong, message in ((lambda y, i: 1 / 0, "the loss raised"), (lambda y, i: 3.0, "has no gradient")):
        with pytest.raises(ArgumentError, match=message):
            paring.compile(Two().eval(), (batches[0],), passes=passes, loss=wrong, **options)
    with pytest.raises(ArgumentError, match="needs calibration data"):
        paring.compile(Two().eval(), (batches[0],), target="reference", passes=passes)
    with pytest.raises(ArgumentError, match="a loss was given"):
        paring.compile(Two().eval(), (batches[0],), target="reference", passes="prune-channels", loss=loss)


@pytest.mark.parametrize("criterion", ["taylor", "snip"])
def test_a_channel_that_the_loss_does_not_hang_on_goes_first(criterion: str) -> None:
    """Large weights that nobody listens to: magnitude keeps them, gradients do not."""
    rng = np.random.default_rng(0)
    x = Node(Input("x", "float32", (4, 6)))
    first = rng.standard_normal((8, 6)).astype("float32")
    second = rng.standard_normal((3, 8)).astype("float32")
    first[[1, 4, 6]] *= 50
    second[:, [1, 4, 6]] = 0
    hidden = Node(unary.Relu(), [Node(linear.Linear(), [x, Node(Const(first))], Loc("a"))])
    graph = Graph((x,), (Node(linear.Linear(), [hidden, Node(Const(second))], Loc("b")),))
    data = [rng.standard_normal((4, 6)).astype("float32") for _ in range(3)]
    wanted = np.delete(first, [1, 4, 6], 0)
    for name, same in ((criterion, True), ("l2", False)):
        passes = f"prune-channels{{ratio=0.375, criterion='{name}', round_to=1}}"
        net = paring.compile(graph, target="reference", passes=passes, calibration=data)
        (kept,) = (n.inputs[1].op.value for n in net.graph.nodes() if n.loc and n.loc.module == "a")
        assert np.array_equal(kept, wanted) == same
    net = paring.compile(
        graph, target="reference", passes=f"prune-unstructured{{ratio=0.375, criterion='{criterion}'}}", calibration=data
    )
    (masked,) = (n.inputs[1].op.value for n in net.graph.nodes() if n.loc and n.loc.module == "a")
    assert not masked[[1, 4, 6]].any()


def test_layers_of_the_planted_ladder_have_gradients_by_the_default_loss() -> None:
    rng = np.random.default_rng(3)
    image = Node(Input("x", "float32", (1, 3, 6, 6)))
    graph = Graph((image,), (layer(rng, layer(rng, image, 4, "a"), 4, "b"),))
    data = [rng.standard_normal((1, 3, 6, 6)).astype("float32") for _ in range(2)]
    net = paring.compile(graph, target="reference", passes="prune-channels{criterion='snip', round_to=1}", calibration=data)
    assert "2 of 8 channels removed" in str(net.ledger)
