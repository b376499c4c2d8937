"""The passes that set weights to zero: which ones, against a slow and obvious account of each; what comes after keeps them."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from planting_masks import MASK_PLANTERS
from test_prune import planted
from wrong_masks import WRONG_MASKS

from paring.ir import Graph, Node
from paring.ir.errors import ParingError
from paring.ir.op import Array
from paring.ir.ops import conv, linear
from paring.passes.compress.masks.mask_pass import MaskPass, RatioPass
from paring.passes.compress.masks.prune_pattern import PrunePattern
from paring.passes.compress.masks.prune_weights import PruneBlock, PruneKernel, PruneNm, PruneUnstructured, PruneVector
from paring.passes.manager import run_pass
from paring.passes.rewriter import Context
from paring.testing import check_round_trip, random_graph

pytestmark = pytest.mark.fast

RATIOS = tuple(tenth / 10 for tenth in range(10))
SEEDS = 12
Pair = tuple[Array, Array]


# --- a slow and obvious account -------------------------------------------------------------------------------------


def layers(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes() if isinstance(node.op, conv.Conv2d | linear.Linear)]


def pairs(before: Graph, after: Graph, accepts: Callable[[Node], bool]) -> list[Pair]:
    """Each weight that a pass may change before and after, (O, I, taps) in float64; all else has to be what it was."""
    found: dict[Node, Pair] = {}
    assert len(layers(before)) == len(layers(after))
    for old, new in zip(layers(before), layers(after), strict=True):
        assert new.op == old.op
        assert new.inputs[2:] == old.inputs[2:], "a bias changed"
        was, now = (node.inputs[1].op.value for node in (old, new))
        assert now.dtype == was.dtype
        gone = (now == 0) & (was != 0)
        assert (now == was)[~gone].all(), "a weight has another value"
        assert not np.signbit(now[gone]).any(), "a zero is negative"
        if not accepts(old):
            assert not gone.any(), "a layer that cannot be pruned was"
            continue
        pair = tuple(w.reshape(*w.shape[:2], -1).astype(np.float64) for w in (was, now))
        if old.inputs[1] in found:
            assert (found[old.inputs[1]][1] == pair[1]).all(), "a shared weight is no longer one"
        found[old.inputs[1]] = pair
    return list(found.values())


def units(shape: Sequence[int], rows: int, columns: int, kernel: bool) -> list[tuple[list[int], ...]]:
    """The places of each unit, as indices of three dimensions."""
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place in np.ndindex(*shape):
        o, i, tap = place
        found.setdefault((o // rows, i // columns, 0 if kernel else tap), []).append(place)
    return [tuple(map(list, zip(*places, strict=True))) for places in found.values()]


def extents(prune: RatioPass) -> tuple[int, int, bool]:
    """Output channels, input channels of a unit, and whether it has all taps."""
    match prune:
        case PruneBlock():
            rows, columns = prune.shape.split("x")
            return int(rows), int(columns), False
        case PruneVector():
            return prune.size, 1, False
        case PruneKernel():
            return prune.share, prune.inputs, True
    return 1, 1, False


def check_ratio(prune: RatioPass, found: Sequence[Pair]) -> None:
    """Units go whole, as many as make up the ratio and no more, and none that matters more than one that stays."""
    every = []
    for was, now in found:
        entries = []
        for unit in units(was.shape, *extents(prune)):
            before, after = was[unit], now[unit]
            assert (after == before).all() or not after.any(), "a unit is cut in two"
            # Of what was zero before nothing can be said: it matters least, and counts.
            entries.append((np.abs(before).mean() if before.any() else -1.0, not after.any(), len(before)))
        assert any(not gone for _, gone, _ in entries) or not was.any(), "a layer is empty"
        every.append(entries)
    for entries in [list(itertools.chain(*every))] if prune.scope == "global" and every else every:
        total, biggest = sum(size for *_, size in entries), max(size for *_, size in entries)
        zero, gone = (sum(size for mean, go, size in entries if (mean < 0 or which) and go) for which in (False, True))
        spared = prune.scope == "global"
        assert gone <= max(zero, prune.ratio * total + 1e-6), "too many go"
        assert gone + biggest > prune.ratio * total + 1e-6 or spared, "too few go"
        if prune.criterion == "l1" and not spared:
            most = max((mean for mean, go, _ in entries if go), default=-1.0)
            assert most <= min(mean for mean, go, _ in entries if not go) + 1e-9, "what matters more goes"


def shared(weight: Array, share: int, inputs: int) -> Iterator[tuple[slice, slice, Array]]:
    """For each block of output channels and of input channels the sum of scores of each tap."""
    for first in range(0, weight.shape[0], share):
        for i in range(0, weight.shape[1], inputs):
            rows, columns = slice(first, first + share), slice(i, i + inputs)
            yield rows, columns, weight[rows, columns].sum(0).sum(0)


def check_nm(prune: PruneNm, found: Sequence[Pair]) -> None:
    for was, now in found:
        wanted = np.zeros_like(was)
        for first in range(0, was.shape[0], prune.share):
            rows = slice(first, first + prune.share)
            for group in range(0, was.shape[1], prune.m):
                for tap in range(was.shape[2]):
                    score = [np.abs(was[rows, group + place, tap]).sum() for place in range(prune.m)]
                    for place in sorted(range(prune.m), key=lambda p: (-score[p], p))[: prune.n]:
                        wanted[rows, group + place, tap] = was[rows, group + place, tap]
        assert (now == wanted).all(), f"not {prune.n} of {prune.m}"


def check_pattern(prune: PrunePattern, found: Sequence[Pair]) -> None:
    counts: Counter[frozenset[int]] = Counter()
    for was, _ in found:
        for _, _, score in shared(was**2, prune.share, prune.inputs):
            others = sorted((p for p in range(9) if p != 4), key=lambda p: (-score[p], p))
            if score.any():
                counts[frozenset([4, *others[: prune.entries - 1]])] += 1
    best = sorted(counts, key=lambda pattern: (-counts[pattern], sum(1 << p for p in pattern)))[: prune.patterns]
    for was, now in found:
        wanted = np.zeros_like(was)
        for rows, i, score in shared(was**2, prune.share, prune.inputs):
            chosen = max(best, key=lambda pattern: (sum(score[p] for p in sorted(pattern)), -best.index(pattern)), default=[])
            for place in chosen:
                wanted[rows, i, place] = was[rows, i, place]
        assert (now == wanted).all(), "not the pattern that keeps most"


def accepts(prune: MaskPass) -> Callable[[Node], bool]:
    def test(node: Node) -> bool:
        out, inputs, *kernel = node.inputs[1].type.shape
        match prune:
            case PruneNm():
                return inputs % prune.m == 0
            case PrunePattern():
                return kernel == [3, 3]
            case PruneKernel() if kernel in ([], [1, 1]) or inputs == 1:
                return False
            case RatioPass():
                rows, columns, whole = extents(prune)
                return bool(out > rows or inputs > columns or (not whole and np.prod(kernel) > 1))
        return True

    return test


def check_masks(graph: Graph, prune: MaskPass) -> int:
    """Raise AssertionError unless the pass sets to zero what it should; gives how many weights."""
    after = run_pass(prune, graph, Context())
    check_round_trip(after)
    found = pairs(graph, after, accepts(prune))
    match prune:
        case RatioPass():
            check_ratio(prune, found)
        case PruneNm():
            check_nm(prune, found)
        case PrunePattern():
            check_pattern(prune, found)
    return sum(int(((now == 0) & (was != 0)).sum()) for was, now in found)


def variant(cls: type[MaskPass], seed: int) -> MaskPass:
    """The pass with options of all kinds."""
    ratio, scope, share = RATIOS[seed % len(RATIOS)], ("layer", "global")[seed % 2], (1, 2, 4, 16)[seed % 4]
    both = {"share": share, "inputs": (1, 3, 4)[seed % 3]}
    criterion = ("l1", "l2", "random")[seed % 3]
    options: dict[type[MaskPass], dict[str, object]] = {
        PruneBlock: {"shape": ("16x1", "2x2", "4x4", "1x4", "3x2")[seed % 5]},
        PruneVector: {"size": (16, 4, 3)[seed % 3]},
        PruneKernel: both,
        PruneNm: {"n": 1 + seed % 3, "m": (4, 8)[seed % 2], "share": share, "criterion": "l1"},
        PrunePattern: {"entries": 2 + seed % 6, "patterns": (1, 4, 8, 100)[seed % 4], **both, "criterion": "l2"},
    }
    by_rank = {"ratio": ratio, "scope": scope, "criterion": criterion, "seed": seed} if issubclass(cls, RatioPass) else {}
    return cls(**by_rank, **options.get(cls, {}))  # type: ignore[arg-type]


MASKS = (PruneUnstructured, PruneNm, PruneBlock, PruneVector, PruneKernel, PrunePattern)


@pytest.mark.parametrize("cls", MASKS, ids=[cls.name for cls in MASKS])
def test_a_pass_zeroes_what_it_should(cls: type[MaskPass], trials: int) -> None:
    gone = 0
    for seed in range(SEEDS * max(1, trials // 100)):
        for name, plant in MASK_PLANTERS.items():
            graph = planted(plant, seed, exact=seed % 2 == 0, size=1)
            prune = variant(cls, seed + zlib.crc32(name.encode()) % 7)
            try:
                gone += check_masks(graph, prune)
            except AssertionError as error:
                raise AssertionError(f"{prune} on {name}, seed {seed}") from error
    assert gone >= 500


@pytest.mark.parametrize("cls", MASKS, ids=[cls.name for cls in MASKS])
def test_random_graphs_too(cls: type[MaskPass], graphs: int) -> None:
    for seed in range(max(4, graphs // 25)):
        check_masks(random_graph(np.random.default_rng((7, seed)), 12, seed % 2 == 0), variant(cls, seed))


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_a_wrong_mask_is_found_out(name: str) -> None:
    prune, patch = WRONG_MASKS[name]
    assert isinstance(prune, MaskPass)
    for seed in range(10):
        for plant in MASK_PLANTERS.values():
            graph = planted(plant, seed, exact=seed % 2 == 0, size=0)
            check_masks(graph, prune)
            with patch():
                try:
                    check_masks(graph, prune)
                except (AssertionError, ParingError):
                    return
    pytest.fail("every planted graph passed")
