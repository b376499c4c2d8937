"""Options of passes: checked where a pass is made, whether from text or in Python."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from paring.ir.errors import ArgumentError
from paring.ir.op import as_declared, attribute_types, is_a

PLAIN = (int, float, bool, str, type(None))
_PIECE = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|.""", re.DOTALL)


def settle(owner: Any) -> None:
    """Make ints floats where an option is a float. Raises ArgumentError for an option that is not of its declared type."""
    cls: Any = type(owner)
    try:
        declared = attribute_types(cls)
    except NameError:
        return  # A type that is local to a function can not be looked up.
    for option, hint in declared:
        if not _is_plain(hint):
            continue
        value = as_declared(getattr(owner, option), hint)
        if not is_a(value, hint):
            wanted = hint.__name__ if isinstance(hint, type) else hint
            raise ArgumentError(f"pass {owner.name}: {option} should be of type {wanted}, not {value!r}")
        object.__setattr__(owner, option, value)


def _is_plain(hint: Any) -> bool:
    """Whether all values of a type have a text form."""
    members = [member for member in typing.get_args(hint) if member is not ...]
    compound = typing.get_origin(hint) in (tuple, typing.Union, types.UnionType)
    return all(map(_is_plain, members)) if compound else hint in PLAIN


def check_least(owner: Any, least: Mapping[str, int]) -> None:
    """Raise ArgumentError for a whole number below its least value; what is positive by default stays positive."""
    for field in dataclasses.fields(owner):
        value, default = getattr(owner, field.name), field.default
        low = least.get(field.name, 1 if type(default) is int and default > 0 else None)
        if type(value) is int and low is not None and value < low:
            what = f"pass {owner.name}: {field.name} is {value}, it is at least {low}"
            raise ArgumentError(what, hint="" if default is dataclasses.MISSING else f"the default is {default}")


def split_pipeline(text: str) -> list[str]:
    """`a, b{x=1, y='p, q'}, c` at its outer commas."""
    parts, depth, current = [], 0, ""
    for piece in _PIECE.findall(text):
        depth += (piece in "{(") - (piece in "})")
        if piece == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += piece
    return [part.strip() for part in (*parts, current) if part.strip()]
