"""What each pass did to the program: size, work, time, rewrites, promise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paring.ir.graph import Graph
from paring.ir.liveness import peak_activation_bytes
from paring.ir.ops.core import Const, Region
from paring.ir.work import integer_macs, integers_line, saved_bytes
from paring.passes.contract import Contract, compose, parse_contract

# How many layers of the lowest SQNR the text shows; the entry has all.
SHOWN_LAYERS = 5
# The key of a figure of the whole network among those of layers.
NETWORK = "network"


@dataclass(frozen=True)
class Size:
    """A program in figures. `integer_macs`: those on 8 bits; `saved_bytes`: what 8-bit weights take less than in float32."""

    nodes: int
    macs: int
    parameter_bytes: int
    peak_activation_bytes: int
    integer_macs: int = 0
    saved_bytes: int = 0

    @property
    def integer_share(self) -> float:
        return self.integer_macs / self.macs if self.macs else 0.0


def measure(graph: Graph) -> Size:
    """Count a graph; a region counts as its body."""
    nodes = macs = on_integers = 0
    digests: dict[str, int] = {}
    for node in graph.nodes():
        macs += node.macs
        on_integers += integer_macs(node)
        members = node.op.body.nodes() if isinstance(node.op, Region) else [node]
        nodes += sum(not isinstance(m.op, Const) and bool(m.inputs) for m in members)
        for member in members:
            if isinstance(member.op, Const):
                digests[member.op.digest] = member.type.bytes
    return Size(nodes, macs, sum(digests.values()), peak_activation_bytes(graph), on_integers, saved_bytes(graph))


@dataclass(frozen=True)
class Entry:
    """One run of one pass. `sqnr`: of each layer that became lossy, the signal-to-quantization-noise ratio in dB.

    `conversion`: the conversion efficiency of pruning, how many times as fast over how many times fewer multiply-adds, of the
    network as a whole ("network") and of each layer by its module.
    """

    step: int
    name: str
    contract: Contract
    rewrites: dict[str, int]
    seconds: float
    before: Size
    after: Size
    changed: bool
    metric: float | None = None
    sqnr: dict[str, float] = field(default_factory=dict)
    conversion: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def remarks(self) -> list[str]:
        """What the table has no column for, one line each: the metric, notes, and the layers of the lowest SQNR."""
        found = list(self.notes) if self.metric is None else [f"metric {self.metric:g}", *self.notes]
        worst = sorted(self.sqnr.items(), key=lambda item: item[1])[:SHOWN_LAYERS]
        if worst:
            shown = ", ".join(f"{name} {ratio:.1f} dB" for name, ratio in worst)
            found.append(f"lowest SQNR of {len(self.sqnr)} layers: {shown}")
        lowest = sorted(self.conversion.items(), key=lambda item: (item[0] != NETWORK, item[1]))[: SHOWN_LAYERS + 1]
        if lowest:
            found.append(f"conversion efficiency: {', '.join(f'{name} {share:.0%}' for name, share in lowest)}")
        return found

    def as_json(self) -> dict[str, object]:
        plain = dataclasses.asdict(self)
        plain["contract"] = str(self.contract)
        return plain


@dataclass
class Ledger:
    """The entries of a pipeline's run, in order."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def contract(self) -> Contract:
        """What the whole run promises."""
        return compose([entry.contract for entry in self.entries])

    @property
    def seconds(self) -> float:
        return sum(e.seconds for e in self.entries)

    @property
    def sqnr(self) -> dict[str, float]:
        """Signal to quantization noise (dB) of each quantized layer by name, by the last pass that looked at it."""
        return {name: ratio for entry in self.entries for name, ratio in entry.sqnr.items()}

    @property
    def on_integers(self) -> str:
        """A line about 8 bits in the program that came out; empty where it has none."""
        last = self.entries[-1].after if self.entries else Size(0, 0, 0, 0)
        names = {entry.name.partition("{")[0] for entry in self.entries}
        asked = last.macs and {"quantize", "fold-qdq"} <= names
        none = "no multiply-adds on 8 bits: `paring why-not ... --pass fold-qdq` says why" if asked else ""
        return integers_line(last.integer_share, last.saved_bytes) or none

    def as_json(self, *, times: bool = True) -> dict[str, object]:
        """As plain data; without times it is the same for the same program."""
        entries = [e.as_json() for e in self.entries]
        if not times:
            for entry in entries:
                del entry["seconds"]
        return {"contract": str(self.contract), "entries": entries}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Ledger:
        """The inverse of `as_json`; times that were left out are 0. Raises KeyError or TypeError for other data."""
        entries = []
        for plain in data["entries"]:
            sizes = {side: Size(**plain[side]) for side in ("before", "after")}
            contract = parse_contract(plain["contract"])
            notes = tuple(plain.get("notes", ()))
            entries.append(Entry(**{"seconds": 0.0, **plain, **sizes, "contract": contract, "notes": notes}))
        return Ledger(entries)

    def __str__(self) -> str:
        wide = max([10, *(len(str(e.contract)) for e in self.entries)])
        lines = [
            f"{'':>3} {'pass':<28} {'contract':<{wide}} {'fired':>5} {'nodes':>6} {'MMACs':>9} "
            f"{'param KiB':>10} {'peak KiB':>9} {'ms':>8}"
        ]
        for e in self.entries:
            a = e.after
            lines.append(
                f"{e.step:>3} {e.name:<28} {e.contract!s:<{wide}} {sum(e.rewrites.values()):>5} {a.nodes:>6} "
                f"{a.macs / 1e6:>9.1f} {a.parameter_bytes / 1024:>10.1f} {a.peak_activation_bytes / 1024:>9.1f} "
                f"{e.seconds * 1e3:>8.1f}"
            )
        for e in self.entries:
            lines.extend(f"{e.step:>3} {line}" for line in e.remarks())
        lines += [self.on_integers] if self.on_integers else []
        lines.append(f"in all: {self.contract}, {self.seconds * 1e3:.0f} ms")
        return "\n".join(lines)
