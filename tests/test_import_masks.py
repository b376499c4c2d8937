"""Models that torch's own tools pruned, and masks from a file: the zeros are constants, and their structure is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.numpy import save_file
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

import paring
from paring.compiler import import_any
from paring.frontends.oracle import TORCH_FACTOR, reference, worst_ratio
from paring.ir import Const, Graph, interpret
from paring.ir.errors import ArgumentError, InputError, ModelError, ParingError
from paring.ir.op import Array
from paring.ir.ops import conv, linear
from paring.passes.manager import Result, run_pipeline
from paring.passes.pipelines import parse_pipeline, with_users

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    """A batch norm to be folded; a linear layer whose weight is used as it is."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    nn.init.uniform_(model[1].running_mean)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def imported(model: nn.Module, passes: str = "import-masks", x: torch.Tensor = X) -> Result:
    return run_pipeline(import_any(model, (x,), {}).graph, with_users((), parse_pipeline(passes)))


def weights(graph: Graph) -> list[tuple[str, Array]]:
    """Of each layer its module path and its weight."""
    found = []
    for node in graph.nodes():
        if isinstance(node.op, conv.Conv2d | linear.Linear):
            assert isinstance(node.inputs[1].op, Const), "a weight is no constant"
            found.append((node.loc.module if node.loc else "", node.inputs[1].op.value))
    return found


def plain(model: nn.Module) -> nn.Sequential:
    """A network without anything of the pruning tools, whose parameters are what they make of them."""
    found = network()
    with torch.no_grad():
        for name in ("0", "3", "7"):
            for parameter in ("weight", "bias"):
                getattr(found.get_submodule(name), parameter).copy_(getattr(model.get_submodule(name), parameter))
    return found


def agrees(result: Result, model: nn.Module, x: torch.Tensor = X) -> bool:
    return worst_ratio(interpret(result.graph, [x.numpy()]), reference(model, (x,))) <= TORCH_FACTOR


def notes(result: Result) -> tuple[str, ...]:
    return result.ledger.entries[0].notes


# --- torch.nn.utils.prune -------------------------------------------------------------------------------------------


def globally(model: nn.Module) -> None:
    prune.global_unstructured([(model[0], "weight"), (model[3], "weight")], pruning_method=prune.L1Unstructured, amount=0.7)


def by_custom_mask(model: nn.Module) -> None:
    mask = torch.zeros(16, 4, 3, 3)
    mask[:, ::2, 1] = 1
    mask[:, 1::2, :, 1] = 1
    prune.custom_from_mask(model[0], "weight", mask)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: prune.l1_unstructured(m[0], "weight", amount=0.5), "unstructured: 0 50.0%"),
        (lambda m: prune.random_unstructured(m[7], "weight", amount=0.25), "unstructured: 7 25.0%"),
        (lambda m: prune.ln_structured(m[3], "weight", amount=0.5, n=2, dim=0), "whole output channels: 3 50.0%"),
        (lambda m: prune.ln_structured(m[3], "weight", amount=0.25, n=1, dim=1), "whole input channels: 3 25.0%"),
        (globally, "unstructured: 0 "),
        (by_custom_mask, "2 patterns of 3 weights, the same for 16 output channels: 0 66.7%"),
        (lambda m: prune.identity(m[3], "weight"), "no zeros: 0 0.0%, 3 0.0%, 7 0.0%"),
    ],
)
def test_models_pruned_by_torch_come_in(change: Callable[[nn.Module], None], said: str) -> None:
    model = network()
    change(model)
    result = imported(model)
    assert any(said in note for note in notes(result)), notes(result)
    for name, w in weights(result.graph):
        assert ((w == 0) == (model.get_submodule(name).weight == 0).numpy()).all(), name
    assert agrees(result, plain(model))


def test_a_pruned_bias_and_two_masks_of_one_weight() -> None:
    model = network()
    prune.l1_unstructured(model[7], "bias", amount=0.5)
    prune.l1_unstructured(model[7], "weight", amount=0.5)
    prune.ln_structured(model[7], "weight", amount=0.5, n=2, dim=0)
    found = dict(weights(imported(model).graph))
    assert ((found["7"] == 0) == (model[7].weight == 0).numpy()).all()


# --- torch.ao.pruning -----------------------------------------------------------------------------------------------


def sparsified(squash: bool, blocks: tuple[int, int] = (1, 4), zeros: int = 2) -> nn.Module:
    model = network()
    level = 1.0 if zeros < blocks[1] else 0.5
    sparsifier = WeightNormSparsifier(sparsity_level=level, sparse_block_shape=blocks, zeros_per_block=zeros)
    sparsifier.prepare(model, [{"tensor_fqn": "7.weight"}])
    sparsifier.step()
    if squash:
        sparsifier.squash_mask()
    return model


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize(("zeros", "said"), [(2, "2:4: 7 50.0%"), (4, "vectors of 4 input channels: 7 50.0%")])
def test_models_of_the_sparsifier_come_in(squash: bool, zeros: int, said: str) -> None:
    """With FakeSparsity as a parametrization, and with the mask squashed into the weight."""
    model = sparsified(squash, zeros=zeros)
    result = imported(model)
    assert any(said in note for note in notes(result)), notes(result)
    assert agrees(result, plain(model))


