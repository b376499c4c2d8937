"""Paring against itself: a model with passes of your choice beside the same model without, and what the work saved is worth."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from paring.bench.peers import Compiled, Peer, Run
from paring.bench.peers_int8 import calibration

if TYPE_CHECKING:
    import torch

    from paring.bench.peers import Inputs
    from paring.bench.run import Record

# What passes like these compute is another network, so any finite answer of the right shape will do.
PRECISION = "changed"


def variant(passes: str) -> Peer:
    """Paring with these passes before the target's own; passes that look at data are shown the bench's calibration data."""

    def prepare(model: torch.nn.Module, inputs: Inputs, threads: int) -> Run:
        product: Any = import_module("paring")
        pipelines: Any = import_module("paring.passes.pipelines")
        product.set_num_threads(threads)
        calibrated = any(each.calibrated for each in pipelines.parse_pipeline(passes))
        data = calibration(inputs) if calibrated else None
        return Compiled(product.compile(model, inputs, target="native", passes=passes, calibration=data), inputs)

    return Peer(passes, prepare, "target native, no tuning", PRECISION)


def efficiency(dense: Record, changed: Record) -> tuple[float, float, float] | None:
    """The share of multiply-adds that is left, the speedup, and of the possible speedup the part that became real.

    The last is (dense time / time) / (dense multiply-adds / multiply-adds). None where something failed or nothing is left.
    """
    before, after = dense["median_ms"], changed["median_ms"]
    all_macs, macs = dense.get("macs", 0), changed.get("macs", 0)
    if before is None or after is None or not all_macs or not macs:
        return None
    share, speedup = macs / all_macs, before / after
    return share, speedup, speedup * share


def variants_table(records: Sequence[Record]) -> Table:
    """A row for each model and pipeline."""
    shown = Table(caption_justify="left", caption_style="")
    shown.add_column("model", no_wrap=True)
    shown.add_column("passes")
    for column in ("ms", "multiply-adds left", "times as fast", "conversion efficiency"):
        shown.add_column(column, justify="right")
    dense: dict[str, Record] = {}
    for record in records:
        changed = record["precision"] == PRECISION
        if not changed:
            dense[record["model"]] = record
        time = "failed" if record["median_ms"] is None else f"{record['median_ms']:.2f}"
        found = efficiency(dense[record["model"]], record) if changed else None
        cells = [f"{found[0]:.1%}", _times(found[1]), f"{found[2]:.0%}"] if found else [""] * 3
        shown.add_row(record["model"], Text(record["system"] if changed else ""), time, *cells)
    failures = [f"{r['model']}, {r['system']}: {r['error']}" for r in records if "error" in r]
    shown.caption = Text("\n".join(failures), style="red") if failures else None
    return shown


def _times(ratio: float) -> Text:
    return Text(f"{ratio:.2f}", style="green" if ratio >= 1 else "red")
