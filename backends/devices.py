"""Where a network runs: in this process, on an emulated machine, or on another one behind an RPC server."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import tvm
import tvm.rpc
from tvm import relax

from paring.backends.artifact import load
from paring.backends.build import Built, buffer_shape
from paring.backends.emulator import Emulator
from paring.backends.runtime import Executable, Network
from paring.backends.targets import RPC, Target, check_device, missing_flags
from paring.ir.errors import TargetError
from paring.ir.op import Array

R = TypeVar("R")


class RemoteExecutable(Network):
    """A network on a device of another kind; `device` loads a library there and runs flat numpy arrays through its `main`."""

    def __init__(self, built: Built, device: Device) -> None:
        super().__init__(built)
        self._device = device
        self._weights = [np.resize(op.value, max(op.value.size, 1)) for op in built.plan.weights]
        with tempfile.TemporaryDirectory(prefix="paring-") as folder:
            path = Path(folder) / "lib.so"
            path.write_bytes(built.library)
            self._remote = _on_device(lambda: device.load(path))

    def _call(self, inputs: Sequence[Array]) -> list[Array]:
        # np.resize flattens and gives an empty array the one element that its buffer has.
        flat = [np.resize(array, buffer_shape(n.type)) for array, n in zip(inputs, self.built.graph.inputs, strict=True)]
        return _on_device(lambda: self._remote.run([*flat, *self._weights]))

    def _release(self) -> None:
        del self._remote, self._device
        self._weights = []


class Loaded(Protocol):
    def run(self, inputs: Sequence[Array]) -> list[Array]: ...


class Device(Protocol):
    """What runs libraries of another machine: `Emulator`, or `RpcDevice`."""

    def load(self, library: Path) -> Loaded: ...


class RpcDevice:
    """A machine that runs TVM's RPC server. The server executes whatever it is sent: reach it through a tunnel only."""

    def __init__(self, host: str, port: int) -> None:
        self.session = tvm.rpc.connect(host, port)
        self.loaded = 0

    def load(self, library: Path) -> Loaded:
        self.loaded += 1
        name = f"paring{self.loaded}.so"
        self.session.upload(str(library), target=name)
        return _RpcModule(self.session, name)


class _RpcModule:
    def __init__(self, session: Any, name: str) -> None:
        self.device = session.cpu(0)
        self.machine = relax.VirtualMachine(session.load_module(name), self.device)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        self.machine.set_input("main", *[tvm.runtime.tensor(array, self.device) for array in inputs])
        self.machine.invoke_stateful("main")
        return [tensor.numpy() for tensor in self.machine.get_outputs("main")]


def _on_device(work: Callable[[], R]) -> R:
    try:
        return work()
    except (RuntimeError, OSError) as error:
        raise TargetError("the device failed", why=str(error)) from error


def open_executable(source: Built | str | Path, target: Target | None = None, device: str | Device | None = None) -> Network:
    """Load a built network, or a saved one, where it is to run.

    `device` is "host", "emulator", "rpc://HOST:PORT" or an object that loads libraries; by default what the target names.
    Raises TargetError where the target cannot run, ArgumentError for an unknown device, ArtifactError for a bad artifact.
    """
    built = source if isinstance(source, Built) else load(source).built
    target = target or built.target
    check_device(target, device)
    if device is None:
        device = target.device
    if not isinstance(device, str):
        return RemoteExecutable(built, device)
    if device == "host":
        missing = missing_flags(target)
        if missing:
            raise TargetError(f"this host cannot run code for {target.name}", why=f"it lacks {', '.join(missing)}", hint=_FOREIGN)
        return Executable(built)
    if device == "emulator":
        return RemoteExecutable(built, _on_device(Emulator))
    if device == "":
        raise TargetError(f"a network for {target.name} does not run on this host", hint=_FOREIGN)
    match = RPC.fullmatch(device)
    assert match
    return RemoteExecutable(built, _connect(match[1].strip("[]"), int(match[2])))


def _connect(host: str, port: int) -> RpcDevice:
    try:
        return RpcDevice(host, port)
    except (RuntimeError, OSError) as error:
        what, why = f"no device answers at {host}:{port}", str(error).strip().splitlines()[-1]
        hint = f"start TVM's server there: python -m tvm.exec.rpc_server --host 127.0.0.1 --port {port}"
        raise TargetError(what, why=why, hint=hint) from error


_FOREIGN = 'give a device ("emulator", "rpc://HOST:PORT"), or save the network and run it on a machine of that kind'
