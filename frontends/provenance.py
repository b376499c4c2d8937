"""Where in the user's model a traced operator comes from: module path and source line, the same text on every machine."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePath
from traceback import extract_tb
from types import TracebackType
from typing import Any

import torch

from paring.ir import Loc

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_CALL_COUNT = re.compile(r"@\d+$")
_LIBRARY = (f"{PurePath(torch.__file__).parent}/", f"{PurePath(__file__).parent}/")


def short(path: str, line: int) -> str:
    """`models/resnet.py:93`: the last two parts only, so that text does not depend on where things are installed."""
    return f"{'/'.join(PurePath(path).parts[-2:])}:{line}"


@lru_cache(maxsize=65536)
def _innermost(stack: str) -> str:
    """The deepest line outside torch; none where all are inside (a bare nn.Sequential): the module's path says where."""
    own = [(path, int(line)) for path, line in _FRAME.findall(stack) if not path.startswith(("<", *_LIBRARY))]
    return short(*own[-1]) if own else ""


def loc_of(node: torch.fx.Node) -> Loc | None:
    """The provenance of an fx node."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    source = _innermost(node.meta.get("stack_trace") or "")
    return Loc(_CALL_COUNT.sub("", path), source) if path or source else None


def user_line(traceback: TracebackType | None) -> str:
    """The deepest line of the user's code in the traceback of a failed trace, with its text."""
    frames = [f for f in extract_tb(traceback) if not f.filename.startswith((*_LIBRARY, "<"))]
    if not frames:
        return ""
    frame = frames[-1]
    return f"{short(frame.filename, frame.lineno or 0)}" + (f": {frame.line}" if frame.line else "")
