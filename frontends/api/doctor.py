"""What a machine needs for Paring: one table of checks, each with what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

DEADLINE_S = 180.0
MESSAGE_LINES = 20


@dataclass(frozen=True)
class Finding:
    """What one check saw, and what to do if that is not good."""

    ok: bool
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Check:
    """`required`: without it a model cannot be compiled and run on this machine."""

    name: str
    function: Callable[[], Finding]
    required: bool


def examine() -> Iterator[tuple[Check, Finding]]:
    """Run all checks side by side; each comes when it is done."""
    with ThreadPoolExecutor() as pool:
        pending = {pool.submit(_safely, check.function): check for check in CHECKS}
        for future in as_completed(pending):
            yield pending[future], future.result()


def _safely(function: Callable[[], Finding]) -> Finding:
    try:
        return function()
    except Exception as error:
        return Finding(False, f"the check itself failed: {type(error).__name__}: {error}", "report this")


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Finding(sys.version_info >= (3, 10), found, "install Python 3.10 or later")


def _pinned(package: str) -> Callable[[], Finding]:
    """A check that a package is there in the version that Paring is built for."""

    def check() -> Finding:
        wanted = next((r for r in _requirements() if _name(r) == package), package)
        hint = f"pip install '{wanted}'"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return Finding(False, "not installed", hint)
        _, pin, exact = wanted.partition("==")
        fits = not pin or f"{version.partition('+')[0]}.".startswith(exact.removesuffix("*").rstrip(".") + ".")
        return Finding(fits, version if fits else f"{version}, but Paring wants {wanted}", hint)

    return check


def _requirements() -> list[str]:
    try:
        return [r.partition(";")[0].strip() for r in importlib.metadata.requires("paring") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def _name(requirement: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]


# With apache-tvm-ffi 0.1.15, which pip picks by itself, both calls kill the process.
_TVM_WORKS = """
import tvm
from tvm import te
x = te.placeholder((4,), "float32", "x")
function = te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1, "y")])
tvm.ir.load_json(tvm.ir.save_json(tvm.IRModule({"main": function})))
"""

_PARING_WORKS = """
import numpy, paring
from paring.ir import Graph, Input, Node
from paring.ir.ops.unary import Relu
x = Node(Input("x", "float32", (3, 5)))
array = numpy.arange(-7, 8, dtype="float32").reshape(3, 5)
net = paring.compile(Graph((x,), (Node(Relu(), (x,)),)), target="native")
numpy.testing.assert_array_equal(net(array), numpy.maximum(array, 0))
print(net.target.name)
"""


def _script(code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, so that a crash is a finding."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def _how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    """The message of the exception that ended it, without the traceback; of anything else what it said last."""
    if done.returncode < 0:
        return f"crashed with signal {-done.returncode}"
    _, raised, said = done.stderr.rstrip().rpartition("Traceback (most recent call last):\n")
    lines = said.splitlines()
    if raised:
        message = list(dropwhile(lambda line: line.startswith(" "), lines))
        return "\n".join(message[:MESSAGE_LINES]).removeprefix("paring.ir.errors.")
    return "\n".join(lines[-MESSAGE_LINES:]) or f"exit status {done.returncode}"


def _tvm_works() -> Finding:
    wanted = next((r for r in _requirements() if _name(r) == "apache-tvm-ffi"), "apache-tvm-ffi")
    try:
        version = importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return Finding(False, "not installed", f"pip install '{wanted}'")
    done = _script(_TVM_WORKS)
    hint = f"pip install '{wanted}'; versions 0.1.15 and later crash with this TVM"
    return Finding(done.returncode == 0, version if not done.returncode else f"{version}: TVM {_how_it_ended(done)}", hint)


def _compiles() -> Finding:
    done = _script(_PARING_WORKS)
    if done.returncode:
        return Finding(False, _how_it_ended(done), "see the other checks first; if they are all right, report this")
    return Finding(True, f"a small network was compiled for {done.stdout.strip()}, ran, and was right")


def _compiler() -> Finding:
    names = ("c++", "g++", "clang++")
    path = next(filter(None, map(shutil.which, names)), None)
    hint = "install a C++ compiler (Debian: apt install g++; Fedora: dnf install gcc-c++)"
    if path is None:
        return Finding(False, f"none of {', '.join(names)} is there to link code", hint)
    with tempfile.TemporaryDirectory(prefix="paring-doctor-") as folder:
        source = Path(folder) / "f.cc"
        source.write_text('extern "C" int f() { return 1; }\n')
        command = [path, "-shared", "-fPIC", str(source), "-o", f"{folder}/f.so"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return Finding(done.returncode == 0, path if not done.returncode else f"{path}: {_how_it_ended(done)}", hint)


def _targets() -> Finding:
    """Which targets run here; the required part is that one of the machine's own does."""
    from paring.backends import targets

    runs, needs = [], []
    for target in targets.TARGETS.values():
        lacks = targets.missing_flags(target)
        if not lacks:
            runs.append(target.name)
        elif target.arch == targets.host_arch():
            needs.append(f"{target.name} needs the CPU flags {', '.join(lacks)}")
        else:
            needs.append(f"{target.name} is another machine's: build here, run on a device")
    native = [name for name in runs if name != targets.REFERENCE.name]
    found = "; ".join([f"run here: {', '.join(runs)}", *needs])
    return Finding(bool(native), found, "this CPU has no target: an x86-64 with AVX2 and FMA, or a 64-bit ARM, is needed")


def _machine() -> Finding:
    import psutil

    cores, threads = psutil.cpu_count(logical=False) or 0, psutil.cpu_count() or 0
    memory = psutil.virtual_memory()
    found = f"{cores} cores, {threads} threads, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB memory free"
    return Finding(memory.available > 2**30, found, "compiling large networks takes up to three times their weights")


def _cache() -> Finding:
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("paring", appauthor=False))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(False, f"{folder}: {error}", "make it writable, or set XDG_CACHE_HOME to a folder that is")
    return Finding(True, str(folder))


def _emulator() -> Finding:
    from paring.backends import emulator_build

    lacks = emulator_build.missing()
    return Finding(
        not lacks, "qemu and the cross compiler are there" if not lacks else f"no {'; no '.join(lacks)}", "install what is named"
    )


def _extra(package: str, use: str) -> Callable[[], Finding]:
    """A check for a package that only some commands use."""

    def check() -> Finding:
        try:
            return Finding(True, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            return Finding(importlib.util.find_spec(package) is not None, f"not installed: {use}", "pip install 'paring[bench]'")

    return check


CHECKS: tuple[Check, ...] = (
    Check("python", _python, True),
    Check("torch", _pinned("torch"), True),
    Check("tvm", _pinned("apache-tvm"), True),
    Check("tvm-ffi", _tvm_works, True),
    Check("compiler", _compiler, True),
    Check("targets", _targets, True),
    Check("compile and run", _compiles, True),
    Check("machine", _machine, False),
    Check("cache folder", _cache, False),
    Check("ARM emulation", _emulator, False),
    Check("onnxruntime", _extra("onnxruntime", "a peer of `paring bench`"), False),
    Check("openvino", _extra("openvino", "a peer of `paring bench`"), False),
    Check("torchvision", _extra("torchvision", "the models of the suite cnn"), False),
    Check("transformers", _extra("transformers", "the models of the suite transformer"), False),
)
