"""A few of many items, for what need not look at all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def sampled(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` items, evenly spaced, including the first."""
    if len(items) <= count:
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]
