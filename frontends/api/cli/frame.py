"""The frame around every command: its two outputs (for people, as JSON), progress on stderr, errors and exit codes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from paring.passes.rewriter import Tell


# How files of the user are called once they are imported.
USER_MODULE = "paring_user_"

OK, USER, USAGE, MISMATCH, OURS, INTERRUPTED = 0, 1, 2, 3, 4, 130


@dataclass(frozen=True)
class Report:
    """What a command found: `data` for --json, `view` for people, and the exit code."""

    data: object
    view: Sequence[RenderableType]
    code: int = OK


_JSON = inspect.Parameter(
    "json_",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="Write the result as JSON to stdout, and nothing else.")],
)
_DEBUG = inspect.Parameter(
    "debug",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)


def framed(function: Callable[..., Report]) -> Callable[..., None]:
    """The function as a command: adds --json (unless it has its own) and --debug, shows its report, ends with its exit code."""
    signature = inspect.signature(function, eval_str=True)
    own = signature.parameters
    added = [parameter for parameter in (_JSON, _DEBUG) if parameter.name not in own]

    @functools.wraps(function)
    def command(**given: Any) -> None:
        as_json = given.get("json_") in (True, "-")
        debug = given["debug"]
        arguments = {name: value for name, value in given.items() if name in own}
        code = OURS
        try:
            with _clean_stdout() if as_json else contextlib.nullcontext():
                report = function(**arguments)
            code = report.code
            _show(report, as_json)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            code = INTERRUPTED
            stderr().print("interrupted")
        except BrokenPipeError:
            # The reader has seen enough (`paring ops | head`); what is still buffered must not be flushed into nothing.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            code = OK
        except Exception as error:
            code = _fail(error, as_json, debug)
        raise typer.Exit(code)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values()] + added
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def stdout() -> Console:
    return _console(False)


def stderr() -> Console:
    return _console(True)


def _console(to_stderr: bool) -> Console:
    """Names of models and tensors are data: no text is ever read as markup."""
    from rich.console import Console

    console = Console(stderr=to_stderr, markup=False, highlight=False, emoji=False)
    # A file or a pipe has no width: tables are not cut there.
    return console if console.is_terminal else Console(stderr=to_stderr, markup=False, highlight=False, emoji=False, width=160)


def plain(text: object) -> str:
    """Text without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(text))


def table(title: str, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table of plain cells; a column whose heading starts with `>` is set to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    columns = list(columns)
    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns))
    for column in columns:
        shown.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        shown.add_row(*[Text(plain("" if cell is None else cell)) for cell in row])
    return shown


def text(value: object, style: str = "") -> RenderableType:
    from rich.text import Text

    return Text(plain(value), style=style)


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """A bar on stderr, where that is a terminal: `tell(stage, done, total)`, total 0 where it is not known."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = stderr()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("", total=None)

        def tell(stage: str, done: int, total: int) -> None:
            shown.update(task, description=plain(stage), completed=done, total=total or None)

        yield tell


def as_plain_data(value: Any) -> Any:
    """Data that JSON has a place for: infinities and NaN as text, everything unknown as its text."""
    if isinstance(value, Mapping):
        return {str(key): as_plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_plain_data(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, str | int) else str(value)


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(as_plain_data(report.data), indent=1), flush=True)
        return
    from rich.table import Table

    console = stdout()
    for number, part in enumerate(report.view):
        if number and isinstance(part, Table):
            console.print()
        console.print(part)
    sys.stdout.flush()


def _fail(error: Exception, as_json: bool, debug: bool) -> int:
    """Say what went wrong, and give the exit code."""
    code, said = _explain(error)
    console = stderr()
    if debug:
        console.print(text("".join(traceback.format_exception(error))), soft_wrap=True)
    console.print(text("error:", "bold red"), text(said["what"]), soft_wrap=True)
    for label in ("where", "why", "hint"):
        if said[label]:
            console.print(text(f"  {label}: {said[label]}"), soft_wrap=True)
    if as_json:
        print(json.dumps({"error": as_plain_data(said), "exit_code": code}, indent=1), flush=True)
    return code


def _explain(error: Exception) -> tuple[int, dict[str, str]]:
    """The exit code, and what, where, why and hint: an error of ours, one of the user's own code, or a mistake in Paring."""
    from paring.errors import ParingError

    kind = type(error).__name__
    if isinstance(error, ParingError):
        said = {"what": error.what, "where": error.where, "why": error.why, "hint": error.hint}
        return error.exit_code, {"type": kind, **said}
    said = {"type": kind, "what": f"{kind}: {error}"}
    frames = [(f.f_globals.get("__name__", ""), f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    theirs = [f"{file}:{line}" for module, file, line in frames if module.startswith(USER_MODULE)]
    if theirs:
        return USER, {**said, "where": theirs[-1], "why": "code of yours raised it", "hint": "--debug shows the traceback"}
    why = "this is a mistake in Paring, not in what you gave it"
    return OURS, {**said, "where": "", "why": why, "hint": "run it again with --debug, and report what that shows"}


@contextlib.contextmanager
def _clean_stdout() -> Iterator[None]:
    """Whatever the model's code, a compiler or a library prints meanwhile goes to stderr."""
    real = sys.stdout is sys.__stdout__ and sys.stdout is not None
    with contextlib.redirect_stdout(sys.stderr):
        if not real:
            yield
            return
        assert sys.__stdout__ is not None
        sys.__stdout__.flush()
        saved = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            _flush_c()
            os.dup2(saved, 1)
            os.close(saved)


def _flush_c() -> None:
    """What C code has printed but not yet written."""
    import ctypes

    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
