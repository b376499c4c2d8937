"""The emulated ARM device runs what was compiled for ARM, exactly, and leaves nothing behind however it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from paring.backends import emulator, emulator_build, wheels
from paring.backends.emulator import Emulator
from paring.backends.emulator_build import EmulatorError

LACKS = emulator_build.missing()
needs_device = pytest.mark.skipif(bool(LACKS), reason=f"the emulated ARM device lacks: {'; '.join(LACKS)}")

SHAPE = (5, 7)
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Cross-compile a Relax `main(x)` that returns what each of the given TE expressions makes of `x`."""
    import tvm
    from tvm import relax, te
    from tvm.support import cc

    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"})
    folder = tmp_path_factory.mktemp("arm")

    def library(name: str, *expressions: Callable[[Any], Any], dtype: str = "float32") -> Path:
        x = relax.Var("x", relax.TensorType(SHAPE, dtype))
        builder = relax.BlockBuilder()
        with builder.function("main", [x]):
            with builder.dataflow():
                outputs = []
                for number, expression in enumerate(expressions):
                    source = te.placeholder(SHAPE, dtype, name="source")
                    kernel = te.create_prim_func([source, expression(source)])
                    variable = builder.add_func(kernel.with_attr("global_symbol", f"kernel{number}"), f"kernel{number}")
                    call = relax.call_tir(variable, [x], out_ty=relax.TensorType(SHAPE, dtype))
                    outputs.append(builder.emit(call))
                result = builder.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            builder.emit_func_output(result)
        path = folder / f"{name}.so"
        cross = cc.cross_compiler("aarch64-linux-gnu-g++")
        tvm.compile(builder.finalize(), target=target).export_library(str(path), fcompile=cross)
        return path

    return library


@pytest.fixture(scope="module")
def device() -> Iterator[Emulator]:
    with Emulator(timeout=60.0) as emulated:
        yield emulated


def twice(x: Any) -> Any:
    from tvm import te

    return te.compute(SHAPE, lambda i, j: x[i, j] + x[i, j], name="twice")


def reverse(x: Any) -> Any:
    from tvm import te

    return te.compute(SHAPE, lambda i, j: x[SHAPE[0] - 1 - i, SHAPE[1] - 1 - j], name="reverse")


def libc(function: str, argument: int) -> Callable[[Any], Any]:
    from tvm import te, tirx

    def expression(x: Any) -> Any:
        call = tirx.call_pure_extern("int32", function, tirx.IntImm("int32", argument))
        return te.compute(SHAPE, lambda i, j: x[i, j] + call.astype("float32"), name=function)

    return expression


def sample(dtype: str = "float32") -> Any:
    return np.random.default_rng(0).integers(-8, 8, SHAPE).astype(dtype)


def running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


TWICE = (sample() + sample()).tobytes()


@needs_device
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int8", "uint8", "int32", "int64", "bfloat16"])
def test_a_kernel_gives_the_same_bits(device: Emulator, build: Build, dtype: str) -> None:
    x = sample(dtype)  # small integers: sums of two are exact in every type
    (output,) = device.load(build(f"twice-{dtype}", twice, dtype=dtype)).run([x])
    assert output.dtype == x.dtype
    assert output.tobytes() == (x + x).tobytes()


@needs_device
def test_a_tuple_comes_back_as_a_list(device: Emulator, build: Build) -> None:
    x = sample()
    net = device.load(build("tuple", twice, reverse, twice))
    for _ in range(3):
        outputs = net.run([x])
        assert [output.tobytes() for output in outputs] == [y.tobytes() for y in (x + x, x[::-1, ::-1], x + x)]


@needs_device
def test_any_memory_layout_is_taken(device: Emulator, build: Build) -> None:
    net = device.load(build("layouts", twice))
    x = sample()
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    frozen = x.copy()
    frozen.flags.writeable = False
    for same in (np.asfortranarray(x), wide, frozen, x.astype(">f4")):
        assert net.run([same])[0].tobytes() == (x + x).tobytes()


@needs_device
def test_wrong_inputs_are_refused_and_the_device_goes_on(device: Emulator, build: Build) -> None:
    net = device.load(build("strict", twice))
    x = sample()
    for wrong in ([x[:2]], [x.astype("int32")], [], [x, x]):
        with pytest.raises(EmulatorError, match=r"running strict\.so"):
            net.run(wrong)
    assert net.run([x])[0].tobytes() == (x + x).tobytes()


@needs_device
def test_the_documented_sequence(device: Emulator, build: Build) -> None:
    import tvm
    from tvm import relax

    x, session = sample(), device.session()
    session.upload(str(build("sequence", twice, reverse)), target="net.so")
    machine = relax.VirtualMachine(session.load_module("net.so"), session.cpu(0))
    machine.set_input("main", tvm.runtime.tensor(x, session.cpu(0)))
    machine.invoke_stateful("main")
    outputs = [output.numpy() for output in machine.get_outputs("main")]
    assert [output.tobytes() for output in outputs] == [(x + x).tobytes(), x[::-1, ::-1].tobytes()]


