"""Saved networks: what is read back is what was saved, and whatever is not is refused with a typed error."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paring.ir.errors import ArtifactError, TargetError
from paring.ir.graph import Graph, Node
from paring.ir.interpreter import interpret
from paring.ir.ops.binary import Add
from paring.ir.ops.core import Const, Input
from paring.ir.ops.shape import Broadcast
from paring.ir.ops.unary import Relu
from paring.ir.text import same

pytest.importorskip("tvm")

from paring.backends import artifact
from paring.backends.artifact import FILES, FORMAT, GRAPH, LIBRARY, MANIFEST, REPORT, WEIGHTS, inspect, load, save
from paring.backends.build import Built, build
from paring.backends.devices import open_executable
from paring.backends.targets import TARGETS, Target, resolve

STRUCTURE = {"inputs": ["x"], "outputs": {"logits": 0}}
SPECIAL = np.array([1, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 0.1, 7, 8], "float32")


def network() -> Graph:
    x = Node(Input('x "quoted"/../x', "float32", (3, 10)))
    row = Node(Broadcast((3, 10)), (Node(Const(SPECIAL)),))
    return Graph((x,), (Node(Relu(), (Node(Add(), (x, row)),)),))


@pytest.fixture(scope="module")
def built() -> Built:
    return build(network(), resolve("native"))


@pytest.fixture(scope="module")
def foreign() -> Built:
    return build(network(), TARGETS["arm"])


@pytest.fixture
def saved(built: Built, tmp_path: Path) -> Path:
    path = tmp_path / "net.paring"
    save(path, built, structure=STRUCTURE, report={"passes": ["fuse"]})
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and write it back."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def reseal(path: Path, name: str, content: bytes) -> None:
    """Put other content into a file, with a manifest that vouches for it: an author who means harm."""
    (path / name).write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(path, lambda manifest: manifest["files"].update({name: entry}))


def refused(path: Path, says: str = "", **options: Any) -> None:
    with pytest.raises(ArtifactError) as error:
        load(path, **options)
    assert says in str(error.value), error.value


def test_round_trip(built: Built, saved: Path) -> None:
    found = load(saved)
    assert same(found.built.graph, built.graph)
    assert found.built.library == built.library
    assert found.built.target == built.target
    assert found.manifest.structure == STRUCTURE
    assert found.report == {"passes": ["fuse"]}
    array = np.random.default_rng(0).standard_normal((3, 10)).astype("float32")
    with open_executable(saved) as net, open_executable(built) as original:
        (got,), (wanted,) = net.run([array]), original.run([array])
        assert got.tobytes() == wanted.tobytes()
        np.testing.assert_array_equal(got, interpret(built.graph, [array])[0])
        assert [t.name for t in net.profile([array], 1)] == [t.name for t in original.profile([array], 1)]  # type: ignore[attr-defined]


def test_the_same_network_gives_the_same_bytes(built: Built, saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.paring"
    save(again, build(network(), built.target), structure=dict(reversed(STRUCTURE.items())), report={"passes": ["fuse"]})
    assert contents(saved) == contents(again)


def test_another_process_gives_the_same_library(tmp_path: Path, saved: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from paring.backends.artifact import load;"
        "Path(sys.argv[2]).write_bytes(load(sys.argv[1], rebuild=True).built.library)"
    )
    out = tmp_path / "lib.so"
    subprocess.run([sys.executable, "-c", script, str(saved), str(out)], check=True, cwd=tmp_path, timeout=120)
    assert out.read_bytes() == (saved / LIBRARY).read_bytes()


def test_inspection_executes_nothing(saved: Path) -> None:
    script = (
        "import sys, os, ctypes, subprocess; from paring.backends.artifact import inspect;"
        "before = open('/proc/self/maps').read().count('lib.so');"
        "sys.addaudithook(lambda event, a: event in ('ctypes.dlopen', 'subprocess.Popen', 'os.system') and os._exit(9));"
        "found = inspect(sys.argv[1]);"
        "assert open('/proc/self/maps').read().count('lib.so') == before;"
        "assert found.report == {'passes': ['fuse']} and 'relu' in found.graph and found.manifest.inputs[0].shape == (3, 10)"
    )
    subprocess.run([sys.executable, "-c", script, str(saved)], check=True, timeout=120)


def test_inspection_works_for_machines_that_are_not_here(foreign: Built, tmp_path: Path) -> None:
    save(tmp_path / "arm.paring", foreign, structure={}, report={})
    assert inspect(tmp_path / "arm.paring").manifest.target.arch == "aarch64"
    assert load(tmp_path / "arm.paring").built.target.name == "arm"
    with pytest.raises(TargetError, match="device"):
        open_executable(tmp_path / "arm.paring")


def test_every_flipped_byte_is_found(saved: Path) -> None:
    """A sample of every file; each byte of the manifest that is not plain layout counts."""
    rng = np.random.default_rng(0)
    loaded = load(saved).manifest
    for name in FILES:
        content = (saved / name).read_bytes()
        for position in {0, len(content) - 1, *rng.integers(0, len(content), 40).tolist()}:
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            (saved / name).write_bytes(damaged)
            refused(saved, "sha256")
            with pytest.raises(ArtifactError):
                inspect(saved)
        (saved / name).write_bytes(content)
    text = (saved / MANIFEST).read_bytes()
    for position in rng.integers(0, len(text), 200).tolist():
        damaged = bytearray(text)
        damaged[position] ^= 1 << int(rng.integers(8))
        (saved / MANIFEST).write_bytes(damaged)
        try:
            found = load(saved).manifest
        except ArtifactError:
            continue
        # What still loads says the same of the network; notes such as versions and structure are the author's to write.
        assert (found.files, found.inputs, found.outputs, found.target) == (
            loaded.files,
            loaded.inputs,
            loaded.outputs,
            loaded.target,
        )


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_truncated_lengthened_and_missing_files(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for part in (b"", content[:1], content[: len(content) // 2], content[:-2], content + b"x"):
        (saved / name).write_bytes(part)
        refused(saved)
    (saved / name).unlink()
    refused(saved)


@pytest.mark.parametrize("kind", ["link", "directory", "pipe", "socket", "link out"])
@pytest.mark.parametrize("name", [MANIFEST, LIBRARY])
def test_what_is_not_a_plain_file(saved: Path, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (saved / name).read_bytes()
    (saved / name).unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        (saved / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "link out":
        (saved / name).symlink_to("/etc/passwd")
    elif kind == "directory":
        (saved / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(saved / name)
    else:
        monkeypatch.chdir(saved)
        socket.socket(socket.AF_UNIX).bind(name)
    refused(saved)


def test_paths_that_hold_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", "file", "empty", "nul\0byte", "x" * 5000):
        refused(tmp_path / path)
        with pytest.raises(ArtifactError):
            inspect(tmp_path / path)


def test_extra_files(saved: Path) -> None:
    (saved / "extra").write_text("x")
    refused(saved, "extra")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "lib.so/../../x", "", ".", "lib.so\0", "GRAPH.IR"])
def test_names_that_lead_elsewhere(saved: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"].pop(LIBRARY)

    edit(saved, change)
    refused(saved, "files")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"format": 1}',
        b'{"format": NaN}',
        b'{"format": "1"}',
        b'{"format": true}',
        b'{"format": 0}',
        b'{"format": 1e999}',
        b"\xff\xfe{}",
        b"\0" * 100,
        b"[" * 100_000,
        b'{"format": 1, "structure": ' + b'{"a":' * 50_000,
        b"{" + b'"a": 1,' * 50_000,
    ],
)
def test_manifests_that_are_none(saved: Path, text: bytes) -> None:
    (saved / MANIFEST).write_bytes(text)
    refused(saved)
    with pytest.raises(ArtifactError):
        inspect(saved)


@pytest.mark.parametrize(
    ("key", "value"),
    [("size", -1), ("size", float("nan")), ("size", 1e3), ("size", 2**63), ("size", "1"), ("sha256", "0" * 63), ("sha256", None)],
)
def test_impossible_entries(saved: Path, key: str, value: object) -> None:
    edit(saved, lambda manifest: manifest["files"][GRAPH].update({key: value}))
    refused(saved, "manifest")


@pytest.mark.parametrize("shape", [[-1, 10], [float("nan")], [2**60], [3.5], "3", None, [10, 3]])
def test_impossible_shapes(saved: Path, shape: object) -> None:
    edit(saved, lambda manifest: manifest["inputs"][0].update(shape=shape))
    refused(saved)


def test_huge_files_are_not_read(saved: Path) -> None:
    for name, size in ((MANIFEST, 1 << 30), (WEIGHTS, 1 << 40)):
        content = (saved / name).read_bytes()
        os.truncate(saved / name, size)
        if name != MANIFEST:
            edit(saved, lambda manifest: manifest["files"][WEIGHTS].update(size=1 << 40))
        refused(saved, "at most")
        (saved / name).write_bytes(content)


def test_later_versions(saved: Path) -> None:
    edit(saved, lambda manifest: manifest.update(format=FORMAT + 1, something="new"))
    refused(saved, "newer Paring")


def test_other_versions_of_tvm_can_be_rebuilt(saved: Path, built: Built) -> None:
    edit(saved, lambda manifest: manifest["versions"].update({"apache-tvm": "0.99.0"}))
    refused(saved, "rebuild=True")
    assert load(saved, rebuild=True).built.library == built.library


def test_rebuilding_does_not_read_the_library(saved: Path, built: Built) -> None:
    (saved / LIBRARY).write_bytes(b"not code")
    assert load(saved, rebuild=True).built.library == built.library


def test_libraries_of_another_machine(saved: Path, foreign: Built) -> None:
    reseal(saved, LIBRARY, foreign.library)
    refused(saved, "not code for")
    reseal(saved, LIBRARY, b"#!/bin/sh\n")
    refused(saved, "not code for")


def test_a_target_of_a_new_architecture_needs_no_more_than_its_entry(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.paring"
    riscv = replace(TARGETS["arm"], name="riscv", arch="riscv64", elf_machine=243, linker="", linker_package="")
    monkeypatch.setitem(artifact.TARGETS, riscv.name, riscv)
    save(path, replace(built, target=riscv), structure={}, report={})
    refused(path, "not code for riscv64")
    head = built.library[:18] + riscv.elf_machine.to_bytes(2, "little") + built.library[20:]
    reseal(path, LIBRARY, head)
    assert load(path).built.target.name == "riscv"


def test_features_that_this_host_lacks(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.paring"
    later: Target = replace(built.target, needs=("avx2048",), device="")
    monkeypatch.setitem(artifact.TARGETS, later.name, later)
    save(path, replace(built, target=later), structure={}, report={})
    refused(path, "avx2048")
    assert load(path, device="rpc://127.0.0.1:9090").built.target.needs == ("avx2048",)


def test_unknown_and_changed_targets(saved: Path) -> None:
    edit(saved, lambda manifest: manifest["target"].update(lanes=4))
    refused(saved, "has changed")
    edit(saved, lambda manifest: manifest["target"].update(name="quantum"))
    refused(saved, "quantum")


def test_hostile_weights(saved: Path) -> None:
    good = (saved / WEIGHTS).read_bytes()
    digest = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")].strip())
    (name,) = digest
    header = {
        "another name": {"../../x": digest[name]},
        "no constants": {},
        "beyond the end": {name: {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}},
        "negative": {name: {"dtype": "F32", "shape": [10], "data_offsets": [40, 0]}},
        "other dtype": {name: {"dtype": "I32", "shape": [10], "data_offsets": [0, 40]}},
        "unknown dtype": {name: {"dtype": "BF16", "shape": [20], "data_offsets": [0, 40]}},
        "unused": {name: digest[name], "00": {"dtype": "F32", "shape": [1], "data_offsets": [40, 44]}},
    }
    for what, entries in header.items():
        text = json.dumps(entries).encode()
        reseal(
            saved, WEIGHTS, len(text).to_bytes(8, "little") + text + SPECIAL.tobytes() + (b"\0" * 4 if what == "unused" else b"")
        )
        refused(saved)
    for raw in (b"", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}", b"PK\x03\x04" + b"\0" * 100, b"\x80\x04cos\nsystem\n"):
        reseal(saved, WEIGHTS, raw)
        refused(saved)


def test_hostile_graphs(saved: Path) -> None:
    good = (saved / GRAPH).read_text()
    texts = [
        "",
        "graph",
        good.replace("relu", "system"),
        good.replace("float32[3,10]", "float32[3,11]", 1),
        good.replace("relu(%", "relu(%9", 1),
        "graph() {" * 5000,
        good + good,
        "import os",
        good.replace("return", "return %0,", 1),
    ]
    for text in texts:
        assert text != good
        reseal(saved, GRAPH, text.encode())
        refused(saved)
    reseal(saved, GRAPH, b"\xff\xfe")
    refused(saved)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_hostile_reports(saved: Path, text: bytes) -> None:
    reseal(saved, REPORT, text)
    refused(saved, "report")


def test_the_bytes_that_were_checked_are_the_bytes_that_run(saved: Path) -> None:
    found = load(saved)
    (saved / LIBRARY).write_bytes(b"changed after the check")
    shutil.rmtree(saved)
    with open_executable(found.built) as net:
        net.run([np.zeros((3, 10), "float32")])


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_is_kept_and_never_unset(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    path, before = tmp_path / "net.paring", os.umask(mask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda mask: pytest.fail("other threads would make files that all may write"))
            save(path, built, structure={}, report={})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o777 & ~mask
    assert sorted(os.listdir(path)) == sorted((MANIFEST, *FILES))


def test_saving_again_replaces(built: Built, saved: Path) -> None:
    save(saved, built, structure={}, report={"second": True})
    assert load(saved).report == {"second": True}
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_does_not_overwrite_what_is_not_ours(built: Built, tmp_path: Path, saved: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / MANIFEST).write_text("{}")
    (tmp_path / "link").symlink_to(saved)
    (tmp_path / "broken").symlink_to("nowhere")
    (saved / "notes.txt").write_text("mine")
    for name in ("notes.txt", "empty", "folder", "link", "broken", saved.name):
        with pytest.raises(ArtifactError, match="not a saved network"):
            save(tmp_path / name, built, structure={}, report={})
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (saved / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == sorted(["notes.txt", "empty", "folder", "link", "broken", saved.name])


@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
@pytest.mark.parametrize("again", [False, True])
def test_a_failed_save_leaves_nothing(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, again: bool
) -> None:
    """Full disks and lost permissions, at each step."""
    path = tmp_path / "net.paring"
    if again:
        save(path, built, structure={}, report={"first": True})
    before = contents(path) if again else None
    owner = {"fsync": os, "rename": Path, "open": Path}[call]
    original = getattr(owner, call)
    for failing in range(20):
        calls = 0

        def fail(*args: Any, turn: int = failing, **options: Any) -> Any:
            nonlocal calls
            # Files that Python reads for purposes of its own are none of ours.
            calls += not isinstance(args[0], Path) or tmp_path in args[0].parents
            if calls == turn + 1:
                raise OSError(28, "No space left on device")
            return original(*args, **options)

        said = ""
        with monkeypatch.context() as patched:
            patched.setattr(owner, call, fail)
            try:
                save(path, built, structure={}, report={})
            except ArtifactError as error:
                said = str(error)
        if not said:
            assert failing >= 1
            break
        assert "No space" in said
        assert os.listdir(tmp_path) == ([path.name] if again else [])
        if again:
            assert contents(path) == before


def test_places_that_cannot_be_written(built: Built, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "no" / "such" / "folder" / "net.paring", tmp_path / "file" / "net.paring", Path("/proc/net.paring")):
        with pytest.raises(ArtifactError, match="cannot write"):
            save(path, built, structure={}, report={})
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_grows_too_large(built: Built, tmp_path: Path) -> None:
    """The limit of a process stands in for a full disk: the write itself fails, inside libraries too."""
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (10, 200, 2000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(ArtifactError, match="cannot write"):
                save(tmp_path / "net.paring", built, structure={}, report={})
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert os.listdir(tmp_path) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("report", [{"loss": float("nan")}, {"array": np.zeros(2)}, {1: {2}}])
def test_reports_that_are_not_json(built: Built, tmp_path: Path, report: Any) -> None:
    with pytest.raises(ArtifactError, match="not JSON"):
        save(tmp_path / "net.paring", built, structure={}, report=report)
    assert os.listdir(tmp_path) == []
