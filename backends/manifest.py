"""What a saved network says of itself, read and checked without TVM: its manifest, and the bytes of its files."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

from paring.ir.errors import ArtifactError

# Raised whenever the files, or the order of what `main` takes and returns, change their meaning.
FORMAT = 1

MANIFEST = "manifest.json"
GRAPH, WEIGHTS, LIBRARY, REPORT = "graph.ir", "weights.safetensors", "lib.so", "report.json"
FILES = (GRAPH, WEIGHTS, LIBRARY, REPORT)

MIB = 1 << 20
# Most bytes that are read of each file; weights may fill the memory of the machine, but no more.
LIMITS = {MANIFEST: 16 * MIB, GRAPH: 512 * MIB, LIBRARY: 1024 * MIB, REPORT: 64 * MIB}

WHAT = "a saved network is a folder that save() wrote, NAME.paring by convention"
AGAIN = "save the network again"
REBUILD = "load(path, rebuild=True) compiles it again from its graph and weights"

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


class Head(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    format: int


@dataclass(frozen=True)
class Inspection:
    """What an artifact says of itself. Its hashes have been checked; nothing of it has been run."""

    manifest: Manifest
    graph: str
    report: dict[str, Any]


def inspect(path: str | Path) -> Inspection:
    """What is in an artifact, without running any of it. Raises ArtifactError where it is damaged."""
    with opened(Path(path)) as folder:
        manifest = read_manifest(folder)
        contents = {name: read_file(folder, name, manifest.files[name]) for name in FILES}
    return Inspection(manifest, as_text(contents[GRAPH]), as_report(contents[REPORT]))


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A handle of the artifact's directory: what is read through it cannot lie elsewhere."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(f"no saved network at {path}", why=why, hint=WHAT) from error
    try:
        yield folder
    except ArtifactError as error:
        raise ArtifactError(error.what, where=f"{path} {error.where}".rstrip(), why=error.why, hint=error.hint) from None
    finally:
        os.close(folder)


def read_file(folder: int, name: str, entry: FileEntry | None) -> bytes:
    """The bytes of one file, which the entry must describe. `name` is one of ours, never one out of a manifest."""
    limit = min(LIMITS.get(name, 1 << 48), psutil.virtual_memory().total)
    hint = REBUILD if name == LIBRARY else AGAIN
    try:
        # NONBLOCK: opening a pipe that somebody put there must not wait for a writer.
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError("a saved network holds plain files only", where=name, hint=hint)
            if status.st_size > limit:
                raise ArtifactError(f"the file has {status.st_size} bytes, at most {limit} are read", where=name)
            if entry is not None and status.st_size != entry.size:
                what = f"the file has {status.st_size} bytes, the manifest says {entry.size}"
                raise ArtifactError(what, where=name, hint=hint)
            content = file.read(status.st_size)
    except FileNotFoundError:
        if name == MANIFEST:
            raise ArtifactError("this is not a saved network", why=f"there is no {MANIFEST} in it", hint=WHAT) from None
        raise ArtifactError("a file is missing", where=name, hint=hint) from None
    except OSError as error:
        raise ArtifactError("a file cannot be read", where=name, why=str(error.strerror), hint=hint) from error
    if entry is not None and hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ArtifactError("the file is damaged: its sha256 is not the one in the manifest", where=name, hint=hint)
    return content


def read_manifest(folder: int) -> Manifest:
    content = read_file(folder, MANIFEST, None)
    try:
        found = Head.model_validate_json(content).format
        if found > FORMAT:
            newer = f"it has format {found}, this version reads up to {FORMAT}"
            raise ArtifactError("the network was saved by a newer Paring", why=newer, hint="upgrade Paring")
        manifest = Manifest.model_validate_json(content)
    except (ValidationError, RecursionError) as error:
        raise ArtifactError("the manifest is damaged", where=MANIFEST, why=_first(error), hint=AGAIN) from None
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


def as_text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError("the graph is not text", where=GRAPH, why=str(error)) from None


def as_report(content: bytes) -> dict[str, Any]:
    try:
        report = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError("the report is not JSON", where=REPORT, why=str(error)) from None
    if not isinstance(report, dict):
        raise ArtifactError("the report is not a JSON object", where=REPORT)
    return report
