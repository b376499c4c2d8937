"""`paring.compile`: from a model to a network that runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paring.backends import targets
from paring.backends.targets import Target
from paring.calibration import HostRun, collect, flatten
from paring.frontends.structure import Imported, Signature, Tree, to_torch
from paring.ir.errors import ArgumentError, InputError, a_kind
from paring.ir.graph import Graph
from paring.ir.interpreter import interpret
from paring.ir.ops.core import Input
from paring.ir.verify import check_trusted
from paring.network import Network, Version, graph_call
from paring.passes.base import Pass
from paring.passes.compress.criteria import GRADIENT_CRITERIA
from paring.passes.compress.finetune import FineTune
from paring.passes.manager import run_pipeline
from paring.passes.pipelines import parse_pipeline, with_users
from paring.passes.pipelines import pipeline as named_pipeline
from paring.passes.rewriter import Run, Tell
from paring.timing import HostTime, machine_of
from paring.training import fine_tuner, loss_gradients


@dataclass(frozen=True)
class Options:
    """Everything that a compilation depends on besides the model and its inputs."""

    target: Target
    passes: tuple[Pass, ...]
    dump: Path | None = None
    device: str | None = None
    calibration: tuple[Any, ...] = ()
    metric: Callable[[Any], float] | None = None
    finetune: Callable[[Any], Any] | None = None
    loss: Callable[[Any, int], Any] | None = None
    progress: Tell | None = None


def compile(
    model: Any,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "native",
    passes: str | Iterable[str | Pass] | None = None,
    pipeline: str | Iterable[str | Pass] | None = None,
    calibration: Iterable[Any] | None = None,
    metric: Callable[[Any], float] | None = None,
    finetune: Callable[[Any], Any] | None = None,
    loss: Callable[[Any, int], Any] | None = None,
    dump: str | Path | None = None,
    device: str | None = None,
    progress: Tell | None = None,
) -> Network:
    """Compile a model for a target.

    Args:
        model: a torch.nn.Module (in eval mode), a torch.export.ExportedProgram, a torch.fx.GraphModule, or an ir.Graph.
        inputs: a tuple of example inputs, or a single one; tensors or numpy arrays. Without it the network is compiled
            when it is first called, once for each combination of input shapes and dtypes. Such a network has several
            versions: its ledger, ir and profile, and the dumps, are those of the version compiled last.
        kwargs: example keyword inputs.
        target: a name from `paring.backends.targets.names()`.
        passes: passes to run before the target's own pipeline, as text (`"a, b{x=1}"`) or a sequence. Lossy ones are given
            a graph that is simplified and has its batch norms folded.
        pipeline: passes to run instead of the target's own pipeline.
        calibration: an iterable of inputs for lossy passes: tuples, single tensors, or dicts of keyword inputs.
        metric: takes a callable network and returns a number, higher is better; its value goes into the ledger, after each
            lossy pass where there are some, else after each pass that changed something. Lossy passes run without one too;
            the ledger then says so.
        finetune: trains a network wherever the pass `finetune` stands among `passes`: it is given the program reached there as
            a torch module (`paring.to_torch(graph, keep_zeros=True)`), trains that in place, and returns it or nothing.
        loss: what criteria with gradients (taylor, snip) descend on: takes the model's outputs, as torch tensors, and the
            number of the calibration batch, and returns a tensor of one element. Without it the sum of all outputs with random
            signs, others for each batch: the square of its gradient is on average how far a weight moves the outputs.
        dump: a folder for the IR after each changing pass, written when a pass fails too; by default the environment variable
            PARING_DUMP.
        device: where a foreign target's code runs: "emulator" or "rpc://127.0.0.1:PORT".
        progress: called with (stage, done, total).

    Raises ArgumentError for an unknown target, pass or option, ModelError and UnsupportedOpsError for models that cannot
    be imported, InputError for impossible inputs, TargetError where the host lacks what the target needs.
    """
    options = Options(
        *_resolved(target, passes, pipeline, device),
        dump=_folder(dump),
        device=device,
        calibration=collect(calibration),
        metric=metric,
        finetune=finetune,
        loss=loss,
        progress=progress,
    )
    _check_used(options)
    if inputs is None and kwargs is None and not _is_closed(model):
        return Network({}, options.target, lambda args, kw: compile_version(model, args, kw, options))
    version = compile_version(model, as_tuple(inputs), dict(kwargs or {}), options)
    return Network({None: version}, options.target)


def _resolved(
    target: str, passes: str | Iterable[str | Pass] | None, whole: str | Iterable[str | Pass] | None, device: str | None
) -> tuple[Target, tuple[Pass, ...]]:
    """The target, and all passes that run for it."""
    if not isinstance(target, str):
        raise ArgumentError(f"target is a name, not {target!r}", hint=f"known: {', '.join(targets.names())}")
    found = targets.resolve(target)
    targets.check_device(found, device)
    first = parse_pipeline(passes) if passes is not None else ()
    own = named_pipeline(found.pipeline, found.pipeline_options()) if whole is None else parse_pipeline(whole)
    return found, with_users(own, first)


def _folder(dump: str | Path | None) -> Path | None:
    named = dump if dump is not None else os.environ.get("PARING_DUMP") or None
    return Path(named) if named else None


def _check_used(options: Options) -> None:
    """Raise ArgumentError for data, or a hook, that no pass would use."""
    calibrated = any(each.calibrated for each in options.passes)
    if options.calibration and not calibrated:
        raise ArgumentError("calibration data were given, but no pass that uses them", hint="leave `calibration` out")
    sloped = any(getattr(each, "criterion", "") in GRADIENT_CRITERIA for each in options.passes)
    if options.loss is not None and not sloped:
        hint = f"criterion={' or '.join(map(repr, GRADIENT_CRITERIA))}, or leave `loss` out"
        raise ArgumentError("a loss was given, but no pass whose criterion takes gradients", hint=hint)
    trains = any(each.name == FineTune.name for each in options.passes)
    if options.finetune is not None and not trains:
        hint = "name it where it should run: passes='prune-channels{ratio=0.3}, finetune, prune-channels{ratio=0.3}, finetune'"
        raise ArgumentError("a hook finetune was given, but the pass finetune is not among the passes", hint=hint)


def _is_closed(model: Any) -> bool:
    """Whether a model has its input types with it, so that it can be compiled without examples."""
    return isinstance(model, Graph) or type(model).__name__ == "ExportedProgram"


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    """A single tensor or array counts as one input."""
    if inputs is None:
        return ()
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def import_any(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Imported:
    """The IR of any kind of model. Raises ArgumentError for what is none."""
    if isinstance(model, Graph):
        check_trusted(model)
        return Imported(model, graph_signature(model))
    import torch

    from paring.frontends import torch_export, torch_fx

    args, kwargs = torch.utils._pytree.tree_map(_as_tensor, (args, kwargs))
    if isinstance(model, torch.export.ExportedProgram):
        return torch_export.import_program(model)
    if isinstance(model, torch.fx.GraphModule):
        return torch_fx.import_fx(model, args, kwargs)
    if isinstance(model, torch.nn.Module):
        return torch_export.import_model(model, args, kwargs)
    hint = "a torch.nn.Module, torch.export.ExportedProgram, torch.fx.GraphModule or paring.ir.Graph"
    raise ArgumentError(f"{a_kind(model)} is not a model", hint=hint)


def _as_tensor(value: Any) -> Any:
    """A numpy array as a torch tensor, anything else as it is. Raises InputError for a dtype that torch lacks."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    try:
        return to_torch(np.asarray(value))
    except TypeError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"an example input is an array of {value.dtype}", why=why, hint="convert it to float32") from None


