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
from typing import Annotated, Any

import psutil
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError
from safetensors import SafetensorError

from paring.backends.build import Built, Progress, build
from paring.backends.memory import plan
from paring.backends.targets import TARGETS, Target, for_host, host_arch, missing_flags
from paring.ir.errors import ArtifactError, IRTypeError, ParseError
from paring.ir.graph import Graph, Node
from paring.ir.ops.core import Input
from paring.ir.parser import parse
from paring.ir.text import constants, show

# Raised whenever the files, or the order of what `main` takes and returns, change their meaning.
FORMAT = 1

MANIFEST = "manifest.json"
GRAPH, WEIGHTS, LIBRARY, REPORT = "graph.ir", "weights.safetensors", "lib.so", "report.json"
FILES = (GRAPH, WEIGHTS, LIBRARY, REPORT)

MIB = 1 << 20
# Most bytes that are read of each file; weights may fill the memory of the machine, but no more.
LIMITS = {MANIFEST: 16 * MIB, GRAPH: 512 * MIB, LIBRARY: 1024 * MIB, REPORT: 64 * MIB}

_REBUILD = "load(path, rebuild=True) compiles it again from its graph and weights"

Count = Annotated[int, Field(ge=0, le=1 << 48)]
Name = Annotated[str, StringConstraints(max_length=4096)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(_Model):
    size: Count
    sha256: Digest


class TensorSpec(_Model):
    name: Name
    dtype: Name
    shape: tuple[Count, ...]


class Fingerprint(_Model):
    """What of a target decides whether a library fits."""

    name: Name
    arch: Name
    cpu: Name
    features: tuple[Name, ...]
    needs: tuple[Name, ...]
    lanes: Count
    registers: Count
    block: Count
    l1: Count
    l2: Count
    cores: Count


class Manifest(_Model):
    format: int
    versions: dict[Name, Name]
    target: Fingerprint
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    structure: dict[str, JsonValue]
    weights: tuple[Digest, ...]  # in the order in which the library's `main` takes them
    files: dict[Name, FileEntry]


class _Head(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    format: int


@dataclass(frozen=True, eq=False)
class Artifact:
    """A saved network that has been read and checked."""

    manifest: Manifest
    built: Built
    report: dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    """What an artifact says of itself. Its hashes have been checked; nothing of it has been run."""

    manifest: Manifest
    graph: str
    report: dict[str, Any]


def save(path: str | Path, built: Built, *, structure: Mapping[str, JsonValue], report: Mapping[str, JsonValue]) -> None:
    """Write a network to `path`, whole or not at all; an artifact that is already there is replaced.

    The same network, structure and report give the same bytes. Raises ArtifactError where it cannot be written, or where
    `path` holds something else.
    """
    path = Path(path)
    try:
        if os.path.lexists(path) and not _is_artifact(path):
            raise ArtifactError(f"{path} exists and is not a saved network", hint="give another name, or remove it")
        with _sibling(path) as folder:
            (folder / GRAPH).write_bytes(show(built.graph).encode())
            # Straight into the file: weights are large, and are not copied once more to be hashed.
            safetensors.numpy.save_file(dict(sorted(constants(built.graph).items())), folder / WEIGHTS)
            (folder / LIBRARY).write_bytes(built.library)
            (folder / REPORT).write_bytes(_json(dict(report)))
            files = {name: _entry(folder / name) for name in FILES}
            (folder / MANIFEST).write_bytes(_json(_manifest(built, structure, files).model_dump(mode="json")))
            for name in (MANIFEST, *FILES, "."):
                _sync(folder / name)
            _replace(folder, path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {path}", why=str(error), hint="see to space and permissions there") from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"cannot write {path}", why=f"structure or report is not JSON: {error}") from error


def inspect(path: str | Path) -> Inspection:
    """What is in an artifact, without running any of it. Raises ArtifactError where it is damaged."""
    with _opened(Path(path)) as folder:
        manifest = _read_manifest(folder)
        contents = {name: _read(folder, name, manifest.files[name]) for name in FILES}
    return Inspection(manifest, _text(contents[GRAPH]), _report(contents[REPORT]))


def load(path: str | Path, rebuild: bool = False, device: str | None = None, progress: Progress | None = None) -> Artifact:
    """Read an artifact and check all of it; the library is not yet loaded.

    `rebuild=True` compiles it again for the recorded target instead of taking its library. `device` is where it is to run,
    when that is not what its target says. Raises ArtifactError for anything damaged, newer, or not fit for this machine.
    """
    with _opened(Path(path)) as folder:
        manifest = _read_manifest(folder)
        # The library of an artifact that is being rebuilt may be damaged or foreign: it is not even read.
        names = [name for name in FILES if name != LIBRARY or not rebuild]
        contents = {name: _read(folder, name, manifest.files[name]) for name in names}
    graph = _graph(contents[GRAPH], contents[WEIGHTS], manifest)
    target = _target(manifest.target)
    if rebuild:
        built = build(graph, for_host(target), progress)
    else:
        _check_fit(manifest, target, contents[LIBRARY], device)
        built = Built(target, plan(graph), contents[LIBRARY])
        if tuple(op.digest for op in built.plan.weights) != manifest.weights:
            raise ArtifactError("this version would hand the weights over in another order", hint=_REBUILD)
    return Artifact(manifest, built, _report(contents[REPORT]))


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
        _Head.model_validate_json((path / MANIFEST).read_bytes())
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


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A handle of the artifact's directory: what is read through it cannot lie elsewhere."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"no saved network at {path}", why=str(error)) from error
    try:
        yield folder
    except ArtifactError as error:
        raise ArtifactError(error.what, where=f"{path} {error.where}".rstrip(), why=error.why, hint=error.hint) from None
    finally:
        os.close(folder)


def _read(folder: int, name: str, entry: FileEntry | None) -> bytes:
    """The bytes of one file, which the entry must describe. `name` is one of ours, never one out of a manifest."""
    limit = min(LIMITS.get(name, 1 << 48), psutil.virtual_memory().total)
    try:
        # NONBLOCK: opening a pipe that somebody put there must not wait for a writer.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError("a saved network holds plain files only", where=name)
            if status.st_size > limit:
                raise ArtifactError(f"the file has {status.st_size} bytes, at most {limit} are read", where=name)
            if entry is not None and status.st_size != entry.size:
                raise ArtifactError(f"the file has {status.st_size} bytes, the manifest says {entry.size}", where=name)
            content = file.read(status.st_size)
    except OSError as error:
        raise ArtifactError("a file cannot be read", where=name, why=str(error)) from error
    if entry is not None and hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ArtifactError("the file is damaged: its sha256 is not the one in the manifest", where=name)
    return content


def _read_manifest(folder: int) -> Manifest:
    content = _read(folder, MANIFEST, None)
    try:
        found = _Head.model_validate_json(content).format
        if found > FORMAT:
            newer = f"it has format {found}, this version reads up to {FORMAT}"
            raise ArtifactError("the network was saved by a newer Paring", why=newer, hint="upgrade Paring")
        manifest = Manifest.model_validate_json(content)
    except (ValidationError, RecursionError) as error:
        raise ArtifactError("the manifest is damaged", where=MANIFEST, why=_first(error)) from None
    if found != FORMAT:
        raise ArtifactError(f"unknown format {found}", where=MANIFEST)
    if set(manifest.files) != set(FILES):
        raise ArtifactError("the manifest does not name the files of a saved network", where=MANIFEST)
    extra = sorted(set(os.listdir(folder)) - {MANIFEST, *FILES})
    if extra:
        raise ArtifactError("the directory holds files that do not belong to a saved network", where=repr(extra[0])[:200])
    return manifest


def _first(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deep"
    details = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, details['loc']))[:200]}: {details['msg'][:200]}"


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError("the graph is not text", where=GRAPH, why=str(error)) from None


def _report(content: bytes) -> dict[str, Any]:
    try:
        report = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the report is not JSON", where=REPORT, why=str(error)) from None
    if not isinstance(report, dict):
        raise ArtifactError("the report is not a JSON object", where=REPORT)
    return report


def _graph(text: bytes, weights: bytes, manifest: Manifest) -> Graph:
    """The graph with its constants. Digests of constants are checked as it is read."""
    try:
        arrays = safetensors.numpy.load(weights)
        graph = parse(_text(text), arrays)
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ArtifactError("the weights cannot be read", where=WEIGHTS, why=str(error)[:500]) from None
    except (ParseError, IRTypeError) as error:
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
        raise ArtifactError("the library is of another version of TVM", why=why, hint=_REBUILD)
    if manifest.target != _fingerprint(target):
        raise ArtifactError(f"the target {target.name} has changed since it was compiled", hint=_REBUILD)
    if library[:4] != b"\x7fELF" or int.from_bytes(library[18:20], "little") != target.elf_machine:
        raise ArtifactError(f"the library is not code for {target.arch}", where=LIBRARY, hint=_REBUILD)
    missing = missing_flags(target)
    if device in (None, "host") and target.arch == host_arch() and missing:
        hint = "compile it for this machine, or give the device that it is to run on"
        raise ArtifactError(f"this host cannot run code for {target.name}", why=f"it lacks {', '.join(missing)}", hint=hint)
