"""How far results are from torch: the float64-ratio measure of float results, equality of all others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree

from paring.frontends.structure import Imported
from paring.ir import magnitude_bound

TORCH_FACTOR = 3.0
ULPS = 2.0


@dataclass(frozen=True)
class Reference:
    """torch's results of one call, in its own precision and in float64, as flat lists of arrays."""

    single: tuple[np.ndarray, ...]
    double: tuple[np.ndarray, ...]


def reference(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Reference:
    """Run a model (or function) as it is, and once more with all its floats in float64."""
    twice = copy.deepcopy(model).double() if isinstance(model, torch.nn.Module) else model
    with torch.no_grad():
        single = model(*_copied(args, torch.clone), **_copied(kwargs or {}, torch.clone))
        double = twice(*_copied(args, _widened), **_copied(kwargs or {}, _widened))
    return Reference(_arrays(single), _arrays(double))


def ratios(imported: Imported, inputs: Sequence[np.ndarray], got: Sequence[np.ndarray], expected: Reference) -> list[float]:
    """For each output the largest error as a share of what is allowed: 3 times torch's own plus 2 ulps of the magnitude bound.

    At most 1 is agreement. Infinite where NaNs, infinities, shapes, or anything that is not a float differ. `got` holds the
    graph's outputs in order.
    """
    _, bounds = magnitude_bound(imported.graph, inputs)
    if not len(got) == len(expected.single) == len(bounds):
        return [float("inf")]
    return [_ratio(*row) for row in zip(got, expected.single, expected.double, bounds, strict=True)]


def worst_ratio(imported: Imported, inputs: Sequence[np.ndarray], got: Sequence[np.ndarray], expected: Reference) -> float:
    """The greatest of `ratios`."""
    return max(ratios(imported, inputs, got, expected), default=0.0)


def _ratio(got: np.ndarray, single: np.ndarray, double: np.ndarray, bound: np.ndarray) -> float:
    if got.shape != single.shape or got.dtype != single.dtype:
        return float("inf")
    if got.dtype.kind != "f":
        return 0.0 if np.array_equal(got, single) else float("inf")
    finite = np.isfinite(single)
    if not np.array_equal(got[~finite], single[~finite], equal_nan=True):
        return float("inf")
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(np.float64) - double)[finite]
        own = np.abs(single.astype(np.float64) - double)[finite]
        allowed = TORCH_FACTOR * own + ULPS * np.finfo(got.dtype).eps * bound[finite] + np.finfo(got.dtype).tiny
        share = np.where(error == 0, 0.0, error / allowed)
    return float(share.max(initial=0.0)) if not np.isnan(share).any() else float("inf")


def _copied(tree: Any, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return pytree.tree_map_only(torch.Tensor, copy_tensor, tree)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def _arrays(tree: Any) -> tuple[np.ndarray, ...]:
    return tuple(leaf.detach().numpy() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))
