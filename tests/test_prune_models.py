"""Real networks with channels removed: the masked network's results within the rounding of one sum, and what they save."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("torch")

from paring.bench.models import MODELS
from paring.compiler import import_any
from paring.ir import Graph
from paring.passes.compress.channels.cut import masked
from paring.passes.compress.channels.prune_channels import PruneChannels
from paring.passes.contract import Exact, check
from paring.passes.ledger import measure
from paring.passes.manager import run_pass, run_pipeline
from paring.passes.pipelines import pipeline
from paring.passes.rewriter import Context
from paring.testing import random_inputs

NAMES = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "vit_tiny", "llama")
# The share of multiply-adds that is left at a ratio of a half is at most this.
LEFT = {"resnet18": 0.27, "resnet50": 0.27, "mobilenet_v2": 0.3, "densenet121": 0.27, "vit_tiny": 0.57, "llama": 0.8}
GRAPHS: dict[str, Graph] = {}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    # Only looked for: torchvision does not import everywhere before bench.models has prepared it.
    library = {"vit_tiny": "timm", "llama": "transformers"}.get(request.param, "torchvision")
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    return str(request.param)


@pytest.fixture
def graph(name: str) -> Graph:
    """Prepared as the pass finds it in a pipeline."""
    if name not in GRAPHS:
        model, inputs = MODELS[name].build(small=True)
        GRAPHS[name] = run_pipeline(import_any(model, inputs, {}).graph, pipeline("prepare", {})).graph
    return GRAPHS[name]


def check_pruned(graph: Graph, prune: PruneChannels) -> Graph:
    after = run_pass(prune, graph, Context())
    arrays = random_inputs(graph, np.random.default_rng(0), exact=False)
    check(Exact(finite=True), masked(graph, prune.plan(graph)), after, arrays, who=str(prune))
    return after


@pytest.mark.slow
def test_half_of_the_channels(name: str, graph: Graph) -> None:
    after = check_pruned(graph, PruneChannels(0.5))
    assert measure(after).macs < LEFT[name] * measure(graph).macs


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.7, 0.9])
def test_other_ratios(graph: Graph, ratio: float) -> None:
    check_pruned(graph, PruneChannels(ratio, "l1", "global" if ratio < 0.5 else "layer", round_to=0 if ratio > 0.5 else 4))
