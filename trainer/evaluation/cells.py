"""Tables as plain text, and how figures are written in their cells."""

from __future__ import annotations

from dataclasses import dataclass

from .bootstrap import Estimate

NONE = "–"  # shown for a figure without data


@dataclass(frozen=True)
class Grid:
    """A table as plain text: a name and figures, or ``words``, per row. ``note``: explanation of the columns."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: bool = False  # left-aligned cells


def percent(estimate: Estimate, interval: bool = True, sign: str = "") -> str:
    """A share in per cent, with its interval in brackets. ``sign``: "+" to write the sign of positive ones."""
    if estimate.value is None:
        return NONE
    value = f"{100 * estimate.value:{sign}.1f}"
    if not interval:
        return value
    if estimate.low is None or estimate.high is None:
        return f"{value} ({NONE})"
    return f"{value} ({100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f})"


def with_interval(estimate: Estimate, digits: int) -> str:
    """A figure with its interval in brackets, where it has one."""
    if estimate.low is None or estimate.high is None:
        return number(estimate.value, digits)
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}, {estimate.high:.{digits}f})"


def share(value: float | None) -> str:
    """A share in per cent."""
    return NONE if value is None else f"{100 * value:.1f}"


def number(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return NONE if value is None else f"{value:.{digits}f}"
