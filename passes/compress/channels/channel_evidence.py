"""What calibration data say about channels: how often they are zero, and what the layers behind lose without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from paring.ir.graph import Graph, Node
from paring.ir.op import Array
from paring.ir.ops import binary, conv, unary
from paring.passes.compress.calibrate import gather
from paring.passes.compress.channels.channels import Channels
from paring.passes.compress.channels.labels import along
from paring.passes.compress.layers import carries, is_layer, taps_last
from paring.passes.compress.operands import see_operands
from paring.passes.rewriter import Context
from paring.passes.util import channel_axis, const_value

# Results of a layer that one batch adds at least, where it has as many.
SAMPLES = 512


def zero_shares(graph: Graph, layers: Sequence[Node], context: Context) -> dict[Node, Array]:
    """Of each layer the share of zeros (channels,) behind its activation function, over the calibration data."""
    users = graph.users()
    ends: dict[Node, tuple[Node, int]] = {layer: _activation(layer, users) for layer in layers}
    counts: dict[Node, list[Array]] = {}

    def see(node: Node, values: Array) -> None:
        counts.setdefault(node, []).append(values == 0)

    def share(end: Node, axis: int) -> Array:
        others = tuple(d for d in range(end.type.rank) if d != axis)
        return np.mean([zero.mean(others) for zero in counts[end]], 0)

    gather(graph, list(dict.fromkeys(end for end, _ in ends.values())), context, see)
    return {layer: share(*ends[layer]) for layer in layers}


def _activation(layer: Node, users: Mapping[Node, Sequence[Node]]) -> tuple[Node, int]:
    """The first function of single elements behind a layer, through sums and pools, and where it has the layer's channels."""
    node, axis = layer, channel_axis(layer)
    while users[node]:
        function = next((reader for reader in users[node] if isinstance(reader.op, unary.Unary)), None)
        if function is not None:
            return function, axis
        reader = users[node][0]
        moved = axis if isinstance(reader.op, binary.Add) else carries(reader, axis)
        if moved is None or len(users[node]) > 1:
            break
        node, axis = reader, moved
    # Nothing makes zeros: it is the layer's own result that counts.
    return layer, channel_axis(layer)


def reconstruction_errors(channels: Channels, context: Context, rng: np.random.Generator) -> dict[int, float]:
    """By its number for each group of channels how far the results of the layers that read it are off once it is masked.

    The greedy choice of ThiNet (Luo et al. 2017, algorithm 1): at each reader that one goes next with which the squared error
    of sampled results grows least, and its figure is the error by then, relative to the results' squares; readers add up.
    """
    known = {group.number for group in channels.groups}
    every = {layer: _read(channels, layer, known) for layer in channels.flow.graph.nodes() if _mixes(layer)}
    readers = {layer: found for layer, found in every.items() if found is not None}
    grams: dict[Node, Array] = {}
    squares: dict[Node, float] = {}

    def see(layer: Node, rows: Array) -> None:
        groups, rest = readers[layer]
        weight = taps_last(const_value(layer.inputs[1]).astype(np.float64))
        x = rows[0].reshape(-1, *weight.shape[1:])
        x = x.repeat(min(len(weight), -(-SAMPLES // max(1, len(x)))), 0)
        sampled = weight[rng.integers(len(weight), size=len(x))]
        lost = _summed(np.einsum("rct,rct->rc", x - rest[:, None], sampled), groups)
        grams[layer] = grams.get(layer, 0.0) + lost.T @ lost
        squares[layer] = squares.get(layer, 0.0) + float((np.einsum("rct,rct->r", x, sampled) ** 2).sum())

    see_operands(channels.flow.graph, list(readers), context, see)
    errors = dict.fromkeys(known, 0.0)
    for layer, (groups, _) in readers.items():
        numbers = np.unique(groups)
        free = np.isin(numbers, list(known))
        found = _greedy(grams[layer][np.ix_(free, free)]) / max(squares[layer], np.finfo(np.float64).tiny)
        for number, error in zip(numbers[free].tolist(), found.tolist(), strict=True):
            errors[number] += error
    return errors


def _mixes(node: Node) -> bool:
    """Whether it is a layer all of whose channels go into each result; of others results go whole, which their readers miss."""
    return is_layer(node) and not (isinstance(node.op, conv.Conv2d) and node.op.groups > 1)


def _read(channels: Channels, layer: Node, known: set[int]) -> tuple[Array, Array] | None:
    """Of each input channel the number of its group and what it holds once masked; None where all of them stay."""
    operand, axis = layer.inputs[0], channel_axis(layer)
    value = channels.flow.values[operand]
    if value is None or not value.varies(axis):
        return None
    groups, rest = along(channels.roots[operand], axis), along(value.rest, axis)
    goes = np.isin(groups, list(known))
    return (groups, np.where(goes, rest, 0.0)) if goes.any() else None


def _summed(columns: Array, groups: Array) -> Array:
    """(rows, distinct groups): columns of one group added up, in ascending order of the groups."""
    order = np.argsort(groups, kind="stable")
    starts = np.unique(groups[order], return_index=True)[1]
    return np.add.reduceat(columns[:, order], starts, 1)


def _greedy(gram: Array) -> Array:
    """The error when each channel is gone with all that went before it, given the products of what they contribute."""
    errors = np.zeros(len(gram))
    grows, total = gram.diagonal().copy(), 0.0
    for _ in range(len(gram)):
        best = int(np.argmin(grows))
        # Errors that cancel do not make a later channel matter less than an earlier one.
        total = max(total, total + float(grows[best]))
        errors[best] = total
        grows += 2 * gram[best]
        grows[best] = np.inf
    return errors