@needs_device
def test_ctrl_c_reaches_a_hanging_kernel(build: Build) -> None:
    program = """
import sys, numpy as np
from paring.backends.emulator import Emulator
device = Emulator()
net = device.load(sys.argv[1])
print(device.pid(), flush=True)
net.run([np.zeros((5, 7), "float32")])
"""
    path = build("interrupted", libc("sleep", 1000))
    with subprocess.Popen([sys.executable, "-c", program, path], stdout=-1, stderr=-1, text=True) as host:
        assert host.stdout is not None
        guest = int(host.stdout.readline())
        time.sleep(0.5)
        host.send_signal(signal.SIGINT)
        try:
            _, said = host.communicate(timeout=5.0)
        finally:
            host.kill()
    assert "KeyboardInterrupt" in said
    assert not running(guest)


@needs_device
@pytest.mark.parametrize(("number", "reason"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGILL, "'max' does not have")])
def test_a_crash_is_an_error_and_the_next_load_works(build: Build, number: int, reason: str) -> None:
    with Emulator(timeout=60.0) as device:
        net = device.load(build("crash", libc("raise", number)))
        with pytest.raises(EmulatorError, match=reason):
            net.run([sample()])
        with pytest.raises(EmulatorError, match=reason):
            net.run([sample()])
        assert device.load(build("after", twice)).run([sample()])[0].tobytes() == TWICE


@needs_device
def test_a_hang_ends_at_the_deadline(build: Build) -> None:
    with Emulator(timeout=3.0) as device:
        net = device.load(build("hang", libc("sleep", 1000)))
        start = time.monotonic()
        with pytest.raises(EmulatorError, match="longer than 3 s"):
            net.run([sample()])
        assert time.monotonic() - start < 5.0


@needs_device
def test_not_a_library(device: Emulator, tmp_path: Path) -> None:
    with pytest.raises(EmulatorError, match="no library at"):
        device.load(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("not a library")
    with pytest.raises(EmulatorError, match=r"loading .*text\.so"):
        device.load(tmp_path / "text.so")


@needs_device
def test_only_the_key_opens_the_device_and_only_once_and_only_from_here() -> None:
    from tvm import rpc

    class Probed(emulator._Guest):
        def _connect(self) -> Any:
            bound = [c.laddr.ip for c in psutil.Process(self.process.pid).net_connections() if c.status == "LISTEN"]
            assert bound == ["127.0.0.1"]
            with socket.create_connection(("127.0.0.1", self.port)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(Exception, match="cannot find server that matches key"):
                rpc.connect("127.0.0.1", self.port, "guess")
            return super()._connect()

    guest = Probed("max", 1, 30.0)
    try:
        assert guest.session.cpu(0).exist
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", guest.port))
    finally:
        guest.stop()


@needs_device
def test_close_leaves_no_process(build: Build) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    device = Emulator()
    assert device.pid() is None
    net = device.load(build("close", twice))
    pid = device.pid()
    assert pid is not None
    device.close()
    device.close()
    assert not psutil.pid_exists(pid)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    with pytest.raises(EmulatorError, match="was closed"):
        net.run([sample()])
    assert device.load(build("again", twice)).run([sample()])[0].tobytes() == TWICE
    device.close()


@needs_device
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "sys.exit(0)", "os._exit(1)", "raise ValueError"])
def test_the_device_ends_with_its_host(end: str) -> None:
    program = f"""
import os, sys
from paring.backends.emulator import Emulator
device = Emulator()
device.session()
print(device.pid(), flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    pid = int(done.stdout)
    limit = time.monotonic() + 5.0
    while running(pid):
        assert time.monotonic() < limit, "the guest outlived its host"
        time.sleep(0.02)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if sys.platform == "linux":
        assert emulator_build.missing() == [
            "qemu-aarch64 (Debian: qemu-user)",
            "aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)",
        ]
    with pytest.raises(EmulatorError, match="Debian: qemu-user"):
        emulator_build.prepare()


def test_wheels_of_another_content_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    index, folder = tmp_path / "index", tmp_path / "wheels"
    index.mkdir()
    folder.mkdir()
    for requirement in wheels.HASHES:
        name = requirement.replace("-", "_").replace("==", "-")
        with zipfile.ZipFile(index / f"{name}-py3-none-manylinux_2_28_aarch64.whl", "w") as archive:
            archive.writestr("tvm/lib/libtvm_runtime.so", "harm")
    for option, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(index)), ("CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(f"PIP_{option}", value)
    monkeypatch.setattr(emulator_build, "_requirements", lambda: list(wheels.HASHES))
    with pytest.raises(EmulatorError, match="DO NOT MATCH THE HASHES"):
        emulator_build._download(folder)
    assert not list(folder.glob("*.whl"))


def test_wheels_of_unknown_versions_are_not_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emulator_build, "_requirements", lambda: ["apache-tvm==0.27.99"])
    with pytest.raises(EmulatorError, match=r"no hash of a wheel of apache-tvm==0\.27\.99 is known: install apache-tvm=="):
        emulator_build._download(tmp_path)


def test_hashes_are_known_for_the_versions_that_are_installed() -> None:
    assert set(emulator_build._requirements()) <= set(wheels.HASHES)
