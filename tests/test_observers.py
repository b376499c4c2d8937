"""Observers: ranges from batches, and the parameters made of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from paring.ir import Node
from paring.ir.errors import ArgumentError, InputError
from paring.ir.op import Array
from paring.ir.ops import quantized
from paring.ir.ops.core import Input
from paring.passes.compress.quantization.observers import NAMES, Histogram, affine, make_observer

pytestmark = pytest.mark.fast

# A histogram knows ends to one of at least 2048 bins on each side.
BIN = 1 / 2048


def seen(name: str, *batches: Array, **settings: float) -> tuple[float, float]:
    observer = make_observer(name, **settings)
    for batch in batches:
        observer.observe(np.asarray(batch, np.float32))
    return observer.range()


def error(values: Array, low: float, high: float) -> float:
    """Mean squared error of 8 bits over [low, high]."""
    params = affine(low, high, "uint8")
    q = quantized.Quantize(params.zero_point, scale=params.scale).ref(values)
    return float(((quantized.Dequantize(params.scale, params.zero_point).ref(q) - values) ** 2).mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_whatever_is_seen_gives_legal_parameters(name: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    tiny = np.finfo(np.float32).smallest_subnormal
    batches = (
        *(
            np.zeros(5),
            np.full(7, 3.0),
            np.full(7, -3.0),
            np.zeros(0),
            np.array([1e-40, 0]),
            np.array([tiny]),
            np.array([3.4e38]),
        ),
        *(
            np.array([-3.4e38, 3.4e38]),
            rng.standard_normal(100),
            rng.random(100) + 5,
            -rng.random(100) - 5,
            np.array([0.0, 1e-30]),
        ),
    )
    for batch in batches:
        low, high = seen(name, batch)
        params = affine(low, high, dtype)
        node = Node(quantized.Quantize(params.zero_point, dtype, scale=params.scale), [Node(Input("x", "float32", batch.shape))])
        assert math.isfinite(1 / np.float32(params.scale)), "the op was built, so its scale has a reciprocal"
        assert params.scale >= np.finfo(np.float32).tiny
        back = quantized.Dequantize(params.scale, params.zero_point).ref(node.op.ref(np.float32([0.0, -0.0])))
        assert (back == 0).all(), "zero is exact"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_seen_and_only_zeros_seen_is_a_range_of_nothing(name: str) -> None:
    assert seen(name) == (0.0, 0.0)
    assert seen(name, np.zeros(9), np.zeros((0, 3))) == (0.0, 0.0)
    assert affine(0.0, 0.0, "uint8").scale == 1.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        seen(name, np.array([1.0, value, 2.0]))
    with pytest.raises(InputError, match="not a range"):
        affine(value, value, "uint8")


def test_minmax_clips_nothing_and_ema_follows() -> None:
    batches = [np.array([-1.0, 4.0]), np.array([-3.0, 2.0])]
    assert seen("minmax", *batches) == (-3.0, 4.0)
    assert seen("ema", *batches, momentum=0.5) == (-2.0, 3.0)
    assert seen("minmax", np.array([2.0, 3.0])) == (0.0, 3.0)


def test_the_parameters_cover_the_range_in_255_steps() -> None:
    params = affine(-1.0, 3.0, "uint8")
    assert (params.scale, params.zero_point) == (float(np.float32(4 / 255)), 64)
    assert affine(0.0, 2.55, "uint8").zero_point == 0
    assert affine(0.0, 2.55, "int8").zero_point == -128
    assert affine(-2.55, 0.0, "uint8").zero_point == 255


@pytest.mark.parametrize("name", ["percentile", "kl", "mse"])
def test_the_order_of_batches_does_not_matter_to_a_histogram(name: str) -> None:
    rng = np.random.default_rng(1)
    batches = [rng.standard_normal(1000) * scale for scale in (0.001, 1.0, 30.0, 0.1)]
    assert seen(name, *batches) == seen(name, *batches[::-1])


def test_a_histogram_that_grows_keeps_every_count() -> None:
    histogram = Histogram()
    for scale in (1e-30, 1.0, 1e30):
        histogram.observe(np.float32([-scale, scale / 3, scale]))
    assert histogram.counts.sum() == 9
    assert histogram.range() == (float(np.float32(-1e30)), float(np.float32(1e30)))


def test_a_percentile_leaves_out_its_share_at_each_end() -> None:
    values = np.arange(-5000, 5001) / 1000
    low, high = seen("percentile", values, percentile=99.0)
    assert abs(low + 4.9) < 8 * BIN
    assert abs(high - 4.9) < 8 * BIN
    assert seen("percentile", values, percentile=100.0) == (-5.0, 5.0)


@pytest.mark.parametrize("name", ["percentile", "kl"])
def test_one_outlier_does_not_use_up_the_range(name: str) -> None:
    values = np.random.default_rng(2).standard_normal(100_000).astype(np.float32)
    values[0] = 1000.0
    low, high = seen(name, values)
    assert -6 < low < -2
    assert 2 < high < 200
    body = values[1:]
    assert error(body, low, high) < error(body, *seen("minmax", values)) / 5


def test_kl_uses_256_levels_for_one_sign_and_keeps_a_uniform_range() -> None:
    values = np.random.default_rng(3).random(100_000)
    low, high = seen("kl", values)
    assert low == 0
    assert high > 0.9
    low, high = seen("kl", values * 2 - 1)
    assert low < -0.9
    assert high > 0.9


def test_mse_has_the_least_error_of_all_observers() -> None:
    rng = np.random.default_rng(4)
    for values in (rng.standard_normal(20_000), rng.laplace(size=20_000), np.maximum(rng.standard_cauchy(20_000), 0)):
        values = values.astype(np.float32)
        errors = {name: error(values, *seen(name, values)) for name in NAMES}
        # The histogram knows each value to half a bin only.
        assert errors["mse"] <= 1.01 * min(errors.values()), errors


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("minmx", {}, "unknown calibrator"),
        ("percentile", {"percentile": 101.0}, "percentile is 101"),
        ("percentile", {"percentile": 0.5}, "percentile is 0.5"),
        ("ema", {"momentum": 1.0}, "momentum is 1"),
        ("ema", {"momentum": math.nan}, "momentum is nan"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_observer(name, **settings)
