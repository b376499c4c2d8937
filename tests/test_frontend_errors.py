"""Bad models and bad calls: each a typed error that says what, where, why and what to do."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paring.frontends.torch_export import import_model, import_program
from paring.frontends.torch_fx import import_fx
from paring.ir.errors import ArgumentError, InputError, ModelError, ParingError, UnsupportedOpsError

ROOT = Path(__file__).resolve().parent.parent

X = torch.ones(2, 4)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def refused(kind: type[ParingError], model: nn.Module | Callable[..., Any], *args: Any) -> ParingError:
    """The error of importing a model, after a check that it is complete."""
    module = model if isinstance(model, nn.Module) else Function(model).eval()
    with pytest.raises(kind) as caught:
        import_model(module, args or (X,))
    assert type(caught.value) is kind
    assert caught.value.what
    assert caught.value.hint
    assert str(ROOT) not in str(caught.value)
    return caught.value


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_training_mode_names_each_layer() -> None:
    error = refused(ModelError, Net())
    assert "2 layers" in error.what
    assert "body.1" in error.where
    assert "body.2" in error.where
    assert "model.eval()" in error.hint
    with pytest.raises(ModelError, match="training mode"):
        import_program(torch.export.export(Net(), (X,)))
    assert "dropout" in refused(ModelError, lambda x: F.dropout(x, 0.5)).where


def test_training_mode_without_consequences_is_fine() -> None:
    import_model(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LayerNorm(3)).train(), (X,))
    import_model(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), (X,))


class Sorting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.sort(x, stable=True)[0]
        y = torch.sort(y, stable=True)[0]
        y = y + torch.atan2(x, x)
        return torch.rand_like(y) + y.relu()


def test_unsupported_operators_are_listed_at_once() -> None:
    error = refused(UnsupportedOpsError, Sorting().eval())
    assert "3 unsupported operators, 4 times" in error.what
    assert "aten.sort.stable x2" in error.where
    assert "aten.atan2.default x1" in error.where
    assert "draws random numbers" in error.where
    assert error.where.count("tests/test_frontend_errors.py:") == 4


def test_an_unsupported_use_says_why() -> None:
    error = refused(UnsupportedOpsError, nn.Conv3d(1, 1, 2).eval(), torch.ones(1, 1, 3, 3, 3))
    assert "3 spatial dimensions" in error.where
    assert "k = 1" in refused(UnsupportedOpsError, lambda x: x.topk(2)).where
    assert "indices" in refused(UnsupportedOpsError, lambda x: F.max_pool1d(x, 2, return_indices=True)[1] + 1).where


def branch(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x
    return -x


DATA_DEPENDENT: dict[str, Callable[..., Any]] = {
    "branch": branch,
    "number": lambda x: x + float(x.mean()),
    "size": lambda x: torch.zeros(int(x.sum().item())),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero() * 2,
    "masked_select": lambda x: x.masked_select(x > 0),
}


@pytest.mark.parametrize("name", DATA_DEPENDENT)
def test_data_dependence(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    error = refused(ModelError, DATA_DEPENDENT[name])
    assert "depend" in error.what or "item()" in error.what
    assert "tests/test_frontend_errors.py:" in error.where
    assert "torch.where" in error.hint
    assert capfd.readouterr() == ("", ""), "said once, in the error"


def test_control_flow_operators() -> None:
    error = refused(UnsupportedOpsError, lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))
    assert "control flow" in error.where


def test_half_precision() -> None:
    error = refused(ModelError, nn.Linear(4, 3).half())
    assert "model.float()" in error.hint
    assert error.where == "weight"
    assert "bfloat16" in refused(ModelError, nn.ReLU(), X.bfloat16()).what
    refused(UnsupportedOpsError, lambda x: x.half() * 2)


def test_other_dtypes_and_memories() -> None:
    refused(ModelError, nn.ReLU(), torch.ones(2, dtype=torch.complex64))
    refused(ModelError, nn.Identity(), torch.ones(2).to_sparse())
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    assert "meta" in refused(ModelError, model, torch.ones(2, 4)).what or True


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count


def test_writes_into_buffers_and_inputs() -> None:
    assert refused(ModelError, Counting().eval()).where == "count"
    error = refused(ModelError, lambda x: x.add_(1) * 2, X.clone())
    assert "input" in error.what
    assert "clone" in error.hint


def test_errors_of_the_model_itself_point_at_its_line() -> None:
    error = refused(ModelError, lambda x: x.reshape(3, 7))
    assert error.where.startswith("tests/test_frontend_errors.py:")
    assert "invalid for input of size 8" in error.why


def test_dynamic_shapes() -> None:
    program = torch.export.export(nn.ReLU(), (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with pytest.raises(ModelError, match="dynamic shape"):
        import_program(program)


def test_things_that_are_not_models() -> None:
    with pytest.raises(ArgumentError, match="expected a torch"):
        import_model(lambda x: x, (X,))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="GraphModule"):
        import_fx(nn.ReLU(), (X,))  # type: ignore[arg-type]


ODD_KEYS: list[tuple[Any, ...]] = [
    (0.5, 0.25),
    (None, "a"),
    ((1, 2), 3),
    (True, (1,)),
    (True, False),
    (torch.int8, torch.float32),
]


@pytest.mark.parametrize("keys", ODD_KEYS, ids=str)
def test_keys_that_cannot_be_saved_are_named(keys: tuple[Any, ...]) -> None:
    first, second = keys
    said = [
        refused(ModelError, lambda x: {first: x + 1, second: x}),
        refused(ModelError, lambda x: (x, [OrderedDict([(first, x), (second, x + 1)])])),
        refused(ModelError, lambda x, d: x + d["d"][first], X, {"d": {first: X, second: X}}),
    ]
    assert [error.where for error in said] == ["output", "output[1][0]", "input 1['d']"]
    assert all(f"has the key {first!r}" in error.what for error in said)


def test_keys_and_containers_that_are_supported() -> None:
    given = defaultdict(list, {"a": X, 1: X}), deque([X, X])
    imported = import_model(Function(lambda d, q: {2: d["a"] + d[1], "b": q[0] + q[1]}).eval(), given)
    assert imported.out_spec.keys == (2, "b")
    assert len(imported.flatten_inputs(given)) == 4


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "too few": ((X,), {}, "expected 2 positional inputs, got 1"),
    "too many": ((X, X, X), {}, "expected 2 positional inputs, got 3"),
    "unknown keyword": ((X, X), {"z": X}, "keyword inputs none, got z"),
    "shape": ((X, torch.ones(2, 5)), {}, r"input 1 \(y\) has shape \[2, 5\], expected float32\[2,4\]"),
    "dtype": ((X.double(), X), {}, r"input 0 \(x\) has dtype float64, expected float32\[2,4\]"),
    "numpy dtype": ((np.ones((2, 4)), X), {}, "has dtype float64"),
    "bfloat16": ((X.bfloat16(), X), {}, r"input 0 \(x\) can not be read"),
    "device": ((X.to("meta"), X), {}, "on device meta, expected cpu"),
    "sparse": ((X.to_sparse(), X), {}, "expected a dense one"),
    "list": (([1.0, 2.0], X), {}, "is a list of 2, expected a tensor"),
    "none": ((None, X), {}, "is None, expected a tensor"),
    "number": ((1.5, X), {}, "is 1.5, expected a tensor"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls(name: str) -> None:
    class Add(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    imported = import_model(Add(), (X, X))
    args, kwargs, message = CALLS[name]
    with pytest.raises(InputError, match=message) as caught:
        imported.flatten_inputs(args, kwargs)
    assert caught.value.hint


NESTED: dict[str, tuple[Any, str]] = {
    "missing key": ({"a": X}, r"expected a dict with the keys \['a', 'b'\]"),
    "not a dict": ([X, (X, 2)], "expected a dict"),
    "short tuple": ({"a": X, "b": (X,)}, "expected a tuple of 2"),
    "other constant": ({"a": X, "b": (X, 3)}, r"input 0\['b'\]\[1\] is 3, expected 2"),
    "deep shape": ({"a": X, "b": (torch.ones(1), 2)}, r"input 0\['b'\]\[0\] .* has shape \[1\]"),
}


@pytest.mark.parametrize("name", NESTED)
def test_bad_nested_calls(name: str) -> None:
    imported = import_model(Function(lambda d: d["a"] * d["b"][1] + d["b"][0]), ({"a": X, "b": (X, 2)},))
    value, message = NESTED[name]
    with pytest.raises(InputError, match=message):
        imported.flatten_inputs((value,))
