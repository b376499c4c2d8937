"""`paring run` and `paring inspect`: a saved network, or a model compiled on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paring.cli.frame import Report, progress, table, text
from paring.cli.options import Device, Seed
from paring.cli.tables import ledger_table

if TYPE_CHECKING:
    import numpy as np

    from paring.passes.rewriter import Tell

    Array = np.ndarray[Any, Any]


def run(
    what: Annotated[str, typer.Argument(metavar="PATH|MODEL", help="A saved network, or a model.", show_default=False)],
    input: Annotated[
        list[Path] | None, typer.Option("--input", "-i", help="An input as .npy; one for each, in order, keyword inputs last.")
    ] = None,
    seed: Seed = 0,
    repeat: Annotated[int, typer.Option(min=0, help="Time this many calls.")] = 0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show each kernel: its time, its work, its layer; of 8-bit layers also the SQNR.")
    ] = False,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Write each result here, as .npy.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="What to compile a model for, native if not given.", show_default=False)
    ] = None,
    device: Device = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Compile a saved network again instead of loading its library.")
    ] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads to use; 0: one for each core.")] = 0,
) -> Report:
    """Call a network, on your inputs or on random ones, and show what comes out; with --repeat, also how fast.

    A model is compiled first and, without --input, called with its own example inputs.
    """
    import paring
    from paring.cli.inputs import check_writable

    check_writable(output)
    if _is_artifact(what):
        _check_artifact(what, target)
    if threads:
        paring.set_num_threads(threads)
    with progress() as tell:
        net, args, kwargs = _load(what, input or (), seed, target, device, rebuild, tell)
        tell("running", 0, 0)
        results = dict(leaves(net(*args, **kwargs)))
        times = _time(net, args, kwargs, repeat, tell)
        kernels = net.profile(*args, **kwargs) if profile else None
    written = _write(results, output) if output is not None else []
    described = [{"name": name, **_describe(array)} for name, array in results.items()]
    columns = ("output", "dtype", "shape", ">min", ">max", ">mean", ">not finite")
    rows = [tuple(entry.values()) for entry in described]
    view: list[Any] = [table("", columns, [[_brief(cell) for cell in row] for row in rows])]
    if times:
        view.append(
            text("{calls} calls: median {median_ms:.3f} ms, fastest {min_ms:.3f} ms, mean {mean_ms:.3f} ms".format(**times))
        )
    view += [text(kernels)] if kernels else []
    view += [text(f"wrote {path}") for path in written]
    data = {"network": what, "target": net.target.name, "outputs": described, "times": times, "written": written}
    return Report({**data, "profile": kernels.as_json() if kernels else None}, view)


def _load(
    what: str, inputs: Sequence[Path], seed: int, target: str | None, device: str | None, rebuild: bool, tell: Tell
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The network and the inputs of its call."""
    import paring
    from paring.cli.inputs import load_model, random_arrays, read_arrays

    given = read_arrays(inputs)
    if _is_artifact(what):
        tell(f"loading {what}", 0, 0)
        with _words_of_the_command_line():
            net = paring.load(what, rebuild=rebuild, device=device, progress=tell)
        return net, *net.arguments(given or random_arrays([type for _, type in net.inputs], seed))
    tell(f"reading {what}", 0, 0)
    example = load_model(what, seed)
    net = paring.compile(example.model, example.args, example.kwargs, target=target or "native", device=device, progress=tell)
    return (net, *net.arguments(given)) if given else (net, as_arrays(example.args), as_arrays(example.kwargs))


def _is_artifact(what: str) -> bool:
    path = Path(what)
    return path.suffix == ".paring" or path.is_dir()


def _check_artifact(what: str, target: str | None) -> None:
    """What can be found out before anything heavy is imported; then TVM, without torch."""
    from paring.backends import lean
    from paring.errors import ArgumentError, ArtifactError

    if not Path(what).exists():
        raise ArtifactError(f"no saved network at {what}", hint=f"it is looked for from {Path.cwd()}")
    if target is not None:
        what = f"--target {target} is of no use for {what}"
        why, hint = "a saved network runs on the target that it was compiled for", "leave --target out, or compile it again"
        raise ArgumentError(what, why=why, hint=hint)
    lean.import_tvm()


