"""An ARM device without an ARM: TVM's RPC server in an aarch64 process under qemu's user-mode emulation.

    with Emulator() as device:
        net = device.load("net.so")          # a Relax VM executable built for aarch64-linux-gnu
        outputs = net.run([x])               # numpy in, numpy out

Its results are those of the hardware; its times mean nothing.

The sequence that runs a Relax VM executable over RPC (`Emulator.load` does it; TVM 0.27), given a session:

    executable = tvm.compile(module, target=tvm.target.Target(
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}))
    executable.export_library(path, fcompile=tvm.support.cc.cross_compiler("aarch64-linux-gnu-g++"))
    session.upload(path, target="net.so")    # `load` copies the file and tensors through a shared folder instead
    machine = relax.VirtualMachine(session.load_module("net.so"), session.cpu(0))
    machine.set_input("main", *[tvm.runtime.tensor(x, session.cpu(0)) for x in inputs])
    machine.invoke_stateful("main")
    outputs = machine.get_outputs("main")    # a tensor, or a tuple of what these may be: .numpy() each

Calling `machine["main"](...)` works as well, but only for a single tensor: a tuple comes back as an opaque reference.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paring.backends.emulator_build import EmulatorError, emulate, prepare

START_SECONDS = 60.0


def _stop(process: subprocess.Popen[bytes], folder: Path, owner: int) -> None:
    """End the guest and its group. A forked child of the host inherits this duty, but the guest is not its own."""
    if os.getpid() != owner:
        return
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)


class _Guest:
    """One emulated process and the session with it. Dead once it has been stopped, crashed or ran past a deadline."""

    def __init__(self, cpu: str, threads: int, timeout: float) -> None:
        self.cpu, self.timeout, self.loaded = cpu, timeout, 0
        self.key = secrets.token_hex(16)
        self.session: Any = None
        self.lock = threading.Lock()
        runtime = prepare()
        self.folder = Path(tempfile.mkdtemp(prefix="paring-arm-"))
        self._log = self.folder / "log"
        # The host listens and the guest inherits the socket, so no port has to be guessed or waited for.
        with socket.create_server(("127.0.0.1", 0)) as listener, self._log.open("wb") as log:
            self.port: int = listener.getsockname()[1]
            server = (runtime / "server", str(listener.fileno()), self.folder)
            self.process = subprocess.Popen(
                emulate(*server, cpu=cpu, threads=threads),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                cwd=self.folder,
                start_new_session=True,
            )
        self.stop = weakref.finalize(self, _stop, self.process, self.folder, os.getpid())
        with self.guard("starting the emulated device", min(timeout, START_SECONDS)):
            assert self.process.stdin is not None
            self.process.stdin.write(f"{self.key}\n".encode())
            self.process.stdin.flush()
            self.session = self._connect()

    def _connect(self) -> Any:
        from tvm import rpc

        return rpc.connect("127.0.0.1", self.port, self.key)

    # Tensors and libraries go by file: through its socket TVM takes 0.2 s a MB here, by file about 3 ms.
    def send(self, array: NDArray[Any]) -> Any:
        import tvm

        native = np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
        native.reshape(-1).view(np.uint8).tofile(self.folder / "tensor")
        tensor = tvm.runtime.empty(native.shape, str(native.dtype), self.session.cpu(0))
        self.session.get_function("paring.read")(tensor, "tensor")
        return tensor

    def receive(self, tensor: Any) -> NDArray[Any]:
        self.session.get_function("paring.write")(tensor, "tensor")
        return np.fromfile(self.folder / "tensor", np.uint8).view(str(tensor.dtype)).reshape(tensor.shape)

    def _answers(self) -> bool:
        try:
            return self.session is not None and self.session.get_function("paring.read") is not None
        except Exception:
            return False

    def alive(self) -> bool:
        return self.stop.alive and self.process.poll() is None

    @contextlib.contextmanager
    def guard(self, what: str, seconds: float | None = None) -> Iterator[None]:
        """Run one exchange with the guest: alone, with a deadline kept on this side, and with a typed error."""
        seconds = self.timeout if seconds is None else seconds
        late = threading.Event()

        def expire() -> None:
            late.set()
            self.process.kill()

        with self.lock:
            if not self.alive():
                raise EmulatorError(f"{what} failed: {self._fate()}")
            timer = threading.Timer(seconds, expire)
            timer.daemon = True
            timer.start()
            try:
                yield
            except Exception as error:
                reason = f"it took longer than {seconds:g} s: allow more time" if late.is_set() else self._fate(error)
                raise EmulatorError(f"{what} failed: {reason}") from error
            except BaseException:
                # Interrupted halfway through a message, the two sides could no longer understand each other.
                self.process.kill()
                raise
            finally:
                timer.cancel()

    def _fate(self, error: Exception | None = None) -> str:
        if not self.stop.alive:
            return "the emulated device was closed: load the library again"
        if error is not None and self._answers():
            return f"the device answered: {error}"
        # When the guest dies the connection breaks first, its exit status follows.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        status = self.process.returncode
        if status is None:
            return f"the connection to the emulated device broke: load the library again ({error})"
        if status == -signal.SIGILL:
            return f"an instruction that the emulated CPU '{self.cpu}' does not have: compile for it, or choose another"
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        said = self._log.read_text(errors="replace").strip()[-2000:] if self._log.exists() else ""
        return f"the emulated process ended with {how}: load the library again. It said:\n{said}"


class EmulatedModule:
    """A library loaded on the emulated device. Calls from several threads take turns."""

    def __init__(self, guest: _Guest, path: Path) -> None:
        from tvm import relax

        self.path, self._guest = path, guest
        with guest.guard(f"loading {path} on the emulated device"):
            guest.loaded += 1
            name = f"{guest.loaded}.so"
            shutil.copyfile(path, guest.folder / name)
            self._machine = relax.VirtualMachine(guest.session.load_module(name), guest.session.cpu(0))
            (guest.folder / name).unlink()

    def run(self, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Call `main`. A tuple of outputs comes back as a list, nested ones flattened."""
        with self._guest.guard(f"running {self.path.name} on the emulated device"):
            self._machine.set_input("main", *[self._guest.send(np.asarray(x)) for x in inputs])
            self._machine.invoke_stateful("main")
            return [self._guest.receive(tensor) for tensor in _flatten(self._machine.get_outputs("main"))]


