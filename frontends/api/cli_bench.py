"""`paring bench`: hands over to paring.bench, and turns its records into a report."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paring.cli_frame import MISMATCH, OK, USER, Report, text
from paring.errors import ArgumentError


def split(names: str) -> tuple[str, ...]:
    """`a, b` as names."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def bench(
    suite: str,
    models: Sequence[str],
    systems: Sequence[str],
    threads: int,
    rounds: int,
    file: str | None,
    **more: Any,
) -> Report:
    """Time models side by side; fails where nothing could be timed at all."""
    from paring.bench.models import MODELS
    from paring.bench.peers import PEERS
    from paring.bench.run import host, run_bench, table

    _known("suite", [suite], {model.suite for model in MODELS.values()})
    _known("model", models, MODELS)
    _known("system", systems, PEERS)
    _writable(file)
    records = run_bench(suite, models, systems, threads, rounds, file, **more)
    view = [table(records), text(f"{host()}; {threads} threads")]
    failed = all("error" in record for record in records)
    return Report(records, view + ([text(f"wrote {file}")] if file else []), USER if failed else OK)


def coverage(models: Sequence[str], threads: int, file: str | None, *, full: bool) -> Report:
    """Which models come out right; a mismatch where one does not."""
    from paring.bench.coverage import coverage_table, run_coverage
    from paring.bench.models import MODELS

    _known("model", models, MODELS)
    _writable(file)
    results = run_coverage(models, threads, file, full=full)
    data = [{**vars(result), "ok": result.ok} for result in results]
    return Report(data, [coverage_table(results)], OK if all(result.ok for result in results) else MISMATCH)


def _known(kind: str, names: Sequence[str], there: Iterable[str]) -> None:
    known = sorted(there)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ArgumentError(f"no {kind} {name!r}", hint=f"{hint}known: {', '.join(known)}")


def _writable(file: str | None) -> None:
    """Better to know before an hour of timing than after it."""
    folder = Path(file).absolute().parent if file else None
    if folder is not None and folder.exists() and not os.access(folder, os.W_OK):
        raise ArgumentError(f"cannot write {file}", hint="give a folder that you may write to")
