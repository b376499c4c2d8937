"""What a pass is: a frozen dataclass whose fields are its options and whose text form is `name{field=value}`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from paring.ir.errors import ArgumentError, ParseError
from paring.ir.graph import Graph
from paring.ir.parser import parse_attributes
from paring.ir.text import literal
from paring.passes.contract import Contract, Exact, Lossy, weakest
from paring.passes.options import check_least, settle
from paring.passes.pattern import Rule
from paring.passes.rewriter import Context, apply_rules


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses state `name`, `contract`, and either `rules` or `run`.

    `lossy`: whether it may change what is computed; then it lives in `compress/` and runs only if asked for.
    `calibrated`: whether it looks at calibration data. `least`: the least values of whole numbers among the options.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract] = Exact()
    lossy: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    least: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        settle(self)
        self.check()

    def check(self) -> None:
        """Raise ArgumentError that names pass and option where an option is out of range."""
        check_least(self, self.least)

    def rules(self) -> Sequence[Rule]:
        """The rules that make up the pass, in the order in which they are tried."""
        return ()

    def run(self, graph: Graph, context: Context) -> Graph:
        """The changed graph; the same object where nothing changed."""
        return apply_rules(graph, self.rules(), context)

    def promise(self, context: Context) -> Contract:
        """The contract of one run: what the run wrote down, or for a pass made of rules the weakest of those that fired."""
        if context.promise is not None:
            return context.promise
        fired = {rewrite.rule for rewrite in context.rewrites}
        contracts = [rule.contract for rule in self.rules() if rule.name in fired]
        if not self.rules() or isinstance(self.contract, Lossy):
            return self.contract
        return weakest(contracts)

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").strip().splitlines()[0]

    def __str__(self) -> str:
        shown = [
            f"{field.name}={literal(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.default is dataclasses.MISSING or literal(getattr(self, field.name)) != literal(field.default)
        ]
        return f"{self.name}{{{', '.join(shown)}}}" if shown else self.name


def parse_pass(text: str, table: Mapping[str, type[Pass]]) -> Pass:
    """`name{option=value, ...}` as a pass. Raises ArgumentError for an unknown name or option, ParseError for bad text."""
    name, brace, rest = text.strip().partition("{")
    name = name.strip()
    if name not in table:
        near = difflib.get_close_matches(name, table, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
        raise ArgumentError(f"unknown pass {name!r}", hint=hint)
    cls = table[name]
    try:
        options = parse_attributes(brace + rest) if brace else {}
    except ParseError as error:
        raise ParseError(f"pass {text!r}: {error.what}", where=error.where, hint="like layout{block=16}") from None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for option in options:
        if option not in fields:
            near = difflib.get_close_matches(option, fields, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"options: {', '.join(fields) or 'none'}"
            raise ArgumentError(f"pass {name} has no option {option!r}", hint=hint)
    lacking = [field.name for field in fields.values() if field.default is dataclasses.MISSING and field.name not in options]
    if lacking:
        raise ArgumentError(f"pass {name} lacks its option {lacking[0]!r}", hint=f"like {name}{{{lacking[0]}=...}}")
    return cls(**options)
