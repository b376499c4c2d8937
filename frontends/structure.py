"""The structure of a network's inputs and outputs: from a call to flat arrays, and from arrays back to what the model returned.

Plain data that goes to JSON and back, so a saved network is called like the model it came from. Needs numpy; torch only when
given torch tensors or asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, isnan
from typing import Any

import numpy as np

from paring.frontends.records import TupleRecord
from paring.ir.errors import ArtifactError, InputError, a_kind
from paring.ir.graph import Graph
from paring.ir.types import TensorType

Key = str | int
CONTAINERS = ("tuple", "list", "dict", "record", "sequence")
# These go by names, the others by position.
NAMED = ("dict", "record", "sequence")
ODD_FLOATS = ("inf", "-inf", "nan")


class Record(dict[Key, Any]):
    """What stands for a model's own output class in a loaded network: entries by name, by position, and as attributes.

    A tuple class has `TupleRecord` instead. As in the class itself, an entry hides a method of its name: `record.values` is the
    entry, `dict.values(record)` the method.
    """

    class_name = "Record"

    def __init__(self, class_name: str, entries: Mapping[Key, Any]) -> None:
        super().__init__(entries)
        self.class_name = class_name

    def __getitem__(self, key: Key) -> Any:
        return list(dict.values(self))[key] if isinstance(key, int) and key not in self else super().__getitem__(key)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and dict.__contains__(self, name):
            return dict.__getitem__(self, name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{dict.__getattribute__(self, 'class_name')} has no entry {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Record, (dict.__getattribute__(self, "class_name"), dict(self))


@dataclass(frozen=True)
class Tree:
    """One place in a structure.

    kind `tensor`: leaf number `index`. kind `constant`: `value`, None or a Python scalar. Containers hold `children`; those of
    a dict, a record or a sequence have `keys`. A record is any other class, named `name`, a sequence one whose entries go by
    position (a namedtuple, torch.return_types). `make` rebuilds these where their class is at hand; it is not part of the data.
    """

    kind: str
    index: int = -1
    value: bool | int | float | str | None = None
    name: str = ""
    keys: tuple[Key, ...] = ()
    children: tuple[Tree, ...] = ()
    make: Callable[[list[Any]], Any] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data; the inverse of `from_json`."""
        if self.kind == "tensor":
            return {"kind": "tensor", "index": self.index}
        if self.kind == "constant":
            # JSON has no infinities and no NaN.
            odd = isinstance(self.value, float) and not isfinite(self.value)
            return {"kind": "constant", "float": repr(self.value)} if odd else {"kind": "constant", "value": self.value}
        data: dict[str, Any] = {"kind": self.kind, "children": [child.to_json() for child in self.children]}
        if self.kind in NAMED:
            data |= {"name": self.name, "keys": list(self.keys)}
        return data

    @staticmethod
    def from_json(data: Any) -> Tree:
        """Raises ArtifactError for anything that `to_json` does not write."""
        data = data if isinstance(data, dict) else {}
        kind, value, index = data.get("kind"), data.get("value"), data.get("index")
        children, keys, name = data.get("children"), data.get("keys", []), data.get("name", "")
        if kind == "tensor" and type(index) is int and index >= 0:
            return Tree("tensor", index=index)
        if kind == "constant" and data.get("float") in ODD_FLOATS:
            return Tree("constant", value=float(data["float"]))
        if kind == "constant" and isinstance(value, bool | int | float | str | None):
            return Tree("constant", value=value)
        fits = kind in CONTAINERS and isinstance(children, list) and isinstance(keys, list) and isinstance(name, str)
        named = kind in NAMED
        if not fits or not all(type(k) in (str, int) for k in keys) or len(keys) != (len(children) if named else 0):
            raise ArtifactError("the structure of inputs or outputs is damaged", why=f"at {str(data)[:80]}")
        return Tree(kind, name=name, keys=tuple(keys), children=tuple(Tree.from_json(child) for child in children))

    def places(self) -> list[int]:
        """The numbers of the tensors that the structure holds places for, in order of the places."""
        own = [self.index] if self.kind == "tensor" else []
        return [*own, *(place for child in self.children for place in child.places())]

    def named(self, name: str = "") -> list[tuple[str, int]]:
        """Each place for a tensor with what leads to it, like `logits` or `0.past`; a tensor alone is called `output`."""
        if self.kind == "tensor":
            return [(name or "output", self.index)]
        start = f"{name}." if name else ""
        return [place for key, child in zip(_keys(self), self.children, strict=True) for place in child.named(f"{start}{key}")]

    def leaves(self) -> int:
        """How many tensors there are to fill all places: the greatest number + 1."""
        return max(self.places(), default=-1) + 1