def test_models_of_wanda_come_in_once_they_are_squashed() -> None:
    """Before that they count norms in a buffer, and are refused."""
    wanda = pytest.importorskip("torchao.sparsity")
    model = network()
    sparsifier = wanda.WandaSparsifier(sparsity_level=0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "7.weight"}])
    model(X)
    sparsifier.step()
    with pytest.raises(ModelError, match="writes into its buffer"):
        imported(copy.deepcopy(model))
    sparsifier.squash_mask()
    assert any("7 50.0%" in note for note in notes(imported(model)))


# --- a file ---------------------------------------------------------------------------------------------------------


def masks(model: nn.Module, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {f"{name}.weight": rng.random(tuple(model.get_submodule(name).weight.shape)) < 0.5 for name in ("0", "3", "7")}


def write(folder: Path, arrays: dict[str, Any]) -> str:
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / "masks.safetensors")
    return f"import-masks{{file={str(folder / 'masks.safetensors')!r}}}"


@pytest.mark.parametrize(
    "rename", [str, lambda n: n.removesuffix(".weight"), lambda n: f"{n}_mask"], ids=["parameter", "module", "mask"]
)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_masks_of_a_file_go_into_the_weights(rename: Callable[[str], str], dtype: str, tmp_path: Path) -> None:
    """They are those of torch's own pruning: the same network comes in either way."""
    given = masks(network())
    text = write(tmp_path, {rename(name): mask.astype(dtype) for name, mask in given.items()})
    result = imported(network(), text)
    by_torch = network()
    for name, mask in given.items():
        prune.custom_from_mask(by_torch.get_submodule(name.removesuffix(".weight")), "weight", torch.tensor(mask))
    for name, w in weights(result.graph):
        assert ((w == 0) == ~given[f"{name}.weight"]).all()
    assert agrees(result, plain(by_torch))
    assert result.ledger.entries[0].rewrites == {"import-masks": 3}


class Attending(nn.Module):
    """One parameter that becomes three layers, and one that is multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.right = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0] @ self.right


def test_a_mask_has_the_shape_of_its_parameter(tmp_path: Path) -> None:
    """Whatever becomes of it: slices, transposes."""
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(1, 5, 8)
    rng = np.random.default_rng(0)
    given = {"attention.in_proj_weight": rng.random((24, 8)) < 0.5, "right": rng.random((8, 6)) < 0.5}
    result = imported(model, write(tmp_path, given), x)
    with torch.no_grad():
        for name, mask in given.items():
            model.get_parameter(name).mul_(torch.tensor(mask))
    assert agrees(result, model, x)
    zero = sum(int((w == 0).sum()) for _, w in weights(result.graph))
    assert zero == sum(int((~mask).sum()) for mask in given.values())


def test_masks_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    given = masks(network())
    bad = {"0.weight": given["0.weight"][:, :2], "3.weight": 0.5 * given["3.weight"], "conv.weight": given["7.weight"]}
    with pytest.raises(InputError) as caught:
        imported(network(), write(tmp_path, {**bad, "7": given["7.weight"], "7.weight_mask": given["7.weight"]}))
    said = str(caught.value)
    assert "4 of 5 masks do not fit" in said
    assert "'0.weight' is of shape (16, 2, 3, 3), its parameter of (16, 4, 3, 3)" in said
    assert "'3.weight' has values that are neither 0 nor 1" in said
    assert "'conv.weight' is no parameter" in said
    assert "'7.weight_mask' is a second mask of one parameter" in said
    assert "parameters: 0.weight, 0.bias" in said
    assert "masks.safetensors" in said


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100, b"PK\x03\x04"])
def test_a_file_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "masks.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError, match="cannot read masks"):
        imported(network(), f"import-masks{{file={str(path)!r}}}")


def test_a_file_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="there are no masks"):
        imported(network(), write(tmp_path, {}))


@pytest.mark.parametrize("text", ["prune-nm, import-masks", "cse, import-masks", "quantize, import-masks"])
def test_masks_come_in_before_all_else(text: str) -> None:
    with pytest.raises(ParingError, match="pass import-masks stands after"):
        with_users((), parse_pipeline(text))


def test_compiled_with_masks_of_a_file(tmp_path: Path) -> None:
    text = write(tmp_path, masks(network()))
    net = paring.compile(network(), (X,), target="reference", passes=f"{text}, prune-unstructured{{ratio=0.8}}")
    assert net.ledger.entries[0].name.startswith("import-masks{file=")
    assert any("79.8% of the 736 weights of 3 layers" in note for entry in net.ledger.entries for note in entry.notes)
