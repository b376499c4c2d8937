"""Sparse layers against our own dense ones: speed by kind of mask and share of zeros, and from which share on each pays.

All kernels of a layer, the dense one and those of each mask, are one library and are called in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from paring.backends.build import build
from paring.backends.runtime import Executable
from paring.backends.targets import PIXELS, Target, resolve
from paring.backends.threads import set_num_threads
from paring.bench.run import save
from paring.ir import Const, Graph, Input, Node, interpret
from paring.ir import layout as lay
from paring.ir.op import Array
from paring.ir.ops.conv import Conv2d
from paring.ir.ops.linear import Linear
from paring.ir.ops.quantized import Requantize
from paring.ir.ops.shape import Broadcast
from paring.ir.ops.sparse import Lists, SparseConv2d, SparseLinear
from paring.passes.fuse import Fuse
from paring.passes.manager import run_pass
from paring.passes.pipelines import pipeline
from paring.passes.rewriter import Context
from paring.passes.sparsify import Sparsify
from paring.passes.winograd import Winograd

# Calls of each kernel in a round.
CALLS = 20
# An answer off by more than this share of its largest value is a failure, not a time.
WRONG = 1e-2


@dataclass(frozen=True)
class Layer:
    """A square convolution with `size` x `size` results, or (kernel 0) a linear layer on `size` rows.

    `dtype` is that of its input: on uint8 its weights are int8, and its sums are scaled back to uint8 in the same kernel.
    """

    inputs: int
    outputs: int
    kernel: int
    size: int
    dtype: str = "float32"

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.outputs, self.inputs, self.kernel, self.kernel) if self.kernel else (self.outputs, self.inputs)

    @property
    def pixels(self) -> int:
        return self.size**2 if self.kernel else self.size


_SHAPES: dict[str, Layer] = {
    "conv1x1-256-28": Layer(256, 256, 1, 28),
    "conv1x1-1024-14": Layer(1024, 256, 1, 14),
    "conv1x1-512-7": Layer(512, 2048, 1, 7),
    "linear-256-128": Layer(256, 1024, 0, 128),
    "linear-768-197": Layer(768, 768, 0, 197),
    "linear-1024-1": Layer(1024, 1024, 0, 1),
    "conv3x3-64-56": Layer(64, 64, 3, 56),
    "conv3x3-256-14": Layer(256, 256, 3, 14),
}
_SMALL: dict[str, Layer] = {
    "conv1x1-small": Layer(64, 64, 1, 8),
    "conv3x3-small": Layer(32, 32, 3, 6),
    "linear-small": Layer(64, 48, 0, 20),
}


def _on_bytes_too(shapes: dict[str, Layer]) -> dict[str, Layer]:
    return {**shapes, **{f"{name}-int8": replace(layer, dtype="uint8") for name, layer in shapes.items()}}


LAYERS, SMALL = _on_bytes_too(_SHAPES), _on_bytes_too(_SMALL)

Mask = Callable[[np.random.Generator, Layer, int, float], Array]


def unstructured(rng: np.random.Generator, layer: Layer, block: int, zeros: float) -> Array:
    """Any weight may be zero."""
    return rng.random(layer.weight) >= zeros


def n_of_m(rng: np.random.Generator, layer: Layer, block: int, zeros: float) -> Array:
    """Two of four neighbouring input channels (of each kernel position) are zero."""
    o, i, *kernel = layer.weight
    order = np.argsort(rng.random((o, i // 4, 4, *kernel)), axis=2)
    return (order < round(4 * (1 - zeros))).reshape(layer.weight)


def shared_n_of_m(rng: np.random.Generator, layer: Layer, block: int, zeros: float) -> Array:
    """The same two of four for a block of output channels."""
    mask = n_of_m(rng, layer, block, zeros)
    return np.repeat(mask[::block], block, 0)[: layer.outputs]


def blocks(rng: np.random.Generator, layer: Layer, block: int, zeros: float) -> Array:
    """Neighbouring output channels, a block of them, share their zeros."""
    o, *rest = layer.weight
    return np.repeat(rng.random((-(-o // block), *rest)) >= zeros, block, 0)[:o]


def patterns(rng: np.random.Generator, layer: Layer, block: int, zeros: float) -> Array:
    """Four of nine kernel positions for each input channel, the same for a block of output channels."""
    o, i, *_ = layer.weight
    kept = np.argsort(rng.random((-(-o // block), i, 9)), axis=2) < 4
    return np.repeat(kept, block, 0)[:o].reshape(layer.weight)


def own_patterns(rng: np.random.Generator, layer: Layer, block: int, zeros: float) -> Array:
    """Four of nine kernel positions for each pair of channels."""
    return patterns(rng, layer, 1, zeros)


def _for_groups(mask: Mask) -> Mask:
    """The same alike for four neighbouring input channels, which 8-bit integers are multiplied by."""

    def grouped(rng: np.random.Generator, layer: Layer, block: int, zeros: float) -> Array:
        return np.repeat(mask(rng, replace(layer, inputs=-(-layer.inputs // 4)), block, zeros), 4, 1)[:, : layer.inputs]

    return grouped


@dataclass(frozen=True)
class Series:
    """A kind of mask at some shares of zeros, the format that stores what it leaves, and the layers that it is for."""

    format: str
    mask: Mask
    zeros: tuple[float, ...]
    kernels: tuple[int, ...] = (0, 1, 3)
    dtype: str = "float32"


SERIES: dict[str, Series] = {
    "unstructured": Series("rows", unstructured, (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    "2:4": Series("rows", n_of_m, (0.5,), (0, 1)),
    "shared 2:4": Series("vectors", shared_n_of_m, (0.5,), (0, 1)),
    "blocks": Series("vectors", blocks, (0.1, 0.25, 0.5, 0.8, 0.9)),
    "patterns": Series("vectors", patterns, (5 / 9,), (3,)),
    "own patterns": Series("rows", own_patterns, (5 / 9,), (3,)),
    "int8 blocks": Series("vectors", _for_groups(blocks), (0.1, 0.25, 0.5, 0.75, 0.8, 0.9), dtype="uint8"),
    "int8 patterns": Series("vectors", _for_groups(patterns), (5 / 9,), (3,), dtype="uint8"),
}


@dataclass(frozen=True)
class Record:
    """One mask of one layer. `bound`: the speed that loads and multiply-adds allow, relative to the dense layer's peak.

    Where the dense layer is computed by tiles, that is what the model of `winograd` says of it. `chosen`: the format that
    `sparsify` takes by itself. `error` says why there is no time.
    """

    layer: str
    mask: str
    format: str
    zeros: float
    threads: int
    dense_us: float | None
    sparse_us: float | None
    bound: float
    chosen: str
    error: str = ""

    @property
    def speedup(self) -> float | None:
        return self.dense_us / self.sparse_us if self.dense_us and self.sparse_us else None


def run_sparse(
    names: Sequence[str] = (),
    threads: int = 2,
    rounds: int = 5,
    json_path: str | None = None,
    *,
    small: bool = False,
    target: str = "native",
    console: Console | None = None,
) -> list[Record]:
    """Time the layers of those names, all by default. Raises KeyError for a name that is not there."""
    table = SMALL if small else LAYERS
    unknown = [name for name in names if name not in table]
    if unknown:
        raise KeyError(f"no layer {unknown[0]!r}; there are: {', '.join(table)}")
    set_num_threads(threads)
    records: list[Record] = []
    machine = resolve(target)
    chosen = tuple(names) or tuple(table)
    with Progress(console=console or Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for name in chosen:
            progress.update(task, description=name)
            records += _Bench(name, table[name], machine, threads).run(rounds)
            progress.advance(task)
            if json_path is not None:
                save([as_json(record) for record in records], Path(json_path))
    return records


class _Bench:
    """One layer, dense and with each mask."""

    def __init__(self, name: str, layer: Layer, target: Target, threads: int) -> None:
        self.name, self.layer, self.target, self.threads = name, layer, target, threads
        self.rng = np.random.default_rng(0)
        shape = (layer.size, layer.inputs)
        if layer.kernel:
            shape = (1, layer.inputs // target.block, layer.size, layer.size, target.block)
        self.x = Node(Input("x", layer.dtype, shape))
        self.bytes = layer.dtype == "uint8"
        own = pipeline(target.pipeline, target.pipeline_options())
        (self.thin,) = (each for each in own if isinstance(each, Sparsify))
        (self.tiles,) = (each for each in own if isinstance(each, Winograd))
        self.bias = _constant(self._random((layer.outputs,), "int32" if self.bytes else "float32"))

    def run(self, rounds: int) -> list[Record]:
        direct = self.dense(np.ones(self.layer.weight, bool))
        dense = run_pass(self.tiles, Graph((self.x,), (direct,)), Context()).outputs[0]
        settings = [
            (name, series, zeros)
            for name, series in SERIES.items()
            if self.layer.kernel in series.kernels and self.layer.dtype == series.dtype
            for zeros in series.zeros
        ]
        masks = [series.mask(self.rng, self.layer, self.target.block, zeros) for _, series, zeros in settings]
        layers = [self.sparse(mask, series.format) for mask, (_, series, _) in zip(masks, settings, strict=True)]
        graph = Graph((self.x,), tuple(map(self.result, (dense, *layers))))
        array = self._random(self.x.type.shape, self.layer.dtype)
        built = Executable(build(run_pass(Fuse(), graph, Context()), self.target))
        try:
            failures = [_failure(got, want) for got, want in zip(built.run([array]), interpret(graph, [array]), strict=True)]
            times = [time.ns / 1e3 for time in built.profile([array], rounds * CALLS)]
        finally:
            built.close()
        found = []
        for (name, series, zeros), mask, time, error in zip(settings, masks, times[1:], failures[1:], strict=True):
            dense_us, sparse_us = (None, None) if error else (times[0], time)
            bound, auto = self.bound(series.format, mask) / self.tiles.gain(direct), self.chosen(mask)
            found.append(
                Record(self.name, name, series.format, round(zeros, 3), self.threads, dense_us, sparse_us, bound, auto, error)
            )
        return found

    def _random(self, shape: tuple[int, ...], dtype: str) -> Array:
        if dtype == "float32":
            return self.rng.standard_normal(shape).astype(dtype)
        low, high = {"uint8": (0, 256), "int8": (-127, 128), "int32": (-1000, 1000)}[dtype]
        return self.rng.integers(low, high, shape).astype(dtype)

    def dense(self, mask: Array) -> Node:
        b, group = self.target.block, self.target.group
        weight = self._random(self.layer.weight, "int8" if self.bytes else "float32") * mask
        if not self.layer.kernel:
            layout = f"OI{b}o{group}i" if self.bytes else f"OI{b}o"
            packed = lay.block_linear_weight(weight, layout)
            return Node(Linear(layout, self.layer.outputs), (self.x, _constant(packed), self.bias))
        pads = ((self.layer.kernel // 2,) * 2,) * 2
        layout = f"OIHW{b // group}i{b}o{group}i" if self.bytes else f"OIHW{b}i{b}o"
        op = Conv2d(padding=pads, layout=f"NCHW{b}c", out_layout=f"NCHW{b}c", weight_layout=layout)
        return Node(op, (self.x, _constant(lay.block_conv_weight(weight, layout)), self.bias))

    def result(self, layer: Node) -> Node:
        """What the kernel writes: the sums, those of bytes scaled back to bytes."""
        if not self.bytes:
            return layer
        # Most of the bytes that there are come out, so that one wrong product shows.
        spread = 100 / (147 * 73 * (self.layer.inputs * self.layer.kernel**2 or self.layer.inputs) ** 0.5)
        factors = np.full(self.layer.outputs, spread, "float32"), np.full(self.layer.outputs, 0.5, "float32")
        b = self.target.block
        shape = (1, self.layer.outputs // b, 1, 1, b) if self.layer.kernel else (self.layer.outputs,)
        wide = (Node(Broadcast(layer.type.shape), (_constant(array.reshape(shape)),)) for array in factors)
        return Node(Requantize(128), (layer, *wide))

    def sparse(self, mask: Array, format: str) -> Node:
        return run_pass(replace(self.thin, format=format), Graph((self.x,), (self.dense(mask),)), Context()).outputs[0]

    def chosen(self, mask: Array) -> str:
        node = self.sparse(mask, "auto")
        if not isinstance(node.op, SparseConv2d | SparseLinear):
            return "dense"
        return "rows" if node.op.block == 1 else "vectors"

    def bound(self, format: str, mask: Array) -> float:
        """The dense layer's multiply-adds over those of the sparse one, loads counted too where these are more.

        Single weights: one vector is loaded for each multiply-add, and one more for each entry; pixels come in whole vectors.
        """
        (o, i, *kernel), b = self.layer.weight, self.target.block
        size = o * i * prod(kernel)
        if format == "vectors":
            cut = Lists(o, i, prod(kernel), b, i, self.target.group if self.bytes else 1)
            return cut.most / max(int(cut.occupied(mask).sum()), 1)
        vectors = -(-self.layer.pixels // b)
        width = vectors / -(-vectors * b // PIXELS)
        return size * self.layer.pixels / max(int(mask.sum()) * vectors * b * (1 + 1 / width), 1)


def _constant(array: Array) -> Node:
    return Node(Const(np.ascontiguousarray(array)))


def _failure(got: Array, want: Array) -> str:
    wide = got.astype(np.float64), want.astype(np.float64)
    error = float(np.max(np.abs(wide[0] - wide[1])) / max(float(np.max(np.abs(wide[1]))), 1e-30))
    # Integers are right or wrong.
    return f"off by {error:.0%} of its largest value" if not error <= (WRONG if want.dtype.kind == "f" else 0) else ""


def as_json(record: Record) -> dict[str, Any]:
    return {**asdict(record), "speedup": record.speedup}


def crossovers(records: Sequence[Record]) -> dict[str, tuple[float, ...]]:
    """By kind of mask, for each layer the share of zeros from which on the sparse layer is the faster one.

    Between two measured shares by a straight line; 0 where it was faster at the least of them, 1 where it never was.
    """
    found: dict[str, tuple[float, ...]] = {}
    for mask in dict.fromkeys(record.mask for record in records):
        for layer in dict.fromkeys(record.layer for record in records):
            points = [(r.zeros, r.speedup) for r in records if (r.layer, r.mask) == (layer, mask) and r.speedup is not None]
            if points:
                found[mask] = (*found.get(mask, ()), _crossing(sorted(points)))
    return found


def _crossing(points: Sequence[tuple[float, float]]) -> float:
    if points[0][1] >= 1:
        return 0.0
    for (low, slow), (high, fast) in pairwise(points):
        if slow < 1 <= fast:
            return low + (high - low) * (1 - slow) / (fast - slow)
    return 1.0


def sparse_table(records: Sequence[Record]) -> Table:
    shown = Table(title="sparse layers against dense ones")
    for name in ("layer", "mask", "format", "chosen"):
        shown.add_column(name, no_wrap=True)
    for name in ("zeros", "dense us", "sparse us", "speed", "bound"):
        shown.add_column(name, justify="right")
    before = ""
    for r in records:
        if before not in ("", r.layer):
            shown.add_section()
        before = r.layer
        times = [r.error, "", ""] if r.speedup is None else [f"{r.dense_us:.1f}", f"{r.sparse_us:.1f}", f"{r.speedup:.2f}x"]
        shown.add_row(r.layer, r.mask, r.format, r.chosen, f"{r.zeros:.0%}", *times, f"{r.bound:.2f}x")
    return shown


def crossover_lines(records: Sequence[Record]) -> list[str]:
    """For people: from which share of zeros on each kind of mask pays, for the middle layer and for the extremes."""
    lines = []
    for mask, shares in crossovers(records).items():
        measured = sorted({r.zeros for r in records if r.mask == mask and r.speedup is not None})
        head = f"{mask} ({SERIES[mask].format})"
        if len(measured) == 1:
            lines.append(f"{head}: pays at {measured[0]:.0%} zeros in {shares.count(0.0)} of {len(shares)} layers")
            continue
        middle, least, most = (_share(share, measured) for share in (median_high(shares), min(shares), max(shares)))
        lines.append(f"{head}: pays from {middle} zeros on" + (f" ({least} to {most})" if least != most else ""))
    return lines


def _share(share: float, measured: Sequence[float]) -> str:
    """A crossover, known only between the least and the greatest share that were measured."""
    if share in (0.0, 1.0):
        return f"under {measured[0]:.0%}" if share == 0.0 else f"over {measured[-1]:.0%}"
    return f"{share:.0%}"
