"""Importing TVM without torch: TVM imports torch where it finds it, which takes seconds and serves nothing here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Hidden:
    """Says to one thread, and to no other, that torch is not installed."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "torch" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("TVM is imported without torch", name=name)
        return None


def import_tvm() -> None:
    """Import TVM; torch stays out unless it is in already."""
    hidden = _Hidden()
    sys.meta_path.insert(0, hidden)
    try:
        import tvm  # noqa: F401
    finally:
        sys.meta_path.remove(hidden)
