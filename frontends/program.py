"""From a functional aten program to a graph: one walk over its operators, through the table."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from paring.frontends.aten import TABLE
from paring.frontends.aten_builder import (
    FOLD_LIMIT,
    HALF,
    Builder,
    Converted,
    DataDependent,
    Missing,
    Unsupported,
    dtype_name,
)
from paring.frontends.provenance import loc_of
from paring.ir import Graph, Input, Loc, Node, TensorType
from paring.ir.errors import InternalError, IRTypeError, ModelError, UnsupportedOpsError, a_kind

INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
OBSERVER = "aten._fused_moving_avg_obs_fq_helper_functional.default"
SHOWN_LINES = 5
# Whole recurrent layers. torch counts them as random for the dropout between layers, which they do in training only.
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass
class Refusals:
    """What could not be converted: operator and reason -> the places that use it, in order."""

    places: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, name: str, reason: str, loc: Loc | None) -> None:
        self.places.setdefault((name, reason), []).append(str(loc) if loc else "")

    def check(self) -> None:
        """Raise one UnsupportedOpsError that lists everything, if there is anything."""
        if not self.places:
            return
        lines = []
        for (name, reason), places in self.places.items():
            known = list(dict.fromkeys(p for p in places if p))
            shown = ", ".join(known[:SHOWN_LINES]) + (f" and {len(known) - SHOWN_LINES} more" if len(known) > SHOWN_LINES else "")
            lines.append(f"{name} x{len(places)}" + (f" at {shown}" if shown else "") + (f" ({reason})" if reason else ""))
        uses = sum(map(len, self.places.values()))
        names = len({name for name, _ in self.places})
        hint = "replace them in the model; `paring ops` lists what there is"
        if any(_recurrent(name) for name, _ in self.places):
            hint += ". A recurrent layer can be written as a loop over nn.LSTMCell, nn.GRUCell or nn.RNNCell"
        raise UnsupportedOpsError(
            f"the model uses {names} unsupported operator{'s' * (names != 1)}, {uses} time{'s' * (uses != 1)}",
            where="; ".join(lines),
            hint=hint,
        )


class Importer:
    """Walks one lowered ExportedProgram. `graph()` gives the graph, or raises a typed error that names all obstacles."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.builder = Builder()
        self.refusals = Refusals()
        self.inputs: list[Node] = []
        self._parameters: dict[tuple[Any, ...], Node] = {}

    def graph(self) -> Graph:
        check_mutations(self.program)
        module = self.program.graph_module
        specs = self.program.graph_signature.input_specs
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        given = [self._argument(node, spec) for node, spec in zip(placeholders, specs, strict=True)]
        results = self._run(module, given)
        self.refusals.check()
        outputs: list[Node] = []
        for spec, result in zip(self.program.graph_signature.output_specs, results, strict=True):
            if isinstance(result, Missing):
                what, where = "an output of the model is not supported", f"output {spec.arg.name}"
                raise UnsupportedOpsError(what, where=where, why=result.reason, hint="do not return it from the model")
            if spec.kind is OutputKind.USER_OUTPUT and isinstance(result, Node):
                outputs.append(result)
        return Graph(tuple(self.inputs), tuple(outputs))

    def _argument(self, node: torch.fx.Node, spec: Any) -> Any:
        """The value of one placeholder: an Input, a constant, or a Python value. Constants are made on first use."""
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(spec.arg, ConstantArgument):
                return spec.arg.value
            if not isinstance(spec.arg, TensorArgument):
                raise ModelError(f"input {node.name} is {a_kind(spec.arg)}", hint="pass tensors and Python constants")
            self.inputs.append(Node(Input(node.name, *input_type(node)), (), None))
            return self.inputs[-1]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            return self._stored(spec.target) if node.users else None
        what = f"the model holds a {spec.kind.name.lower()} named {spec.target}"
        raise ModelError(what, why="only tensors are supported", hint="make such objects outside of forward")

    def _stored(self, target: str) -> Node:
        """A parameter, buffer or lifted constant, copied once; names tied to one tensor share the node."""
        state = self.program.state_dict
        tensor = state[target] if target in state else self.program.constants[target]
        return self._constant(tensor, target)

    def _constant(self, tensor: torch.Tensor, name: str) -> Node:
        check_tensor(tensor, name)
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if key not in self._parameters or not tensor.numel():
            # A copy: later changes to the model in place must not change the program.
            array = np.array(tensor.cpu().resolve_conj().resolve_neg().numpy(), order="C", copy=True)
            node = self._parameters[key] = self.builder.parameter(array, Loc(name))
            if array.dtype.kind == "f" and array.ndim > 1:
                self.builder.weights.add(node)
        return self._parameters[key]

    def _run(self, module: torch.fx.GraphModule, given: Sequence[Any]) -> list[Any]:
        """The results of a graph module on given values; called again for the bodies of no_grad and autocast blocks."""
        values: dict[torch.fx.Node, Any] = {}
        arguments = iter(given)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "get_attr":
                values[node] = self._attribute(module, str(node.target))
            elif node.op == "output":
                return [values[a] if isinstance(a, torch.fx.Node) else a for a in node.args[0]]
            else:
                values[node] = self._call(node, values)
        raise InternalError("a program without an output")

    def _attribute(self, module: torch.fx.GraphModule, name: str) -> Any:
        found = operator.attrgetter(name)(module)
        return self._constant(found, name) if isinstance(found, torch.Tensor) else found

    def _call(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> Converted:
        mapped: Any = torch.fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        args, kwargs = mapped
        name, loc = operator_name(node.target), loc_of(node)
        if node.target is operator.getitem:
            return args[0] if isinstance(args[0], Missing) else args[0][args[1]]
        if name.startswith("operator.") and not any(isinstance(a, Node | Missing) for a in args):
            return node.target(*args)  # type: ignore[operator]
        if name.rpartition(".")[2] in INLINED and _harmless(name, args):
            body = next(i for i, a in enumerate(args) if isinstance(a, torch.fx.GraphModule))
            return tuple(self._run(args[body], args[body + 1 :]))
        self.builder.loc = loc
        missing = [a for a in _flat((args, tuple(kwargs.values()))) if isinstance(a, Missing)]
        try:
            self.builder.types = result_types(node)
            converter = TABLE.get(name)
            if converter is None:
                result = self._by_torch(node.target, args, kwargs)
            elif missing:
                if missing[0].reason:
                    raise Unsupported(missing[0].reason)
                return Missing()
            else:
                result = converter(self.builder, *bind(cast(torch._ops.OpOverload, node.target), args, kwargs))
        except (Unsupported, IRTypeError) as error:
            why = f"{error.what}: {error.why}".removesuffix(": ") if isinstance(error, IRTypeError) else str(error)
            original = node.meta.get("original_aten")
            self.refusals.add(name if original is None or name.startswith("aten.") else operator_name(original), why, loc)
            return Missing()
        except DataDependent as error:
            raise ModelError(str(error), where=str(loc or ""), hint="use torch.where, or keep the full size and mask") from None
        self._check(name, result)
        return result

    def _by_torch(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Converted:
        """What has no row but only constant operands (arange, linspace, masks) is computed by torch itself, now."""
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise Unsupported("control flow is not supported")
        if not isinstance(target, torch._ops.OpOverload):
            raise Unsupported("")
        if _recurrent(operator_name(target)):
            raise Unsupported("there are no recurrent layers")
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise Unsupported("it draws random numbers")
        bound = bind(target, args, kwargs)
        operands = [a for a in _flat(bound) if isinstance(a, Node | Missing)]
        foldable = all(isinstance(n, Node) and n in self.builder.values and n.type.size <= FOLD_LIMIT for n in operands)
        tensors = all(isinstance(r.type, torch.TensorType) for r in target._schema.returns)
        if target.namespace not in ("aten", "prims") or not foldable or not tensors:
            raise Unsupported("")
        bound = [torch.device("cpu") if isinstance(a, torch.device) else a for a in bound]
        concrete = torch.utils._pytree.tree_map_only(Node, lambda n: torch.from_numpy(self.builder.values[n].copy()), list(bound))
        names = [(a.name, a.kwarg_only) for a in target._schema.arguments]
        positional = [c for c, (_, kw) in zip(concrete, names, strict=True) if not kw]
        named = {n: c for c, (n, kw) in zip(concrete, names, strict=True) if kw}
        result = target(*positional, **named)
        made = [self.builder.constant(r.detach().numpy()) for r in (result if isinstance(result, tuple) else (result,))]
        return tuple(made) if isinstance(result, tuple) else made[0]

    def _check(self, name: str, result: Converted) -> None:
        """A converter's result has the type that torch gives it; anything else is our mistake."""
        found = result if isinstance(result, tuple) else (result,)
        for node, wanted in zip(found, self.builder.types, strict=False):
            if isinstance(node, Node) and wanted is not None and node.type != wanted:
                raise InternalError(
                    f"{name} was imported as {node.type}, torch says {wanted}",
                    where=str(self.builder.loc or ""),
                    hint="please report this with the model's line",
                )


def _harmless(name: str, args: Sequence[Any]) -> bool:
    """Gradient mode never matters here; autocast does not where it is off."""
    return name.endswith("set_grad_enabled") or any(a is False for a in args[2:3])


def _recurrent(name: str) -> bool:
    return name.startswith("aten.") and name.split(".")[1] in RECURRENT


def _flat(value: Any) -> list[Any]:
    found: list[Any] = []
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, list | tuple):
            pending.extend(reversed(item))
        else:
            found.append(item)
    return found


def operator_name(target: Any) -> str:
    """`aten.conv2d.default`, `higher_order.cond`, or the name of a Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.__name__}"
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}".lstrip("._")


def bind(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments in schema order, defaults filled in."""
    bound: list[Any] = []
    for position, argument in enumerate(target._schema.arguments):
        if position < len(args):
            bound.append(args[position])
        elif argument.name in kwargs:
            bound.append(kwargs[argument.name])
        else:
            bound.append(argument.default_value)
    return bound


def result_types(node: torch.fx.Node) -> tuple[TensorType | None, ...]:
    """What torch says about the results of a node, None for those that are not tensors of a static shape."""
    value = node.meta.get("val")
    listed = value if isinstance(value, list | tuple) else (value,)
    static = [isinstance(v, torch.Tensor) and all(isinstance(s, int) for s in v.shape) for v in listed]
    return tuple(TensorType(dtype_name(v.dtype), tuple(v.shape)) if s else None for v, s in zip(listed, static, strict=True))


def input_type(node: torch.fx.Node) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor input. Raises ModelError for what Paring does not take."""
    value = node.meta["val"]
    check_tensor(value, f"input {node.name}")
    if not all(isinstance(s, int) for s in value.shape):
        raise ModelError(
            f"input {node.name} has the dynamic shape {list(value.shape)}",
            why="a network is compiled for fixed shapes",
            hint="export it without dynamic_shapes",
        )
    return dtype_name(value.dtype), tuple(value.shape)


def check_tensor(tensor: torch.Tensor, name: str) -> None:
    """Raise ModelError for tensors of a dtype or memory layout that the IR does not have."""
    if tensor.dtype in HALF:
        raise ModelError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}",
            where=name,
            why="16-bit floats are not supported yet",
            hint="call model.float() and pass float32 inputs",
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = "on the meta device" if tensor.device.type == "meta" else "sparse or quantized"
        raise ModelError(f"{name} is {kind}", where=name, hint="load its weights" if "meta" in kind else "make it a dense tensor")
    try:
        dtype_name(tensor.dtype)
    except Unsupported as error:
        raise ModelError(f"{name}: {error}", where=name, hint="use float32, int64, int32 or bool") from None


def _of_observer(node: torch.fx.Node) -> bool:
    """Whether a value is the state of an observer, which is imported only where it is switched off."""
    return node.target is operator.getitem and operator_name(node.args[0].target) == OBSERVER  # type: ignore[union-attr]


def check_mutations(program: torch.export.ExportedProgram) -> None:
    """Raise ModelError where a call would change the model or its inputs: a compiled network keeps no state."""
    buffers, inputs = [], []
    nodes = {node.name: node for node in program.graph.nodes}
    for spec in program.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION and not _of_observer(nodes[spec.arg.name]):
            buffers.append(str(spec.target))
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            inputs.append(str(spec.target))
    if buffers:
        raise ModelError(
            f"the model writes into its buffer{'s' * (len(buffers) > 1)} {', '.join(buffers)}",
            where=", ".join(buffers),
            why="a compiled network keeps no state from call to call",
            hint="pass the state in and return the new one; what only training needs belongs under `if self.training:`",
        )
    if inputs:
        raise ModelError(
            f"the model writes into its input{'s' * (len(inputs) > 1)} {', '.join(inputs)}",
            where=", ".join(inputs),
            why="a compiled network does not change what it is given",
            hint="work on a copy in the model: x = x.clone(), or inplace=False",
        )
