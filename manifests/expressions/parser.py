"""Filter expressions: ``clip_score > 0.28 and (itm_score >= 0.5 or language in ("en", "de"))``.

    condition = all {"or" all}                   all     = single {"and" single}
    single    = "not" single | sum [comparison sum | ["not"] "in" list | "is" ["not"] "null"]
    sum       = product {("+" | "-") product}    product = factor {("*" | "/") factor}
    factor    = "-" factor | number | "text" | 'text' | column | "(" condition ")"
    list      = "(" factor {"," factor} ")"

Parsed here into typed nodes (:mod:`.conditions`, which also defines null semantics); never passed to Python's
parser. Keywords are case-insensitive. Syntax errors give the position and a fix.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...errors import BadInput
from .conditions import (
    Arithmetic,
    Column,
    Comparison,
    Condition,
    Constant,
    IsNull,
    Junction,
    Kind,
    Mask,
    Membership,
    Node,
    Not,
    conjuncts,
    holds,
    within,
)

MAX_DEPTH = 50  # nesting of parentheses, negations and minus signs
_SHOWN = 60  # maximum characters of a text in a reason
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<name>[A-Za-z_]\w*)
    | (?P<sign><=|>=|==|!=|<>|&&|\|\||[-<>=!()+*/,])
    | (?P<other>\S))""",
    re.VERBOSE | re.ASCII | re.DOTALL,
)
_WORDS = ("and", "or", "not", "in", "is", "null")
_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
_MENDS = {"=": "write ==", "<>": "write !=", "&&": "write and", "||": "write or", "!": "write not"}
_MENDS |= dict.fromkeys("\"'", "a text ends with the quote it began with")
_PIECES = "an expression has columns, numbers, quoted texts, < <= > >= == != + - * /, in (…), is null, and, or, not"


class UnknownColumn(BadInput):
    """A condition, or an option, names a column that does not exist, as far as is known (exit 2)."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression. ``terms``: its conjuncts, in the order in which they are reported as reasons."""

    text: str
    terms: tuple[Condition, ...]

    @property
    def columns(self) -> tuple[Column, ...]:
        """Distinct columns that it reads."""
        by_name = {column.name: column for term in self.terms for column in within(term, Column)}
        return tuple(by_name.values())

    def failures(self, table: pa.Table) -> npt.NDArray[np.int32]:
        """For every row the index of the first term that is not true, -1 if all are."""
        failed = np.full(len(table), -1, np.int32)
        for index in reversed(range(len(self.terms))):
            failed[~holds(self.terms[index], table)] = index
        return failed

    def mask(self, table: pa.Table) -> Mask:
        """Mask of the rows for which it is true."""
        mask: Mask = self.failures(table) < 0
        return mask

    def reason(self, term: int, row: Mapping[str, Any]) -> str:
        """Reason why ``row`` fails ``term``: the term's source text and the row's values of its columns."""
        columns = {column.shown: column.name for column in within(self.terms[term], Column)}
        values = ", ".join(f"{shown} is {shown_value(row[name])}" for shown, name in columns.items())
        return f"{self.terms[term].text}: {values}"

    def bounds(self) -> list[tuple[str, float]]:
        """Columns and the numbers that they are compared with, for plots."""
        candidates = (comparison.bound() for term in self.terms for comparison in within(term, Comparison))
        return [bound for bound in candidates if bound is not None]


def parse(
    text: str, types: Mapping[str, pa.DataType], aliases: Mapping[str, str] | None = None, option: str = "--keep"
) -> Expression:
    """Parse a condition over columns of the given Arrow types. ``aliases``: further names of columns; ``option``: what
    errors call it.

    Raises UnknownColumn for a name that is neither, and BadInput, with a one-line message, for anything else.
    """
    return Expression(text, tuple(conjuncts(_Parser(text, types, aliases or {}, option).condition())))


def names_in(text: str) -> set[str]:
    """All names in a condition, whether or not there are such columns; the text need not be valid."""
    return {token.value for token in _tokens(text) if token.kind == "name"}


def shown_value(value: Any) -> str:
    """A value formatted for a reason: floats that are 32-bit ones in their shortest form, long texts truncated."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "missing"
    if isinstance(value, float):
        return str(shortest(value))
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def shortest(value: float) -> float | np.float32:
    """A finite number as a 32-bit float if it is exactly one, whose decimals are fewer; else unchanged."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return single if float(single) == value else value


