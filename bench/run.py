"""Time models in several systems, in interleaved rounds, and show them side by side."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import monotonic
from typing import TypedDict

import psutil  # type: ignore[import-untyped,unused-ignore]
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from paring.bench.models import MODELS, suite_models
from paring.bench.protocol import Child, ChildError, Message
from paring.bench.systems import at_precision, system_of


class _Optional(TypedDict, total=False):
    error: str
    macs: int


class Record(_Optional):
    """One model in one system. The times are None where it failed, and then `error` says why.

    `macs`: multiply-adds of one run, where the system is Paring.
    """

    model: str
    suite: str
    precision: str
    system: str
    threads: int
    median_ms: float | None
    min_ms: float | None
    rounds: int


@dataclass(frozen=True)
class Protocol:
    """How long everything may take."""

    threads: int = 2
    rounds: int = 5
    seconds: float = 1.0
    prepare_s: float = 900.0
    round_s: float = 120.0
    patience_s: float = 5.0

    def environment(self) -> dict[str, str]:
        """Pools size themselves at import, so they are told here; nothing is downloaded or compiled on the side."""
        count = str(self.threads)
        return {
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }


def run_bench(
    suite: str | None = None,
    models: Sequence[str] = (),
    peers: Sequence[str] = (),
    threads: int = 2,
    rounds: int = 5,
    json_path: str | os.PathLike[str] | None = None,
    *,
    precision: str = "float32",
    seconds: float = 1.0,
    patience_s: float = 5.0,
    prepare_s: float = 900.0,
    small: bool = False,
    passes: Sequence[str] = (),
    console: Console | None = None,
) -> list[Record]:
    """Time `models`, or those of `suite`, in Paring and its `peers`, by default all that are compared at that precision.

    At int8 each system quantizes the model with its own tools, and Paring's float32 is timed beside them. With `passes`,
    Paring is timed without and with each of these pipelines, and no peer.
    `json_path` is brought up to date after each model.
    Raises KeyError for names that are not there, ValueError for numbers out of range.
    """
    names = tuple(models) or suite_models(suite or "cnn")
    _known("model", names, MODELS)
    systems = ("paring", *passes) if passes else at_precision(peers, precision)
    if rounds < 1 or threads < 1:
        raise ValueError(f"rounds and threads must be at least 1, not {rounds} and {threads}")
    protocol = Protocol(threads, rounds, seconds, prepare_s, patience_s=patience_s)
    console = console or Console(stderr=True)
    records: list[Record] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        run = _Run(protocol, progress, len(names) * len(systems) * (rounds + 1))
        for name in names:
            records += run.model(name, systems, small)
            if json_path is not None:
                save(records, Path(json_path))
    if run.busy:
        console.print(f"{run.busy} rounds began on a busy machine: trust min_ms more than median_ms", style="yellow")
    return records


class _Run:
    """The systems of one model side by side: all prepared, one awake at a time, in rounds ABC ABC ABC."""

    def __init__(self, protocol: Protocol, progress: Progress, steps: int) -> None:
        self.protocol, self.progress = protocol, progress
        self.task = progress.add_task("", total=steps, completed=-1)
        self.busy = 0

    def model(self, name: str, systems: Sequence[str], small: bool) -> list[Record]:
        protocol = self.protocol
        times: dict[str, list[list[float]]] = {system: [] for system in systems}
        errors: dict[str, str] = {}
        macs: dict[str, int] = {}
        with ExitStack() as stack:
            children: dict[str, Child] = {}
            for system in systems:
                self._show(f"{name}: preparing {system}")
                arguments = ["--model", name, "--system", system, "--threads", str(protocol.threads)]
                child = Child("paring.bench.worker", arguments, protocol.environment())
                children[system] = stack.enter_context(child)
                macs[system] = self._ask(children, errors, system, "prepare", protocol.prepare_s, small=small).get("macs", 0)
            for number, system in product(range(protocol.rounds), systems):
                self._show(f"{name}: round {number + 1}, {system}")
                if system in errors:
                    continue
                self.busy += not quiet(protocol.patience_s)
                found = self._ask(children, errors, system, "round", protocol.round_s, seconds=protocol.seconds)
                if found:
                    times[system].append(found["times_ms"])
        return [self._record(name, system, times[system], macs[system], errors.get(system)) for system in systems]

    def _ask(
        self,
        children: dict[str, Child],
        errors: dict[str, str],
        system: str,
        do: str,
        deadline_s: float,
        **details: object,
    ) -> Message:
        """Wake one child for one command; one that fails is ended and its reason kept."""
        child = children[system]
        child.resume()
        try:
            found = child.ask(do, deadline_s, **details)
        except ChildError as error:
            errors[system] = str(error)
            child.close()
            return {}
        child.pause()
        return found

    def _show(self, description: str) -> None:
        """A step begins, so the one before it is done: hence the count starts at -1."""
        self.progress.update(self.task, description=description, advance=1)

    def _record(self, name: str, system: str, times: list[list[float]], macs: int, error: str | None) -> Record:
        complete = error is None
        record: Record = {
            "model": name,
            "suite": MODELS[name].suite,
            "precision": system_of(system).precision,
            "system": system,
            "threads": self.protocol.threads,
            "median_ms": median(median(each) for each in times) if complete else None,
            "min_ms": min(min(each) for each in times) if complete else None,
            "rounds": len(times),
        }
        if error is not None:
            record["error"] = error
        if macs:
            record["macs"] = macs
        return record


def quiet(patience_s: float, limit_percent: float = 20.0) -> bool:
    """Wait until others leave the machine alone; False when they never do. All our workers are stopped meanwhile."""
    stop = monotonic() + patience_s
    while psutil.cpu_percent(interval=0.1) > limit_percent:
        if monotonic() > stop:
            return False
    return True


def save(records: Sequence[Record], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(records, indent=1) + "\n")
    temporary.replace(path)


def table(records: Sequence[Record]) -> Table:
    """A row per model, a column per system (median, below it the minimum), and the fastest peer's median over ours."""
    systems = list(dict.fromkeys(record["system"] for record in records))
    shown = Table(title="median (min) ms", caption_justify="left", caption_style="")
    shown.add_column("model", no_wrap=True)
    for system in systems:
        shown.add_column(system, justify="right")
    shown.add_column("fastest peer / paring", justify="right")
    ratios: list[float] = []
    for name in dict.fromkeys(record["model"] for record in records):
        row = {record["system"]: record for record in records if record["model"] == name}
        best, ratio = compare(row.values())
        ratios += [ratio] if ratio is not None else []
        cells = [_cell(row.get(system)) for system in systems]
        shown.add_row(name, *cells, _ratio(ratio, best))
    if len(ratios) > 1:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        shown.add_section()
        shown.add_row("geometric mean", *[""] * len(systems), _ratio(mean, None))
    failures = [f"{r['model']}, {r['system']}: {r['error']}" for r in records if "error" in r]
    if failures:
        shown.caption = Text("\n".join(failures), style="red")
    return shown


def compare(row: Iterable[Record]) -> tuple[str | None, float | None]:
    """The fastest peer, and its median over paring's: above 1, paring is faster."""
    medians = {record["system"]: record["median_ms"] for record in row}
    own = medians.pop("paring", None)
    ours = medians.pop("paring-int8", own)
    peers = {system: time for system, time in medians.items() if time is not None}
    best = min(peers, key=lambda system: peers[system]) if peers else None
    return best, peers[best] / ours if best is not None and ours is not None else None


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record["median_ms"] is None or record["min_ms"] is None:
        return "failed"
    return f"{record['median_ms']:.2f}\n({record['min_ms']:.2f})"


def _ratio(ratio: float | None, best: str | None) -> Text:
    text = Text("-") if ratio is None else Text(f"{ratio:.2f}x", style="green" if ratio >= 1 else "red")
    return text.append(f"\n{best}", style="dim") if best is not None else text


def _known(kind: str, names: Sequence[str], there: Iterable[str]) -> None:
    unknown = [name for name in names if name not in there]
    if unknown:
        raise KeyError(f"no {kind} {unknown[0]!r}; there are: {', '.join(there)}")


def host() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {psutil.cpu_count(logical=False)} cores, {platform.system()}"
