"""Which real models come out right: compiled in one process, saved, loaded in another, held against float64 torch."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from paring.bench.models import MODELS, suite_models
from paring.bench.protocol import Child, ChildError, Message, serve
from paring.frontends.oracle import TORCH_FACTOR, Reference, arrays_of, reference, worst_ratio

if TYPE_CHECKING:
    import numpy as np

    Arrays = Sequence[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Result:
    """One model. `ratio` is Paring's error over torch's, both against float64; None where it did not get so far."""

    model: str
    nodes: int | None = None
    compile_s: float | None = None
    ratio: float | None = None
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and self.ratio is not None and self.ratio <= TORCH_FACTOR


def run_coverage(
    models: Sequence[str] = (),
    threads: int = 2,
    json_path: str | None = None,
    *,
    full: bool = False,
    deadline_s: float = 600.0,
    console: Console | None = None,
) -> list[Result]:
    """Try `models`, or all of them, at their small sizes unless `full`; nothing is hidden and nothing waits for ever."""
    names = tuple(models) or suite_models("coverage")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise KeyError(f"no model {unknown[0]!r}; there are: {', '.join(MODELS)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[Result] = []
    with Progress(*columns, console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(names))
        for name in names:
            progress.update(task, description=name)
            results.append(check(name, threads, full, deadline_s))
            progress.advance(task)
    if json_path is not None:
        Path(json_path).write_text(json.dumps([{**vars(result), "ok": result.ok} for result in results], indent=1) + "\n")
    return results


def check(name: str, threads: int, full: bool, deadline_s: float) -> Result:
    """One model through its two processes; they share nothing but a folder."""
    found: Message = {}
    with tempfile.TemporaryDirectory(prefix="paring-coverage-") as folder:
        try:
            for do in ("compile", "compare"):
                arguments = ["--child", "--folder", folder, "--threads", str(threads)]
                with Child("paring.bench.coverage", arguments, {"HF_HUB_OFFLINE": "1"}) as child:
                    found |= child.ask(do, deadline_s, **({"name": name, "full": full} if do == "compile" else {}))
        except ChildError as error:
            found["error"] = f"{do}: {error}"
    return Result(name, **found)


class _Process:
    """The two commands of a child, each in a process of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads

    def compile(self, name: str, full: bool) -> Message:
        """Compile and save; leave the inputs, torch's answers and our own beside the artifact."""
        import torch
        from torch.utils._pytree import tree_structure

        import paring

        torch.set_num_threads(self.threads)
        product: Any = paring
        model, inputs = MODELS[name].build(small=not full)
        start = perf_counter()
        net = product.compile(model, inputs, target="native")
        seconds = perf_counter() - start
        net.save(str(self.folder / "net.paring"))
        ours = net(*inputs)
        with torch.no_grad():
            wanted = tree_structure(model(*inputs))
        if tree_structure(ours) != wanted:
            raise TypeError(f"the result's structure changed: {tree_structure(ours)} for {wanted}")
        expected = reference(model, inputs)
        self._keep("inputs", arrays_of(inputs))
        self._keep("ours", arrays_of(ours))
        self._keep("single", expected.single)
        self._keep("double", expected.double)
        return {"nodes": count_nodes(net), "compile_s": seconds}

    def compare(self) -> Message:
        """Load what the other process saved, call it, and judge its answer."""
        import numpy as np
        import torch

        import paring

        product: Any = paring
        product.set_num_threads(self.threads)
        net = product.load(str(self.folder / "net.paring"))
        loaded = arrays_of(net(*(torch.from_numpy(x) for x in self._kept("inputs"))))
        if any(not np.array_equal(a, b, equal_nan=True) for a, b in zip(loaded, self._kept("ours"), strict=True)):
            raise ArithmeticError("the loaded network gives other bits than the one that was saved")
        ratio = worst_ratio(loaded, Reference(self._kept("single"), self._kept("double")))
        if not np.isfinite(ratio):
            raise ArithmeticError("a shape, dtype, integer, infinity or NaN is not torch's")
        return {"ratio": ratio}

    def _keep(self, what: str, arrays: Arrays) -> None:
        import numpy as np

        np.savez(self.folder / f"{what}.npz", *arrays)

    def _kept(self, what: str) -> Arrays:
        import numpy as np

        with np.load(self.folder / f"{what}.npz", allow_pickle=False) as kept:
            return [kept[name] for name in kept.files]


def count_nodes(net: Any) -> int:
    """What the compiled graph computes: its nodes less inputs and constants, a region counting as one."""
    return sum(bool(node.inputs) for node in net.graph.nodes())


def coverage_table(results: Sequence[Result]) -> Table:
    good = sum(result.ok for result in results)
    shown = Table(title=f"{good} of {len(results)} models agree with torch", caption_justify="left", caption_style="")
    shown.add_column("model")
    for heading in ("nodes", "compile s", "error ratio", "ok"):
        shown.add_column(heading, justify="right")
    for result in results:
        seconds = "-" if result.compile_s is None else f"{result.compile_s:.1f}"
        ratio = "-" if result.ratio is None else f"{result.ratio:.2f}"
        ok = Text("yes", style="green") if result.ok else Text("no", style="red")
        shown.add_row(result.model, str(result.nodes or "-"), seconds, ratio, ok)
    reasons = [f"{result.model}: {result.error}" for result in results if result.error]
    if reasons:
        shown.caption = Text("\n".join(reasons), style="red")
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="paring bench --coverage", description=__doc__)
    parser.add_argument("--models", default="", help="names, comma-separated, instead of all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--full", action="store_true", help="the sizes that are timed, not the small ones")
    parser.add_argument("--deadline", type=float, default=600.0, help="seconds for each process")
    parser.add_argument("--json", help="write the results to this file")
    for hidden, kind in (("--folder", Path), ("--parent", int)):
        parser.add_argument(hidden, type=kind, default=kind(), help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if options.child:
        process = _Process(options.folder, options.threads)
        serve({"compile": process.compile, "compare": process.compare}, options.parent)
        return 0
    names = [name for name in options.models.split(",") if name]
    results = run_coverage(names, options.threads, options.json, full=options.full, deadline_s=options.deadline)
    Console().print(coverage_table(results))
    return 0 if all(result.ok for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
