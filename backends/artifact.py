"""Saved networks: a directory `NAME.paring` with a manifest, the program, its constants, the library and a report.

    manifest.json        what it is and for which machine, with size and sha256 of every other file
    graph.ir             the lowered graph, as text
    weights.safetensors  its constants, by digest
    lib.so               the compiled library
    report.json          whatever the caller wants to keep

Nothing in it is executed before its hash has been checked, and nothing is unpickled. Hashes protect against damage, not
against an author who means harm: loading a library runs its code, so load what you trust, or rebuild it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.numpy
from pydantic import JsonValue, ValidationError
from safetensors import SafetensorError

from paring.backends.build import Built, Progress, build
from paring.backends.manifest import (
    FILES,
    FORMAT,
    GRAPH,
    LIBRARY,
    MANIFEST,
    MIB,
    REBUILD,
    REPORT,
    WEIGHTS,
    FileEntry,
    Fingerprint,
    Head,
    Manifest,
    TensorSpec,
    as_report,
    as_text,
    opened,
    read_file,
    read_manifest,
)
from paring.backends.memory import plan
from paring.backends.targets import TARGETS, Target, for_host, host_arch, missing_flags
from paring.ir.errors import ArtifactError, IRTypeError, ParseError, VerifyError
from paring.ir.graph import Graph, Node
from paring.ir.ops.core import Input
from paring.ir.parser import parse
from paring.ir.text import constants, show
from paring.ir.verify import check_trusted, verify


@dataclass(frozen=True, eq=False)
class Artifact:
    """A saved network that has been read and checked."""

    manifest: Manifest
    built: Built
    report: dict[str, Any]


def save(path: str | Path, built: Built, *, structure: Mapping[str, JsonValue], report: Mapping[str, JsonValue]) -> None:
    """Write a network to `path`, whole or not at all; an artifact that is already there is replaced.

    The same network, structure and report give the same bytes. Raises ArtifactError where it cannot be written, or where
    `path` holds something else.
    """
    path = Path(path)
    try:
        if not path.parent.is_dir():
            raise ArtifactError(f"cannot write {path}", why=f"there is no folder {path.parent}", hint="make that folder first")
        if os.path.lexists(path) and not _is_artifact(path):
            raise ArtifactError(f"{path} exists and is not a saved network", hint="give another name, or remove it")
        with _sibling(path) as folder:
            (folder / GRAPH).write_bytes(show(built.graph).encode())
            # Straight into the file: weights are large, and are not copied once more to be hashed.
            safetensors.numpy.save_file(dict(sorted(constants(built.graph).items())), folder / WEIGHTS)
            # It makes files that only their owner may read.
            (folder / WEIGHTS).chmod(stat.S_IMODE((folder / GRAPH).stat().st_mode))
            (folder / LIBRARY).write_bytes(built.library)
            (folder / REPORT).write_bytes(_json(dict(report)))
            files = {name: _entry(folder / name) for name in FILES}
            (folder / MANIFEST).write_bytes(_json(_manifest(built, structure, files).model_dump(mode="json")))
            for name in (MANIFEST, *FILES, "."):
                _sync(folder / name)
            _replace(folder, path)
    except (OSError, SafetensorError) as error:
        # Its own text has the name of a temporary folder.
        why = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"cannot write {path}", why=why, hint="see to space and permissions there") from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot write {path}", why=f"structure or report is not JSON: {error}") from error


def load(path: str | Path, rebuild: bool = False, device: str | None = None, progress: Progress | None = None) -> Artifact:
    """Read an artifact and check all of it; the library is not yet loaded.

    `rebuild=True` compiles it again for the recorded target instead of taking its library. `device` is where it is to run,
    when that is not what its target says. Raises ArtifactError for anything damaged, newer, or not fit for this machine.
    """
    with opened(Path(path)) as folder:
        manifest = read_manifest(folder)
        # The library of an artifact that is being rebuilt may be damaged or foreign: it is not even read.
        names = [name for name in FILES if name != LIBRARY or not rebuild]
        contents = {name: read_file(folder, name, manifest.files[name]) for name in names}
    graph = _graph(contents[GRAPH], contents[WEIGHTS], manifest)
    target = _target(manifest.target)
    if rebuild:
        built = build(graph, for_host(target), progress)
    else:
        _check_fit(manifest, target, contents[LIBRARY], device)
        built = Built(target, plan(graph), contents[LIBRARY])
        if tuple(op.digest for op in built.plan.weights) != manifest.weights:
            raise ArtifactError("this version would hand the weights over in another order", hint=REBUILD)
    return Artifact(manifest, built, as_report(contents[REPORT]))


def _entry(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def _manifest(built: Built, structure: Mapping[str, JsonValue], files: dict[str, FileEntry]) -> Manifest:
    return Manifest(
        format=FORMAT,
        versions=_versions(),
        target=_fingerprint(built.target),
        inputs=_specs(built.graph.inputs),
        outputs=_specs(built.graph.outputs),
        structure=dict(structure),
        weights=tuple(op.digest for op in built.plan.weights),
        files=files,
    )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("paring", "apache-tvm", "apache-tvm-ffi", "numpy")}


def _fingerprint(target: Target) -> Fingerprint:
    return Fingerprint(**{name: getattr(target, name) for name in Fingerprint.model_fields})


def _specs(nodes: Sequence[Node]) -> tuple[TensorSpec, ...]:
    labels = [n.op.label if isinstance(n.op, Input) else f"output{position}" for position, n in enumerate(nodes)]
    return tuple(TensorSpec(name=label, dtype=n.type.dtype, shape=n.type.shape) for label, n in zip(labels, nodes, strict=True))


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _is_artifact(path: Path) -> bool:
    """Whether `path` is a directory with a manifest of ours and no file that we would not write."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        Head.model_validate_json((path / MANIFEST).read_bytes())
    except (FileNotFoundError, ValidationError):
        return False
    return set(os.listdir(path)) <= {MANIFEST, *FILES}


