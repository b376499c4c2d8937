"""`paring bench`: hands over to paring.bench, and turns its records into a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paring.cli.frame import MISMATCH, OK, USER, Report, text
from paring.cli.inputs import check_writable, find


def split(names: str) -> tuple[str, ...]:
    """`a, b` as names."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def bench(
    suite: str,
    models: Sequence[str],
    peers: Sequence[str],
    threads: int,
    rounds: int,
    file: str | None,
    *,
    precision: str,
    **more: Any,
) -> Report:
    """Time models in Paring and its peers side by side; fails where nothing could be timed at all."""
    from paring.bench.models import MODELS
    from paring.bench.run import host, run_bench, table
    from paring.bench.systems import COMPARED, SYSTEMS

    find(suite, dict.fromkeys(["coverage", *(model.suite for model in MODELS.values())]), "suite")
    for kind, names, known in (("model", models, MODELS), ("precision", [precision], COMPARED), ("system", peers, SYSTEMS)):
        for name in names:
            find(name, known, kind)
    check_writable(file)
    systems = ("paring", *(name for name in peers or COMPARED[precision] if name != "paring"))
    records = run_bench(suite, models, systems, threads, rounds, file, precision=precision, **more)
    view = [table(records), text(f"{host()}; {threads} threads")]
    failed = all("error" in record for record in records)
    return Report(records, view + ([text(f"wrote {file}")] if file else []), USER if failed else OK)


def coverage(models: Sequence[str], threads: int, file: str | None, *, full: bool) -> Report:
    """Which models come out right; a mismatch where one does not."""
    from paring.bench.coverage import coverage_table, run_coverage
    from paring.bench.models import MODELS

    for name in models:
        find(name, MODELS, "model")
    check_writable(file)
    results = run_coverage(models, threads, file, full=full)
    data = [{**vars(result), "ok": result.ok} for result in results]
    return Report(data, [coverage_table(results)], OK if all(result.ok for result in results) else MISMATCH)
