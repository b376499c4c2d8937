"""Calibration data as the command line names them: a file of arrays, or a function that gives batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paring.cli.inputs import PICKLES, load_object, run_users
from paring.ir.errors import ArgumentError, a_kind
from paring.ir.graph import Graph
from paring.ir.ops.core import Input

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

HOW = (
    "calibration data are a .npy file (one input) or a .npz file (an array for each input, by its name or as arr_0, arr_1, ...), "
    "batches along the first axis; or file.py:function, module:function, which gives batches"
)


def read_calibration(spec: str, model: Any) -> list[Any]:
    """Batches as `compile` takes them: tuples of arrays, dicts of them by name, or whatever a function gives.

    An array is (batches, *shape of the input). Nothing pickled is opened. Raises ArgumentError for what cannot be read,
    ModelError where the function's own code fails; whether the batches fit the network is `compile`'s business.
    """
    path = Path(spec)
    if path.suffix in PICKLES:
        raise ArgumentError(f"{spec} is not opened", why="opening such a file runs whatever code is in it", hint=HOW)
    if path.suffix not in (".npy", ".npz"):
        return _called(spec)
    arrays = _read(path)
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ArgumentError(f"{name or 'the array'} in {path} has no axis of batches", why="it is a single number", hint=HOW)
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ArgumentError(f"the arrays in {path} differ in the number of batches", why=listed, hint=HOW)
    rows = [dict(zip(arrays, row, strict=True)) for row in zip(*arrays.values(), strict=True)]
    order = _order(arrays, model)
    return rows if order is None else [tuple(row[name] for name in order) for row in rows]


def _order(arrays: Mapping[str, Array], model: Any) -> list[str] | None:
    """The names of arrays that are given by position, or whose names are those of a graph's inputs; None: by name."""
    plain = [f"arr_{i}" for i in range(len(arrays))]
    if list(arrays) == [""] or set(arrays) == set(plain):
        return sorted(arrays, key=[*plain, ""].index)
    labels = [n.op.label for n in model.inputs if isinstance(n.op, Input)] if isinstance(model, Graph) else []
    return labels if set(labels) == set(arrays) else None


def _read(path: Path) -> dict[str, Array]:
    """The arrays of a file by name; that of a .npy file has none."""
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
        arrays = {"": found} if isinstance(found, np.ndarray) else {name: found[name] for name in found.files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        hint = "write it with numpy.save(path, array) or numpy.savez(path, x=array)"
        raise ArgumentError(f"cannot read {path}", why=str(error), hint=hint) from None
    if not arrays:
        raise ArgumentError(f"{path} holds no arrays", hint=HOW)
    return arrays


def _called(spec: str) -> list[Any]:
    function: Callable[[], Any] = load_object(spec, HOW)
    if not callable(function):
        raise ArgumentError(f"{spec} is {a_kind(function)}, not a function", hint=HOW)
    result = run_users(spec, function)
    if not hasattr(result, "__iter__") or isinstance(result, str | Mapping):
        raise ArgumentError(f"{spec} gave {a_kind(result)}, not batches", hint="a list of input tuples, of tensors, or of dicts")
    return run_users(spec, lambda: list(result))
