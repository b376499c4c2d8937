"""Saving networks and loading them in another process, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paring.backends import lean, manifest
from paring.frontends.structure import spec_from_json, spec_to_json
from paring.ir.errors import ArgumentError, ArtifactError, ParingError, a_kind
from paring.network import SAVED, Network, Version
from paring.passes.ledger import Ledger
from paring.passes.manager import Result
from paring.passes.rewriter import Tell


def save(version: Version, path: Path) -> Path:
    """Write one version of a network. The same network gives the same bytes."""
    if version.built is None:
        raise ArgumentError(f"a network for {version.target.name} has no library to save", hint="compile it for another target")
    from paring.backends import artifact

    report = {"ledger": version.result.ledger.as_json(times=False)}
    artifact.save(path, version.built, structure=spec_to_json(version.signature), report=report)
    return path


def load(path: str | Path, *, rebuild: bool = False, device: str | None = None, progress: Tell | None = None) -> Network:
    """A saved network, ready to be called.

    Every file is checked against the manifest before any code is loaded. `rebuild=True` compiles again from the saved
    program and weights instead of loading the saved library. `device` is for networks of a foreign target.
    Raises ArtifactError for anything damaged, newer than this release, or not made for this machine.
    """
    if not isinstance(path, str | Path):
        raise ArgumentError(f"a saved network is a path, not {a_kind(path)}", hint="paring.load('net.paring')")
    lean.import_tvm()
    from paring.backends import artifact
    from paring.backends.devices import open_executable

    tell = (lambda done, total, name: progress("kernels", done, total)) if progress else None
    found = artifact.load(path, rebuild, device, tell)
    signature = spec_from_json(found.manifest.structure)
    graph = found.built.graph
    if signature.types != tuple(node.type for node in graph.inputs) or signature.outputs.leaves() > len(graph.outputs):
        raise ArtifactError("the manifest and the program disagree on inputs or outputs", where=str(path))
    result = Result(graph, _ledger(found.report, path), [(SAVED, graph)])
    executable = open_executable(found.built, found.built.target, device)
    return Network({None: Version(signature, result, found.built.target, found.built, executable)}, found.built.target)


def _ledger(report: dict[str, Any], path: str | Path) -> Ledger:
    try:
        return Ledger.from_json(report["ledger"])
    except (KeyError, TypeError, AttributeError, ParingError) as error:
        raise ArtifactError("the report is damaged", where=str(path), why=repr(error)) from None


def inspect(path: str | Path) -> dict[str, Any]:
    """What a saved network says of itself: manifest, program text, report. Hashes are checked; nothing is executed."""
    found = manifest.inspect(path)
    return {"manifest": found.manifest.model_dump(mode="json"), "graph": found.graph, "report": found.report}
