"""The public face: what a user of `paring.compile` relies on."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tvm")

import torch

import paring
from paring import errors
from paring.bench.networks import small_mobilenet, small_resnet
from paring.ir import Const, Graph, Node, TensorType


def test_importing_is_quick_and_brings_in_neither_torch_nor_tvm() -> None:
    code = "import sys, time; t = time.perf_counter(); import paring; s = time.perf_counter() - t"
    code += "; print(s, 'torch' in sys.modules, 'tvm' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 0.3
    assert out[1:] == ["False", "False"]


def test_a_network_compiled_without_inputs_has_a_version_for_each_signature() -> None:
    model, (x,) = small_resnet()
    net = paring.compile(model)
    with pytest.raises(errors.InputError, match="not compiled yet"):
        _ = net.ledger
    for batch in (1, 3):
        images = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(net(images), model(images))
    assert "2 versions" in repr(net)
    start = time.perf_counter()
    net(x)
    assert time.perf_counter() - start < 1


def test_torch_in_torch_out_and_numpy_in_numpy_out() -> None:
    model, (x,) = small_resnet()
    net = paring.compile(model, x)
    assert isinstance(net(x), torch.Tensor)
    found = net(x.numpy())
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, net(x).numpy())


def test_numpy_examples_will_do_for_a_model_of_torch() -> None:
    model = torch.nn.Linear(3, 3).eval()
    backwards = np.arange(6, dtype=">f4").reshape(2, 3)[::-1]
    expected = model(torch.from_numpy(backwards.astype("float32"))).detach().numpy()
    for net in (paring.compile(model, (backwards,), target="reference"), paring.compile(model, target="reference")):
        np.testing.assert_array_almost_equal_nulp(net(backwards), expected, 8)
    with pytest.raises(errors.InputError, match="array of <U1"):
        paring.compile(model, (np.array(["a"]),), target="reference")


def test_a_closed_network_is_not_compiled_again() -> None:
    net = paring.compile(torch.nn.Linear(3, 3).eval(), target="reference")
    net(torch.ones(1, 3))
    net.close()
    for call in (lambda: net(torch.ones(1, 3)), lambda: net(torch.ones(2, 3)), lambda: net.specialize(torch.ones(3, 3))):
        with pytest.raises(errors.InputError, match="closed"):
            call()


class Shifted(torch.nn.Module):
    def forward(self, x: torch.Tensor, low: float, missing: float) -> torch.Tensor:
        return torch.clamp(x, min=low) + (0.0 if missing != missing else 1.0)


def test_networks_for_infinite_and_missing_constants_are_saved(tmp_path: Path) -> None:
    args = (torch.tensor([-1.0, 2.0]), -float("inf"), float("nan"))
    net = paring.compile(Shifted(), args)
    again = paring.load(net.save(tmp_path / "net.paring"))
    assert torch.equal(again(*args), net(*args))
    with pytest.raises(errors.InputError, match="expected -inf"):
        again(args[0], 0.0, args[2])


def test_an_artifact_whose_inputs_lack_a_tensor_is_refused(tmp_path: Path) -> None:
    path = paring.compile(torch.nn.Linear(3, 3).eval(), (torch.ones(1, 3),)).save(tmp_path / "net.paring")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["structure"]["inputs"]["children"][0]["children"] = [{"kind": "constant", "value": 1}]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(errors.ArtifactError, match="contradicts itself"):
        paring.load(path)


def test_saved_networks_run_in_another_process(tmp_path: Path) -> None:
    model, (x,) = small_mobilenet()
    net = paring.compile(model, (x,))
    path = net.save(tmp_path / "net.paring")
    np.save(tmp_path / "x.npy", x.numpy())
    code = f"""
import numpy as np, paring
net = paring.load({str(path)!r})
np.save({str(tmp_path / "y.npy")!r}, net(np.load({str(tmp_path / "x.npy")!r})))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.array_equal(np.load(tmp_path / "y.npy"), net(x).numpy())
    again = paring.load(path, rebuild=True)
    assert np.array_equal(again(x).numpy(), net(x).numpy())
    assert str(again.ledger.contract) == net.contract


