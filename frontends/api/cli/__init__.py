"""The command line `paring`. Each command gives a Report; `framed` shows it. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from paring import __version__
from paring.cli.frame import INTERRUPTED, MISMATCH, OK, USER, Report, framed, plain, progress, stderr, table, text
from paring.cli.options import Calibration, Device, Dump, Model, Passes, Pipeline, Plugins, Seed, TargetName
from paring.cli.run import inspect, run
from paring.cli.search import bisect, why_not
from paring.cli.tables import ledger_table, ops, passes


def compile_(
    model: Model,
    target: TargetName = "native",
    passes: Passes = None,
    pipeline: Pipeline = None,
    plugin: Plugins = None,
    calibration: Calibration = None,
    dump: Dump = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the network in this folder.", metavar="NAME.paring")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare with the model's own results; exit 3 if they differ.")] = False,
    device: Device = None,
    seed: Seed = 0,
) -> Report:
    """Compile a model, and show what each pass did to it.

    Example: paring compile net.py:make --target x86 --dump /tmp/net --output net.paring --check

    On 8-bit integers: paring compile net.py:make --passes "quantize, correct-bias" --calibration images.npy
    """
    from time import perf_counter

    import paring
    from paring.cli.calibration import read_calibration
    from paring.cli.inputs import check_writable, chosen_passes, load_model

    start = perf_counter()
    check_writable(output)
    check_writable(dump)
    with progress() as tell:
        chosen = chosen_passes(target, passes, pipeline, plugin or ())
        if check:
            _check_runs(target, device)
        tell(f"reading {model}", 0, 0)
        example = load_model(model, seed)
        net = paring.compile(
            example.model,
            example.args,
            example.kwargs,
            target=target,
            pipeline=chosen,
            calibration=read_calibration(calibration, example.model) if calibration is not None else None,
            dump=dump,
            device=device,
            progress=tell,
        )
        seconds = perf_counter() - start
        saved = net.save(output) if output is not None else None
        tell("checking", 0, 0)
        verdict = _verdict(net, example) if check else None
    return _compiled(model, net, seconds, dump, saved, verdict)


def _compiled(model: str, net: Any, seconds: float, dump: Path | None, saved: Path | None, verdict: Any) -> Report:
    data = {
        "model": model,
        "target": net.target.name,
        "seconds": seconds,
        "contract": net.contract,
        "stages": net.stages,
        "ledger": net.ledger.as_json(),
        "dump": dump,
        "output": saved,
        "check": verdict.as_json() if verdict else None,
    }
    lines = [f"compiled {model} for {net.target.name} in {seconds:.1f} s; it promises {net.contract}"]
    lines = [*(f"{e.step:>3} {line}" for e in net.ledger.entries for line in e.remarks()), *lines]
    lines += [net.ledger.on_integers] if net.ledger.on_integers else []
    lines += [f"the program after each pass: {dump}"] if dump else []
    lines += [f"saved: {saved}"] if saved else []
    lines += [str(verdict)] if verdict else []
    return Report(data, [ledger_table(net.ledger), *map(text, lines)], MISMATCH if verdict and not verdict.ok else OK)


def _check_runs(target: str, device: str | None) -> None:
    from paring.backends import targets
    from paring.errors import ArgumentError

    if device is None and targets.resolve(target).device != "host":
        raise ArgumentError(f"--check runs the network, and this host does not run {target}", hint="add --device emulator")


def _verdict(net: Any, example: Any) -> Any:
    from paring.cli.check import check_network

    return check_network(net, example)


def bench(
    suite: Annotated[str, typer.Option(help="cnn or transformer; sparse: layers with zeros against dense ones.")] = "cnn",
    models: Annotated[str, typer.Option(help="Models (sparse: layers) by name, comma-separated, instead of a suite.")] = "",
    peers: Annotated[str, typer.Option(help="What to compare with, comma-separated; by default all that can.")] = "",
    against: Annotated[str, typer.Option(help="One system to compare with, instead of --peers: tvm-default.")] = "",
    precision: Annotated[str, typer.Option(help="float32 or int8: quantized by each system's own tools.")] = "float32",
    passes: Annotated[
        list[str] | None, typer.Option(help="Instead of peers, Paring with these passes beside Paring without; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each system.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the systems take turns in each.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Length of one system's turn.")] = 1.0,
    small: Annotated[bool, typer.Option("--small", help="Small inputs: quick, and no benchmark.")] = False,
    coverage: Annotated[bool, typer.Option("--coverage", help="Which models compile, save, load and agree with torch.")] = False,
    json_: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the records here; - is stdout.")] = None,
) -> Report:
    """Time models in Paring and in other systems, side by side; or, with --coverage, see which models come out right.

    With --passes: how much of the work that a pass saves becomes time.

    Example: paring bench --suite cnn --peers eager,inductor,ort,openvino --threads 2 --json results.json
    Example: paring bench --models resnet50 --passes 'prune-channels{ratio=0.25}' --passes 'prune-channels{ratio=0.5}'
    """
    from paring.cli.bench import bench as measure
    from paring.cli.bench import coverage as check_coverage
    from paring.cli.bench import sparse, split

    file = None if json_ in (None, "-") else json_
    names = split(models)
    if coverage:
        return check_coverage(names, threads, file, full=not small)
    if suite == "sparse":
        return sparse(names, threads, rounds, file, small=small)
    more = {"precision": precision, "seconds": seconds, "small": small, "passes": tuple(passes or ())}
    return measure(suite, names, split(against or peers), threads, rounds, file, **more)


def doctor() -> Report:
    """Say what this machine has and lacks for Paring, and what to install. Exit 0 when compiling and running works."""
    from paring.doctor import CHECKS, examine

    findings = []
    with progress() as tell:
        for check, finding in examine():
            findings.append((check, finding))
            tell(check.name, len(findings), len(CHECKS))
    findings.sort(key=lambda pair: [c.name for c in CHECKS].index(pair[0].name))
    good = all(finding.ok for check, finding in findings if check.required)
    rows = []
    for check, finding in findings:
        state = "ok" if finding.ok else ("FAILED" if check.required else "missing")
        rows.append((state, check.name, finding.detail + (f"\n-> {finding.hint}" if finding.hint and not finding.ok else "")))
    data = {
        "ok": good,
        "checks": [{"name": c.name, "required": c.required, "ok": f.ok, "detail": f.detail, "hint": f.hint} for c, f in findings],
    }
    last = "compiling and running works here" if good else "compiling and running does not work here yet: see FAILED"
    return Report(data, [table("", ("", "check", "found"), rows), text(last)], OK if good else USER)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"paring {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")] = False,
) -> None:
    """Paring pares a network down, and compiles what is left.

    A MODEL is `file.py:factory` or `module:factory`, a function that returns (model, example_inputs) or (model, args, kwargs),
    or an .ir dump.

    Exit codes: 0 ok, 1 something you gave is wrong, 2 usage, 3 results differ, 4 a mistake in Paring.
    """


COMMANDS: dict[str, Callable[..., Report]] = {
    "compile": compile_,
    "inspect": inspect,
    "run": run,
    "passes": passes,
    "ops": ops,
    "bench": bench,
    "bisect": bisect,
    "why-not": why_not,
    "doctor": doctor,
}


def make_app() -> typer.Typer:
    settings = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(
        name="paring", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, context_settings=settings
    )
    app.callback()(_root)
    for name, function in COMMANDS.items():
        app.command(name)(framed(function))
    return app


def main() -> None:
    """The console script."""
    try:
        make_app()(prog_name="paring")
    except KeyboardInterrupt:
        stderr().print(plain("interrupted"))
        sys.exit(INTERRUPTED)
