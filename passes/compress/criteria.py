"""How much a weight or a channel matters, as a table: a criterion scores a layer's weights, its output channels, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from paring.ir.errors import ArgumentError, ModelError, nearest
from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.passes.compress import slopes
from paring.passes.compress.calibrate import check_calibration
from paring.passes.compress.channels.channel_evidence import reconstruction_errors, zero_shares
from paring.passes.compress.channels.channels import Channels, Group
from paring.passes.compress.operands import see_operands
from paring.passes.rewriter import Context
from paring.passes.util import const_value, layer_name

Found = TypeVar("Found")

SCOPES = ("layer", "global")
# A share is meant exactly: 0.29 of 100 is 29, though the product in floats is less.
SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a criterion may look at besides a layer.

    `layers`: all that are asked about in one run, of `graph`. `context`: calibration data, who runs a graph on them, and
    whom to tell of progress. `channels`: how the channels of the graph hang together, where channels are judged.
    """

    graph: Graph
    layers: Sequence[Node]
    context: Context
    rng: np.random.Generator
    channels: Channels | None = None
    _known: dict[Callable[..., Any], Any] = field(default_factory=dict)

    def once(self, gather: Callable[[Evidence], Found]) -> Found:
        """`gather(self)`, computed when it is first asked for: statistics of all layers in one run over the data."""
        if gather not in self._known:
            self._known[gather] = gather(self)
        return self._known[gather]


Judge = Callable[[Node, Evidence], Array]


@dataclass(frozen=True)
class Criterion:
    """Scores in float64, the least go first; None where a criterion does not know such a thing.

    `weights`: one for each weight of a layer, of the weight's shape. `channels`: one for each output channel, shape
    (channels,); 0 or more. `data`: whether it looks at calibration data, which are checked before it is asked. `rows`:
    whether scores of weights only compare within one output channel. `comparable`: whether scores of channels mean the same in
    all layers, like the change of a loss; others are made relative to their layer's mean.
    """

    weights: Judge | None
    channels: Judge | None
    data: bool = False
    rows: bool = False
    comparable: bool = False


def magnitude(layer: Node, evidence: Evidence) -> Array:
    """|weight|."""
    return np.abs(const_value(layer.inputs[1]).astype(np.float64))


def squared(layer: Node, evidence: Evidence) -> Array:
    """weight^2."""
    return magnitude(layer, evidence) ** 2


def of_rows(weights: Judge) -> Judge:
    """The sum over the weights that make a channel."""

    def judge(layer: Node, evidence: Evidence) -> Array:
        found = weights(layer, evidence)
        return found.reshape(found.shape[0], -1).sum(1)

    return judge


def euclidean(layer: Node, evidence: Evidence) -> Array:
    """The Euclidean norm of the weights that make a channel."""
    return np.sqrt(of_rows(squared)(layer, evidence))


def random_weights(layer: Node, evidence: Evidence) -> Array:
    """Nothing but chance, as a control."""
    return evidence.rng.random(layer.inputs[1].type.shape)


def random_channels(layer: Node, evidence: Evidence) -> Array:
    """Nothing but chance, as a control."""
    return evidence.rng.random(layer.inputs[1].type.shape[0])


def wanda(layer: Node, evidence: Evidence) -> Array:
    """|weight| times the norm of what it meets in calibration (Sun et al. 2023, equation 1)."""
    norms = evidence.once(input_norms)[layer]
    found = magnitude(layer, evidence)
    return (found.reshape(len(norms), -1, norms.shape[1]) * norms[:, None]).reshape(found.shape)


def input_norms(evidence: Evidence) -> dict[Node, Array]:
    """Of each layer the Euclidean norm (groups, columns) of what the weights of one output meet."""
    squares: dict[Node, Array] = {}

    def see(layer: Node, rows: Array) -> None:
        squares[layer] = squares.get(layer, 0.0) + np.einsum("grc,grc->gc", rows, rows, dtype=np.float64)

    see_operands(evidence.graph, evidence.layers, evidence.context, see)
    return {layer: np.sqrt(found) for layer, found in squares.items()}


