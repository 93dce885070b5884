"""Error isolation by bisection: a failing batch is halved down to the item at fault, so other items still succeed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

OF_DEVICES = (torch.AcceleratorError, torch.OutOfMemoryError, MemoryError)  # not caused by a single item
Item = TypeVar("Item")
Result = TypeVar("Result")


def by_halves(
    items: Sequence[Item],
    compute: Callable[[Sequence[Item]], Sequence[Result]],
    shared: tuple[type[Exception], ...] = (),
) -> list[Result | Exception]:
    """Results of ``compute`` for ``items``, in order; where it raises on a single one, that error in its position.

    ``shared``: errors that no item causes, such as :data:`OF_DEVICES`; raised as they are.
    """
    if not items:
        return []
    try:
        return [*compute(items)]
    except shared:
        raise
    except Exception as error:
        # Drop the traceback: it holds the batch's tensors, whose memory the halves may need.
        failure = error.with_traceback(None)
        failure.__context__ = failure.__cause__ = None
    if len(items) == 1:
        return [failure]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = len(items) // 2
    return by_halves(items[:middle], compute, shared) + by_halves(items[middle:], compute, shared)
