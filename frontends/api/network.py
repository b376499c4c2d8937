"""A compiled network: call it, look at it, profile it, save it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from paring.backends.reference import ReferenceExecutable
from paring.backends.targets import REFERENCE, Target
from paring.frontends.structure import Signature
from paring.ir.errors import ArgumentError, InputError, TargetError
from paring.ir.graph import Graph
from paring.ir.interpreter import interpret
from paring.ir.text import show
from paring.ir.types import TensorType
from paring.passes.ledger import Ledger
from paring.passes.manager import Result
from paring.passes.rewriter import Run, Tell

if TYPE_CHECKING:
    from paring.backends.build import Built
    from paring.backends.profile import Profile


# The one stage of a loaded network.
SAVED = "saved"


@dataclass
class Version:
    """A network for one set of input types: its call, what the passes made of it, and what runs it.

    `executable` is None for a foreign target without a device: it can be saved, but not called.
    """

    signature: Signature
    result: Result
    target: Target
    built: Built | None
    executable: Any
    extra: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def build(signature: Signature, result: Result, target: Target, device: str | None, tell: Tell) -> Version:
        """Compile a lowered graph and open it where it can run."""
        if target.name == REFERENCE.name:
            return Version(signature, result, target, None, ReferenceExecutable(result.graph))
        from paring.backends.build import build
        from paring.backends.devices import open_executable

        built = build(result.graph, target, lambda done, total, name: tell("kernels", done, total))
        runs = device is not None or target.device == "host"
        return Version(signature, result, target, built, open_executable(built, target, device) if runs else None)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        arrays = self.signature.flatten_inputs(args, kwargs)
        # Without a tensor in the call, what comes out is of the model's own kind.
        like_torch = any_torch(args, kwargs) if self.signature.types else self.signature.of_torch
        return self.signature.unflatten_outputs(self.running().run(arrays), like_torch)

    def running(self) -> Any:
        """The executable. Raises TargetError where there is none."""
        if self.executable is None:
            raise TargetError(
                f"this network is compiled for {self.target.name}, which this host does not run",
                hint="give compile() or load() a device (device='emulator'), or save it and load it there",
            )
        return self.executable


class Network:
    """A callable network, in one version for each set of input types it was compiled for.

    Takes and gives torch tensors when called with torch tensors, numpy arrays when called with numpy arrays; without inputs
    it gives what its model gives. Calls from several threads are safe; they take turns. Graph, ledger, stages, ir and contract
    are those of the version compiled last; `version(x)` gives any one of them as a network of its own.
    """

    def __init__(
        self,
        versions: dict[Any, Version],
        target: Target,
        make: Callable[[tuple[Any, ...], dict[str, Any]], Version] | None = None,
    ) -> None:
        self._versions = versions
        self._make = make
        self._lock = threading.Lock()
        self._closed = False
        self.target = target

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._version(args, kwargs).call(args, kwargs)

    def specialize(self, *args: Any, **kwargs: Any) -> Network:
        """Compile now for inputs like these, and give the network back."""
        self._version(args, kwargs)
        return self

    def version(self, *args: Any, **kwargs: Any) -> Network:
        """The version for inputs like these, compiled now if need be, as a network of one version. Both close together."""
        return Network({None: self._version(args, kwargs)}, self.target)

    @property
    def inputs(self) -> tuple[tuple[str, TensorType], ...]:
        """Name and type of each tensor that the network takes."""
        signature = self._only().signature
        return tuple(zip(signature.labels, signature.types, strict=True))

    def arguments(self, arrays: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call (args, kwargs) that these make, in the order of `inputs`. Raises InputError where their number is another."""
        return self._only().signature.unflatten_inputs(arrays)

    @property
    def outputs(self) -> tuple[tuple[str, TensorType], ...]:
        """Name and type of each tensor that the network gives; the name is its place in the result, like `logits` or `0.1`."""
        version = self._only()
        return tuple((name, version.result.graph.outputs[index].type) for name, index in version.signature.outputs.named())

    @property
    def graph(self) -> Graph:
        """The graph that the backend was given."""
        return self._only().result.graph

    @property
    def ledger(self) -> Ledger:
        """What each pass did."""
        return self._only().result.ledger

    @property
    def contract(self) -> str:
        """What all passes together promise."""
        return str(self.ledger.contract)

    @property
    def stages(self) -> list[str]:
        """The names of the stages that `ir(after=...)` shows: the import, then each pass that changed something."""
        return [name for name, _ in self._only().result.stages]

    @property
    def stage_graphs(self) -> list[Graph]:
        """The program at each of the `stages`."""
        return [graph for _, graph in self._only().result.stages]

    @property
    def declined(self) -> list[tuple[str, str, str]]:
        """(pass, rule and node, reason) for each place where a rule fitted and declined."""
        return [(name, str(rewrite), why) for name, rewrite, why in self._only().result.declined]

    def ir(self, after: str | None = None) -> str:
        """The program as text after the last run of a pass (or after "import"); without a name, as it is run.

        Raises ArgumentError for a pass that was not run, and for a loaded network, which has no stages.
        """
        if after is None:
            return show(self.graph)
        graph = _stage(self._only().result, after)
        if graph is not None:
            return show(graph)
        if self.stages == [SAVED]:
            why, hint = "a saved network keeps the program that runs, no stages", "ir() shows it; `dump` keeps all stages"
            raise ArgumentError(f"there is no stage {after!r}", why=why, hint=hint)
        names = dict.fromkeys(["import", *(entry.name for entry in self.ledger.entries)])
        raise ArgumentError(f"no pass {after!r} was run", hint=f"stages: {', '.join(names)}")

    def profile(self, *args: Any, repeats: int = 20, **kwargs: Any) -> Profile:
        """Time of each region with its work, bytes, share of peak, and where in the model it came from.

        Of a quantized network also the SQNR of each layer (dB, as the ledger has it), the share of multiply-adds on 8-bit
        integers, and the bytes that its weights take less than in float32.
        """
        from paring.backends.profile import profile

        version = self._version(args, kwargs)
        return profile(version.running(), version.signature.flatten_inputs(args, kwargs), repeats, version.result.ledger.sqnr)

    def save(self, path: str | Path) -> Path:
        """Write the artifact folder `path` (conventionally NAME.paring); it holds one version.

        Raises ArgumentError where there are several, ArtifactError where it cannot be written.
        """
        from paring.artifacts import save

        if len(self._versions) > 1:
            listed = "; ".join(version.signature.shown() for version in self._versions.values())
            what = f"the network has {len(self._versions)} versions, and a saved network holds one"
            raise ArgumentError(what, where=listed, hint="choose one by its inputs: net.version(x).save(path)")
        return save(self._only(), Path(path))

    def close(self) -> None:
        """Free the network; calling it afterwards is an error."""
        with self._lock:
            self._closed = True
            for version in self._versions.values():
                if version.executable is not None:
                    version.executable.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise ArgumentError("a compiled network cannot be pickled", hint="use .save(path) and paring.load(path)")

    def __repr__(self) -> str:
        count = len(self._versions)
        return f"<paring.Network for {self.target.name}, {count} version{'s' * (count != 1)}>"

    def _only(self) -> Version:
        """The version compiled last: the only one of a network compiled for given inputs."""
        if not self._versions:
            raise InputError("the network is not compiled yet", hint="call it, or specialize(x), first")
        return list(self._versions.values())[-1]

    def _version(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Version:
        if self._make is None:
            return self._versions[None]
        key = call_key(args, kwargs)
        with self._lock:
            if self._closed:
                raise InputError("the network is closed", hint="compile or load it again")
            if key not in self._versions:
                self._versions[key] = self._make(args, kwargs)
            return self._versions[key]


def _stage(result: Result, name: str) -> Graph | None:
    """The graph after the last run of a pass, whether or not that run changed it; None where there was no such run."""
    (first, graph), *changed = result.stages
    found = graph if name == first else None
    if first == SAVED:
        return found
    rest = iter(changed)
    for entry in result.ledger.entries:
        if entry.changed:
            _, graph = next(rest)
        if name in (entry.name, entry.name.partition("{")[0]):
            found = graph
    return found


def call_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What tells one specialisation from another: structure, shapes and dtypes of tensors, and the values of all else."""
    leaves, structure = flatten_call(args, kwargs)
    return structure, tuple(_key(leaf) for leaf in leaves)


def _key(leaf: Any) -> Any:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), str(leaf.dtype).removeprefix("torch."), str(getattr(leaf, "device", "cpu"))
    return type(leaf).__name__, repr(leaf)


def any_torch(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gives torch tensors, and so wants them back."""
    given = (*args, *kwargs.values())
    if any(hasattr(value, "detach") for value in given):
        return True
    # Looking into containers takes longer than a small network.
    containers = tuple(value for value in given if not isinstance(value, np.ndarray))
    return bool(containers) and any(hasattr(leaf, "detach") for leaf in flatten_call(containers, {})[0])


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], str]:
    """The leaves of a call and its structure as text; any container that torch knows is looked into, once torch is there."""
    if "torch" in sys.modules:
        leaves, structure = sys.modules["torch"].utils._pytree.tree_flatten((args, kwargs))
        return leaves, str(structure)
    leaves = []
    return leaves, repr(_shape_of((args, kwargs), leaves))


def _shape_of(value: Any, leaves: list[Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _shape_of(item, leaves) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_shape_of(item, leaves) for item in value]
        return items if isinstance(value, list) else tuple(items)
    leaves.append(value)
    return None


def graph_call(graph: Graph, signature: Signature, run: Run = interpret) -> Callable[..., Any]:
    """A callable that takes what the network takes and runs a graph, by the reference interpreter unless told otherwise."""

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays = signature.flatten_inputs(args, kwargs)
        return signature.unflatten_outputs(run(graph, arrays), any_torch(args, kwargs))

    return call
