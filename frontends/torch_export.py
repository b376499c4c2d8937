"""Importer of torch.export programs: lowers them to functional aten operators that the table knows, then walks them."""

from __future__ import annotations

import inspect
import io
import logging
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache, partial
from textwrap import shorten
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.immutable_collections import immutable_dict, immutable_list

from paring.frontends.aten import TABLE
from paring.frontends.aten_builder import HALF
from paring.frontends.program import Importer, bind, operator_name
from paring.frontends.provenance import loc_of, user_line
from paring.frontends.structure import Imported, Signature, Tree
from paring.ir import Input
from paring.ir.errors import ArgumentError, InternalError, ModelError, a_kind

Decompositions = dict[Any, Callable[..., Any]]
DECOMPOSITION_ROUNDS = 6
DICTS = (dict, immutable_dict, OrderedDict, defaultdict)
# The argument that says "training" in each operator that behaves differently then.
TRAINING: dict[str, str] = {
    "aten.batch_norm.default": "training",
    "aten._native_batch_norm_legit_functional.default": "training",
    "aten._native_batch_norm_legit.default": "training",
    "aten.instance_norm.default": "use_input_stats",
    "aten.dropout.default": "train",
    "aten.dropout_.default": "train",
    "aten.feature_dropout.default": "train",
    "aten.feature_dropout_.default": "train",
    "aten.alpha_dropout.default": "train",
    "aten.alpha_dropout_.default": "train",
    "aten.feature_alpha_dropout.default": "train",
    "aten.native_dropout.default": "train",
    "aten.rrelu.default": "training",
    "aten.rrelu_.default": "training",
    "aten.scaled_dot_product_attention.default": "dropout_p",
}