@dataclass(frozen=True)
class Signature:
    """How a network is called: labels and types of its tensors, and the structures they come and go in.

    `inputs` is a tuple of (args tuple, kwargs dict); `parameters` names the positional arguments, so that those may also be
    passed by name. `of_torch`: the model was one of torch's, so that without inputs it gives torch tensors.
    """

    labels: tuple[str, ...]
    types: tuple[TensorType, ...]
    inputs: Tree
    outputs: Tree
    parameters: tuple[str, ...] = ()
    of_torch: bool = False

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[np.ndarray]:
        """The call's tensors as native contiguous arrays, in order. Raises InputError naming the input that does not fit."""
        args, kwargs = self._by_position(tuple(args), dict(kwargs or {}))
        found: dict[int, np.ndarray] = {}
        wanted_args, wanted_kwargs = self.inputs.children
        self._check_names(args, kwargs)
        if len(args) != len(wanted_args.children):
            count = len(wanted_args.children)
            what = f"expected {count} positional input{'s' * (count != 1)}, got {len(args)}"
            raise InputError(what, hint=self._hint())
        for position, (tree, value) in enumerate(zip(wanted_args.children, args, strict=True)):
            self._take(tree, value, f"input {position}", found)
        for key, tree in zip(wanted_kwargs.keys, wanted_kwargs.children, strict=True):
            self._take(tree, kwargs[str(key)], f"input {key!r}", found)
        return [found[i] for i in range(len(self.types))]

    def unflatten_inputs(self, arrays: Sequence[np.ndarray]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call (args, kwargs) that these arrays make, in order. Raises InputError where they are too many or too few."""
        if len(arrays) != len(self.types):
            raise InputError(f"expected {len(self.types)} inputs, got {len(arrays)}", hint=self._hint())
        args, kwargs = _build(self.inputs, arrays)
        return args, kwargs

    def unflatten_outputs(self, arrays: Sequence[np.ndarray], like_torch: bool) -> Any:
        """The model's own output structure around the arrays, as torch tensors or as numpy arrays."""
        return _build(self.outputs, [to_torch(a) for a in arrays] if like_torch else list(arrays))

    def with_leaves(self, leaves: Sequence[Any]) -> Any:
        """The model's own output structure around anything, one for each output of the graph."""
        return _build(self.outputs, leaves)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a manifest; the inverse of `from_json`."""
        return {
            "labels": list(self.labels),
            "types": [str(t) for t in self.types],
            "inputs": self.inputs.to_json(),
            "outputs": self.outputs.to_json(),
            "parameters": list(self.parameters),
            "of_torch": self.of_torch,
        }

    @staticmethod
    def from_json(data: Any) -> Signature:
        """Raises ArtifactError for anything that `to_json` does not write."""
        texts = [data.get(k) if isinstance(data, dict) else None for k in ("labels", "types", "parameters")]
        if not all(isinstance(t, list) and all(isinstance(s, str) for s in t) for t in texts):
            raise ArtifactError("the specification of inputs and outputs is damaged")
        labels, types, parameters = (tuple(t) for t in texts if t is not None)
        inputs, outputs = Tree.from_json(data.get("inputs")), Tree.from_json(data.get("outputs"))
        signature = Signature(labels, tuple(TensorType.parse(t) for t in types), inputs, outputs, parameters)
        signature = replace(signature, of_torch=data.get("of_torch") is True)
        shape_fits = [c.kind for c in inputs.children] == ["tuple", "dict"] and len(types) == len(labels)
        if not shape_fits or sorted(inputs.places()) != list(range(len(types))):
            raise ArtifactError("the specification of inputs and outputs contradicts itself")
        return signature

    def _by_position(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments given by name, and named ones given by position, moved to where the signature has them."""
        wanted_args, wanted_kwargs = self.inputs.children
        for name in self.parameters[len(args) : len(wanted_args.children)]:
            if name not in kwargs:
                break
            args = (*args, kwargs.pop(name))
        for name, value in zip(self.parameters[len(wanted_args.children) :], args[len(wanted_args.children) :], strict=False):
            if name not in wanted_kwargs.keys or name in kwargs:
                break
            kwargs[name] = value
            args = (*args[: len(wanted_args.children)], *args[len(wanted_args.children) + 1 :])
        return args, kwargs

    def _check_names(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise InputError for keyword inputs that are unknown, given twice, or missing."""
        positional, named = self.inputs.children
        wanted = named.keys
        for name in kwargs:
            if name in self.parameters[: len(args)]:
                raise InputError(f"the input {name!r} is given twice, by position and by name", hint=self._hint())
            if name not in (*wanted, *self.parameters[: len(positional.children)]):
                why = "the network was compiled without it" if name in self.parameters else ""
                raise InputError(f"unknown keyword input {name!r}", why=why, hint=self._hint())
        missing = [repr(name) for name in wanted if name not in kwargs]
        if missing:
            raise InputError(f"missing keyword input{'s' * (len(missing) > 1)} {', '.join(missing)}", hint=self._hint())

    def shown(self) -> str:
        """What is given in a call: tensors with their types, constants with their values."""
        args, kwargs = self.inputs.children
        names = [*(f"{name}=" for name in self.parameters), *[""] * len(args.children)]
        shown = [self._shown(names[i], tree) for i, tree in enumerate(args.children)]
        return ", ".join(
            [*shown, *(self._shown(f"{key}=", tree) for key, tree in zip(kwargs.keys, kwargs.children, strict=True))]
        )

    def _shown(self, name: str, tree: Tree) -> str:
        if tree.kind == "tensor":
            return f"{self.labels[tree.index]}: {self.types[tree.index]}"
        if tree.kind == "constant":
            return f"{name}{tree.value!r}"
        inside = [
            self._shown(f"{key}=" if tree.kind in NAMED else "", child)
            for key, child in zip(_keys(tree), tree.children, strict=True)
        ]
        return f"{name}{tree.name or tree.kind}({', '.join(inside)})"

    def _hint(self) -> str:
        return f"the network takes ({self.shown()})"

    def _take(self, tree: Tree, value: Any, where: str, found: dict[int, np.ndarray]) -> None:
        if tree.kind == "tensor":
            found[tree.index] = _to_array(value, self.types[tree.index], f"{where} ({self.labels[tree.index]})")
        elif tree.kind == "constant":
            if not _same_constant(tree.value, value):
                raise InputError(
                    f"{where} is {_brief(value)}, expected {tree.value!r}",
                    where=where,
                    why="the network was compiled for this value: only tensors may change from call to call",
                    hint="compile it for the other value too",
                )
        else:
            for key, child in zip(_keys(tree), tree.children, strict=True):
                self._take(child, _entry(tree, key, value, where), f"{where}[{key!r}]", found)


def _keys(tree: Tree) -> Sequence[Key]:
    return tree.keys if tree.kind in ("dict", "record") else range(len(tree.children))


def _entry(tree: Tree, key: Key, value: Any, where: str) -> Any:
    """One entry of a container given by the caller, after a check that the container is the expected one."""
    wanted = f"{tree.name or tree.kind} of {len(tree.children)}"
    if tree.kind in ("tuple", "list", "sequence"):
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(tree.children):
            raise InputError(f"{where} is {_brief(value)}, expected a {wanted}", where=where)
        return value[int(key)]
    if tree.kind == "dict":
        if not isinstance(value, Mapping) or set(value) != set(tree.keys):
            raise InputError(f"{where} is {_brief(value)}, expected a dict with the keys {list(tree.keys)}", where=where)
        return value[key]
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(key, int) and isinstance(value, Sequence) and key < len(value):
        return value[key]
    if isinstance(key, str) and hasattr(value, key):
        return getattr(value, key)
    raise InputError(f"{where} is {_brief(value)}, expected a {wanted} with {key!r}", where=where)


def _same_constant(wanted: Any, value: Any) -> bool:
    if isinstance(wanted, float) and isinstance(value, float) and isnan(wanted):
        return isnan(value)
    return type(value) is type(wanted) and bool(value == wanted)


def _brief(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    if isinstance(value, Mapping):
        return f"{a_kind(value)} with the keys {list(value)}"
    if isinstance(value, tuple | list):
        return f"{a_kind(value)} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else a_kind(value)


def _is_torch(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch" or hasattr(value, "__torch_function__")


def _to_array(value: Any, wanted: TensorType, where: str) -> np.ndarray:
    """A native, row-major array of exactly the wanted type; copies only where the memory does not serve as it is."""
    if _is_torch(value) and hasattr(value, "detach"):
        value = _from_torch(value, where)
    if not isinstance(value, np.ndarray | np.generic):
        what = f"{where} is {_brief(value)}, expected a tensor {wanted}"
        raise InputError(what, where=where, hint="pass a torch tensor or a numpy array")
    array = np.asarray(value)
    if array.dtype == wanted.dtype and array.shape == wanted.shape:
        return np.asarray(array, order="C")
    dtype = array.dtype.newbyteorder("=")
    if dtype.name != wanted.dtype:
        what = f"{where} has dtype {dtype.name}, expected {wanted}"
        raise InputError(what, where=where, hint=f"convert it to {wanted.dtype} before the call")
    if array.shape != wanted.shape:
        raise InputError(
            f"{where} has shape {list(array.shape)}, expected {wanted}",
            where=where,
            why="a network is compiled for fixed shapes",
            hint="compile it for this shape too",
        )
    return np.asarray(array, dtype=dtype, order="C")


def _from_torch(tensor: Any, where: str) -> np.ndarray:
    """A torch tensor's memory as numpy sees it. Raises InputError for tensors that are not plain memory on the CPU."""
    try:
        array: np.ndarray = tensor.detach().numpy()
    except (RuntimeError, TypeError):
        array = _from_odd_torch(tensor, where)
    return array


def _from_odd_torch(tensor: Any, where: str) -> np.ndarray:
    """For a tensor that torch does not show to numpy as it is."""
    if tensor.device.type != "cpu":
        raise InputError(f"{where} is on device {tensor.device}, expected cpu", where=where, hint="call .cpu() on it")
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized:
        raise InputError(f"{where} is a {tensor.layout} tensor, expected a dense one", where=where, hint="call .to_dense() on it")
    try:
        array: np.ndarray = tensor.detach().resolve_conj().resolve_neg().numpy()
    except (RuntimeError, TypeError) as error:
        what, why = f"{where} can not be read as an array", str(error).splitlines()[0]
        raise InputError(what, where=where, why=why, hint="pass a plain tensor of the expected dtype") from None
    return array


def to_torch(array: np.ndarray) -> Any:
    """A tensor on an array's memory, or on a copy where torch could not use that."""
    import torch

    # torch can not mark memory as read-only: constants are copied, so that nobody writes into the network.
    native = array.astype(array.dtype.newbyteorder("="), order="C", copy=not array.flags.writeable)
    return torch.from_numpy(native)


def _build(tree: Tree, leaves: Sequence[Any]) -> Any:
    if tree.kind == "tensor":
        return leaves[tree.index]
    if tree.kind == "constant":
        return tree.value
    children = [_build(child, leaves) for child in tree.children]
    if tree.make is not None:
        return tree.make(children)
    if tree.kind in ("tuple", "list"):
        return tuple(children) if tree.kind == "tuple" else children
    if tree.kind == "sequence":
        return TupleRecord(tree.name, [str(key) for key in tree.keys], children)
    entries = dict(zip(tree.keys, children, strict=True))
    return entries if tree.kind == "dict" else Record(tree.name, entries)


@dataclass(frozen=True)
class Imported:
    """A program from a frontend: its graph, and how it is called."""

    graph: Graph
    signature: Signature

    @property
    def in_spec(self) -> Tree:
        return self.signature.inputs

    @property
    def out_spec(self) -> Tree:
        return self.signature.outputs

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[np.ndarray]:
        """See Signature.flatten_inputs."""
        return self.signature.flatten_inputs(args, kwargs)

    def unflatten_outputs(self, arrays: Sequence[np.ndarray], like_torch: bool) -> Any:
        """See Signature.unflatten_outputs."""
        return self.signature.unflatten_outputs(arrays, like_torch)

    def with_graph(self, graph: Graph) -> Imported:
        """The same call around another graph of the same inputs and outputs."""
        return replace(self, graph=graph)


def spec_to_json(imported: Imported | Signature) -> dict[str, Any]:
    """The call's specification as plain data, for a manifest."""
    return (imported.signature if isinstance(imported, Imported) else imported).to_json()


def spec_from_json(data: Any) -> Signature:
    """The inverse of `spec_to_json`. Raises ArtifactError where the data is damaged."""
    return Signature.from_json(data)