def graph_signature(graph: Graph) -> Signature:
    """A call of positional tensors that gives one tensor, or a tuple of them."""
    labels = tuple(node.op.label for node in graph.inputs if isinstance(node.op, Input))
    leaves = tuple(Tree("tensor", index=i) for i in range(len(graph.outputs)))
    args = Tree("tuple", children=tuple(Tree("tensor", index=i) for i in range(len(graph.inputs))))
    outputs = leaves[0] if len(leaves) == 1 else Tree("tuple", children=leaves)
    types = tuple(node.type for node in graph.inputs)
    return Signature(labels, types, Tree("tuple", children=(args, Tree("dict"))), outputs)


def compile_version(model: Any, args: Sequence[Any], kwargs: dict[str, Any], options: Options) -> Version:
    """Import, run the passes, build and open: one version of a network, for these input types."""
    tell = options.progress or (lambda stage, done, total: None)
    tell("import", 0, 0)
    imported = import_any(model, tuple(args), kwargs)
    count = len(options.passes)
    seen = iter(range(1, count + 1))
    run = HostRun(options.target, tell)
    calibration = flatten(options.calibration, imported.signature)
    try:
        result = run_pipeline(
            imported.graph,
            options.passes,
            dump=options.dump,
            metric=_graph_metric(options, imported, run),
            progress=lambda name: tell(name, next(seen), count),
            calibration=calibration,
            run=run,
            tell=tell,
            finetune=fine_tuner(options.finetune),
            gradients=loss_gradients(options.loss, calibration, imported.signature),
            machine=machine_of(options.target),
            time=HostTime.where_it_runs(options.target, tell),
        )
    finally:
        run.close()
    return Version.build(imported.with_graph(result.graph).signature, result, options.target, options.device, tell)


def _graph_metric(options: Options, imported: Imported, run: Run) -> Callable[[Graph], float] | None:
    """The user's metric of a callable network, as a figure of a graph."""
    metric = options.metric
    if metric is None:
        return None
    # What comes before a lossy pass can be compiled by itself; any stage can be interpreted.
    runs = run if any(each.lossy for each in options.passes) else interpret
    return lambda graph: metric(graph_call(graph, imported.signature, runs))
