"""Quantization from the command line: calibration data from files and functions, good and bad; what the profile says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_files import Result, conv_graph

from paring.ir import Graph, Input, Node, constants, show
from paring.ir.ops.binary import Add
from paring.ir.ops.linear import Linear
from paring.passes.util import constant

fast = pytest.mark.fast
SHAPE = (1, 4, 6, 6)
GIVING = """
import numpy as np

def batches():
    for seed in range(3):
        yield np.random.default_rng(seed).standard_normal((1, 4, 6, 6)).astype("float32")

def none():
    return 3

def fails():
    yield 1
    raise ValueError("no luck")

number = 5
"""
MODEL = """
import torch
from paring.bench.networks import small_resnet

def make():
    return small_resnet()
"""


def dump(graph: Graph, folder: Path) -> Path:
    from safetensors.numpy import save_file

    path = folder / "net.ir"
    path.write_text(show(graph))
    save_file(constants(graph), str(folder / "constants.safetensors"))
    return path


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return dump(conv_graph(np.random.default_rng(0)), tmp_path)


def images(*outer: int, shape: tuple[int, ...] = SHAPE) -> Any:
    return np.random.default_rng(1).standard_normal((*outer, *shape)).astype(np.float32)


def compiled(net: Path, calibration: object, *more: object) -> Result:
    return Result("compile", net, "--target", "reference", "--passes", "quantize", "--calibration", calibration, *more)


@fast
def test_a_file_and_a_function_give_the_same_network(net: Path, tmp_path: Path) -> None:
    arrays = np.stack([np.random.default_rng(seed).standard_normal(SHAPE).astype("float32") for seed in range(3)])
    np.save(tmp_path / "x.npy", arrays)
    np.savez(tmp_path / "named.npz", x=arrays)
    np.savez_compressed(tmp_path / "placed.npz", arrays)
    (tmp_path / "data.py").write_text(GIVING)
    entries = []
    for given in (*(tmp_path / name for name in ("x.npy", "named.npz", "placed.npz")), f"{tmp_path}/data.py:batches"):
        done = compiled(net, given, "--json")
        assert done.code == 0, done.err
        (entry,) = [e for e in done.json()["ledger"]["entries"] if e["name"] == "quantize"]
        entries.append(entry["sqnr"])
    assert entries[0]
    assert all(entry == entries[0] for entry in entries)
    shown = compiled(net, tmp_path / "x.npy").out
    assert "of multiply-adds between roundings to 8 bits" in shown
    assert "lowest SQNR of" in shown


@fast
def test_each_input_has_its_own_array(tmp_path: Path) -> None:
    x, y = (Node(Input(label, "float32", (2, 3))) for label in ("x", "y"))
    weight = constant(np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32))
    path = dump(Graph((x, y), (Node(Linear(), (Node(Add(), (x, y)), weight)),)), tmp_path)
    small, large = images(4, shape=(2, 3)), 100 * images(4, shape=(2, 3))
    np.savez(tmp_path / "named.npz", y=large, x=small)
    np.savez(tmp_path / "placed.npz", small, large)
    found = [compiled(path, tmp_path / f"{name}.npz", "--json").json()["ledger"]["entries"] for name in ("named", "placed")]
    assert [e["sqnr"] for e in found[0]] == [e["sqnr"] for e in found[1]]
    np.savez(tmp_path / "odd.npz", x=small, y=large[:3])
    done = compiled(path, tmp_path / "odd.npz")
    assert (done.code, "differ in the number of batches" in done.err, "x 4, y 3" in done.err) == (1, True, True)
    np.save(tmp_path / "one.npy", small)
    assert compiled(path, tmp_path / "one.npy").code == 1


BAD = {
    "absent.npy": (None, "cannot read"),
    "absent.npz": (None, "cannot read"),
    "pickled.npy": (np.array([{}]), "cannot read"),
    "number.npy": (np.float32(3), "no axis of batches"),
    "empty.npy": (images(0), "calibration data are empty"),
    "flat.npy": (images(1, shape=SHAPE[1:]), "calibration batch 0"),
    "wide.npy": (images(3, shape=(1, 4, 6, 7)), "calibration batch 0"),
    "integers.npy": (np.zeros((2, *SHAPE), np.int64), "calibration batch 0"),
    "nan.npy": (np.where(np.arange(3).reshape(3, 1, 1, 1, 1) == 1, np.nan, images(3)).astype(np.float32), "batch 1, input x"),
}


@fast
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str, net: Path, tmp_path: Path) -> None:
    array, message = BAD[name]
    if array is not None:
        np.save(tmp_path / name, array, allow_pickle=True)
    done = compiled(net, tmp_path / name)
    assert done.code == 1
    assert message in done.err


@fast
def test_damaged_and_strange_archives_are_refused(net: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=images(3))
    whole = (tmp_path / "x.npz").read_bytes()
    np.savez(tmp_path / "pickled.npz", x=np.array([{}]))
    np.savez(tmp_path / "strange.npz", z=images(3))
    np.savez(tmp_path / "hollow.npz")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:300] + bytes(255 - b for b in whole[300:310]) + whole[310:])
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("pickled", "strange", "hollow", "cut", "flipped", "text"):
        done = compiled(net, tmp_path / f"{name}.npz")
        assert (name, done.code) == (name, 1)
        assert "error:" in done.err


@fast
def test_bad_functions_are_refused(net: Path, tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(GIVING)
    for name, message in {
        "data.py:none": "gave an int, not batches",
        "data.py:number": "is an int, not a function",
        "data.py:batch": "did you mean 'batches'?",
        "data.py:fails": "its own code raised ValueError",
        "data.py": "does not say which function",
        "data.pt": "is not opened",
    }.items():
        done = compiled(net, tmp_path / name)
        assert (name, done.code) == (name, 1)
        assert message in done.err


@fast
def test_data_without_a_use_and_a_use_without_data(net: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(3))
    done = Result("compile", net, "--target", "reference", "--calibration", tmp_path / "x.npy")
    assert (done.code, "no pass that uses them" in done.err) == (1, True)
    done = Result("compile", net, "--target", "reference", "--passes", "quantize")
    assert (done.code, "--calibration FILE" in done.err) == (1, True)
    done = Result("why-not", net, "--passes", "quantize", "--calibration", tmp_path / "x.npy", "--pass", "fold-qdq")
    assert done.code == 0, done.err


@fast
def test_bisect_shows_passes_the_data(net: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", images(3))
    np.save(tmp_path / "nan.npy", images(3) * np.float32(np.nan))
    found = Result("bisect", net, "--target", "reference", "--passes", "quantize", "--calibration", tmp_path / "x.npy", "--json")
    assert (found.code, found.json()["culprit"]) == (0, None), found.err
    found = Result(
        "bisect", net, "--target", "reference", "--passes", "quantize", "--calibration", tmp_path / "nan.npy", "--json"
    )
    assert (found.code, found.json()["culprit"]["pass"]) == (3, "quantize"), found.err
    assert "NaN or infinite" in found.json()["culprit"]["reason"]


def test_the_profile_of_a_quantized_network(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tvm")
    (tmp_path / "net.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", images(3, shape=(1, 1, 8, 8)))
    saved, data = tmp_path / "net.paring", tmp_path / "x.npy"
    made = Result("compile", f"{tmp_path}/net.py:make", "--passes", "quantize", "--calibration", data, "--output", saved)
    assert made.code == 0, made.err
    assert "100.0% of multiply-adds on 8 bits" in made.out
    done = Result("run", saved, "--profile")
    assert "SQNR dB" in done.out
    assert "100.0% of multiply-adds on 8 bits" in done.out
    assert "100.0% of multiply-adds on 8 bits" in Result("inspect", saved).out
    found = Result("run", saved, "--profile", "--json").json()["profile"]
    assert found["integer_share"] == 1.0
    assert found["saved_bytes"] > 0
    assert sum(row["sqnr"] is not None for row in found["kernels"]) == 10
    assert Result("run", saved, "--json").json()["profile"] is None


def test_check_after_lossy_passes_is_of_what_is_left(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("tvm")
    (tmp_path / "net.py").write_text(MODEL)
    np.save(tmp_path / "x.npy", images(3, shape=(1, 1, 8, 8)))
    model = f"{tmp_path}/net.py:make"
    for passes, more in (("prune-unstructured{ratio=0.9}", []), ("quantize", ["--calibration", tmp_path / "x.npy"])):
        done = Result("compile", model, "--passes", passes, *more, "--check", "--json")
        assert done.code == 0, done.err
        assert done.json()["check"]["ok"]