def apoz(layer: Node, evidence: Evidence) -> Array:
    """How often a channel is not zero behind its activation: 1 less the average percentage of zeros (Hu et al. 2016)."""
    return 1 - evidence.once(_zero_shares)[layer]


def _zero_shares(evidence: Evidence) -> dict[Node, Array]:
    return zero_shares(evidence.graph, evidence.layers, evidence.context)


def reconstruction(layer: Node, evidence: Evidence) -> Array:
    """How far the results of the next layers are off without a channel (Luo et al. 2017, "ThiNet")."""
    channels = evidence.channels
    assert channels is not None
    errors = evidence.once(_reconstruction_errors)
    return np.array([errors.get(root, 0.0) for root in channels.flow.coupling.roots(channels.flow.layers[layer]).tolist()])


def _reconstruction_errors(evidence: Evidence) -> dict[int, float]:
    assert evidence.channels is not None
    return reconstruction_errors(evidence.channels, evidence.context, evidence.rng)


CRITERIA: dict[str, Criterion] = {
    "l1": Criterion(magnitude, of_rows(magnitude)),  # Li et al. 2017
    "l2": Criterion(squared, euclidean),
    "wanda": Criterion(wanda, None, data=True, rows=True),
    "apoz": Criterion(None, apoz, data=True),
    "reconstruction": Criterion(None, reconstruction, data=True),
    "random": Criterion(random_weights, random_channels),
    "taylor": Criterion(slopes.taylor_weights, slopes.taylor_channels, data=True, comparable=True),  # Molchanov et al. 2019
    "snip": Criterion(slopes.snip, of_rows(slopes.snip), data=True, comparable=True),  # Lee et al. 2019
}
GRADIENT_CRITERIA = ("taylor", "snip")
CHANNEL_CRITERIA = tuple(name for name, criterion in CRITERIA.items() if criterion.channels)
WEIGHT_CRITERIA = tuple(name for name, criterion in CRITERIA.items() if criterion.weights)


def check_choice(who: str, option: str, value: str, known: Iterable[str]) -> None:
    """Raise ArgumentError for an option of a pass that is none of those known."""
    names = tuple(known)
    if value not in names:
        why = f"there are {', '.join(names)}"
        raise ArgumentError(f"pass {who}: {option} is {value!r}", why=why, hint=nearest(value, names, ""))


def check_evidence(who: str, criterion: str, graph: Graph, context: Context) -> None:
    """Raise ArgumentError where a criterion looks at calibration data and there are none, InputError for bad ones."""
    if CRITERIA[criterion].data:
        check_calibration(graph, context, f"{who}{{criterion={criterion!r}}}")


def channel_scores(groups: Sequence[Group], criterion: str, evidence: Evidence) -> Mapping[int, float]:
    """By its number for each group the mean over its channels, each relative to the mean of its layer.

    Layers of different size so count the same, within a group and between groups. Where scores of all layers are comparable,
    it is their sum over the group. Raises ModelError where a score is not a number.
    """
    judge, comparable = CRITERIA[criterion].channels, CRITERIA[criterion].comparable
    assert judge is not None
    relative: dict[Node, Array] = {}
    for layer in evidence.layers:
        found = judge(layer, evidence)
        if not np.isfinite(found).all():
            raise ModelError(f"criterion {criterion!r} gives NaN or infinite scores", where=layer_name(layer))
        mean = 1.0 if comparable else found.mean()
        relative[layer] = found / mean if mean > 0 else np.zeros_like(found)
    together = np.sum if comparable else np.mean
    return {
        group.number: float(together(np.concatenate([relative[layer][places] for layer, places in group.channels.items()])))
        for group in groups
    }
