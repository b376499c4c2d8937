"""What commands are given: models, plugins, passes, arrays. Everything wrong with them is a typed error."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paring.cli.frame import USER_MODULE
from paring.ir.errors import ArgumentError, ModelError, ParingError, a_kind, nearest

if TYPE_CHECKING:
    import numpy as np

    from paring.ir.graph import Graph
    from paring.ir.types import TensorType
    from paring.passes.base import Pass

    Array = np.ndarray[Any, Any]

HOW = (
    "a model is `file.py:factory` or `module:factory`, a function that returns (model, example_inputs) or (model, args, kwargs), "
    "or an .ir dump"
)
PICKLES = (".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")


@dataclass(frozen=True)
class Example:
    """A model with inputs to call it with."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_model(spec: str, seed: int = 0) -> Example:
    """The model that a command line names. Raises ArgumentError for what is none, ModelError where its own code fails."""
    path = Path(spec)
    if path.suffix == ".ir":
        graph = read_graph(path)
        return Example(graph, tuple(random_arrays([node.type for node in graph.inputs], seed)))
    if path.suffix in PICKLES:
        raise ArgumentError(f"{spec} is not opened", why="opening such a file runs whatever code is in it", hint=HOW)
    if path.suffix == ".onnx":
        raise ArgumentError(f"{spec}: there is no ONNX importer yet", hint=HOW)
    factory = load_object(spec, HOW)
    _check_factory(spec, factory)
    return _example(spec, run_users(spec, factory))


def _check_factory(spec: str, factory: Any) -> None:
    if not callable(factory) or isinstance(factory, type) or hasattr(factory, "forward"):
        raise ArgumentError(f"{spec} is {a_kind(factory)}, not a function", hint=HOW)
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ArgumentError(f"{spec} cannot be called without arguments", why=str(error), hint=HOW) from None
    except ValueError:
        return


def _example(spec: str, result: Any) -> Example:
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        found = f"a tuple of {len(result)}" if isinstance(result, tuple) else f"{a_kind(result)}"
        raise ArgumentError(f"{spec} returned {found}, not (model, example_inputs)", hint="end it with: return model, (x,)")
    model, inputs, *more = result
    kwargs = more[0] if more else {}
    if not isinstance(kwargs, Mapping):
        what = f"{spec} returned a tuple of 3 that ends with {a_kind(kwargs)}, not with a dict of keyword inputs"
        raise ArgumentError(what, hint="end it with: return model, (x,), {'mask': mask}")
    if isinstance(inputs, Mapping):
        return Example(model, (), {**inputs, **kwargs})
    if isinstance(inputs, tuple | list):
        return Example(model, tuple(inputs), dict(kwargs))
    if hasattr(inputs, "shape") and hasattr(inputs, "dtype"):
        return Example(model, (inputs,), dict(kwargs))
    what = f"{spec} returned {a_kind(inputs)} for its example inputs"
    raise ArgumentError(what, hint="a tuple of tensors, or a dict of keyword inputs")


def load_object(spec: str, how: str) -> Any:
    """`file.py:name` or `module:name`. Raises ArgumentError, or ModelError where the code itself fails."""
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        there = Path(spec)
        hint = f"{spec}:factory" if there.suffix == ".py" else how
        raise ArgumentError(f"{spec!r} does not say which function", why=how if hint != how else "", hint=hint)
    is_file = source.endswith(".py") or "/" in source or "\\" in source
    module = _from_file(spec, Path(source)) if is_file else _from_module(spec, source)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            hint = nearest(part, [n for n in dir(found) if not n.startswith("_")], how)
            raise ArgumentError(f"{source} has no {name!r}", hint=hint) from None
    return found


def _from_file(spec: str, path: Path) -> Any:
    if not path.is_file():
        raise ArgumentError(f"no file {path}", hint=f"it is looked for from {Path.cwd()}")
    name = f"{USER_MODULE}{path.stem}"
    described = importlib.util.spec_from_file_location(name, path.resolve())
    if described is None or described.loader is None:
        raise ArgumentError(f"{path} is not a Python file", hint=HOW)
    module = importlib.util.module_from_spec(described)
    loader = described.loader
    sys.modules[name] = module
    # Beside the file lie the modules that it imports.
    sys.path.insert(0, str(path.resolve().parent))
    run_users(spec, lambda: loader.exec_module(module))
    return module


def _from_module(spec: str, name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))

    def load() -> Any:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(f"{error.name}.")):
                hint = f"for a file write {name}.py:{spec.rpartition(':')[2]}"
                raise ArgumentError(f"no module {error.name!r}", hint=hint) from None
            raise

    return run_users(spec, load)