def test_compiling_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    model, args = small_mobilenet()
    first, second = (paring.compile(model, args) for _ in range(2))
    assert first.ir() == second.ir()
    one, two = first.save(tmp_path / "a.paring"), second.save(tmp_path / "b.paring")
    for name in ("manifest.json", "graph.ir", "weights.safetensors", "lib.so", "report.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_dumps_have_each_changed_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, args = small_resnet()
    monkeypatch.setenv("PARING_DUMP", str(tmp_path / "dump"))
    net = paring.compile(model, args, target="reference", pipeline="canonicalize, fold-bn, fuse")
    files = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert files[0] == "000_import.ir"
    assert "002_fold-bn.ir" in files
    assert json.loads((tmp_path / "dump" / "ledger.json").read_text())["contract"] == net.contract
    assert net.ir(after="import") != net.ir(after="fold-bn")
    with pytest.raises(errors.ArgumentError, match="no pass 'layout'"):
        net.ir(after="layout")


def test_the_metric_goes_into_the_ledger() -> None:
    model, (x,) = small_resnet()
    label = int(model(x).argmax())
    net = paring.compile(model, (x,), target="reference", pipeline="fold-bn", metric=lambda f: float(int(f(x).argmax()) == label))
    assert [entry.metric for entry in net.ledger.entries] == [1.0]


def test_profile_shows_where_time_goes_and_where_it_comes_from() -> None:
    model, args = small_resnet()
    profile = paring.compile(model, args).profile(*args, repeats=3)
    plain = json.loads(json.dumps(profile.as_json()))
    assert plain["threads"] == paring.get_num_threads()
    convolutions = [row for row in plain["kernels"] if row["kind"] == "conv2d"]
    assert len(convolutions) == 9
    assert all("stages" in row["loc"] or "stem" in row["loc"] for row in convolutions)
    assert "stages.0.conv1" in str(profile)


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ({"target": "x68"}, errors.ArgumentError, "did you mean 'x86'"),
        ({"target": 3}, errors.ArgumentError, "known"),
        ({"passes": "fold-bm"}, errors.ArgumentError, "did you mean 'fold-bn'"),
        ({"passes": "layout{blok=8}"}, errors.ArgumentError, "did you mean 'block'"),
        ({"passes": "layout{block='x'}"}, errors.ArgumentError, ""),
        ({"passes": "layout{block=}"}, errors.ParseError, "layout{block=16}"),
        ({"calibration": []}, errors.ArgumentError, ""),
        ({"dump": "/proc/nowhere"}, errors.ArgumentError, ""),
        ({"target": "arm", "device": "toaster"}, errors.ArgumentError, "rpc://"),
        ({"target": "x86-avx2", "device": "emulator"}, errors.ArgumentError, "the emulator runs code for arm"),
        ({"device": "emulator"}, errors.ArgumentError, "this host only"),
        ({"passes": [3]}, errors.ArgumentError, "cse"),
        ({"passes": 3}, errors.ArgumentError, "cse"),
    ],
)
def test_bad_arguments_say_what_to_do(options: dict[str, object], error: type[Exception], hint: str) -> None:
    model, args = small_resnet()
    with pytest.raises(error) as caught:
        paring.compile(model, args, **{"target": "reference", **options})
    assert hint in str(caught.value)


class Fixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self) -> torch.Tensor:
        return self.weight + 1


def test_a_network_without_inputs_gives_what_its_model_gives(tmp_path: Path) -> None:
    net = paring.compile(Fixed().eval(), ())
    assert torch.equal(net(), torch.full((3,), 2.0))
    assert torch.equal(paring.load(net.save(tmp_path / "net.paring"))(), torch.full((3,), 2.0))
    graph = paring.compile(Graph((), (Node(Const(np.ones(3, "float32"))),)), target="reference")
    assert isinstance(graph(), np.ndarray)


def test_one_version_is_saved_and_the_others_are_not_lost(tmp_path: Path) -> None:
    net = paring.compile(torch.nn.Linear(3, 2).eval())
    small, large = torch.ones(1, 3), torch.ones(5, 3)
    net(small), net(large)
    with pytest.raises(errors.ArgumentError, match="2 versions") as caught:
        net.save(tmp_path / "net.paring")
    assert caught.value.where == "input: float32[1,3]; input: float32[5,3]"
    assert net.inputs == (("input", TensorType("float32", (5, 3))),)
    again = paring.load(net.version(small).save(tmp_path / "net.paring"))
    assert torch.equal(again(small), net(small))
    assert again.inputs == (("input", TensorType("float32", (1, 3))),)
    assert again.outputs == (("output", TensorType("float32", (1, 2))),)


