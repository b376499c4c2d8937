"""An ARM device without an ARM: TVM's RPC server in an aarch64 process under qemu's user-mode emulation.

    with Emulator() as device:
        net = device.load("net.so")          # a Relax VM executable built for aarch64-linux-gnu
        outputs = net.run([x])               # numpy in, numpy out

Its results are those of the hardware; its times mean nothing.

The guest needs no Python. It is a small C++ program (`SERVER` below), compiled here with the cross compiler that
links ARM kernels anyway, on three libraries out of TVM's own aarch64 wheels: `libtvm_ffi`, `libtvm_runtime` and
`libtvm_runtime_extra`. libc and libstdc++ are the cross compiler's. That is 7 MB, with no foreign packages and no root.

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

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import platformdirs
from numpy.typing import NDArray

from paring.backends import wheels
from paring.ir.errors import TargetError

QEMU = "qemu-aarch64"
COMPILER = "aarch64-linux-gnu-g++"
TOOLS = {QEMU: "qemu-user", COMPILER: "g++-aarch64-linux-gnu"}
LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so")
LOCK_SECONDS = 900.0
START_SECONDS = 60.0

# One process serves one session, so that a kernel which crashes, hangs or leaks takes nothing else with it.
# The key is the only password TVM's RPC has. It comes by standard input, because arguments can be read by every user;
# the end of standard input means that the host has gone, even if it was killed, and ends the guest.
SERVER = r"""
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

namespace ffi = tvm::ffi;
constexpr int32_t kMagic = 0xFF271;  // kRPCMagic of TVM, whose handshake this is

bool Handshake(int fd, const std::string& key) {
  int32_t head[2] = {};
  if (recv(fd, head, 8, MSG_WAITALL) != 8 || head[0] != kMagic || head[1] < 0 || head[1] > 4096) return false;
  std::string theirs(head[1], '\0');
  if (recv(fd, &theirs[0], head[1], MSG_WAITALL) != head[1]) return false;
  bool same = theirs == "client:" + key;
  const int32_t accepted[] = {kMagic, 0}, refused[] = {kMagic + 2};  // 0: the length of our own name
  send(fd, same ? accepted : refused, same ? 8 : 4, MSG_NOSIGNAL);
  return same;
}

[[noreturn]] void End(const std::string& folder) {
  static std::mutex first;
  first.lock();
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  _exit(0);
}

char* Bytes(DLTensor* t) {
  if (!ffi::IsContiguous(*t)) throw std::runtime_error("not a contiguous tensor");
  return static_cast<char*>(t->data) + t->byte_offset;
}

