"""Models quantized by torchao (PT2E) and by quantization-aware training: imported, folded, and equal to torch's own execution."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")

import torch
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

from paring.frontends.torch_export import import_model
from paring.ir import Graph, Input, Node, interpret, rebuild
from paring.ir.errors import UnsupportedOpsError
from paring.ir.ops import quantized
from paring.passes.manager import Result, run_pipeline
from paring.passes.pipelines import parse_pipeline, pipeline

F = nn.functional
INPUTS, BATCH = 1024, 64
# The step of the fake quantizers' results; the share of results that must be equal, where halves may fall either way.
STEP, MOST = 0.05, 0.999
# A few roundings of float32 each: a product by a scale, a sum, a division.
ROUNDINGS = 8
PASSES = parse_pipeline(
    (*pipeline("simplify", {}), "fold-bn", "decompose", "canonicalize", "fold-qdq", "const-fold{dequantize=True}")
)
ENDS = ("input", "const", "broadcast", "quantize", "dequantize", "descale", "reshape", "transpose")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer, self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.second(self.layer(x)) + x)
        x = F.adaptive_avg_pool2d(F.max_pool2d(x, 2), 1)
        return self.head(x.flatten(1))


class Inverted(nn.Module):
    def __init__(self, given: int, out: int, stride: int) -> None:
        super().__init__()
        wide = 2 * given
        self.layers = nn.Sequential(
            *(nn.Conv2d(given, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        self.residual = given == out and stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.blocks = nn.Sequential(Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1))
        self.head = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 10)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, _ = x.shape
        q, k, v = self.heads(self.first(x)).reshape(n, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        x = x + self.narrow(F.gelu(self.wide(self.second(x))))
        return self.head(x.mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (BATCH, 3, 12, 12)),
    "mobile": (Mobile, (BATCH, 3, 16, 16)),
    "attention": (Attention, (BATCH, 7, 16)),
}


def xnnpack() -> Any:
    return XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))


def inductor() -> Any:
    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())


QUANTIZERS = {"xnnpack": xnnpack, "x86": inductor}


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, dims = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, 0.0, 0.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model.eval(), torch.randn(dims)


def quantize(model: nn.Module, x: torch.Tensor, quantizer: Any) -> torch.fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
        for _ in range(4):
            prepared(torch.randn(x.shape))
        return convert_pt2e(prepared)


class Recorder(torch.fx.Interpreter):
    """torch's own execution, with what every quantize gives on the way."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[tuple[tuple[Any, ...], np.ndarray]] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if str(target) == "quantized_decomposed.quantize_per_tensor.default":
            self.found.append(((args[1], args[2], tuple(result.shape)), result.numpy()))
        return result

    def in_order_of(self, keys: list[tuple[Any, ...]]) -> list[np.ndarray]:
        """The results by their keys; of equal keys the first comes first."""
        left = list(self.found)
        return [left.pop(next(i for i, (found, _) in enumerate(left) if found == key))[1] for key in keys]


def quantizes(graph: Graph) -> tuple[list[Node], list[tuple[Any, ...]]]:
    """The nodes that round to 8 bits, and what tells them apart."""
    nodes = [n for n in graph.nodes() if isinstance(n.op, quantized.Quantize)]
    return nodes, [(n.op.scale, n.op.zero_point, n.type.shape) for n in nodes]  # type: ignore[attr-defined]


def layer_by_layer(graph: Graph) -> Graph:
    """The graph cut at each quantize: it reads the integers before as inputs, and its own are outputs."""
    given: dict[Node, Node] = {}
    ends: list[Node] = []

    def visit(node: Node, inputs: tuple[Node, ...]) -> Node:
        new = node.with_inputs(inputs)
        if not isinstance(node.op, quantized.Quantize):
            return new
        ends.append(new)
        given[node] = Node(Input(f"q{len(given)}", node.type.dtype, node.type.shape))
        return given[node]

    cut = rebuild(graph, visit)
    return Graph((*cut.inputs, *given.values()), (*cut.outputs, *ends))


def floats(graph: Graph) -> set[str]:
    return {n.op.name for n in graph.nodes() if n.type.is_float and n.op.name not in ENDS}