class Several(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> object:
        return {"a": x.sum(), "b": (x, [x + 1])}


def test_outputs_are_named_by_their_places() -> None:
    net = paring.compile(Several(), (torch.ones(2),), target="reference")
    assert [(name, str(t)) for name, t in net.outputs] == [("a", "float32[]"), ("b.0", "float32[2]"), ("b.1.0", "float32[2]")]


def test_the_program_after_a_pass_that_changed_nothing(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()).eval()
    net = paring.compile(model, (torch.ones(1, 3),))
    assert net.ir(after="fold-bn") == net.ir(after="import") != net.ir(after="canonicalize")
    assert net.ir(after="fuse") == net.ir() != net.ir(after="import")
    with pytest.raises(errors.ArgumentError, match="no pass 'fold-bm' was run"):
        net.ir(after="fold-bm")
    again = paring.load(net.save(tmp_path / "net.paring"))
    with pytest.raises(errors.ArgumentError, match="no stages"):
        again.ir(after="fold-bn")
    assert again.ir(after="saved") == again.ir() == net.ir()


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    net = paring.compile(torch.nn.ReLU(), (torch.ones(3),))
    with pytest.raises(errors.ArtifactError, match="there is no folder") as caught:
        net.save(tmp_path / "no" / "net.paring")
    assert ".net.paring." not in str(caught.value)
    with pytest.raises(errors.ArtifactError, match="not a saved network") as caught:
        paring.load(tmp_path)
    assert caught.value.hint
    path = net.save(tmp_path / "net.paring")
    assert len({(path / name).stat().st_mode for name in ("manifest.json", "weights.safetensors", "lib.so")}) == 1
    (path / "lib.so").write_bytes(b"other")
    with pytest.raises(errors.ArtifactError) as caught:
        paring.load(path)
    assert "rebuild=True" in caught.value.hint


def test_inspection_and_loading_leave_out_what_they_do_not_need(tmp_path: Path) -> None:
    path = paring.compile(torch.nn.ReLU(), (torch.ones(3),)).save(tmp_path / "net.paring")
    code = (
        "import sys, numpy, paring; paring.inspect(sys.argv[1]); print(sorted({'torch', 'tvm'} & set(sys.modules)));"
        "net = paring.load(sys.argv[1]); print(net(-numpy.ones(3, 'float32')), 'torch' in sys.modules);"
        "import torch; print(net(torch.ones(3)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", "[0. 0. 0.] False", "tensor([1., 1., 1.])"]


def test_a_foreign_target_without_a_device_can_be_saved_but_not_called() -> None:
    from paring.backends import emulator_build

    if any("g++" in lack for lack in emulator_build.missing()):
        pytest.skip("no cross compiler for ARM")
    model, args = small_resnet()
    net = paring.compile(model, args, target="arm")
    with pytest.raises(errors.TargetError, match="emulator"):
        net(*args)


def test_not_a_model() -> None:
    with pytest.raises(errors.ArgumentError, match="an int is not a model"):
        paring.compile(42, (np.zeros(3),), target="reference")


def test_networks_are_not_pickled_and_not_called_after_close() -> None:
    model, args = small_resnet()
    net = paring.compile(model, args)
    with pytest.raises(errors.ArgumentError, match="save"):
        pickle.dumps(net)
    net.close()
    with pytest.raises(errors.ParingError, match="closed"):
        net(*args)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Linear(6, 1), (3, 6)),
        (torch.nn.Conv2d(3, 5, 3), (1, 3, 8, 8)),
        (torch.nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), (2, 4, 5, 6)),
        (torch.nn.Softmax(1), (2, 7)),
        (torch.nn.Identity(), (2, 3)),
    ],
)
def test_a_single_layer_is_a_network_too(layer: torch.nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(paring.compile(layer.eval(), (x,))(x), layer(x).detach())


class OnlyByName(torch.nn.Module):
    """Takes its inputs by name, one inside a dict."""

    def forward(self, *, x: torch.Tensor, more: dict[str, torch.Tensor]) -> torch.Tensor:
        return x - more["y"]


def test_flat_arrays_make_the_call_of_a_network_whatever_its_form(tmp_path: Path) -> None:
    x, y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)
    path = paring.compile(OnlyByName().eval(), (), kwargs={"x": x, "more": {"y": y}}).save(tmp_path / "net.paring")
    net = paring.load(path)
    args, kwargs = net.arguments([x, y])
    assert torch.equal(net(*args, **kwargs), x - y)
    with pytest.raises(errors.InputError, match="expected 2 inputs, got 1"):
        net.arguments([x])


def test_log1p_of_huge_numbers() -> None:
    class Log1p(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log1p(x)

    x = np.array([1e-30, -1e-7, 0.0, 1.0, 1e30, 1e37, 3.4e38, np.inf], np.float32)
    found = paring.compile(Log1p(), (x,))(x)
    # A logarithm, a quotient and a product, each right to an ulp or so.
    np.testing.assert_array_max_ulp(found, np.log1p(x.astype(np.float64)).astype(np.float32), maxulp=4)


def test_a_model_that_gives_nothing() -> None:
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> None:
            x + 1

    with pytest.raises(errors.ModelError, match="returns no tensor"):
        paring.compile(Nothing(), (torch.ones(2),))


def test_a_saved_network_is_a_path() -> None:
    with pytest.raises(errors.ArgumentError, match="a saved network is a path, not None"):
        paring.load(None)  # type: ignore[arg-type]
