"""Pipelines as data: which passes run, in which order. `{block}` stands for the target's option of that name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from paring.ir.errors import ArgumentError
from paring.passes.base import Pass, parse_pass
from paring.passes.canonicalize import Canonicalize
from paring.passes.compress.channels.prune_channels import PruneChannels
from paring.passes.compress.channels.prune_search import PruneSearch
from paring.passes.compress.finetune import FineTune
from paring.passes.compress.masks.import_masks import ImportMasks
from paring.passes.compress.masks.prune_pattern import PrunePattern
from paring.passes.compress.masks.prune_weights import PruneBlock, PruneKernel, PruneNm, PruneUnstructured, PruneVector
from paring.passes.compress.quantization.adaround import AdaRound
from paring.passes.compress.quantization.correct_bias import CorrectBias
from paring.passes.compress.quantization.equalize import Equalize
from paring.passes.compress.quantization.quantize import Quantize
from paring.passes.compress.quantization.smooth import Smooth
from paring.passes.const_fold import ConstFold
from paring.passes.cse import Cse
from paring.passes.dce import Dce
from paring.passes.decompose import Decompose
from paring.passes.fold_bn import FoldBn
from paring.passes.fold_qdq import FoldQdq
from paring.passes.fuse import Fuse
from paring.passes.layout import Layout
from paring.passes.options import split_pipeline
from paring.passes.prepack import Prepack
from paring.passes.scale_weights import ScaleWeights
from paring.passes.sink_reshapes import SinkReshapes
from paring.passes.sparsify import Sparsify
from paring.passes.winograd import Winograd

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        Canonicalize,
        ConstFold,
        Cse,
        Dce,
        FoldBn,
        Decompose,
        FoldQdq,
        SinkReshapes,
        Layout,
        Prepack,
        ScaleWeights,
        Sparsify,
        Winograd,
        Fuse,
    )
}

LOSSY: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        *(ImportMasks, PruneChannels, PruneUnstructured, PruneNm, PruneBlock, PruneVector, PruneKernel, PrunePattern),
        *(PruneSearch, FineTune, Equalize, Smooth, Quantize, AdaRound, CorrectBias),
    )
}
"""Those that may change what is computed; no pipeline below has one."""

HOW = "give passes by name, like 'cse, layout{block=16}', or objects: [Cse(), 'dce']"

_SIMPLIFY = ("canonicalize", "const-fold", "cse", "dce")

PIPELINES: dict[str, tuple[str, ...]] = {
    "none": (),
    "simplify": _SIMPLIFY,
    # Before the user's lossy passes: they see layers whose batch norms are folded.
    "prepare": (*_SIMPLIFY, "fold-bn", "decompose", "sink-reshapes", *_SIMPLIFY),
    "blocked": (
        *_SIMPLIFY,
        "fold-bn",
        "decompose",
        "fold-qdq",
        "const-fold{{dequantize=True}}",
        "sink-reshapes",
        "canonicalize",
        "const-fold",
        "layout{{block={block}, group={group}}}",
        "prepack{{block={block}, group={group}}}",
        "const-fold",
        "scale-weights",
        "canonicalize",
        "cse",
        "dce",
        "sparsify{{block={block}, span={span}, group={group}, pixels={pixels}, start={start}, gather={gather}, entry={entry}, "
        "ratio={winograd}, far={far}}}",
        "winograd{{block={block}, group={group}, ratio={winograd}, far={far}}}",
        "fuse",
    ),
}


Table = Mapping[str, type[Pass]]


def pipeline(name: str, options: Mapping[str, object], extra: Table | None = None) -> tuple[Pass, ...]:
    """A named pipeline, its options filled in, passes of `extra` in place of those of their names.

    Raises ArgumentError for an unknown name.
    """
    if name not in PIPELINES:
        raise ArgumentError(f"unknown pipeline {name!r}", hint=f"known: {', '.join(PIPELINES)}")
    return parse_pipeline([step.format(**options) for step in PIPELINES[name]], extra)


def parse_pipeline(steps: str | Iterable[str | Pass], extra: Table | None = None) -> tuple[Pass, ...]:
    """Passes from text (`a, b{x=1}`) or from a sequence of texts and passes. `extra` adds passes to the table.

    Raises ArgumentError for anything else.
    """
    table = {**PASSES, **LOSSY, **(extra or {})}
    if not isinstance(steps, Iterable):
        raise ArgumentError(f"passes are text or a sequence, not {steps!r}", hint=HOW)
    parts: Sequence[str | Pass] = split_pipeline(steps) if isinstance(steps, str) else tuple(steps)
    for part in parts:
        if not isinstance(part, str | Pass):
            raise ArgumentError(f"{part!r} is not a pass", hint=HOW)
    return tuple(part if isinstance(part, Pass) else parse_pass(part, table) for part in parts)


def with_users(own: tuple[Pass, ...], passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The user's passes before a target's own; lossy ones are given what they need to come before them."""
    _check_order(passes)
    first = len(list(takewhile(lambda each: each.unprepared, passes)))
    before = pipeline("prepare", {}) if any(each.lossy for each in passes) else ()
    return (*passes[:first], *before, *passes[first:], *own)


def _check_order(passes: Sequence[Pass]) -> None:
    """Raise ArgumentError for a pass that would find nothing to do where it stands."""
    names = [each.name for each in passes]
    for place, each in enumerate(passes):
        if each.unprepared and not all(other.unprepared for other in passes[:place]):
            raise ArgumentError(f"pass {each.name} stands after {names[place - 1]}", hint=f"'{each.name}, {names[place - 1]}'")
    for place, each in enumerate(passes):
        late = [name for name in each.before if name in names[:place]]
        if late:
            raise ArgumentError(f"pass {each.name} stands after {late[0]}", hint=f"'{each.name}, {late[0]}'")
        lacking = [name for name in each.after if name not in names[:place]]
        if lacking:
            raise ArgumentError(f"pass {each.name} comes after {lacking[0]}", hint=f"'{lacking[0]}, {each.name}'")


def show_pipeline(passes: Iterable[Pass]) -> str:
    """The text that `parse_pipeline` reads back."""
    return ", ".join(str(p) for p in passes)
