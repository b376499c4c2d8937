"""How far results are from torch's: our error over its own, both against torch in float64. At most TORCH_FACTOR is agreement."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paring.frontends.structure import Imported, Record
from paring.ir import magnitude_bound
from paring.ir.op import Array

if TYPE_CHECKING:
    import torch

TORCH_FACTOR = 3.0
ULPS = 2.0
LARGEST32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Reference:
    """torch's results of one call, in its own precision and in float64, as flat sequences of arrays."""

    single: Sequence[Array]
    double: Sequence[Array]


def worst_ratio(got: Sequence[Array], expected: Reference) -> float:
    """For networks of any depth: the greatest `error_ratio` of all outputs."""
    if not len(got) == len(expected.single) == len(expected.double):
        return float("inf")
    return max(map(error_ratio, got, expected.single, expected.double), default=0.0)


def ratios(imported: Imported, inputs: Sequence[Array], got: Sequence[Array], expected: Reference) -> list[float]:
    """For operators and small programs: the `error_ratio` of each output of the graph, in order, by its magnitude bound."""
    _, bounds = magnitude_bound(imported.graph, inputs)
    if not len(got) == len(expected.single) == len(bounds):
        return [float("inf")]
    return list(map(error_ratio, got, expected.single, expected.double, bounds))


def error_ratio(got: Array, single: Array, double: Array, bound: Array | None = None) -> float:
    """The error of one output over that of torch, both against float64; a little more is granted to torch.

    Without `bound` the largest errors of the output are compared, and a ratio of TORCH_FACTOR is that many times torch's
    error and one float32 ulp of the largest value. With it, which is useless for deep networks, errors are compared element
    by element, with 2 ulps of the bound. Infinite where shapes, dtypes, NaNs, infinities or anything but floats differ.
    """
    if got.shape != single.shape or got.dtype != single.dtype:
        return float("inf")
    if got.dtype.kind != "f":
        return 0.0 if np.array_equal(got, single) else float("inf")
    finite = np.isfinite(single)
    if not np.array_equal(got[~finite], single[~finite], equal_nan=True):
        return float("inf")
    with np.errstate(all="ignore"):
        error, own = (np.abs(x.astype(np.float64) - double)[finite] for x in (got, single))
        if bound is None:
            largest = min(np.abs(double[finite]).max(initial=0.0), LARGEST32)
            error, own, granted = error.max(initial=0.0), own.max(initial=0.0), np.spacing(np.float32(largest))
        else:
            granted = ULPS * np.finfo(got.dtype).eps * bound[finite] + np.finfo(got.dtype).tiny
        ratio = np.where(error == 0, 0.0, error / (own + granted / TORCH_FACTOR))
    return float("inf") if np.isnan(ratio).any() else float(ratio.max(initial=0.0))


def reference(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Reference:
    """Run a model (or function) as it is, and a copy of it with all its floats in float64."""
    import torch

    with torch.no_grad():
        single = model(*_copied(args, torch.clone), **_copied(kwargs or {}, torch.clone))
        twice = copy.deepcopy(model).double() if isinstance(model, torch.nn.Module) else model
        double = _in_float64(twice, _copied(args, _widened), _copied(kwargs or {}, _widened))
    return Reference(arrays_of(single), arrays_of(double))


def arrays_of(result: Any) -> tuple[Array, ...]:
    """The tensors and arrays in the result of a model, or of the network made from it, in order.

    torch's own walk does not look into what stands for a model's class in a loaded network: a kind of dict, or of tuple.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    if isinstance(result, torch.Tensor):
        return (result.detach().numpy(),)
    if isinstance(result, np.ndarray):
        return (result,)
    if isinstance(result, Record):
        items: list[Any] = list(dict.values(result))
    elif isinstance(result, tuple | list):
        items = list(result)
    else:
        items = [leaf for leaf in tree_leaves(result) if leaf is not result]
    return tuple(array for item in items for array in arrays_of(item))


def _in_float64(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Some models cast to float32 on their own (RMS norms, rotary tables): they are overruled."""
    import torch
    from torch.overrides import TorchFunctionMode

    def widen(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    class Wide(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.float:
                function = torch.Tensor.double
            return function(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})

    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            return function(*args, **kwargs)
    finally:
        torch.set_default_dtype(usual)


def _copied(tree: Any, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    import torch
    from torch.utils._pytree import tree_map_only

    return tree_map_only(torch.Tensor, copy_tensor, tree)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()