@contextmanager
def _sibling(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, removed unless it has been renamed."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(folder: Path, path: Path) -> None:
    """Move `folder` to `path`. An artifact there is moved aside first, and back if the move fails."""
    folder.chmod(_usual_mode(folder))
    if not path.exists():
        folder.rename(path)
    else:
        with _sibling(path) as aside:
            path.rename(aside / "old")
            try:
                folder.rename(path)
            except OSError:
                (aside / "old").rename(path)
                raise
    # The artifact is in place and whole; only when the disk takes note of its name is left open.
    with suppress(OSError):
        _sync(path.parent)


def _usual_mode(folder: Path) -> int:
    """The mode of a new folder, seen from one: asking for the umask would unset it for all threads for a moment."""
    probe = folder / "probe"
    probe.mkdir()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.rmdir()
    return mode


def _graph(text: bytes, weights: bytes, manifest: Manifest) -> Graph:
    """The graph with its constants. Digests of constants are checked as it is read."""
    try:
        arrays = safetensors.numpy.load(weights)
        graph = parse(as_text(text), arrays)
        verify(graph)
        check_trusted(graph)
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError("the weights cannot be read", where=WEIGHTS, why=str(error)[:500]) from None
    except (ParseError, IRTypeError, VerifyError) as error:
        raise ArtifactError(f"the graph cannot be read: {error.what}", where=f"{GRAPH} {error.where}", why=error.why) from None
    if set(arrays) != set(constants(graph)):
        raise ArtifactError("there are weights that the graph does not use", where=WEIGHTS)
    if (_specs(graph.inputs), _specs(graph.outputs)) != (manifest.inputs, manifest.outputs):
        raise ArtifactError("the graph does not have the inputs and outputs of the manifest", where=GRAPH)
    return graph


def _target(found: Fingerprint) -> Target:
    """The target of that name as this version knows it: nothing that gets executed is taken from a file."""
    if found.name not in TARGETS:
        raise ArtifactError(f"it was compiled for {found.name!r}, which this version does not know", hint="upgrade Paring")
    return replace(for_host(TARGETS[found.name]), cores=max(1, found.cores))


def _check_fit(manifest: Manifest, target: Target, library: bytes, device: str | None) -> None:
    """Raise ArtifactError unless the library is of this TVM, for its target as it is today, and for this machine."""
    ours = _versions()
    if manifest.versions.get("apache-tvm", "").split(".")[:2] != ours["apache-tvm"].split(".")[:2]:
        why = f"saved with TVM {manifest.versions.get('apache-tvm')}, this is {ours['apache-tvm']}"
        raise ArtifactError("the library is of another version of TVM", why=why, hint=REBUILD)
    if manifest.target != _fingerprint(target):
        raise ArtifactError(f"the target {target.name} has changed since it was compiled", hint=REBUILD)
    if library[:4] != b"\x7fELF" or int.from_bytes(library[18:20], "little") != target.elf_machine:
        raise ArtifactError(f"the library is not code for {target.arch}", where=LIBRARY, hint=REBUILD)
    missing = missing_flags(target)
    if device in (None, "host") and target.arch == host_arch() and missing:
        hint = "compile it for this machine, or give the device that it is to run on"
        raise ArtifactError(f"this host cannot run code for {target.name}", why=f"it lacks {', '.join(missing)}", hint=hint)
