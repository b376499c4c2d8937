"""`paring bench`: what it refuses, and what it hands over."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from cli_files import Result
from rich.console import Console

from paring.bench.variants import efficiency, variants_table


@pytest.mark.fast
@pytest.mark.parametrize("options", [["--suite", "cn"], ["--models", "resnet-18"], ["--peers", "egaer"], ["--against", "tvm"]])
def test_bench_refuses_unknown_names(options: list[str]) -> None:
    done = Result("bench", *options)
    assert done.code == 1
    assert "did you mean" in done.err


@pytest.mark.fast
def test_bench_says_what_to_install_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paring.cli.bench.find_spec", lambda name: None if name in ("timm", "openvino", "torchvision") else 1)
    monkeypatch.setattr("paring.bench.run.run_bench", lambda *a, **k: pytest.fail("it ran"))
    done = Result("bench", "--models", "resnet18,vit_tiny", "--peers", "ort,openvino")
    assert done.code == 1
    assert "torchvision, timm, openvino" in done.err
    assert "paring[bench]" in done.err


@pytest.mark.fast
@pytest.mark.parametrize(("peers", "lacking"), [("openvino", True), ("", True), ("ort", False)])
def test_int8_wants_the_tools_that_quantize(peers: str, lacking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paring.cli.bench.find_spec", lambda name: None if name == "nncf" else 1)
    record = {"model": "resnet18", "system": "paring", "median_ms": 2.0, "min_ms": 1.0, "rounds": 3, "precision": "int8"}
    monkeypatch.setattr("paring.bench.run.run_bench", lambda *a, **k: [record])
    named = ["--peers", peers] if peers else []
    assert Result("bench", "--models", "resnet18", *named).code == 0
    done = Result("bench", "--models", "resnet18", "--precision", "int8", *named)
    assert (done.code, "the benchmark needs nncf" in done.err) == (int(lacking), lacking)


@pytest.mark.fast
def test_bench_hands_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []
    record = {"model": "resnet18", "suite": "cnn", "precision": "float32", "system": "paring", "threads": 1}
    times = {"median_ms": 2.0, "min_ms": 1.0, "rounds": 3}

    def run_bench(*arguments: object, **more: object) -> list[dict[str, object]]:
        asked.append(arguments)
        return [{**record, **times}]

    monkeypatch.setattr("paring.bench.run.run_bench", run_bench)
    monkeypatch.setattr("paring.cli.bench.find_spec", lambda name: name)
    done = Result("bench", "--models", "resnet18", "--against", "tvm-default", "--threads", 1, "--rounds", 3, "--json", "-")
    assert done.json() == [{**record, **times}]
    assert asked == [("cnn", ("resnet18",), ("tvm-default",), 1, 3, None)]
    done = Result("bench", "--models", "resnet18", "--json", tmp_path / "r.json")
    assert "resnet18" in done.out
    assert asked[-1][-1] == str(tmp_path / "r.json")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--passes", "prune-chanels"], "did you mean"),
        (["--passes", "cse", "--peers", "ort"], "compares Paring with itself"),
        (["--passes", "cse", "--precision", "int8"], "compares Paring with itself"),
    ],
)
def test_bench_refuses_bad_pipelines(options: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paring.bench.run.run_bench", lambda *a, **k: pytest.fail("it ran"))
    done = Result("bench", "--models", "resnet18", *options)
    assert (done.code, says in done.err) == (1, True), done.err


@pytest.mark.fast
def test_conversion_efficiency_is_what_becomes_of_the_work_saved() -> None:
    rest = {"model": "m", "suite": "cnn", "threads": 1, "min_ms": 1.0, "rounds": 1}
    dense: Any = {**rest, "system": "paring", "precision": "float32", "median_ms": 12.0, "macs": 400}
    half: Any = {**rest, "system": "prune-channels", "precision": "changed", "median_ms": 4.0, "macs": 100}
    assert efficiency(dense, half) == (0.25, 3.0, 0.75)
    assert efficiency(dense, {**half, "median_ms": None}) is None
    console = Console(width=120, record=True, file=StringIO())
    console.print(variants_table([dense, half]))
    shown = console.export_text()
    for cell in ("25.0%", "3.00", "75%", "prune-channels"):
        assert cell in shown


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pruned_networks_are_timed_beside_the_dense_one() -> None:
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is an extra")
    options = ["--models", "resnet18", "--small", "--rounds", "1", "--seconds", "0.05", "--threads", "1", "--json", "-"]
    dense, pruned = Result("bench", *options, "--passes", "prune-channels{ratio=0.5}").json()
    assert 0 < pruned["macs"] < 0.5 * dense["macs"]
    assert pruned["median_ms"] > 0


def a_record(mask: str, zeros: float, sparse_us: float | None, layer: str = "conv1x1-256-28") -> Any:
    from paring.bench.sparse import Record

    return Record(layer, mask, "rows", zeros, 2, sparse_us and 100.0, sparse_us, 2.0, "rows", "" if sparse_us else "off by 50%")


def test_crossovers_lie_where_the_line_between_two_measurements_meets_one() -> None:
    from paring.bench.sparse import crossover_lines, crossovers

    records = [a_record("unstructured", zeros, us) for zeros, us in ((0.9, 20.0), (0.5, 125.0), (0.7, 83.3333333))]
    records += [
        a_record("unstructured", 0.5, 50.0, "linear-256-128"),
        a_record("2:4", 0.5, 150.0),
        a_record("2:4", 0.5, None, "other"),
    ]
    found = crossovers(records)
    assert found["unstructured"] == (pytest.approx(0.6), 0.0)
    assert found["2:4"] == (1.0,)
    assert crossover_lines(records)[0] == "unstructured (rows): pays from 60% zeros on (under 50% to 60%)"
    assert crossover_lines(records)[1] == "2:4 (rows): pays at 50% zeros in 0 of 1 layers"


def test_the_sparse_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A small layer of each type, for real: every mask has a time, a bound and a choice, and the crossover is printed."""
    from paring.bench.sparse import SERIES

    fewer = {name: dataclasses.replace(SERIES[name], zeros=(0.9,)) for name in ("unstructured", "blocks", "int8 blocks")}
    monkeypatch.setattr("paring.bench.sparse.SERIES", fewer)
    file = tmp_path / "sparse.json"
    layers = "linear-small,linear-small-int8"
    done = Result("bench", "--suite", "sparse", "--small", "--models", layers, "--rounds", 1, "--json", file)
    assert done.code == 0, done.err
    assert "unstructured (rows): pays at 90% zeros in" in done.out
    records = json.loads(file.read_text())
    assert [record["mask"] for record in records] == ["unstructured", "blocks", "int8 blocks"]
    for record in records:
        assert record["dense_us"] > 0
        assert record["sparse_us"] > 0
        assert not record["error"]
    assert records[1]["chosen"] == records[2]["chosen"] == "vectors"
    done = Result("bench", "--suite", "sparse", "--models", "conv1x1-256-29")
    assert done.code == 1
    assert "did you mean" in done.err