def reasons(result: Result) -> str:
    return "; ".join(f"{rewrite}: {why}" for name, rewrite, why in result.declined if name == "fold-qdq")


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_gives_the_predictions_of_torchao(name: str, kind: str) -> None:
    model, x = model_of(name)
    converted = quantize(model, x, QUANTIZERS[kind]())
    graph = import_model(converted, (x,)).graph
    _, keys = quantizes(graph)
    whole, layers = (run_pipeline(g, PASSES).graph for g in (graph, layer_by_layer(graph)))
    same, steps = 0, np.zeros(256, int)
    for _ in range(INPUTS // BATCH):
        x = torch.randn(x.shape)
        recorder = Recorder(converted)
        with torch.no_grad():
            wanted = recorder.run(x)
        (got,) = interpret(whole, [x.numpy()])
        same += int((got.argmax(1) == wanted.numpy().argmax(1)).sum())
        assert sorted(keys) == sorted(key for key, _ in recorder.found)
        values = recorder.in_order_of(keys)
        for value, found in zip(values, interpret(layers, [x.numpy(), *values])[1:], strict=True):
            steps += np.bincount(np.abs(value.astype(int) - found.astype(int)).ravel(), minlength=256)
    assert same >= MOST * INPUTS
    assert not steps[2:].any(), "no layer is off by more than one step"
    assert steps[1] <= (1 - MOST) / 10 * steps.sum()


@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_a_model_quantized_everywhere_is_integers_everywhere(name: str) -> None:
    model, x = model_of(name)
    graph = import_model(quantize(model, x, xnnpack()), (x,)).graph
    result = run_pipeline(graph, PASSES)
    assert not floats(result.graph)
    assert not reasons(result)


def test_what_a_quantizer_left_in_float_is_explained() -> None:
    model, x = model_of("residual")
    result = run_pipeline(import_model(quantize(model, x, inductor()), (x,)).graph, PASSES)
    assert {"add", "relu", "max_pool2d", "mean"} == floats(result.graph)
    assert "no rule computes this add on integers" in reasons(result)


def test_compiled_it_gives_the_same_bits_as_the_interpreter() -> None:
    import paring

    model, x = model_of("residual")
    converted = quantize(model, x, xnnpack())
    net = paring.compile(converted, (x,), target="x86-avx2")
    (wanted,) = interpret(run_pipeline(import_model(converted, (x,)).graph, PASSES).graph, [x.numpy()])
    np.testing.assert_array_equal(net(x).numpy(), wanted)


# --- quantization-aware training ------------------------------------------------------------------------------------


def test_a_model_trained_with_pt2e_is_imported() -> None:
    model, x = model_of("residual")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_qat=True))
        prepared = prepare_qat_pt2e(torch.export.export(model.train(), (x,)).module(), quantizer)
        move_exported_model_to_train(prepared)
        for _ in range(3):
            prepared(torch.randn(x.shape))
        move_exported_model_to_eval(prepared)
        converted = convert_pt2e(prepared)
    graph = import_model(converted, (x,)).graph
    result = run_pipeline(graph, PASSES)
    assert not floats(result.graph)
    with torch.no_grad():
        wanted = converted(x)
    (got,) = interpret(result.graph, [x.numpy()])
    assert (got.argmax(1) == wanted.numpy().argmax(1)).all()


