"""Whole programs: structure of inputs and outputs, provenance, tied weights, determinism, fx graphs, deep chains."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paring.frontends.oracle import TORCH_FACTOR, ratios, reference
from paring.frontends.structure import Imported, Record, spec_from_json, spec_to_json
from paring.frontends.torch_export import import_model, import_program
from paring.frontends.torch_fx import import_fx
from paring.ir import Const, Node, interpret, parse, same, show
from paring.ir.errors import ArtifactError
from paring.ir.text import constants


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(y)
        y += x
        return self.relu(y)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer1(self.stem(x)))


class Transformer(nn.Module):
    """Tied embedding, learned positions, a causal mask, pre-norm blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 16, 8))
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        n = tokens.shape[1]
        x = self.embed(tokens) + self.position[:, :n]
        q, k, v = (p.unflatten(-1, (2, 4)).transpose(1, 2) for p in self.qkv(self.norm(x)).chunk(3, -1))
        bias = torch.full((n, n), float("-inf")).triu(1)
        scores = q @ k.transpose(-1, -2) / 2.0 + bias
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e9)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return {"logits": self.out(x), "hidden": x}


def settled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.uniform_(-0.5, 0.5)
    return model.eval()


def agree(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Imported:
    imported = import_model(model, args, kwargs)
    inputs = imported.flatten_inputs(args, kwargs)
    found = ratios(imported, inputs, interpret(imported.graph, inputs), reference(model, args, kwargs))
    assert max(found) <= TORCH_FACTOR, show(imported.graph)
    return imported


def test_cnn_with_provenance() -> None:
    imported = agree(settled(Cnn()), (torch.randn(2, 3, 8, 8),))
    locs = {(n.op.name, n.loc.module): n.loc.source for n in imported.graph.nodes() if n.loc}
    assert ("conv2d", "layer1.0.conv1") in locs
    assert ("const", "layer1.0.conv1.weight") in locs
    assert locs["add", "layer1.1"].startswith("tests/test_frontend_models.py:")
    assert not any(n.loc and "/work" in n.loc.source for n in imported.graph.nodes())


def test_transformer_with_keyword_mask() -> None:
    tokens = torch.tensor([[1, 5, 0, 10]])
    mask = torch.tensor([[1, 1, 1, 0]])
    imported = agree(Transformer().eval(), (tokens,), {"mask": mask})
    assert [n.op.label for n in imported.graph.inputs] == ["tokens", "mask"]
    by_position = imported.flatten_inputs((tokens, mask))
    by_name = imported.flatten_inputs((), {"mask": mask, "tokens": tokens})
    assert all(np.array_equal(a, b) for a, b in zip(by_position, by_name, strict=True))


def test_tied_weights_are_one_constant() -> None:
    imported = import_model(Transformer().eval(), (torch.tensor([[1, 2]]),))
    users = imported.graph.users()
    tied = [n for n in imported.graph.nodes() if isinstance(n.op, Const) and n.type.shape == (11, 8)]
    assert len(tied) == 1
    assert {u.op.name for u in users[tied[0]]} == {"gather", "linear"}


def test_importing_twice_gives_the_same_text() -> None:
    model = settled(Cnn())
    first, second = (import_model(model, (torch.zeros(1, 3, 8, 8),)).graph for _ in range(2))
    assert show(first) == show(second)
    assert same(parse(show(first), constants(first)), first)


def test_later_changes_to_the_model_do_not_reach_the_graph() -> None:
    model, x = nn.Linear(3, 2).eval(), torch.ones(1, 3)
    imported = import_model(model, (x,))
    before = interpret(imported.graph, imported.flatten_inputs((x,)))[0]
    with torch.no_grad():
        model.weight.mul_(2)
    assert np.array_equal(before, interpret(imported.graph, imported.flatten_inputs((x,)))[0])


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Result:
    x: torch.Tensor
    y: torch.Tensor | None = None


torch.export.register_dataclass(Result, serialized_type_name="paring.tests.Result")


class Structured(nn.Module):
    def forward(self, x: torch.Tensor, flag: bool, *, options: dict[str, Any]) -> Any:
        y = x + 1 if flag else x
        return OrderedDict(a=x, b=(y, None, 3, "s", 2.5)), Pair(x, [y, y]), Result(y), {"q": options["q"]}, torch.ones(2)


def structured() -> tuple[Imported, tuple[Any, ...], dict[str, Any]]:
    args, kwargs = (torch.tensor([1.0, 2.0]), True), {"options": {"q": torch.tensor([3.0]), "r": 1}}
    return import_model(Structured().eval(), args, kwargs), args, kwargs


def test_structure_is_kept() -> None:
    imported, args, kwargs = structured()
    outputs = interpret(imported.graph, imported.flatten_inputs(args, kwargs))
    ordered, pair, result, plain, ones = imported.unflatten_outputs(outputs, True)
    assert type(ordered) is OrderedDict
    assert list(ordered) == ["a", "b"]
    assert ordered["b"][1:] == (None, 3, "s", 2.5)
    assert isinstance(pair, Pair)
    assert torch.equal(pair.second[0], torch.tensor([2.0, 3.0]))
    assert isinstance(result, Result)
    assert result.y is None
    assert torch.equal(plain["q"], torch.tensor([3.0]))
    ones[0] = 7
    again = interpret(imported.graph, imported.flatten_inputs(args, kwargs))
    assert torch.equal(imported.unflatten_outputs(again, True)[-1], torch.ones(2))
    assert isinstance(imported.unflatten_outputs(outputs, False)[0]["a"], np.ndarray)


def test_specification_goes_through_json() -> None:
    imported, args, kwargs = structured()
    text = json.dumps(spec_to_json(imported))
    loaded = spec_from_json(json.loads(text))
    assert loaded == imported.signature
    outputs = interpret(imported.graph, loaded.flatten_inputs(args, kwargs))
    ordered, pair, result, _, _ = loaded.unflatten_outputs(outputs, False)
    assert type(ordered) is dict
    assert isinstance(pair, Record)
    assert np.array_equal(pair.first, pair[0])
    assert result.class_name == "Result"
    assert np.array_equal(result["x"], result.x)
    with pytest.raises(AttributeError, match="has no entry"):
        _ = result.nothing


@pytest.mark.parametrize("path", ["labels", "types", "inputs", "outputs", "parameters"])
@pytest.mark.parametrize("damage", [None, 3, [1], {"kind": "odd"}, {"kind": "dict", "keys": ["a"], "children": []}])
def test_damaged_specifications_are_refused(path: str, damage: Any) -> None:
    data = spec_to_json(structured()[0])
    data[path] = damage
    with pytest.raises(ArtifactError):
        spec_from_json(data)


class Passing(nn.Module):
    def forward(self, x: torch.Tensor, unused: torch.Tensor) -> Any:
        return x, x, torch.zeros(2)


def test_unused_inputs_duplicated_and_constant_outputs() -> None:
    args = (torch.ones(3), torch.ones(2, 2))
    imported = agree(Passing(), args)
    assert len(imported.graph.inputs) == 2
    x, again, zeros = imported.unflatten_outputs(interpret(imported.graph, imported.flatten_inputs(args)), True)
    assert torch.equal(x, again)
    assert torch.equal(zeros, torch.zeros(2))


def odd_tensors() -> dict[str, Any]:
    base = torch.arange(12.0).reshape(3, 4)
    read_only = base.numpy().copy()
    read_only.flags.writeable = False
    return {
        "transposed": base.reshape(4, 3).t(),
        "expanded": torch.ones(3, 1).expand(3, 4),
        "strided": torch.arange(24.0).reshape(3, 8)[:, ::2],
        "requires_grad": base.clone().requires_grad_(),
        "parameter": nn.Parameter(base.clone()),
        "numpy": base.numpy(),
        "read_only": read_only,
        "big_endian": base.numpy().astype(">f4"),
        "fortran": np.asfortranarray(base.numpy()),
        "negative_bit": torch.complex(base, base).conj().imag,
    }


@pytest.mark.parametrize("name", odd_tensors())
def test_odd_memory_is_accepted(name: str) -> None:
    imported = import_model(nn.Linear(4, 2).eval(), (torch.zeros(3, 4),))
    value = odd_tensors()[name]
    (array,) = imported.flatten_inputs((value,))
    plain = value.detach().resolve_neg().numpy() if isinstance(value, torch.Tensor) else value
    assert np.array_equal(array, plain)
    assert array.flags.c_contiguous
    assert array.dtype.isnative
    interpret(imported.graph, [array])


def test_aliased_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + 2 * y

    x = torch.ones(3)
    imported = agree(Sum(), (x, x))
    assert len(imported.graph.inputs) == 2


def test_provenance_is_the_users_line_or_none_but_never_one_of_torch() -> None:
    body = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    line = Model.forward.__code__.co_firstlineno + 1
    for model, source in ((Model(), f"tests/test_frontend_models.py:{line}"), (body, "")):
        locs = [n.loc for n in import_model(model.eval(), (torch.ones(1, 2),)).graph.nodes() if n.op.name in ("linear", "relu")]
        assert [loc.source for loc in locs if loc] == [source, source]
        assert all(loc and loc.module for loc in locs)


def test_fx_graph_modules_keep_their_provenance() -> None:
    model, x = settled(Cnn()), torch.randn(1, 3, 8, 8)
    tracer = torch.fx.Tracer()
    tracer.record_stack_traces = True
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    imported = import_fx(traced, (x,))
    assert same(imported.graph, import_model(model, (x,)).graph)
    assert imported.graph.inputs[0].op.label == "x"
    places = {(n.op.name, n.loc.module) for n in imported.graph.nodes() if n.loc}
    assert {("conv2d", "layer1.0.conv1"), ("add", "layer1.1"), ("linear", "head.3")} <= places
    sources = {n.loc.source.partition(":")[0] for n in imported.graph.nodes() if n.loc and n.op.name == "add"}
    assert sources == {"tests/test_frontend_models.py"}


def test_programs_exported_by_the_user() -> None:
    model, x = settled(Cnn()), torch.randn(1, 3, 8, 8)
    program = torch.export.export(model, (x,))
    direct = import_model(model, (x,)).graph
    assert same(import_program(program).graph, direct)
    assert same(import_program(program.run_decompositions({})).graph, direct)


class Scoped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x * 2
        with torch.autocast("cpu", enabled=False):
            z = y + 1
        return z.relu()


def test_gradient_and_autocast_scopes_vanish() -> None:
    x = torch.randn(3)
    agree(Scoped(), (x,))
    imported = import_program(torch.export.export(Scoped(), (x,)))
    used = [n.op.name for n in imported.graph.nodes() if n.op.name not in ("const", "broadcast")]
    assert used == ["input", "mul", "add", "relu"]


class Chain(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in range(self.depth):
            x = torch.sin(x) if step % 2 else x + 0.5
        return x


def test_chains_of_5000_operators() -> None:
    x = torch.ones(2)
    imported = import_model(Chain(5000), (x,))
    steps = [n for n in imported.graph.nodes() if n.op.name in ("add", "sin")]
    assert len(steps) == 5000
    value: Node = imported.graph.outputs[0]
    assert value.type.shape == (2,)
    interpret(imported.graph, imported.flatten_inputs((x,)))
