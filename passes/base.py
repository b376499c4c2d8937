"""What a pass is: a frozen dataclass whose fields are its options and whose text form is `name{field=value}`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from paring.ir.errors import ArgumentError, ParseError, nearest
from paring.ir.graph import Graph
from paring.ir.parser import parse_attributes
from paring.ir.text import literal
from paring.passes.contract import Contract, Exact, Lossy, accumulate
from paring.passes.options import check_least, settle
from paring.passes.pattern import Rule
from paring.passes.rewriter import Context, apply_rules


@dataclass(frozen=True)
class Pass:
    """Base of all passes. Subclasses state `name`, `contract`, and either `rules` or `run`.

    `lossy`: whether it may change what is computed, as a Lossy contract says; then it lives in `compress/` and runs only if
    asked for. `calibrated`: whether it looks at calibration data, or may. `before` which passes it belongs, and
    `after` which. `unprepared`: it comes before everything else, where parameters still are as the model names them. `least`:
    the least values of whole numbers among the options.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract] = Exact()
    lossy: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False
    before: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    unprepared: ClassVar[bool] = False
    least: ClassVar[Mapping[str, int]] = {}

    def __init_subclass__(cls) -> None:
        cls.lossy = cls.lossy or isinstance(cls.contract, Lossy)

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
        """The contract of one run: what the run wrote down, or that of all its rewrites together."""
        if context.promise is not None:
            return context.promise
        contracts = {rule.name: rule.contract for rule in self.rules()}
        return accumulate([contracts.get(rewrite.rule, self.contract) for rewrite in context.rewrites])

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
        raise ArgumentError(f"unknown pass {name!r}", hint=nearest(name, table, f"known: {', '.join(table)}"))
    cls = table[name]
    try:
        options = parse_attributes(brace + rest) if brace else {}
    except ParseError as error:
        raise ParseError(f"pass {text!r}: {error.what}", where=error.where, hint="like layout{block=16}") from None
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for option in options:
        if option not in fields:
            hint = nearest(option, fields, f"options: {', '.join(fields) or 'none'}")
            raise ArgumentError(f"pass {name} has no option {option!r}", hint=hint)
    lacking = [field.name for field in fields.values() if field.default is dataclasses.MISSING and field.name not in options]
    if lacking:
        raise ArgumentError(f"pass {name} lacks its option {lacking[0]!r}", hint=f"like {name}{{{lacking[0]}=...}}")
    return cls(**options)
