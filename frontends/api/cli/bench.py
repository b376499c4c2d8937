"""`paring bench`: hands over to paring.bench, and turns its records into a report."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from paring.cli.frame import MISMATCH, OK, USER, Report, text
from paring.cli.inputs import check_writable, find
from paring.ir.errors import ArgumentError

# What a system is imported from, besides what Paring itself needs; and what it quantizes with.
PACKAGES = {"ort": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}
QUANTIZERS = {"openvino": ("nncf",)}


def split(names: str) -> tuple[str, ...]:
    """`a, b` as names."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def check_installed(models: Sequence[str], systems: Sequence[str], precision: str = "float32") -> None:
    """Raise ArgumentError naming all packages that these models and systems need and this machine lacks."""
    from paring.bench import models as rows

    library = {rows.torchvision_model: "torchvision", rows.timm_model: "timm", rows.transformers_model: "transformers"}
    needed = [library.get(getattr(rows.MODELS[name].factory, "func", None), "torch") for name in models]
    tables = (PACKAGES, QUANTIZERS) if precision == "int8" else (PACKAGES,)
    needed += [package for packages in tables for name in systems for package in packages.get(name, ())]
    lacking = [package for package in dict.fromkeys(needed) if find_spec(package) is None]
    if lacking:
        hint = "pip install 'paring[bench]' (in a checkout: make .venv/bench), or choose other --models and --peers"
        raise ArgumentError(f"the benchmark needs {', '.join(lacking)}", why="not installed", hint=hint)


def bench(
    suite: str,
    models: Sequence[str],
    peers: Sequence[str],
    threads: int,
    rounds: int,
    file: str | None,
    *,
    precision: str,
    passes: Sequence[str] = (),
    **more: Any,
) -> Report:
    """Time models in Paring and its peers side by side; fails where nothing could be timed at all."""
    from paring.bench.models import MODELS, suite_models
    from paring.bench.run import host, run_bench, table
    from paring.bench.systems import COMPARED, SYSTEMS
    from paring.bench.variants import variants_table
    from paring.passes.pipelines import parse_pipeline

    find(suite, dict.fromkeys(["coverage", "sparse", *(model.suite for model in MODELS.values())]), "suite")
    for kind, names, known in (("model", models, MODELS), ("precision", [precision], COMPARED), ("system", peers, SYSTEMS)):
        for name in names:
            find(name, known, kind)
    for pipeline in passes:
        parse_pipeline(pipeline)
    if passes and (peers or precision != "float32"):
        hint = "leave --peers and --precision out: `quantize` is a pass too"
        raise ArgumentError("--passes compares Paring with itself", hint=hint)
    check_writable(file)
    check_installed(models or suite_models(suite), () if passes else peers or COMPARED[precision], precision)
    records = run_bench(suite, models, peers, threads, rounds, file, precision=precision, passes=passes, **more)
    view = [variants_table(records) if passes else table(records), text(f"{host()}; {threads} threads")]
    failed = all("error" in record for record in records)
    return Report(records, view + ([text(f"wrote {file}")] if file else []), USER if failed else OK)


def sparse(layers: Sequence[str], threads: int, rounds: int, file: str | None, *, small: bool) -> Report:
    """Sparse layers against dense ones, and from which share of zeros on each kind of mask pays."""
    from paring.bench.run import host
    from paring.bench.sparse import LAYERS, SMALL, as_json, crossover_lines, run_sparse, sparse_table

    for name in layers:
        find(name, SMALL if small else LAYERS, "layer")
    check_writable(file)
    records = run_sparse(layers, threads, rounds, file, small=small)
    lines = [*crossover_lines(records), f"{host()}; {threads} threads"]
    failed = any(record.error for record in records)
    view = [sparse_table(records), *map(text, lines), *([text(f"wrote {file}")] if file else [])]
    return Report([as_json(record) for record in records], view, MISMATCH if failed else OK)


def coverage(models: Sequence[str], threads: int, file: str | None, *, full: bool) -> Report:
    """Which models come out right; a mismatch where one does not."""
    from paring.bench.coverage import coverage_table, run_coverage
    from paring.bench.models import MODELS, suite_models

    for name in models:
        find(name, MODELS, "model")
    check_writable(file)
    check_installed(models or suite_models("coverage"), ())
    results = run_coverage(models, threads, file, full=full)
    data = [{**vars(result), "ok": result.ok} for result in results]
    return Report(data, [coverage_table(results)], OK if all(result.ok for result in results) else MISMATCH)