int main(int argc, char** argv) try {
  ffi::Function loop = ffi::Function::GetGlobalRequired("rpc.ServerLoop");
  ffi::Function::GetGlobalRequired("ffi.Module.load_from_file.relax.VMExecutable");
  if (argc == 2 && argv[1] == std::string("--check")) return 0;
  int listener = std::atoi(argv[1]);
  std::string folder = argv[2], key;
  std::getline(std::cin, key);
  std::thread([folder] {
    for (char c; read(0, &c, 1) > 0;) continue;
    End(folder);
  }).detach();
  auto path = [folder](std::string name) { return folder + "/" + name; };
  auto load = [path](std::string name) { return ffi::Module::LoadFromFile(path(name)); };
  auto read = [path](DLTensor* t, std::string name) {
    std::ifstream file(path(name), std::ios::binary);
    if (!file.read(Bytes(t), ffi::GetDataSize(*t))) throw std::runtime_error("cannot read a tensor");
  };
  auto write = [path](DLTensor* t, std::string name) {
    std::ofstream file(path(name), std::ios::binary);
    if (!file.write(Bytes(t), ffi::GetDataSize(*t)).flush()) throw std::runtime_error("cannot write a tensor");
  };
  ffi::Function::SetGlobal("tvm.rpc.server.workpath", ffi::Function::FromTyped(path), true);
  ffi::Function::SetGlobal("tvm.rpc.server.load_module", ffi::Function::FromTyped(load), true);
  ffi::Function::SetGlobal("paring.read", ffi::Function::FromTyped(read), true);
  ffi::Function::SetGlobal("paring.write", ffi::Function::FromTyped(write), true);
  for (;;) {
    int client = accept(listener, nullptr, nullptr);
    if (client < 0) return 3;
    timeval patience{5, 0}, forever{0, 0};
    setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (Handshake(client, key)) {
      setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
      close(listener);
      loop(client);
      End(folder);
    }
    close(client);
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
"""


class EmulatorError(TargetError):
    """The emulated device cannot be had, or what ran on it failed: says what, why and what to do."""


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        package = TOOLS[name]
        raise EmulatorError(f"no {name} on this host, which the emulated device needs: install it (Debian: {package})")
    return path


def _run(command: Sequence[str | Path], what: str, remedy: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise EmulatorError(f"{what} failed (exit status {done.returncode}): {remedy}. It said:\n{said}")
    return done.stdout.strip()


def _sysroot() -> Path:
    """The folder above the lib/ that holds the cross compiler's loader, libc and libstdc++, as qemu's -L wants it."""
    loader = Path(_run([_tool(COMPILER), "-print-file-name=ld-linux-aarch64.so.1"], COMPILER, "reinstall it"))
    if not loader.is_absolute():
        raise EmulatorError(f"{COMPILER} has no C library for ARM: install one (Debian: libc6-dev-arm64-cross)")
    return loader.resolve().parent.parent


def _emulate(*command: str | Path, cpu: str = "max", threads: int = 1) -> list[str]:
    # What the host preloads is not for the guest, whose libraries are found without help.
    environment = ["-U", "LD_PRELOAD", "-U", "LD_LIBRARY_PATH", "-E", f"TVM_NUM_THREADS={threads}"]
    return [_tool(QEMU), "-cpu", cpu, "-L", str(_sysroot()), *environment, *map(str, command)]


def _requirements() -> list[str]:
    return [f"{name}=={importlib.metadata.version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]


def _runtime() -> Path:
    """Where the prepared runtime is, or will be: named by all that went into it."""
    version = _run([_tool(COMPILER), "-dumpversion"], COMPILER, "reinstall it")
    parts = "\n".join([*_requirements(), f"gcc=={version}", SERVER])
    digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("paring", appauthor=False)) / f"arm-{digest}"


def missing() -> list[str]:
    """What this host lacks to emulate an ARM device, each with what to install or run. Nothing is downloaded."""
    if sys.platform != "linux":
        return ["Linux (qemu emulates single programs there only)"]
    lacks = [f"{name} (Debian: {package})" for name, package in TOOLS.items() if shutil.which(name) is None]
    if not lacks and not _runtime().is_dir():
        lacks.append("the ARM runtime (run: python -m paring.backends.emulator --prepare)")
    return lacks


def _download(folder: Path) -> list[Path]:
    """Fetch TVM's aarch64 wheels of the versions installed here, from wherever pip is set up to fetch; by their hashes."""
    unknown = [requirement for requirement in _requirements() if requirement not in wheels.HASHES]
    if unknown:
        known = " and ".join(wheels.HASHES)
        raise EmulatorError(f"no hash of a wheel of {unknown[0]} is known: install {known}, or add it to {wheels.__name__}")
    listed = folder / "requirements.txt"
    listed.write_text("\n".join(map(wheels.pinned, _requirements())) + "\n")
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(40, 16, -1)]
    python = f"--python-version={sys.version_info.major}.{sys.version_info.minor}"
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp", python, f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, *platforms, "--require-hashes", "-r", listed]
    remedy = "see that pip is installed and reaches a package index that has these very files"
    _run(command, "downloading TVM's aarch64 wheels", remedy)
    return sorted(folder.glob("*.whl"))


def _compile(folder: Path) -> None:
    source = folder / "server.cc"
    source.write_text(SERVER)
    libraries = [f"-l{name.removeprefix('lib').removesuffix('.so')}" for name in LIBRARIES]
    # --no-as-needed: nothing in the server refers to libtvm_runtime_extra, which registers the RPC loop and the VM.
    link = [f"-L{folder}", "-Wl,--no-as-needed", *libraries, "-lpthread", "-Wl,-rpath,$ORIGIN"]
    server = folder / "server"
    command = [_tool(COMPILER), "-std=c++17", "-O1", f"-I{folder}/include", str(source), "-o", str(server), *link]
    _run(command, "compiling the ARM server", f"see that {COMPILER} works")
    _run(_emulate(server, "--check"), "starting the ARM server", f"a newer {QEMU} or {COMPILER} may be needed")
    source.unlink()
    shutil.rmtree(folder / "include")


def prepare(progress: Callable[[str], None] = lambda message: None) -> Path:
    """Make sure that the ARM runtime is in the user's cache folder, and return where. Quick if it is there already."""
    _tool(QEMU)
    final = _runtime()
    if final.is_dir():
        return final
    try:
        # For this user alone: what lies in it gets executed.
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        final.parent.chmod(0o700)
        with filelock.FileLock(final.with_suffix(".lock"), timeout=LOCK_SECONDS):
            if not final.is_dir():
                _build(final, progress)
    except filelock.Timeout as error:
        raise EmulatorError(f"another process has been preparing {final} for {LOCK_SECONDS:.0f} s: end it") from error
    except OSError as error:
        raise EmulatorError(f"cannot write the ARM runtime {final}: {error}") from error
    return final


def _build(final: Path, progress: Callable[[str], None]) -> None:
    prefix = f".{final.name}-"
    # Under the lock of this runtime, unfinished folders of the same name can only be left from a killed process.
    for stale in final.parent.glob(f"{prefix}*"):
        shutil.rmtree(stale, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=final.parent))
    try:
        (building / "wheels").mkdir()
        (building / "runtime").mkdir()
        progress(f"downloading {' and '.join(_requirements())} for aarch64 (about 95 MB)")
        for wheel in _download(building / "wheels"):
            progress(f"unpacking {wheel.name}")
            wheels.unpack(wheel, building / "runtime", LIBRARIES)
        progress("compiling the server")
        _compile(building / "runtime")
        (building / "runtime").rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)


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
                _emulate(*server, cpu=cpu, threads=threads),
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Says what the emulated ARM device lacks on this host.")
    parser.add_argument("--prepare", action="store_true", help="download and build the ARM runtime in the user's cache")
    options = parser.parse_args()
    try:
        if options.prepare:
            prepare(lambda message: print(message, file=sys.stderr, flush=True))
    except EmulatorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lacks = [f"missing: {lack}" for lack in missing()]
    print("\n".join(lacks) or f"the emulated ARM device is ready: {_runtime()}")
    return 1 if lacks else 0


if __name__ == "__main__":
    sys.exit(main())
