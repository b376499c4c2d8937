"""The measure against torch: what it allows, what it refuses, and the float64 run that it rests on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from paring.frontends.oracle import TORCH_FACTOR, Reference, arrays_of, error_ratio, reference, worst_ratio
from paring.frontends.structure import Record

ULP = float(np.finfo(np.float32).eps)
INF = float("inf")
DOUBLE = np.array([1.0, 1.0, 2.0**-10])


def off_by(*ulps: float) -> np.ndarray:
    """DOUBLE with errors in ulps of 1, in float32."""
    return (DOUBLE + np.array(ulps) * ULP).astype(np.float32)


def test_the_largest_error_is_held_against_three_times_that_of_torch_and_one_ulp() -> None:
    assert error_ratio(off_by(7, 0, 0), off_by(0, 2, 0), DOUBLE) <= TORCH_FACTOR
    assert error_ratio(off_by(8, 0, 0), off_by(0, 2, 0), DOUBLE) > TORCH_FACTOR
    assert error_ratio(off_by(0, 0, 0), off_by(0, 0, 0), DOUBLE) == 0


def test_with_a_bound_each_element_is_held_against_its_own() -> None:
    assert error_ratio(off_by(0, 7.5, 0), off_by(0, 2, 0), DOUBLE, DOUBLE) <= TORCH_FACTOR
    assert error_ratio(off_by(7, 0, 0), off_by(0, 2, 0), DOUBLE, DOUBLE) > TORCH_FACTOR
    assert error_ratio(off_by(0, 0, 1), off_by(0, 2, 0), DOUBLE, DOUBLE) > TORCH_FACTOR


@pytest.mark.parametrize(
    ("got", "single"),
    [
        (np.zeros(3, "float32"), np.zeros(4, "float32")),
        (np.zeros(3, "float32"), np.zeros(3, "float64")),
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([0.0, np.nan], "float32"), np.array([0.0, 1.0], "float32")),
        (np.array([0.0, 1.0], "float32"), np.array([0.0, np.nan], "float32")),
        (np.array([0.0, np.inf], "float32"), np.array([0.0, -np.inf], "float32")),
    ],
    ids=["shape", "dtype", "integers", "NaN", "no NaN", "infinities"],
)
def test_what_no_rounding_explains_is_infinitely_far(got: np.ndarray, single: np.ndarray) -> None:
    assert error_ratio(got, single, single.astype(np.float64)) == INF
    assert worst_ratio([single, got], Reference([single] * 2, [single.astype(np.float64)] * 2)) == INF


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan, np.inf, -np.inf, 1.0], "float32"),
        np.zeros((0, 3), "float32"),
        np.array([True, False]),
        np.array([1e300]),
    ],
    ids=["special values", "nothing", "no floats", "beyond float32"],
)
def test_equal_results_agree(array: np.ndarray) -> None:
    assert error_ratio(array, array, array.astype(np.float64)) == 0


def test_a_missing_output_is_infinitely_far() -> None:
    assert worst_ratio([], Reference([DOUBLE], [DOUBLE])) == INF


class Casting(nn.Module):
    """Computes in float32 whatever it is given, as RMS norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> dict[str, torch.Tensor | int]:
        x += shift
        return {"a": x.float() * self.scale, "b": x.to(torch.float32) / 3, "c": torch.full((1,), 0.1) * 3, "n": 2}


def test_the_float64_run_is_in_float64_throughout_and_leaves_model_and_inputs_alone() -> None:
    model, x, shift = Casting(), torch.ones(2), torch.ones(1)
    found = reference(model, (x,), {"shift": shift})
    assert [array.dtype for array in found.single] == [np.float32] * 3
    assert [array.dtype for array in found.double] == [np.float64] * 3
    assert found.double[1][0] == 2 / 3
    assert model.scale.dtype == torch.get_default_dtype() == torch.float32
    assert x.tolist() == [1, 1]


def test_arrays_come_in_the_order_of_the_result() -> None:
    first, second, third = torch.zeros(1), np.ones(1), torch.ones(2)
    found = arrays_of({"b": [first, 3, None], "a": Record("Output", {"y": second, 0: (third,)})})
    assert [array.tolist() for array in found] == [[0], [1], [1, 1]]