def run_users(spec: str, code: Callable[[], Any]) -> Any:
    """Run the user's code; what it raises becomes a ModelError that names their line."""
    try:
        return code()
    except ParingError:
        raise
    except (Exception, SystemExit) as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and "importlib" not in f.filename
        ]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else spec
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        what = f"{spec} failed: its own code raised {type(error).__name__}"
        raise ModelError(what, where=where, why=str(error), hint="try it in Python alone; --debug shows the traceback") from error


def read_graph(path: Path) -> Graph:
    """A dumped graph with the constants beside it. Raises ArgumentError, ParseError, IRTypeError."""
    from paring.ir import parse

    try:
        written = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"cannot read {path}", why=str(error)) from None
    weights = path.with_name("constants.safetensors")
    try:
        graph = parse(written, _read_constants(weights) if weights.is_file() else {})
    except ParingError as error:
        error.at(str(path))
        if not weights.is_file() and not error.hint:
            error.hint = f"its constants are looked for in {weights}"
        raise
    return graph


def _read_constants(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(str(path)))
    except (OSError, SafetensorError) as error:
        raise ArgumentError(f"cannot read {path}", why=str(error), hint="write the dump again") from None


def random_arrays(types: Sequence[TensorType], seed: int) -> list[Array]:
    """Standard normal floats; integers and booleans of 0 and 1, which are legal indices and masks nearly everywhere."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [
        np.asarray(rng.standard_normal(t.shape), t.dtype) if t.is_float else np.asarray(rng.integers(0, 2, t.shape), t.dtype)
        for t in types
    ]


def read_arrays(paths: Sequence[Path]) -> list[Array]:
    """Arrays from .npy files; nothing pickled is opened. Raises ArgumentError."""
    import numpy as np

    found = []
    for path in paths:
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ArgumentError(f"cannot read {path}", why=str(error), hint="write it with numpy.save(path, array)") from None
        if not isinstance(array, np.ndarray):
            raise ArgumentError(f"{path} holds several arrays", hint="give one .npy file for each input, in order")
        found.append(array)
    return found


def find(name: str, known: Mapping[str, Any], kind: str) -> Any:
    """`known[name]`. Raises ArgumentError with the nearest name."""
    if name not in known:
        raise ArgumentError(f"no {kind} {name!r}", hint=nearest(name, known, f"known: {', '.join(known)}"))
    return known[name]


def check_writable(path: str | Path | None) -> None:
    """Better to know before the work than after it. Raises ArgumentError where nothing can be written at `path`."""
    if path is None:
        return
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        why = f"{folder} is not a folder" if not folder.is_dir() else f"{folder} may not be written to"
        raise ArgumentError(f"cannot write {path}", why=why, hint="give a place that you may write to")


def load_plugins(specs: Sequence[str]) -> dict[str, type[Pass]]:
    """Passes of the user's own, by name. Raises ArgumentError for what is not a pass."""
    from paring.passes.base import Pass

    how = "a plugin is `file.py:MyPass` or `module:MyPass`, a subclass of paring.passes.base.Pass"
    table: dict[str, type[Pass]] = {}
    for spec in specs:
        found = load_object(spec, how)
        for each in found if isinstance(found, tuple | list) else (found,):
            cls = type(each) if isinstance(each, Pass) else each
            if not isinstance(cls, type) or not issubclass(cls, Pass) or not isinstance(getattr(cls, "name", None), str):
                raise ArgumentError(f"{spec} is not a pass with a name", hint=how)
            table[cls.name] = cls
    return table


def chosen_passes(target: str, passes: str | None, whole: str | None, plugins: Sequence[str] = ()) -> tuple[Pass, ...]:
    """The passes to run, in order: a plugin takes the place of a pass of its name; one that nothing names runs first.

    `passes` go before the target's own pipeline, `whole` replaces that.
    """
    from paring.backends import targets
    from paring.passes.base import parse_pass
    from paring.passes.pipelines import parse_pipeline, pipeline, with_users

    extra = load_plugins(plugins)
    found = targets.resolve(target)
    own = pipeline(found.pipeline, found.pipeline_options(), extra) if whole is None else parse_pipeline(whole, extra)
    chosen = with_users(own, parse_pipeline(passes or (), extra))
    named = {each.name for each in chosen}
    first = tuple(parse_pass(name, extra) for name in extra if name not in named)
    return (*first, *chosen)