class FakeQuantized(nn.Module):
    """Every form in which a fake quantizer can be called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("scale", torch.tensor([STEP]))
        self.register_buffer("zero", torch.tensor([7], dtype=torch.int32))
        self.register_buffer("scales", torch.tensor([0.01, 0.02, 0.004, 0.03]))
        self.register_buffer("zeros", torch.zeros(4, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, 0.031, 3, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(self.layer.weight, self.scales, self.zeros, 0, -127, 127)
        y = torch.fake_quantize_per_tensor_affine(F.linear(x, weight, self.layer.bias), self.scale, self.zero, -128, 127)
        z = torch.ops.aten.fake_quantize_per_tensor_affine_cachemask(y, STEP, 7, -128, 127)[0]
        return torch.fake_quantize_per_tensor_affine(torch.relu(z), STEP, 3, 0, 15)


def test_fake_quantizers_are_pairs() -> None:
    torch.manual_seed(0)
    model, x = FakeQuantized().eval(), torch.randn(500, 6) * 3
    graph = import_model(model, (x,)).graph
    result = run_pipeline(graph, PASSES)
    assert not floats(result.graph)
    with torch.no_grad():
        wanted = model(x).numpy()
    (imported,), (got,) = (interpret(g, [x.numpy()]) for g in (graph, result.graph))
    for found in (imported, got):
        steps = np.abs(found - wanted) / np.float32(STEP)
        assert steps.round().max() <= 1
        assert (steps.round() == 0).sum() >= MOST * steps.size
        assert np.abs(steps - steps.round()).max() <= ROUNDINGS * np.finfo(np.float32).eps * 256


def trained() -> tuple[nn.Module, torch.Tensor]:
    """Prepared by torch's eager recipe: observers and fake quantizers are one operator."""
    from torch.ao import quantization as tq

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), torch.randn(32, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = tq.get_default_qat_qconfig("x86")
        tq.prepare_qat(model.train(), inplace=True)
        for _ in range(3):
            model(torch.randn(x.shape))
    return model.eval(), x


def test_fused_observers_that_are_off_are_fake_quantizers() -> None:
    from torch.ao.quantization import disable_observer

    model, x = trained()
    graph = import_model(model.apply(disable_observer), (x,)).graph
    with torch.no_grad():
        wanted = model(x).numpy()
    (got,) = interpret(graph, [x.numpy()])
    assert np.abs(got - wanted).max() <= ROUNDINGS * np.spacing(np.abs(wanted).max())
    assert "conv2d" in floats(run_pipeline(graph, PASSES).graph), "its input is not quantized"
    assert "linear" not in floats(run_pipeline(graph, PASSES).graph)


def test_an_observer_that_is_on_is_refused() -> None:
    model, x = trained()
    with pytest.raises(UnsupportedOpsError, match="2 times") as caught:
        import_model(model, (x,))
    assert "disable_observer" in caught.value.where


# --- what is not supported ------------------------------------------------------------------------------------------


class Unusual(nn.Module):
    """Schemes that there are no integers for, one after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.quantized_decomposed
        ones, zeros = torch.ones(4), torch.zeros(4, dtype=torch.int64)
        scale, zero = q.choose_qparams.tensor(x, -128, 127, 1e-5, torch.int8)
        a = q.dequantize_per_tensor.tensor(
            q.quantize_per_tensor.tensor(x, scale, zero, -128, 127, torch.int8), scale, zero, -128, 127, torch.int8
        )
        b = q.dequantize_per_tensor(
            q.quantize_per_tensor(x, 0.1, 0, -32768, 32767, torch.int16), 0.1, 0, -32768, 32767, torch.int16
        )
        c = torch.fake_quantize_per_channel_affine(x, ones, zeros.int(), 1, -128, 127)
        d = torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -1000, 1000)
        weight = torch.arange(16).reshape(4, 4).to(torch.uint8)
        e = q.dequantize_per_channel(weight * 16, ones, zeros + 3, 0, 0, 255, torch.uint8)
        return a + b + c + d + e


def test_unsupported_schemes_are_listed_at_once() -> None:
    with pytest.raises(UnsupportedOpsError) as caught:
        import_model(Unusual(), (torch.randn(4, 4),))
    for reason in (
        "dynamic quantization, where scales depend on the values of a call",
        "int16 is not an 8-bit integer",
        "activations have one scale in all",
        "integers from -1000 to 1000 are more than 8 bits",
        "weights with a zero point for each channel",
    ):
        assert reason in caught.value.where


def test_dynamic_quantizers_are_refused() -> None:
    model, x = model_of("attention")
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    with pytest.raises(UnsupportedOpsError, match="dynamic quantization"):
        import_model(quantize(model, x, quantizer), (x,))


def test_weights_in_disguise_are_signed() -> None:
    """Unsigned weights around 128 are signed ones around 0."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randint(0, 256, (3, 4), dtype=torch.uint8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = torch.ops.quantized_decomposed
            scales, zeros = torch.full((3,), 0.125), torch.full((3,), 128)
            x = q.dequantize_per_tensor(q.quantize_per_tensor(x, 0.5, 2, 0, 255, torch.uint8), 0.5, 2, 0, 255, torch.uint8)
            return F.linear(x, q.dequantize_per_channel(self.weight, scales, zeros, 0, 0, 255, torch.uint8))

    model, x = Shifted(), torch.randn(5, 4) * 4
    result = run_pipeline(import_model(model, (x,)).graph, PASSES)
    assert not floats(result.graph)
    np.testing.assert_array_equal(interpret(result.graph, [x.numpy()])[0], model(x).numpy())
