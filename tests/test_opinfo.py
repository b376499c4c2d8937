"""PyTorch's own samples (OpInfo, float32) of the operators that Paring supports, none skipped silently.

Every operator of `op_db` is run, or stands in `REFUSED`, `PARTLY` or `NOT_RUN` with the reason. Many samples share one export,
because tracing costs more than checking. The fast test takes `FAST_SAMPLES` of each operator; the slow one takes all, and
checks the refusals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from paring.frontends.oracle import ratios, reference
from paring.frontends.torch_export import import_model
from paring.ir import interpret

pytest.importorskip("expecttest", reason="torch's OpInfo needs expecttest")
from torch.testing._internal.common_methods_invocations import op_db

FAST_SAMPLES = 2
GROUP = 8
#TABLES#

class Samples(nn.Module):
    """Calls of operators; the tensors among their arguments are the inputs."""

    def __init__(self, calls: Sequence[tuple[Any, list[Any], Any]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: torch.Tensor) -> dict[str, Any]:
        rest = iter(tensors)
        results = {}
        for number, (op, leaves, spec) in enumerate(self.calls):
            args, kwargs = pytree.tree_unflatten([next(rest) if isinstance(x, torch.Tensor) else x for x in leaves], spec)
            results[f"{number} {op.name}"] = op.op(*args, **kwargs)
        return results


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


OPS = {name_of(op): op for op in op_db if torch.float32 in op.dtypes}


def samples_of(name: str, count: int | None) -> Iterator[tuple[Any, list[Any], Any]]:
    """The first samples of an operator (all without a count), as (operator, flat arguments, their structure)."""
    torch.manual_seed(0)
    for sample in islice(OPS[name].sample_inputs("cpu", torch.float32, requires_grad=False), count):
        yield OPS[name], *pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))


def disagreements(calls: Sequence[tuple[Any, list[Any], Any]]) -> dict[str, float]:
    """Import and run some calls as one program; the results whose error is more than is allowed."""
    tensors = tuple(leaf for _, leaves, _ in calls for leaf in leaves if isinstance(leaf, torch.Tensor))
    model = Samples(calls).eval()
    expected = reference(model, tensors)
    imported = import_model(model, tuple(t.clone() for t in tensors))
    inputs = imported.flatten_inputs(tensors)
    found = ratios(imported, inputs, interpret(imported.graph, inputs), expected)
    with torch.no_grad():
        results, _ = pytree.tree_flatten_with_path(model(*tensors))
    paths = [pytree.keystr(path) for path, leaf in results if isinstance(leaf, torch.Tensor)]
    return {path: ratio for path, ratio in zip(paths, found, strict=True) if not ratio <= 1}
