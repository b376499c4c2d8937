"""Zeros of masked weights: which stay zero while a network is trained, and which learn."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from test_prune import ladder
from torch import nn

import paring
from paring.frontends.torch_module import from_torch, to_torch
from paring.ir import Const, Graph, Input, Loc, Node
from paring.ir.op import Array
from paring.ir.ops import binary, conv, linear, norm, shape


def _add_one(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)


def test_zeros_of_masked_weights_stay_zero_whatever_is_learned() -> None:
    net = paring.compile(ladder(), target="reference", passes="prune-unstructured{ratio=0.75}, finetune", finetune=_add_one)
    stages = dict(zip(net.stages, net.stage_graphs, strict=True))
    after = [node for node in stages["finetune"].nodes() if node.op.name in ("conv2d", "linear")]
    masked = next(graph for name, graph in stages.items() if name.startswith("prune-unstructured"))
    before = [node for node in masked.nodes() if node.op.name in ("conv2d", "linear")]
    for old, new in zip(before, after, strict=True):
        was, now = (node.inputs[1].op.value for node in (old, new))
        assert np.array_equal(was == 0, now == 0)
        assert np.array_equal(now[was != 0], was[was != 0] + 1)
        assert len(new.inputs) == 2 or (new.inputs[2].op.value != 0).any()
    plain = to_torch(masked)
    _add_one(plain)
    assert all((node.inputs[1].op.value != 0).any() for node in from_torch(plain).nodes() if node.op.name == "conv2d")


def _product(form: str, value: Array) -> Graph:
    """x times a weight, with a bias of zeros, in a layer called `a`."""
    outputs, size = value.shape[:2]
    x = Node(Input("x", "float32", (2, size, 3, 3) if form == "conv2d" else (2, size)))
    op = conv.Conv2d() if form == "conv2d" else linear.Linear()
    bias = Node(Const(np.zeros(outputs, "float32")))
    return Graph((x,), (Node(op, [x, Node(Const(value)), bias], Loc("a")),))


@pytest.mark.parametrize(
    ("form", "size", "zeros"),
    [
        ("linear", (1, 64), 32),
        ("linear", (64, 1), 32),
        ("conv2d", (1, 8, 1, 1), 3),
        ("conv2d", (8, 1, 1, 1), 3),
        ("linear", (4, 6), 24),
    ],
)
def test_zeros_stay_in_weights_of_one_output_and_of_zeros_only(form: str, size: tuple[int, ...], zeros: int) -> None:
    value = np.arange(1, np.prod(size) + 1, dtype="float32").reshape(size)
    value.flat[:zeros] = 0
    graph = _product(form, value)
    net = paring.compile(graph, target="reference", passes="finetune", finetune=_add_one)
    (node,) = (node for node in net.stage_graphs[net.stages.index("finetune")].nodes() if node.loc and node.loc.module == "a")
    now, bias = (i.op.value for i in node.inputs[1:])
    assert np.array_equal(now, np.where(value == 0, 0, value + 1))
    assert (bias == 1).all()


def test_zeros_of_one_weight_are_freed_by_its_name() -> None:
    graph = _product("linear", np.zeros((3, 4), "float32"))
    module = to_torch(graph, keep_zeros=True)
    assert list(module.masks) == ["a.weight"]
    del module.masks["a.weight"]
    _add_one(module)
    (node,) = from_torch(module).outputs
    assert (node.inputs[1].op.value == 1).all()


def test_zeros_of_shifts_and_norms_are_learned() -> None:
    """Of rank 2 and more, but no weights that a mask is for."""
    x = Node(Input("x", "float32", (2, 4, 3)))
    zeros = [Node(Const(np.zeros(size, "float32"))) for size in ((1, 4, 1), (4, 3), (4, 3))]
    shift = Node(shape.Broadcast((2, 4, 3)), [zeros[0]])
    y = Node(norm.LayerNorm(1e-5), [Node(binary.Add(), [x, shift], Loc("s")), *zeros[1:]], Loc("n"))
    module = to_torch(Graph((x,), (y,)), keep_zeros=True)
    assert {name for name, _ in module.named_parameters()} == {"s.shift", "n.weight", "n.bias"}
    assert not module.masks


def test_what_is_masked_is_zero_whatever_stands_behind_the_mask() -> None:
    value = np.array([[1, 0, 0], [2, 0, -0.0]], "float32")
    graph = _product("linear", value)
    module = to_torch(graph, keep_zeros=True)
    assert from_torch(module) is graph
    with torch.no_grad():
        module.a.weight.copy_(torch.tensor([[3, -5, float("inf")], [4, float("nan"), -1]]))
    (node,) = from_torch(module).outputs
    assert node.inputs[1].op.value.tobytes() == np.array([[3, 0, 0], [4, 0, 0]], "float32").tobytes()


def test_a_lottery_ticket_is_rewound_to_the_initial_weights() -> None:
    """Frankle and Carbin 2019: the mask is that of the trained network, the weights those that training began with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(8, 6)
    initial = paring.to_torch(model, (x,)).state_dict()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))

    net = paring.compile(
        model.eval(),
        (x,),
        target="reference",
        passes="prune-unstructured{ratio=0.5}, finetune",
        finetune=lambda module: module.load_state_dict(initial) and None,
    )
    first, second = (node for node in net.graph.nodes() if node.op.name == "linear")
    for node, name, trained in ((first, "0.weight", model[0].weight), (second, "2.weight", model[2].weight)):
        value, start = node.inputs[1].op.value, initial[name].numpy()
        assert 0.3 < (value == 0).mean() < 0.7
        assert np.array_equal(value[value != 0], start[value != 0])
        kept, gone = (np.abs(trained.detach().numpy())[mask] for mask in (value != 0, value == 0))
        assert gone.max() <= kept.min()