@contextmanager
def _words_of_the_command_line() -> Iterator[None]:
    """Hints that name an argument of `load` name the option instead."""
    from paring.backends.manifest import REBUILD
    from paring.errors import ArtifactError

    try:
        yield
    except ArtifactError as error:
        error.hint = error.hint.replace(REBUILD, "paring run --rebuild compiles it again from its graph and weights")
        raise


def as_arrays(value: Any) -> Any:
    """The same structure with numpy arrays in place of torch tensors."""
    if isinstance(value, Mapping):
        return {key: as_arrays(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(as_arrays, value)) if type(value) in (tuple, list) else value
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Array]]:
    """The arrays in a result with their places, like `logits` or `0.past.1`."""
    import numpy as np

    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}{key}")
    elif isinstance(value, tuple | list):
        for position, item in enumerate(value):
            yield from leaves(item, f"{prefix}{position}")
    elif value is not None:
        yield name or "output", np.asarray(value.detach() if hasattr(value, "detach") else value)


def _describe(array: Array) -> dict[str, Any]:
    import numpy as np

    numbers = array.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    low, high, mean = (float(f(finite)) for f in (np.min, np.max, np.mean)) if finite.size else (None, None, None)
    shape = list(array.shape)
    bad = array.size - finite.size
    return {"dtype": array.dtype.name, "shape": shape, "min": low, "max": high, "mean": mean, "not_finite": bad}


def _brief(cell: object) -> object:
    return f"{cell:.6g}" if isinstance(cell, float) else ("-" if cell is None else cell)


def _time(net: Any, args: tuple[Any, ...], kwargs: dict[str, Any], repeat: int, tell: Tell) -> dict[str, float] | None:
    from statistics import mean, median
    from time import perf_counter

    if not repeat:
        return None
    times = []
    for turn in range(repeat):
        start = perf_counter()
        net(*args, **kwargs)
        times.append((perf_counter() - start) * 1e3)
        if turn % max(repeat // 100, 1) == 0:
            tell("running", turn, repeat)
    return {"calls": repeat, "median_ms": median(times), "min_ms": min(times), "mean_ms": mean(times)}


def _write(results: Mapping[str, Array], folder: Path) -> list[Path]:
    """Names of outputs come from the model: in file names only letters, digits and a few marks of theirs are kept."""
    import re

    import numpy as np

    from paring.errors import ArgumentError

    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for position, (name, array) in enumerate(results.items()):
            safe = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:60]
            path = folder / f"{position:03d}_{safe}.npy"
            np.save(path, array, allow_pickle=False)
            written.append(path)
    except OSError as error:
        raise ArgumentError(f"cannot write to {folder}", why=str(error), hint="give a folder that you may write to") from None
    return written


def inspect(
    path: Annotated[Path, typer.Argument(help="A saved network, NAME.paring.", show_default=False)],
    ir: Annotated[bool, typer.Option("--ir", help="Show the program itself.")] = False,
) -> Report:
    """Look into a saved network: versions, target, inputs, outputs, passes, files and their hashes. Runs nothing of it.

    Example: paring inspect net.paring --ir
    """
    import paring
    from paring.passes.ledger import Ledger

    with _words_of_the_command_line():
        found = paring.inspect(path)
    if ir:
        return Report({"path": path, **found}, [text(found["graph"])])
    manifest, ledger = found["manifest"], Ledger.from_json(found["report"]["ledger"])
    facts = [("format", manifest["format"]), *manifest["versions"].items()]
    facts += [(f"target {name}", _line(value)) for name, value in manifest["target"].items()]
    ends = [(kind, s["name"], s["dtype"], _line(s["shape"])) for kind in ("input", "output") for s in manifest[f"{kind}s"]]
    files = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    view = [
        table(str(path), ("", ""), facts),
        table("", ("", "name", "dtype", "shape"), ends),
        table("", ("file", ">bytes", "sha256"), files),
        ledger_table(ledger, times=False),
    ]
    view += [text(ledger.on_integers)] if ledger.on_integers else []
    return Report({"path": path, "manifest": manifest, "report": found["report"]}, view)


def _line(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