def unknown_column(name: str, known: list[str]) -> str:
    """Error text for an unknown column, with suggestions."""
    close = difflib.get_close_matches(name, known, 3)
    return f"no column {name!r}; " + (f"did you mean {', '.join(close)}?" if close else f"known: {', '.join(known)}")


@dataclass(frozen=True)
class _Token:
    """A token. ``kind``: number, text, name, word (keyword), sign, other, or end."""

    kind: str
    value: str
    start: int
    end: int


def _tokens(text: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(text):
        kind = match.lastgroup or "other"
        token = _Token(kind, match[kind], *match.span(kind))
        if kind == "name" and token.value.lower() in _WORDS:
            token = replace(token, kind="word", value=token.value.lower())
        tokens.append(token)
    return [*tokens, _Token("end", "", len(text), len(text))]


class _Parser:
    """Recursive-descent parser, one method per rule of the grammar above."""

    def __init__(self, text: str, types: Mapping[str, pa.DataType], aliases: Mapping[str, str], option: str) -> None:
        self._text, self._types, self._aliases, self._option = text, types, aliases, option
        self._tokens, self._at, self._depth = _tokens(text), 0, 0

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, kind: str, *values: str) -> str | None:
        """Consume the next token and return its value if it matches, else return None."""
        token = self._next
        if token.kind != kind or (values and token.value not in values):
            return None
        self._at += 1
        return token.value

    def _fail(self, problem: str, kind: type[BadInput] = BadInput) -> NoReturn:
        shown = self._text if len(self._text) <= 200 else self._text[:199] + "…"
        raise kind(f"{self._option} {shown!r}: {problem}")

    def _unexpected(self, wanted: str = _PIECES) -> NoReturn:
        token = self._next
        if token.kind == "end":
            self._fail(f"it ends too early; {wanted}")
        self._fail(f"{token.value!r} at character {token.start + 1}: {_MENDS.get(token.value, wanted)}")

    def condition(self) -> Condition:
        """Parse the whole text."""
        node = self._condition()
        if self._next.kind != "end":
            self._unexpected()
        return self._truth(node)

    def _junction(self, word: Literal["and", "or"]) -> Node:
        part = self._single if word == "and" else lambda: self._junction("and")
        start, terms = self._at, [part()]
        while self._take("word", word):
            terms.append(part())
        if len(terms) == 1:
            return terms[0]
        return Junction(self._since(start), word, tuple(self._truth(term) for term in terms))

    def _condition(self) -> Node:
        return self._junction("or")

    def _since(self, start: int) -> str:
        """Source text from token ``start`` to the current position, on one line."""
        return " ".join(self._text[self._tokens[start].start : self._tokens[self._at - 1].end].split())

    def _truth(self, node: Node) -> Condition:
        if not isinstance(node, Condition):
            self._fail(f"{_name(node)} is no condition; compare it with something")
        return node

    def _deeper(self) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"nested more than {MAX_DEPTH} deep; write it flatter")

    def _single(self) -> Node:
        start = self._at
        if self._take("word", "not"):
            self._deeper()
            item = self._truth(self._single())
            self._depth -= 1
            return Not(self._since(start), item)
        left = self._sum()
        operator = self._take("sign", *_COMPARISONS)
        if operator:
            return self._comparison(start, operator, left)
        if self._take("word", "is"):
            return self._is_null(start, left)
        negated = self._take("word", "not") is not None
        if self._take("word", "in"):
            choices = self._choices(left)
            text = self._since(start)
            membership = Membership(text, left, choices)
            return Not(text, membership) if negated else membership
        if negated:
            self._unexpected("after a value, `not` is followed by `in`")
        return left

    def _comparison(self, start: int, operator: str, left: Node) -> Condition:
        right = self._sum()
        if self._next.kind == "sign" and self._next.value in _COMPARISONS:
            self._fail("comparisons cannot be chained; write a < b and b < c")
        for side in (left, right):
            self._value(side)
        if left.kind != right.kind:
            kinds = {"number": "a number", "text": "a text"}
            known = f"{_name(left)} is {kinds[left.kind]} and {_name(right)} is {kinds[right.kind]}"
            self._fail(f"{known}: they cannot be compared")
        if left.kind == "text" and operator not in ("==", "!="):
            self._fail(f"texts have no {operator}; compare them with ==, != or in")
        self._needs_column(left, right)
        return Comparison(self._since(start), operator, left, right)

    def _is_null(self, start: int, item: Node) -> Condition:
        negated = self._take("word", "not") is not None
        if not self._take("word", "null"):
            self._unexpected("`is` is followed by null or not null")
        if isinstance(item, Condition):
            self._fail("only a value can be null; ask it of a column")
        self._needs_column(item)
        text = self._since(start)
        return Not(text, IsNull(text, item)) if negated else IsNull(text, item)

    def _choices(self, item: Node) -> tuple[float | str, ...]:
        """Parse the list of an ``in``; all elements must have the kind of the item."""
        self._value(item)
        self._needs_column(item)
        if not self._take("sign", "("):
            self._unexpected('`in` is followed by a list, e.g. in ("en", "de")')
        choices = []
        while True:
            choice = self._factor()
            if not isinstance(choice, Constant):
                self._fail("the list of an `in` has only numbers or only texts")
            if choice.kind != item.kind:
                self._fail(f"{_name(item)} cannot be {_name(choice)}: one is a number, the other a text")
            choices.append(choice.value)
            if not self._take("sign", ","):
                break
        if not self._take("sign", ")"):
            self._unexpected("the list of an `in` ends with )")
        return tuple(choices)

    def _value(self, node: Node) -> None:
        if node.kind == "list":
            self._fail(f"{_name(node)} is a list; it can only be asked for null")
        if isinstance(node, Condition):
            self._fail(f"({node.text}) is a condition, not a value; join conditions with and, or")

    def _needs_column(self, *nodes: Node) -> None:
        if not any(True for node in nodes for _ in within(node, Column)):
            self._fail("a comparison without a column is the same for every row; name a column in it")

    def _sum(self) -> Node:
        return self._chain(("+", "-"), lambda: self._chain(("*", "/"), self._factor))

    def _chain(self, operators: tuple[str, ...], part: Callable[[], Node]) -> Node:
        """Parse operands joined by these operators; leading constants are folded."""
        first, rest = part(), list[tuple[str, Node]]()
        while operator := self._take("sign", *operators):
            operand = part()
            for side in (operand,) if rest else (first, operand):
                self._number(operator, side)
            if not rest and isinstance(first, Constant) and isinstance(operand, Constant):
                first = self._folded(operator, first, operand)
            else:
                rest.append((operator, operand))
        return Arithmetic(first, tuple(rest)) if rest else first

    def _number(self, operator: str, node: Node) -> None:
        self._value(node)
        if node.kind != "number":
            self._fail(f"{_name(node)} is a text; {operator} takes numbers")

    def _folded(self, operator: str, left: Constant, right: Constant) -> Constant:
        value = Arithmetic(left, ((operator, right),)).values(pa.table({})).as_py()
        if value is None:
            self._fail(f"{_name(left)} {operator} {_name(right)} is no number")
        return Constant(value)

    def _factor(self) -> Node:
        if self._take("sign", "-"):
            self._deeper()
            node = self._factor()
            self._depth -= 1
            self._number("-", node)
            minus = Constant(-1.0)
            return self._folded("*", minus, node) if isinstance(node, Constant) else Arithmetic(minus, (("*", node),))
        if self._take("sign", "("):
            self._deeper()
            node = self._condition()
            if not self._take("sign", ")"):
                self._unexpected("a ) is missing")
            self._depth -= 1
            return node
        if number := self._take("number"):
            if not math.isfinite(float(number)):
                self._fail(f"{number} is too large a number")
            return Constant(float(number))
        if text := self._take("text"):
            return Constant(re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL))
        if name := self._take("name"):
            return self._column(name)
        self._unexpected()

    def _column(self, name: str) -> Column:
        if self._next.value == "(" and self._next.kind == "sign":
            self._fail(f"{name}(…) is a call, and nothing can be called here; {_PIECES}")
        column = self._aliases.get(name, name)
        if column not in self._types:
            self._fail(unknown_column(name, [*self._aliases, *self._types]), UnknownColumn)
        return Column(column, name, kind_of(self._types[column]))


def kind_of(type_: pa.DataType) -> Kind:
    """Kind of values of an Arrow type, which decides the permitted operations."""
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    return "text" if pa.types.is_string(type_) else "list"


def _name(node: Node) -> str:
    if isinstance(node, Column):
        return node.shown
    if isinstance(node, Constant):
        return repr(node.value) if isinstance(node.value, str) else f"{node.value:g}"
    return f"({node.text})" if isinstance(node, Condition) else "the result of + - * /"
