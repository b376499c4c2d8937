"""Quantization through `paring.compile`: calibration data in all their forms, compiled runs, progress, the saved ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tvm")

import torch

import paring
from paring import calibration as host
from paring import errors
from paring.backends import targets
from paring.bench.networks import small_resnet
from paring.compiler import import_any
from paring.ir import interpret
from paring.passes.compress.quantization.units import is_pair
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline, pipeline

NOISE = 0.02


def images(count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


class TwoInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.fc.weight.sum() * 0 + x + y))


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize(
    "form",
    [
        lambda: images(),
        lambda: [(x,) for x in images()],
        lambda: [[x] for x in images()],
        lambda: [x.numpy() for x in images()],
        lambda: [{"x": x} for x in images()],
        lambda: (x for x in images()),
        lambda: torch.stack(images()),
    ],
    ids=["tensors", "tuples", "lists", "numpy", "dicts", "generator", "stacked"],
)
def test_calibration_data_come_in_many_forms(form: Callable[[], Any]) -> None:
    model, (x,) = small_resnet()
    net = paring.compile(model, (x,), target="reference", passes="quantize", calibration=form())
    with torch.no_grad():
        assert relative(net(x), model(x)) < NOISE
    assert net.stages[-1] == "quantize"
    assert "batch_norm" not in net.ir()
    (entry,) = [e for e in net.ledger.entries if e.name == "quantize"]
    assert "stages.2.conv2" in entry.sqnr


def test_models_of_two_inputs_take_tuples_and_dicts() -> None:
    model = TwoInputs().eval()
    x, y = torch.randn(2, 6), torch.randn(2, 6)
    for batches in ([(x, y)], [{"x": x, "y": y}]):
        net = paring.compile(model, (x, y), target="reference", passes="quantize", calibration=batches)
        with torch.no_grad():
            assert relative(net(x, y), model(x, y)) < NOISE


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], errors.ArgumentError, "are empty"),
        (3, errors.ArgumentError, "calibration is an int"),
        (None, errors.ArgumentError, "needs calibration data"),
        ([torch.randn(2, 1, 8, 8)], errors.InputError, "calibration batch 0"),
        ([*images(), torch.randn(1, 1, 8, 9)], errors.InputError, "calibration batch 4"),
        ([(images()[0], torch.tensor(3))], errors.InputError, "no labels"),
        ([images()[0].double()], errors.InputError, "dtype float64"),
        ([{"image": images()[0]}], errors.InputError, "calibration batch 0"),
        (["x"], errors.InputError, "calibration batch 0"),
        ([images()[0], images()[0] * torch.nan], errors.InputError, "NaN or infinite"),
    ],
)
def test_bad_calibration_data_are_refused(data: Any, error: type[errors.ParingError], message: str) -> None:
    model, (x,) = small_resnet()
    with pytest.raises(error, match=message):
        paring.compile(model, (x,), target="reference", passes="quantize", calibration=data)


def test_data_without_a_pass_that_uses_them_are_refused() -> None:
    model, (x,) = small_resnet()
    with pytest.raises(errors.ArgumentError, match="no pass that uses them"):
        paring.compile(model, (x,), target="reference", calibration=images())


def test_progress_and_metric_are_told() -> None:
    model, (x,) = small_resnet()
    label = int(model(x).argmax())
    told: list[tuple[str, int, int]] = []
    net = paring.compile(
        model,
        (x,),
        target="reference",
        passes="quantize{budget=0.5}",
        calibration=images(),
        metric=lambda f: float(int(f(x).argmax()) == label),
        progress=lambda *step: told.append(step),
    )
    assert ("calibrate", 4, 4) in told
    assert any(stage == "scan" for stage, _, _ in told)
    measured = [e for e in net.ledger.entries if e.metric is not None]
    assert [e.name for e in measured] == ["quantize{budget=0.5}"]
    assert measured[0].notes[0] == "metric 1 before"
    assert net.contract == "Lossy(metric, 0.5)"


def test_a_network_quantized_on_its_first_call_uses_data_given_once() -> None:
    model, (x,) = small_resnet()

    def once() -> Iterator[torch.Tensor]:
        yield from images()

    net = paring.compile(model, target="reference", passes="quantize", calibration=once())
    with torch.no_grad():
        assert relative(net(x), model(x)) < NOISE


@pytest.mark.parametrize("how", ["torch", "compiled"])
def test_quick_runs_agree_with_the_interpreter(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = small_resnet()
    graph = import_any(model, (x,), {}).graph
    graph = run_pipeline(graph, parse_pipeline(pipeline("prepare", {}))).graph
    monkeypatch.setattr(host, "QUICK_FROM_MACS", 0)
    if how == "compiled":
        fails = mock.Mock(side_effect=errors.ParingError("torch does not compute this"))
        monkeypatch.setattr(host.EagerExecutable, "__init__", fails)
    stages: list[str] = []
    run = host.HostRun(targets.resolve("native"), lambda stage, done, total: stages.append(stage))
    batches = [[image.numpy()] for image in images()]
    plain = run_pipeline(graph, parse_pipeline("quantize"), calibration=batches)
    quick = run_pipeline(graph, parse_pipeline("quantize"), calibration=batches, run=run)
    run.close()
    assert ("kernels" in stages) == (how == "compiled")
    pairs = [[n for n in r.graph.nodes() if is_pair(n)] for r in (plain, quick)]
    for one, two in zip(*pairs, strict=True):
        assert abs(one.op.scale / two.op.scale - 1) < 64 * np.finfo(np.float32).eps
    (a,), (b,) = (interpret(r.graph, batches[0]) for r in (plain, quick))
    assert np.abs(a - b).max() <= NOISE * np.abs(a).max()


@pytest.mark.parametrize("compiles", [True, False])
def test_what_torch_cannot_run_after_all_runs_otherwise(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = small_resnet()
    graph = run_pipeline(import_any(model, (x,), {}).graph, parse_pipeline(pipeline("prepare", {}))).graph
    monkeypatch.setattr(host, "QUICK_FROM_MACS", 0)
    fails = mock.Mock(side_effect=RuntimeError("ZeroDivisionError"))
    monkeypatch.setattr(host.EagerExecutable, "run", fails)
    if not compiles:
        monkeypatch.setattr(host, "open_on_host", mock.Mock(side_effect=errors.TargetError("no compiler")))
    run = host.HostRun(targets.resolve("native"), lambda *step: None)
    arrays = [x.numpy()]
    (right,) = interpret(graph, arrays)
    for _ in range(2):
        (found,) = run(graph, arrays)
        assert np.abs(found - right).max() <= NOISE * np.abs(right).max()
    run.close()
    assert fails.call_count == 1
    with pytest.raises(errors.ParingError):
        run(graph, [np.zeros((1, 2), "float32")])


def test_a_foreign_target_is_calibrated_on_this_host() -> None:
    run = host.HostRun(targets.TARGETS["arm"], lambda *step: None)
    assert run.target.device == "host"


def test_the_ledger_is_saved_with_the_network(tmp_path: Path) -> None:
    model, (x,) = small_resnet()
    net = paring.compile(model, (x,), target="native", passes="quantize", calibration=images())
    with torch.no_grad():
        assert relative(net(x), model(x)) < NOISE
    again = paring.load(net.save(tmp_path / "net.paring"))
    assert torch.equal(again(x), net(x))
    kept = {e.name: e.sqnr for e in again.ledger.entries}
    assert kept == {e.name: e.sqnr for e in net.ledger.entries}
    assert kept["quantize"]


def test_ledger_and_profile_say_what_8_bits_do(tmp_path: Path) -> None:
    model, (x,) = small_resnet()
    net = paring.compile(model, (x,), target="native", passes="quantize{skip='stages.1'}", calibration=images())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)}
    quantized = {name: module for name, module in layers.items() if not name.startswith("stages.1")}
    assert quantized.keys() <= net.ledger.sqnr.keys()
    net.save(tmp_path / "net.paring")
    for each in (net, paring.load(tmp_path / "net.paring")):
        profile = each.profile(x, repeats=1)
        rows = {row.kernel.loc.module: row for row in profile.rows if row.kernel.macs and row.kernel.loc}
        assert {name: row.sqnr for name, row in rows.items() if row.sqnr is not None} == {
            n: net.ledger.sqnr[n] for n in quantized
        }
        last = each.ledger.entries[-1].after
        assert last.macs == sum(row.kernel.macs for row in profile.rows)
        assert 0 < profile.integer_share == last.integer_share < 1
        # Packed weights are padded to whole blocks.
        assert profile.saved_bytes == last.saved_bytes >= 3 * sum(m.weight.numel() for m in quantized.values())
        assert f"{profile.integer_share:.1%} of multiply-adds on 8 bits" in str(profile)
        assert each.ledger.on_integers in str(profile)
        assert each.ledger.on_integers in str(each.ledger)
        plain = profile.as_json()
        assert (plain["integer_share"], plain["saved_bytes"]) == (profile.integer_share, profile.saved_bytes)
        assert [row["sqnr"] for row in plain["kernels"]] == [row.sqnr for row in profile.rows]


def test_a_float_network_is_silent_about_8_bits() -> None:
    model, (x,) = small_resnet()
    net = paring.compile(model, (x,), target="native")
    profile = net.profile(x, repeats=1)
    assert (profile.integer_share, profile.saved_bytes, net.ledger.on_integers) == (0.0, 0, "")
    assert "SQNR" not in str(profile)
    assert "8 bits" not in str(profile)
