"""Typed errors of every floor. Each says what went wrong, where, why, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ParingError(Exception):
    """Base of all errors that Paring raises on purpose.

    Args:
        what: one sentence: what went wrong.
        where: the place: a node, a file and line of the user's model, an argument.
        why: the reason, where it is not plain from `what`.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(what, where, why, hint)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("hint", self.hint)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)

    def at(self, place: str) -> None:
        """Say that it happened inside `place`."""
        self.where = f"{place}: {self.where}" if self.where else place
        self.args = self.what, self.where, self.why, self.hint

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.why, self.hint)


def _rebuild(cls: type[ParingError], what: str, where: str, why: str, hint: str) -> ParingError:
    error = cls.__new__(cls)
    ParingError.__init__(error, what, where=where, why=why, hint=hint)
    return error


class IRTypeError(ParingError):
    """An op refused its inputs: the node was never built."""


class VerifyError(ParingError):
    """A graph breaks an invariant that a single node cannot see."""


class ParseError(ParingError):
    """Text that is not a graph or not a pipeline; `where` has line and column."""


class ContractError(ParingError):
    """A pass changed results by more than its contract allows."""

    exit_code = 3


class PassError(ParingError):
    """A pass or a rule that failed, or gave something else than a program."""


class MismatchError(ParingError):
    """A compiled result differs from its reference by more than was promised."""

    exit_code = 3


class UnsupportedOpsError(ParingError):
    """A model uses operators that no importer entry covers; all are listed at once."""


class ModelError(ParingError):
    """A model that cannot be compiled as it is (training mode, data-dependent control flow, ...)."""


class InputError(ParingError):
    """A call with the wrong number, shape, dtype or device of inputs."""


class ArgumentError(ParingError):
    """An unknown or impossible argument: target, pass, option, path."""


class TargetError(ParingError):
    """A target that this host can not build for or run on."""


class ArtifactError(ParingError):
    """A saved network that is damaged, hostile, of another version or for another machine."""


class InternalError(ParingError):
    """Our mistake. The message asks for a report and names the smallest thing that shows it."""

    exit_code = 4


def a_kind(value: object) -> str:
    """What a value is, with its article: `an int`, `a list`, or `None`."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint for a name that is not there: the one that holds it or looks like it, or what else there is to say."""
    known = list(known)
    near = [each for each in known if name and name in each] or difflib.get_close_matches(name, known, 1, 0.4)
    return f"did you mean {near[0]!r}?" if near else otherwise
