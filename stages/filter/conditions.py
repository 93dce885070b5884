"""Conditions over columns: typed nodes that are computed with Arrow, whole columns at a time.

Nulls are SQL's: whatever is computed from a null is null, a comparison with one is unknown, ``not unknown`` is unknown,
and only what is known to hold holds. So a row without a score is never kept by a condition on that score, negated or
not. NaN, and what a division by zero gives, counts as null.

Numbers are compared in the precision of the column beside them: in ``clip_score > 0.28``, 0.28 is the float32 next to
it, so a score that is shown as 0.28 is not above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Kind = Literal["number", "text", "list", "truth"]
Mask = npt.NDArray[np.bool_]
Values = Any  # a pyarrow Array, or a Scalar for a literal

_COMPARE = {
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "==": pc.equal,
    "!=": pc.not_equal,
}
_COMPUTE = {"+": pc.add, "-": pc.subtract, "*": pc.multiply, "/": pc.divide}


@dataclass(frozen=True)
class Constant:
    """A number or a text."""

    value: float | str

    @property
    def kind(self) -> Kind:
        return "text" if isinstance(self.value, str) else "number"

    def parts(self) -> tuple[Node, ...]:
        return ()

    def values(self, table: pa.Table) -> Values:
        return pa.scalar(self.value)


@dataclass(frozen=True)
class Column:
    """A column under its own name; ``shown`` is the name it was asked for by."""

    name: str
    shown: str
    kind: Kind

    def parts(self) -> tuple[Node, ...]:
        return ()

    def values(self, table: pa.Table) -> Values:
        column = table.column(self.name).combine_chunks()
        if pa.types.is_integer(column.type):
            return column.cast(pa.float64())
        if pa.types.is_floating(column.type):
            return _known(column, pc.invert(pc.is_nan(column)))
        return column


@dataclass(frozen=True)
class Arithmetic:
    """Sums and differences, or products and quotients, of numbers, from left to right: a thousand terms are no deeper
    than two. ``rest``: each further operand behind its operator."""

    first: Node
    rest: tuple[tuple[str, Node], ...]
    kind: Kind = "number"

    def parts(self) -> tuple[Node, ...]:
        return (self.first, *(operand for _, operand in self.rest))

    def values(self, table: pa.Table) -> Values:
        result = self.first.values(table)
        for operator, operand in self.rest:
            result = _COMPUTE[operator](*_alike(result, operand.values(table)))
            result = _known(result, pc.is_finite(result))
        return result


@dataclass(frozen=True)
class Comparison:
    """``text`` of this and the following nodes: how it was written."""

    text: str
    operator: str
    left: Node
    right: Node
    kind: Kind = "truth"

    def parts(self) -> tuple[Node, ...]:
        return (self.left, self.right)

    def values(self, table: pa.Table) -> Values:
        return _COMPARE[self.operator](*_alike(self.left.values(table), self.right.values(table)))

    def bound(self) -> tuple[str, float] | None:
        """The column and the number where one is held against the other."""
        for one, other in ((self.left, self.right), (self.right, self.left)):
            if isinstance(one, Column) and isinstance(other, Constant) and isinstance(other.value, float):
                return one.name, other.value
        return None


@dataclass(frozen=True)
class Membership:
    text: str
    item: Node
    choices: tuple[float | str, ...]
    kind: Kind = "truth"

    def parts(self) -> tuple[Node, ...]:
        return (self.item,)

    def values(self, table: pa.Table) -> Values:
        item = self.item.values(table)
        return _known(pc.is_in(item, value_set=pa.array(list(self.choices), item.type)), pc.is_valid(item))


@dataclass(frozen=True)
class IsNull:
    text: str
    item: Node
    kind: Kind = "truth"

    def parts(self) -> tuple[Node, ...]:
        return (self.item,)

    def values(self, table: pa.Table) -> Values:
        return pc.is_null(self.item.values(table))


@dataclass(frozen=True)
class Not:
    text: str
    item: Node
    kind: Kind = "truth"

    def parts(self) -> tuple[Node, ...]:
        return (self.item,)

    def values(self, table: pa.Table) -> Values:
        return pc.invert(self.item.values(table))


@dataclass(frozen=True)
class Junction:
    """Terms joined by ``and``, or by ``or``."""

    text: str
    word: Literal["and", "or"]
    terms: tuple[Node, ...]
    kind: Kind = "truth"

    def parts(self) -> tuple[Node, ...]:
        return self.terms

    def values(self, table: pa.Table) -> Values:
        join = pc.and_kleene if self.word == "and" else pc.or_kleene
        result = self.terms[0].values(table)
        for term in self.terms[1:]:
            result = join(result, term.values(table))
        return result


Condition = Comparison | Membership | IsNull | Not | Junction
Node = Constant | Column | Arithmetic | Condition
Found = TypeVar("Found", bound=Node)


def within(node: Node, kind: type[Found]) -> Iterator[Found]:
    """The node and all below it that are of a kind, from left to right."""
    if isinstance(node, kind):
        yield node
    for part in node.parts():
        yield from within(part, kind)


def conjuncts(condition: Condition) -> list[Condition]:
    """What must hold for ``condition`` to hold, one by one: the terms of an outermost ``and``, else itself."""
    if isinstance(condition, Junction) and condition.word == "and":
        return [each for term in condition.terms if isinstance(term, Condition) for each in conjuncts(term)]
    return [condition]


def holds(condition: Condition, table: pa.Table) -> Mask:
    """Where ``condition`` is known to hold: a boolean for every row."""
    mask: Mask = np.asarray(pc.fill_null(condition.values(table), False).to_numpy(zero_copy_only=False), dtype=bool)
    return mask


def _known(values: Values, where: Values) -> Values:
    """``values`` with nulls where ``where`` is false."""
    return pc.if_else(where, values, pa.scalar(None, values.type))


def _alike(left: Values, right: Values) -> tuple[Values, Values]:
    """A literal in the precision of the column beside it."""
    if isinstance(right, pa.Scalar) and pa.types.is_float32(left.type):
        return left, _single(right)
    if isinstance(left, pa.Scalar) and pa.types.is_float32(right.type):
        return _single(left), right
    return left, right


def _single(number: pa.Scalar) -> pa.Scalar:
    with np.errstate(over="ignore"):  # beyond every float32: infinite, which compares as it should
        return pa.scalar(np.float32(number.as_py()))