def import_model(model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Imported:
    """Trace a model on example inputs and import it.

    Raises ModelError for models that can not be compiled as they are, UnsupportedOpsError that lists all operators without an
    IR form.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"expected a torch.nn.Module, got {type(model).__name__}", hint="wrap functions in a Module")
    if isinstance(model, torch.jit.ScriptModule):
        why = "torch.export traces Python code, which a scripted or traced module no longer has"
        raise ModelError("a TorchScript module cannot be imported", why=why, hint="give the module that it was made from")
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    _check_weights(model)
    with _quiet():
        program = _export(model, args, dict(kwargs or {}))
    return import_program(program, parameters=_positional_names(model))


def import_program(program: torch.export.ExportedProgram, *, parameters: tuple[str, ...] = ()) -> Imported:
    """Import an exported program. `parameters` names the positional arguments, for callers that pass them by name."""
    _check_training(program)
    with _quiet():
        program = lower(program)
    output = _output_tree(program)
    if not output.places():
        raise ModelError("the model returns no tensor", hint="return what it is to compute")
    importer = Importer(program)
    graph = importer.graph()
    ops = [node.op for node in graph.inputs]
    labels = tuple(op.label for op in ops if isinstance(op, Input))
    types = tuple(node.type for node in graph.inputs)
    return Imported(graph, Signature(labels, types, _input_tree(program), output, parameters, of_torch=True))


def lower(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program without mutation, in operators of the table as far as torch can decompose the others.

    Raises ModelError where torch itself fails.
    """
    chosen: Decompositions = {}
    refused: set[Any] = set()
    for _ in range(DECOMPOSITION_ROUNDS):
        added = _decompositions(program, {*chosen, *refused})
        try:
            program = program.run_decompositions({**chosen, **added})
        except Exception as error:
            # Not all of torch's reference decompositions can be traced: without them the operator is just unsupported.
            references = {op for op in added if op not in _torch_table()}
            if not references:
                raise _model_error(error) from error
            refused |= references
            continue
        chosen |= added
        if not _decompositions(program, {*chosen, *refused}):
            return program
    return program


def _decompositions(program: torch.export.ExportedProgram, seen: set[Any]) -> Decompositions:
    """torch's decompositions of those operators in the program that the table lacks."""
    found: Decompositions = {}
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            op = node.target
            if isinstance(op, torch._ops.OpOverload) and op not in found and op not in seen and operator_name(op) not in TABLE:
                decomposition = _decomposition(op)
                if decomposition is not None:
                    found[op] = decomposition
    return found


def _decomposition(op: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """torch's own way to say an operator in others, None where it has none.

    In-place operators are left alone, because torch itself replaces them by functional ones, and so are those that make
    tensors out of nothing: they are computed at import.
    """
    makes = not any(isinstance(a.type, torch.TensorType) or "Tensor" in str(a.type) for a in op._schema.arguments)
    if op._schema.is_mutable or makes or torch.Tag.nondeterministic_seeded in op.tags:
        return None
    # torch's table looks its entries up lazily, which its `get` does not know of.
    found: Callable[..., Any] | None = _torch_table()[op] if op in _torch_table() else torch._decomp.decomposition_table.get(op)
    return found


@cache
def _torch_table() -> Any:
    return torch.export.default_decompositions()


# --- tracing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter reports failures on the log as well as in what it raises: say things once."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
    # The fast path of torch's own transformer layers is one opaque operator.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # On failure torch prints the graph so far to stderr; what the model itself prints is passed on.
    said = io.StringIO()
    try:
        with torch.no_grad(), redirect_stderr(said):
            program = torch.export.export(model, args, kwargs)
    except Exception as error:
        raise _model_error(error) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    sys.stderr.write(said.getvalue())
    return program


def _model_error(error: Exception) -> ModelError:
    where = user_line(error.__traceback__)
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error):
        return ModelError(
            "the model's control flow or shapes depend on the values of a tensor",
            where=where,
            why="a compiled network does the same steps for every input, but here Python needs a number out of a tensor",
            hint="use torch.where instead of if, and masks instead of sizes that depend on data",
        )
    hint = "call model(*args) with the same inputs first; tensors must stay torch tensors all the way"
    if "not a known type" in reason or "Unsupported input type" in reason:
        hint = (
            "take and return tensors, tuples, lists and dicts; torch.export.register_dataclass(YourClass) makes a dataclass "
            "known; for transformers set use_cache=False"
        )
    why = shorten(f"{type(error).__name__}: {reason}", 300, placeholder=" ...")
    return ModelError("torch.export can not trace the model on these inputs", where=where, why=why, hint=hint)


def _positional_names(model: torch.nn.Module) -> tuple[str, ...]:
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in found if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_weights(model: torch.nn.Module) -> None:
    """What is wrong with weights fails somewhere inside tracing otherwise, far from its cause."""
    named = [*model.named_parameters(), *model.named_buffers()]
    half = [name for name, tensor in named if tensor.dtype in HALF]
    if half:
        raise ModelError(
            f"{len(half)} of the model's tensors are 16-bit floats, {half[0]} for one",
            where=half[0],
            why="16-bit floats are not supported yet",
            hint="call model.float()",
        )
    away = [name for name, tensor in named if tensor.device.type != "cpu"]
    if away:
        device = dict(named)[away[0]].device.type
        meta = "load them: model.to_empty(device='cpu'), then model.load_state_dict(...)"
        raise ModelError(
            f"{len(away)} of the model's tensors are on the device {device}, {away[0]} for one",
            where=away[0],
            why="tensors of the meta device have no values" if device == "meta" else "weights are read on the CPU",
            hint=meta if device == "meta" else "call model.cpu()",
        )


def _check_training(program: torch.export.ExportedProgram) -> None:
    """Raise ModelError naming every layer that was traced in training mode."""
    found: dict[str, None] = {}
    for node in program.graph.nodes:
        name = operator_name(node.target) if node.op == "call_function" else ""
        if name not in TRAINING:
            continue
        arguments = [a.name for a in node.target._schema.arguments]
        bound = dict(zip(arguments, bind(node.target, node.args, node.kwargs), strict=True))
        without_statistics = bound.get("running_mean", True) is None
        if bound[TRAINING[name]] and bound.get("p") != 0 and not without_statistics:
            loc = loc_of(node)
            found[f"{name.split('.')[1].strip('_')} at {loc}" if loc else name] = None
    if found:
        listed = list(found)
        raise ModelError(
            f"the model is in training mode: {len(listed)} layer{'s' * (len(listed) > 1)} would behave differently in use",
            where="; ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else ""),
            why="dropout is random and batch norm updates its statistics while training",
            hint="call model.eval() first",
        )


# --- structure -------------------------------------------------------------------------------------------------------


def _tree(spec: pytree.TreeSpec, leaves: Iterator[Tree], path: tuple[Any, ...]) -> Tree:
    """The plain form of torch's TreeSpec; its leaves are taken in order. `path` leads to it, for errors."""
    if spec.is_leaf():
        return next(leaves)
    kind = spec.type
    keys = _keys(spec, path)
    children = tuple(_tree(child, leaves, (*path, key)) for key, child in zip(keys, spec.children(), strict=True))
    if kind in (tuple, list, immutable_list):
        return Tree("tuple" if kind is tuple else "list", children=children)
    if kind in (dict, immutable_dict):
        return Tree("dict", name="dict", keys=keys, children=children)
    if kind is OrderedDict:
        return Tree("dict", name="OrderedDict", keys=keys, children=children, make=partial(_ordered, keys))
    own = spec.context if isinstance(spec.context, type) else kind
    unflatten = pytree.SUPPORTED_NODES[kind].unflatten_fn
    make = partial(_unflatten, unflatten, spec.context)
    if issubclass(own, Sequence):
        return Tree("sequence", name=own.__name__, keys=_field_names(own, len(children)), children=children, make=make)
    return Tree("record", name=own.__name__, keys=keys, children=children, make=make)


def _ordered(keys: tuple[Any, ...], children: list[Any]) -> Any:
    return OrderedDict(zip(keys, children, strict=True))


def _unflatten(unflatten: Callable[[Any, Any], Any], context: Any, children: list[Any]) -> Any:
    return unflatten(children, context)


def _field_names(own: type, count: int) -> tuple[str, ...]:
    """Names of the entries of a tuple class; of torch.return_types they are in the names that `match` takes."""
    names = getattr(own, "_fields", None) or getattr(own, "__match_args__", ())
    return tuple(names) if len(names) == count else tuple(map(str, range(count)))


def _keys(spec: pytree.TreeSpec, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Names of a container's entries from what torch keeps about it, positions where there are none."""
    context, count = spec.context, len(spec.children())
    if spec.type in DICTS:
        keys = tuple(context[1] if spec.type is defaultdict else context)
        odd = [key for key in keys if isinstance(key, bool) or not isinstance(key, str | int)]
        if odd:
            raise ModelError(
                f"the dict at {_place(path)} has the key {odd[0]!r}",
                where=_place(path),
                why=f"keys are str or int, this one is of type {type(odd[0]).__name__}",
                hint="name the entries by strings, or take and return a tuple",
            )
        return keys
    if isinstance(context, type) and hasattr(context, "_fields"):
        return tuple(context._fields)
    for names in (context, context[0] if isinstance(context, list | tuple) and context else None):
        if isinstance(names, list | tuple) and len(names) == count and all(isinstance(n, str | int) for n in names):
            return tuple(names)
    return tuple(range(count))


def _place(path: tuple[Any, ...]) -> str:
    """`input 0['a']`, `output[1]`: positional and named inputs are one container deeper."""
    side, *keys = path
    if side == "input" and len(keys) > 1:
        side, keys = f"input {keys[1]!r}", keys[2:]
    return side + "".join(f"[{key!r}]" for key in keys)


def _input_tree(program: torch.export.ExportedProgram) -> Tree:
    given = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    return _whole(program.call_spec.in_spec, _leaves(given), "input")


def _output_tree(program: torch.export.ExportedProgram) -> Tree:
    given = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    return _whole(program.call_spec.out_spec, _leaves(given), "output")


def _leaves(arguments: Sequence[Any]) -> list[Tree]:
    """One leaf for each argument, tensors numbered in order."""
    leaves: list[Tree] = []
    tensors = 0
    for argument in arguments:
        if isinstance(argument, ConstantArgument):
            leaves.append(Tree("constant", value=_plain(argument.value)))
        else:
            leaves.append(Tree("tensor", tensors))
            tensors += 1
    return leaves


def _plain(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str | None):
        raise ModelError(f"an input or output is {a_kind(value)}", hint="use tensors, numbers, strings and None")
    return value


def _whole(spec: pytree.TreeSpec | None, leaves: list[Tree], side: str) -> Tree:
    rest = iter(leaves)
    if spec is None:
        raise InternalError("an exported program without a call specification")
    tree = _tree(spec, rest, (side,))
    if next(rest, None) is not None:
        raise InternalError("an exported program whose call specification does not match its signature")
    return tree