def _flatten(outputs: Any) -> list[Any]:
    if isinstance(outputs, (tuple, list)):
        return [leaf for output in outputs for leaf in _flatten(output)]
    return [outputs]


class Emulator:
    """An emulated ARM device, started when first needed, and again when needed after `close()` or a crash.

    `cpu` is one of `qemu-aarch64 -cpu help`: `max` has every extension qemu knows; an older one such as `cortex-a72`
    shows that code does not rely on extensions it was not compiled for. `timeout` bounds each single exchange.
    """

    def __init__(self, cpu: str = "max", threads: int = 2, timeout: float = 600.0) -> None:
        self.cpu, self.threads, self.timeout = cpu, threads, timeout
        self._guest: _Guest | None = None
        self._lock = threading.Lock()

    def _started(self) -> _Guest:
        with self._lock:
            if self._guest is None or not self._guest.alive():
                if self._guest is not None:
                    self._guest.stop()
                self._guest = _Guest(self.cpu, self.threads, self.timeout)
            return self._guest

    def session(self) -> Any:
        """The `tvm.rpc` session, which lives as long as this emulator. Calls made on it directly have no deadline."""
        return self._started().session

    def load(self, library: str | Path) -> EmulatedModule:
        """Load a Relax VM executable exported for aarch64-linux-gnu, whose entry is `main`."""
        path = Path(library)
        if not path.is_file():
            raise EmulatorError(f"no library at {path}: export one with export_library")
        return EmulatedModule(self._started(), path)

    def pid(self) -> int | None:
        """The emulated process, where one is running."""
        return self._guest.process.pid if self._guest is not None and self._guest.alive() else None

    def close(self) -> None:
        """End the device and all that was loaded on it. Safe to call twice."""
        with self._lock:
            if self._guest is not None:
                self._guest.stop()
                self._guest = None

    def __enter__(self) -> Emulator:
        self._started()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
