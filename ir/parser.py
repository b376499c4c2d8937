"""Reads the text form of graphs. Text is data: nothing in it is executed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from paring.ir.errors import IRTypeError, ParseError
from paring.ir.graph import Graph, Loc, Node
from paring.ir.op import Array, Op
from paring.ir.ops import OPS
from paring.ir.ops.core import Const, Input, Region
from paring.ir.types import TensorType

MAX_NESTING = 8

_TOKEN = re.compile(
    r"""[ \t\r]*(?:\#[^\n]*)?
      (?:
        (?P<newline>\n)
      | (?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
      | (?P<value>%\d+)
      | (?P<number>[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d+|inf\b|nan\b))
      | (?P<word>[A-Za-z_][A-Za-z_0-9]*)
      | (?P<mark>[(){}\[\]=:,@])
      | (?P<end>\Z)
      )""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(u[0-9a-f]{8}|.)")
_WORDS = {"True": True, "False": False, "None": None}


def parse(text: str, constants: Mapping[str, Array] | None = None) -> Graph:
    """The graph that `text` shows. `constants` gives the arrays named by digest.

    Raises ParseError with line and column for malformed text, IRTypeError for ill-typed nodes.
    """
    reader = _Reader(text, constants or {})
    graph = reader.graph(0)
    reader.expect("end", "")
    return graph


def parse_attributes(text: str) -> dict[str, object]:
    """`{a=1, b="x"}` as a dict; strings in either quote. Raises ParseError."""
    reader = _Reader(text, {})
    attributes = reader.attributes()
    reader.expect("end", "")
    return attributes


@dataclasses.dataclass
class _Token:
    kind: str
    text: str
    line: int
    column: int


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position, line, start = 0, 1, 0
    while not tokens or tokens[-1].kind != "end":
        match = _TOKEN.match(text, position)
        if not match:
            position += len(text[position:]) - len(text[position:].lstrip(" \t\r"))
            raise ParseError(f"unexpected {text[position]!r}", where=f"line {line}, column {position - start + 1}")
        kind = match.lastgroup or ""
        position = match.end()
        if kind == "newline":
            line, start = line + 1, position
        else:
            tokens.append(_Token(kind, match[kind], line, match.start(kind) - start + 1))
    return tokens


class _Reader:
    def __init__(self, text: str, constants: Mapping[str, Array]) -> None:
        self.tokens = _tokens(text)
        self.position = 0
        self.constants = constants

    def peek(self, kind: str, text: str | None = None) -> bool:
        token = self.tokens[self.position]
        return token.kind == kind and (text is None or token.text == text)

    def accept(self, kind: str, text: str | None = None) -> _Token | None:
        if not self.peek(kind, text):
            return None
        self.position += 1
        return self.tokens[self.position - 1]

    def expect(self, kind: str, text: str | None = None) -> _Token:
        token = self.accept(kind, text)
        if token is None:
            found = self.tokens[self.position]
            raise self.error(f"expected {text or kind}, found {found.text or 'the end'!r}")
        return token

    def error(self, what: str, token: _Token | None = None) -> ParseError:
        token = token or self.tokens[self.position]
        return ParseError(what, where=f"line {token.line}, column {token.column}")

    def names(self, close: str) -> list[str]:
        found: list[str] = []
        while not self.peek("mark", close):
            if found:
                self.expect("mark", ",")
            found.append(self.expect("value").text)
        return found

    def graph(self, depth: int) -> Graph:
        if depth > MAX_NESTING:
            raise self.error(f"regions are nested more than {MAX_NESTING} deep")
        self.expect("word", "graph")
        self.expect("mark", "(")
        inputs = self.names(")")
        self.expect("mark", ")")
        self.expect("mark", "{")
        nodes: dict[str, Node] = {}
        while not self.peek("word", "return"):
            self.node(nodes, depth)
        self.expect("word", "return")
        outputs = self.names("}")
        closing = self.expect("mark", "}")
        missing = [name for name in (*inputs, *outputs) if name not in nodes]
        if missing:
            raise self.error(f"{missing[0]} is not defined", closing)
        return Graph(tuple(nodes[n] for n in inputs), tuple(nodes[n] for n in outputs))

    def node(self, nodes: dict[str, Node], depth: int) -> None:
        name = self.expect("value")
        self.expect("mark", ":")
        declared = self.type()
        self.expect("mark", "=")
        op_name = self.expect("word")
        self.expect("mark", "(")
        operands = self.names(")")
        self.expect("mark", ")")
        attributes = self.attributes() if self.peek("mark", "{") else {}
        body = self.graph(depth + 1) if self.peek("word", "graph") else None
        loc = self.loc()
        if name.text in nodes:
            raise self.error(f"{name.text} is defined twice", name)
        unknown = [operand for operand in operands if operand not in nodes]
        if unknown:
            raise self.error(f"{unknown[0]} is used before it is defined", name)
        try:
            op = self.op(op_name, attributes, body, declared)
            node = Node(op, [nodes[operand] for operand in operands], loc)
        except IRTypeError as error:
            raise IRTypeError(error.what, where=f"line {name.line}: {error.where}", why=error.why, hint=error.hint) from None
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise self.error(f"{op_name.text} cannot take these attributes: {error}", name) from None
        if node.type != declared:
            raise self.error(f"{op.name} gives {node.type}, the text says {declared}", name)
        nodes[name.text] = node

    def type(self) -> TensorType:
        dtype = self.expect("word").text
        self.expect("mark", "[")
        shape: list[str] = []
        while not self.accept("mark", "]"):
            if shape:
                self.expect("mark", ",")
            shape.append(self.expect("number").text)
        try:
            return TensorType.parse(f"{dtype}[{','.join(shape)}]")
        except IRTypeError as error:
            raise self.error(error.what) from None

    def attributes(self) -> dict[str, object]:
        self.expect("mark", "{")
        found: dict[str, object] = {}
        while not self.accept("mark", "}"):
            if found:
                self.expect("mark", ",")
            key = self.expect("word")
            if key.text in found:
                raise self.error(f"{key.text} is given twice", key)
            self.expect("mark", "=")
            found[key.text] = self.literal(0)
        return found

    def literal(self, depth: int) -> object:
        if depth > MAX_NESTING:
            raise self.error("a literal is nested too deep")
        if token := self.accept("string"):
            return unquote(token.text)
        if token := self.accept("number"):
            is_int = re.fullmatch(r"[-+]?\d{1,30}", token.text)
            return int(token.text) if is_int else float(token.text)
        if token := self.accept("word"):
            if token.text in _WORDS:
                return _WORDS[token.text]
            if token.text in ("inf", "nan"):
                return math.inf if token.text == "inf" else math.nan
            near = token.text.capitalize()
            raise self.error(f"{token.text!r} is not a literal" + (f", {near} is" if near in _WORDS else ""), token)
        self.expect("mark", "(")
        items: list[object] = []
        while not self.accept("mark", ")"):
            if items:
                self.expect("mark", ",")
                if self.accept("mark", ")"):
                    break
            items.append(self.literal(depth + 1))
        return tuple(items)

    def loc(self) -> Loc | None:
        if not self.accept("mark", "@"):
            return None
        module = unquote(self.expect("string").text)
        self.expect("mark", ":")
        return Loc(module, unquote(self.expect("string").text))

    def op(self, name: _Token, attributes: dict[str, object], body: Graph | None, declared: TensorType) -> Op:
        if name.text not in OPS:
            raise self.error(f"unknown op {name.text!r}", name)
        cls = OPS[name.text]
        if cls is Const:
            return self.const(name, attributes, declared)
        if cls is Input:
            attributes = {**attributes, "dtype": declared.dtype, "shape": declared.shape}
        if cls is Region:
            attributes = {**attributes, "body": body}
        elif body is not None:
            raise self.error(f"{name.text} has no body", name)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        extra = sorted(set(attributes) - set(fields))
        if extra:
            raise self.error(f"{name.text} has no attribute {extra[0]!r}", name)
        required = {f.name for f in fields.values() if f.default is dataclasses.MISSING}
        lacking = sorted(required - set(attributes)) + [n for n in ("body",) if n in required and body is None]
        if lacking:
            raise self.error(f"{name.text} lacks {lacking[0]!r}", name)
        return cls(**attributes)

    def const(self, name: _Token, attributes: dict[str, object], declared: TensorType) -> Const:
        if set(attributes) == {"sha256"}:
            digest = attributes["sha256"]
            if digest not in self.constants:
                raise self.error(f"no array is given for the constant {str(digest)[:12]}...", name)
            const = Const(self.constants[str(digest)])
            if const.digest != digest:
                raise self.error(f"the array given for the constant {str(digest)[:12]}... has another digest", name)
            return const
        if set(attributes) != {"value"} or not isinstance(attributes["value"], tuple):
            raise self.error("a const has either sha256 or value", name)
        values = attributes["value"]
        if len(values) != declared.size or not all(isinstance(v, int | float) for v in values):
            raise self.error(f"the value does not fill {declared}", name)
        array = np.array(values, dtype=declared.dtype)
        if array.dtype.kind != "f" and not np.array_equal(array, np.array(values)):
            raise self.error(f"the value does not fit {declared}", name)
        return Const(array.reshape(declared.shape))


def unquote(text: str) -> str:
    """The inverse of `text.quote`."""
    return _ESCAPE.sub(lambda m: chr(min(int(m[1][1:], 16), 0x10FFFF)) if len(m[1]) > 1 else m[1], text[1:-1])
