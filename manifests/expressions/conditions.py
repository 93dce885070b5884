"""Conditions over columns: typed expression nodes, evaluated with Arrow on whole columns.

Nulls follow SQL's three-valued logic: arithmetic with null is null, a comparison with null is unknown, ``not unknown``
is unknown, and a row is kept only if the condition is true. So a row without a score is never kept by a condition on
that score, negated or not. NaN and division by zero count as null.

Literals are compared in the precision of the column: in ``clip_score > 0.28``, 0.28 is rounded to float32, so a score
that is shown as 0.28 is not above it.
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
    """A number or text literal."""

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
    """A column by its actual name; ``shown``: the name used in the expression."""

    name: str
    shown: str
    kind: Kind

    def parts(self) -> tuple[Node, ...]:
        return ()

    def values(self, table: pa.Table) -> Values:
        column = table.column(self.name).combine_chunks()
        if pa.types.is_integer(column.type):
            return column.cast(pa.float64(), safe=False)  # integers of more than 53 bits are rounded
        if pa.types.is_floating(column.type):
            return _known(column, pc.invert(pc.is_nan(column)))
        return column


@dataclass(frozen=True)
class Arithmetic:
    """Sums and differences, or products and quotients, of numbers, as a flat left-associative chain: depth does not
    grow with the number of terms. ``rest``: pairs of operator and operand."""

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
    """Comparison of two values. ``text``, here and in the following nodes: the source text."""

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
        """Column name and number, if one is compared with the other."""
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
    """All nodes of a type in the tree of ``node``, from left to right."""
    if isinstance(node, kind):
        yield node
    for part in node.parts():
        yield from within(part, kind)


def conjuncts(condition: Condition) -> list[Condition]:
    """Conjuncts of ``condition``: the terms of an outermost ``and``, nested ones flattened; else itself."""
    if isinstance(condition, Junction) and condition.word == "and":
        return [part for term in condition.terms if isinstance(term, Condition) for part in conjuncts(term)]
    return [condition]


def holds(condition: Condition, table: pa.Table) -> Mask:
    """Mask of the rows for which ``condition`` is true."""
    mask: Mask = np.asarray(pc.fill_null(condition.values(table), False).to_numpy(zero_copy_only=False), dtype=bool)
    return mask


def _known(values: Values, where: Values) -> Values:
    """``values`` with nulls where ``where`` is false."""
    return pc.if_else(where, values, pa.scalar(None, values.type))


def _alike(left: Values, right: Values) -> tuple[Values, Values]:
    """Cast a literal to the precision of the column that it is combined with."""
    if isinstance(right, pa.Scalar) and pa.types.is_float32(left.type):
        return left, _single(right)
    if isinstance(left, pa.Scalar) and pa.types.is_float32(right.type):
        return _single(left), right
    return left, right


def _single(number: pa.Scalar) -> pa.Scalar:
    with np.errstate(over="ignore"):  # overflow: infinity, which compares correctly
        return pa.scalar(np.float32(number.as_py()))
