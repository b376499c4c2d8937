"""Our elementary functions against float64, over dense sweeps of float32: the largest error of each in ulps."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from paring.backends import vecmath as vm
from paring.backends.kernel import Lanes, Value, tvm_target
from paring.backends.targets import TARGETS, missing_flags
from paring.ir.op import Array

COUNT = 1 << 20
HOST = [t for t in TARGETS.values() if t.arch == "x86_64" and not missing_flags(t)]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x))))


def _gelu_tanh(x: Array) -> Array:
    return x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


# name: (ours, float64, range swept, largest error in ulps)
FUNCTIONS: dict[str, tuple[Callable[[Value], Value], Callable[[Array], Array], tuple[float, float], float]] = {
    "exp": (vm.exp, np.exp, (-110.0, 90.0), 1.0),
    "exp_negative": (vm.exp_negative, np.exp, (-110.0, 0.0), 1.0),
    "exp_moderate": (vm.exp_moderate, np.exp, (-87.0, 87.0), 1.0),
    "expm1": (vm.expm1, np.expm1, (-20.0, 20.0), 1.5),
    "log": (vm.log, np.log, (0.0, 1e38), 1.0),
    "log_near_1": (vm.log, np.log, (0.5, 2.0), 1.0),
    "erf": (vm.erf, _erf, (-5.0, 5.0), 1.0),
    "tanh": (vm.tanh, np.tanh, (-12.0, 12.0), 1.5),
    "sin": (vm.sin, np.sin, (-100.0, 100.0), 1.5),
    "cos": (vm.cos, np.cos, (-100.0, 100.0), 1.5),
    "sin_far": (vm.sin, np.sin, (-3e5, 3e5), 1.5),
    "cos_far": (vm.cos, np.cos, (-1e30, 1e30), 1.5),
    "sigmoid": (vm.sigmoid, _sigmoid, (-105.0, 90.0), 2.5),
    "silu": (vm.silu, lambda x: x * _sigmoid(x), (-80.0, 80.0), 3.5),
    # Where gelu is small for negative x, its definition cancels: the error is counted in ulps of x (below).
    "gelu": (vm.gelu, lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), (-15.0, 15.0), 1.5),
    "gelu_tanh": (vm.gelu_tanh, _gelu_tanh, (-1.0, 8.0), 3.5),
}


def sweep(low: float, high: float) -> Array:
    """Evenly spaced values, and bit patterns evenly spaced over all magnitudes in the range."""
    even = np.linspace(low, high, COUNT // 2, dtype=np.float64)
    bits = np.linspace(1, int(np.float32(max(abs(low), abs(high))).view(np.int32)), COUNT // 4).astype(np.int32)
    magnitudes = bits.view(np.float32)
    values = np.concatenate([even.astype(np.float32), magnitudes, -magnitudes])
    return values[(values >= np.float32(low)) & (values <= np.float32(high))]


def kernels(count: dict[str, int], lanes: int) -> dict[str, tvm.tirx.PrimFunc]:
    made = {}
    for name, size in count.items():
        with IRBuilder() as builder, T.prim_func():
            T.func_name(name)
            x, y = (T.arg(a, T.Buffer((size,), "float32")) for a in "xy")
            T.func_attr({"tirx.noalias": True, "global_symbol": name})
            with T.serial(0, size // lanes) as i:
                where = Lanes(i * lanes, lanes).expand()
                T.buffer_store(y, FUNCTIONS[name][0](x[where]), [where])
        made[name] = builder.get()
    return made


def spacing_of(values: Array) -> Array:
    """The unit of the last place in float32, which below the normal range is that of the least normal number."""
    return np.spacing(np.maximum(np.abs(values), np.finfo(np.float32).tiny).astype(np.float32)).astype(np.float64)


@pytest.mark.parametrize("target", HOST, ids=lambda t: t.name)
def test_errors_over_dense_sweeps(target: object) -> None:
    inputs = {}
    for name, (_, _, (low, high), _) in FUNCTIONS.items():
        values = sweep(low, high)
        inputs[name] = values[: values.size // 16 * 16]
    module = tvm.compile(tvm.IRModule(kernels({n: v.size for n, v in inputs.items()}, 16)), target=tvm_target(target))
    worst = {}
    for name, x in inputs.items():
        result = tvm.runtime.tensor(np.zeros_like(x))
        module[name](tvm.runtime.tensor(x), result)
        with np.errstate(all="ignore"):
            want = FUNCTIONS[name][1](x.astype(np.float64))
        got = result.numpy()
        finite = np.abs(want) <= np.finfo(np.float32).max
        assert np.isinf(got[~finite]).all(), name
        scale = x if name == "gelu" else want
        worst[name] = float((np.abs(got[finite] - want[finite]) / spacing_of(scale[finite])).max())
    print(worst)
    too_far = {name: error for name, error in worst.items() if error > FUNCTIONS[name][3]}
    assert not too_far, f"{too_far} of {worst}"
