"""The runtime of the emulated ARM device: what it is made of, whether this host has it, and how it is made.

The guest needs no Python. It is a small C++ program (`emulator_server.cc`), compiled here with the cross compiler that
links ARM kernels anyway, on three libraries out of TVM's own aarch64 wheels: `libtvm_ffi`, `libtvm_runtime` and
`libtvm_runtime_extra`. libc and libstdc++ are the cross compiler's. That is 7 MB, with no foreign packages and no root.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
import platformdirs

from paring.backends import wheels
from paring.ir.errors import TargetError

QEMU = "qemu-aarch64"
COMPILER = "aarch64-linux-gnu-g++"
TOOLS = {QEMU: "qemu-user", COMPILER: "g++-aarch64-linux-gnu"}
LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so")
SERVER = Path(__file__).with_name("emulator_server.cc")
LOCK_SECONDS = 900.0


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


def emulate(*command: str | Path, cpu: str = "max", threads: int = 1) -> list[str]:
    # What the host preloads is not for the guest, whose libraries are found without help.
    environment = ["-U", "LD_PRELOAD", "-U", "LD_LIBRARY_PATH", "-E", f"TVM_NUM_THREADS={threads}"]
    return [_tool(QEMU), "-cpu", cpu, "-L", str(_sysroot()), *environment, *map(str, command)]


def _requirements() -> list[str]:
    return [f"{name}=={importlib.metadata.version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]


def runtime_folder() -> Path:
    """Where the prepared runtime is, or will be: named by all that went into it."""
    version = _run([_tool(COMPILER), "-dumpversion"], COMPILER, "reinstall it")
    parts = "\n".join([*_requirements(), f"gcc=={version}", SERVER.read_text()])
    digest = hashlib.sha256(parts.encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("paring", appauthor=False)) / f"arm-{digest}"


def missing() -> list[str]:
    """What this host lacks to emulate an ARM device, each with what to install or run. Nothing is downloaded."""
    if sys.platform != "linux":
        return ["Linux (qemu emulates single programs there only)"]
    lacks = [f"{name} (Debian: {package})" for name, package in TOOLS.items() if shutil.which(name) is None]
    if not lacks and not runtime_folder().is_dir():
        lacks.append("the ARM runtime (run: python -m paring.backends.emulator_build --prepare)")
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
    libraries = [f"-l{name.removeprefix('lib').removesuffix('.so')}" for name in LIBRARIES]
    # --no-as-needed: nothing in the server refers to libtvm_runtime_extra, which registers the RPC loop and the VM.
    link = [f"-L{folder}", "-Wl,--no-as-needed", *libraries, "-lpthread", "-Wl,-rpath,$ORIGIN"]
    server = folder / "server"
    command = [_tool(COMPILER), "-std=c++17", "-O1", f"-I{folder}/include", str(SERVER), "-o", str(server), *link]
    _run(command, "compiling the ARM server", f"see that {COMPILER} works")
    _run(emulate(server, "--check"), "starting the ARM server", f"a newer {QEMU} or {COMPILER} may be needed")
    shutil.rmtree(folder / "include")


def prepare(progress: Callable[[str], None] = lambda message: None) -> Path:
    """Make sure that the ARM runtime is in the user's cache folder, and return where. Quick if it is there already."""
    _tool(QEMU)
    final = runtime_folder()
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
    print("\n".join(lacks) or f"the emulated ARM device is ready: {runtime_folder()}")
    return 1 if lacks else 0


if __name__ == "__main__":
    sys.exit(main())
